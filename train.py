"""Train a SiT: ``accelerate launch train.py --mixer atconv``; ``python train.py --help`` lists the flags."""

from __future__ import annotations

import sys

from sit.config import parse_train_arguments
from sit.errors import door


@door
def main() -> None:
    arguments = parse_train_arguments(sys.argv[1:])
    config = arguments.config

    # the heavy imports come after the flags are understood
    if arguments.dry_run:
        from sit.plan import plan

        print(plan(config, arguments.gpus, arguments.images_per_second))
        return

    from sit.training import train

    folder, is_main_process = train(config)
    if is_main_process:
        reference = config.data if config.data.startswith("digits") else "REFERENCE"
        print(f"run: {folder}")
        print(f"sample:   python sample.py --ckpt {folder} --steps 250")
        print(f"evaluate: python eval_fid.py --ckpt {folder} --reference {reference}")


if __name__ == "__main__":
    main()
