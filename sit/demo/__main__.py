"""``python -m sit.demo``: a page to play with trained networks."""

from sit.demo.cli import main

if __name__ == "__main__":
    main()
