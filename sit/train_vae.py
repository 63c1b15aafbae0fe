"""``python -m sit.train_vae``: train a small VAE."""

from __future__ import annotations

from sit.latents.arguments import VAEArguments
from sit.utils.cli import parse
from sit.utils.errors import entry_point


@entry_point
def main() -> None:
    arguments = parse(VAEArguments, "python -m sit.train_vae")
    from sit.latents.train_vae import train  # the heavy imports come once the flags are parsed

    arguments.threads.use()
    train(arguments)


if __name__ == "__main__":
    main()
