"""``python -m sit.compare``: evaluate runs side by side."""

from sit.compare.compare import main

if __name__ == "__main__":
    main()
