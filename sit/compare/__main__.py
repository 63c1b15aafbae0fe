"""``python -m sit.compare``: evaluate runs side by side."""

from sit.compare.cli import main

if __name__ == "__main__":
    main()
