"""``python -m sit.train`` and ``sit-train``, which are ``python train.py`` from any folder."""

from sit.utils.signals import TRAINING, ended_by_signals


def main() -> None:
    """The command, from its first line on."""
    with ended_by_signals(TRAINING, "the checkpoints are as they were; start again with --resume auto to go on"):
        from sit.training.cli import main as command  # takes a moment, in which signals may come

        command()


if __name__ == "__main__":
    main()
