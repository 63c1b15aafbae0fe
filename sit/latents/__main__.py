"""``python -m sit.latents``: encode a data set into a latent cache, or verify one."""

from sit.utils.signals import PLAIN, ended_by_signals

if __name__ == "__main__":
    with ended_by_signals(PLAIN, "what is encoded is kept; start again to go on"):
        from sit.latents.cli import main  # takes a moment, in which signals may come

        main()
