"""``python -m sit.train_classifier``: train a classifier to evaluate with."""

from __future__ import annotations

from sit.metrics.arguments import ClassifierArguments
from sit.utils.cli import parse
from sit.utils.errors import entry_point


@entry_point
def main() -> None:
    arguments = parse(ClassifierArguments, "python -m sit.train_classifier")
    from sit.metrics.train_classifier import train  # the heavy imports come once the flags are parsed

    arguments.threads.use()
    train(arguments)


if __name__ == "__main__":
    main()
