"""The study of ``experiments/fashion-pixels-gpu.yaml``, in the time that is left, by ``python -m sit.study``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from gpu_parts.pieces import ROOT, Figures, Part, Piece
from sit.utils.errors import UserError
from sit.utils.signals import REQUEUE_EXIT

FILE = ROOT / "experiments" / "fashion-pixels-gpu.yaml"
TINY = """
recipe: digits
settings: {model: SiT-XS/8, data: "digits:heldout", vae: "none:channels=1", heldout: 0.1, heldout_images: 8, steps: 2,
           batch_size: 4, warmup_steps: 0, log_every: 1, cpu_threads: 1}
variants:
  - {name: attention, mixer: attention}
  - {name: ATConv, mixer: atconv}
seeds: [0]
"""
AROUND = 45.0
"""seconds in which the program starts, and in the end the run that goes on saves itself and the report is written"""


def go_on(out: Path, tiny: bool, left: float) -> Figures | None:
    """Go on with the study for ``left`` seconds; None if something is left of it.

    Raises:
        UserError: it can't be done, as where its data or classifiers are missing; in the words of the study.
    """
    file = FILE
    if tiny:
        file = out / "tiny-study.yaml"
        out.mkdir(parents=True, exist_ok=True)
        file.write_text(TINY)
    hours = max(1.0, left - AROUND) / 3600
    command = [sys.executable, "-m", "sit.study", str(file), "--jobs", "0", "--hours", f"{hours:.5f}",
               "--out", str(out / "study")]  # fmt: skip
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if ended.returncode == REQUEUE_EXIT:
        return None
    if ended.returncode:
        said = [line.strip() for line in ended.stderr.splitlines() if line.strip()]
        raise UserError(f"the study stopped: {said[-1].removeprefix('error: ') if said else ended.returncode}")
    return {"passed": None, "report": str(Path("study", "report", "README.md"))}


def part(out: Path, tiny: bool) -> Part:
    """One piece, which goes on from call to call."""
    out = out.resolve()
    pieces = [Piece("study", 20 if tiny else 120, lambda done, left: go_on(out, tiny, left), goes_on=True)]
    return Part("study", pieces, ("experiments/gpu_parts/study.py",), {"tiny": tiny})
