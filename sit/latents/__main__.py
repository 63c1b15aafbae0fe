"""``python -m sit.latents``: encode a data set into a latent cache, or verify one."""

from sit.latents.encode import main

if __name__ == "__main__":
    main()
