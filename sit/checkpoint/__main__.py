"""``python -m sit.checkpoint``: say what a checkpoint is, or convert it."""

from sit.checkpoint.cli import main

if __name__ == "__main__":
    main()
