"""``python -m sit.sample`` and ``sit-sample``, which are ``python sample.py`` from any folder."""

from sit.utils.signals import PLAIN, ended_by_signals


def main() -> None:
    """The command, from its first line on."""
    with ended_by_signals(PLAIN, "no images are kept of what was begun"):
        from sit.sampling.cli import main as command  # takes a moment, in which signals may come

        command()


if __name__ == "__main__":
    main()
