"""Sample from a checkpoint: ``python sample.py --ckpt RUN --steps 250``; ``--help`` lists the flags."""

from sit.sampling.cli import main

if __name__ == "__main__":
    main()
