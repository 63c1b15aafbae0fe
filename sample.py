"""Sample from a checkpoint: ``python sample.py --ckpt RUN --steps 250``; ``--help`` lists the flags."""

from sit.sample import main

if __name__ == "__main__":
    main()
