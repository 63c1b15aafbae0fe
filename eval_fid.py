"""Evaluate samples against a reference: ``python eval_fid.py --ckpt RUN --reference digits``."""

from sit.eval import main

if __name__ == "__main__":
    main()
