"""Train a SiT: ``accelerate launch train.py --mixer atconv``; ``--help`` lists the flags."""

from sit.train import main

if __name__ == "__main__":
    main()
