"""``python -m sit.eval`` and ``sit-eval``, which are ``python eval_fid.py`` from any folder."""

from sit.utils.signals import PLAIN, ended_by_signals


def main() -> None:
    """The command, from its first line on."""
    with ended_by_signals(PLAIN, "what is in --work-dir is kept; start again to go on"):
        from sit.metrics.cli import main as command  # takes a moment, in which signals may come

        command()


if __name__ == "__main__":
    main()
