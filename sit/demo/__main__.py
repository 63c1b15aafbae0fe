"""``python -m sit.demo``: a page to play with trained networks."""

from sit.demo.page import run

if __name__ == "__main__":
    run()
