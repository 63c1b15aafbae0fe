"""How this program was started, so that its help and messages name its siblings in the same way."""

from __future__ import annotations

import sys
from pathlib import Path

NAMES = {
    "train": ("python train.py", "python -m sit.train", "sit-train"),
    "sample": ("python sample.py", "python -m sit.sample", "sit-sample"),
    "eval_fid": ("python eval_fid.py", "python -m sit.eval", "sit-eval"),
}
"""each as a file of a clone, as a module, and as what is installed"""


def program(name: str) -> str:
    """The command that starts ``name``, one of :data:`NAMES`, as the program that asks was started."""
    started = Path(sys.argv[0])
    if started.name.startswith("sit-"):
        return NAMES[name][2]
    package = Path(__file__).resolve().parents[1]
    return NAMES[name][package in started.resolve().parents]
