"""``python -m sit.train_classifier``: train a classifier to evaluate with."""

from sit.metrics.train_classifier import run

if __name__ == "__main__":
    run()
