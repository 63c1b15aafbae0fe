"""``python -m sit.train_classifier``: train a classifier to evaluate with."""

from sit.metrics.train_classifier import main

if __name__ == "__main__":
    main()
