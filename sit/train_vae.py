"""``python -m sit.train_vae``: train a small VAE."""

from sit.latents.train_vae import run

if __name__ == "__main__":
    run()
