"""Training, encoding, evaluation and sampling at their smallest, and what a folder holds when they are through.

Each works in the current folder, as its command does, with nothing on the command line.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sit.latents.encode import Encode, encode
from sit.metrics import extraction
from sit.metrics import run as evaluation
from sit.sampling import run as sampling
from sit.sampling.config import SamplerConfig
from sit.training.config import TrainConfig
from sit.training.recipes import load_recipe
from sit.training.trainer import train


def run_training(_checkpoint: Path) -> None:
    train(
        dataclasses.replace(
            load_recipe("digits"), data="digits:heldout", model="SiT-XS/8", mixer="attention", steps=6, batch_size=4,
            log_every=1, preview_every=3, preview_steps=2, checkpoint_every=2, keep_last=1, keep_every=4, trackers=(),
            cpu_threads=1, output_dir="out", resume="auto",
        )
    )  # fmt: skip


def run_encoding(_checkpoint: Path) -> None:
    encode(Encode(Path("out"), "digits:heldout", image_size=32, batch_size=30, chunk=60, shard_size=100, workers=0))


def run_evaluation(checkpoint: Path) -> None:
    extraction.CHUNK = 8  # images between two files
    evaluation.evaluate_samples(
        evaluation.Arguments(
            "digits:heldout", ckpt=str(checkpoint), num_samples=40, batch_size=8, work_dir="work", json="report.json",
            device="cpu", sampler=SamplerConfig(steps=2),
        )
    )  # fmt: skip


def run_sampling(checkpoint: Path) -> None:
    if not Path("out").exists():  # else it was killed when all was done, and says so
        sampling.sample(
            sampling.Arguments(
                str(checkpoint), out="out", num_samples=12, device="cpu", batch_size=4, sampler=SamplerConfig(steps=2)
            )
        )


PROGRAMS: dict[str, Callable[[Path], None]] = {
    "training": run_training,
    "encoding": run_encoding,
    "evaluation": run_evaluation,
    "sampling": run_sampling,
}


def make_checkpoint(_: Path) -> None:
    config = TrainConfig(
        data="digits:heldout", model="SiT-XS/8", steps=1, batch_size=4, preview_every=0, trackers=(), cpu_threads=1,
        output_dir="run",
    )  # fmt: skip
    train(config)


def contents(folder: Path) -> dict[str, Any]:
    """What each file says by its path, hidden ones and empty folders included: bytes, but for :data:`READERS`.

    Of ``optimizer.pt`` it is every tensor's bytes and every number, as its pickle says the same in different ways; of
    ``metrics.jsonl`` all but the speed; of ``samples.npz`` the arrays, as a zip has dates.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        read = READERS.get(path.name, Path.read_bytes)
        found[path.relative_to(folder).as_posix()] = read(path) if path.is_file() else None
    return found


def rows_without_speed(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: row[key] for key in row if not key.endswith("per_second")} for row in rows]


def index_without_optimizer(path: Path) -> dict[str, Any]:
    index = json.loads(path.read_text())
    del index["checksum"]
    index["files"].pop("training/optimizer.pt", None)
    return index


def optimizer_state(path: Path) -> dict[str, bytes | object]:
    """Every tensor as bytes, and every plain value, by name."""
    flat: dict[str, bytes | object] = {}

    def walk(name: str, value: object) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{name}/{key}", inner)
        elif isinstance(value, (list, tuple)):
            walk(name, dict(enumerate(value)))
        else:
            flat[name] = value.numpy().tobytes() if isinstance(value, torch.Tensor) else value

    walk("", torch.load(path, weights_only=True))
    return flat


def arrays(path: Path) -> dict[str, bytes]:
    with np.load(path) as archive:
        return {name: archive[name].tobytes() for name in archive}


READERS: dict[str, Callable[[Path], Any]] = {
    "metrics.jsonl": rows_without_speed,
    "sit.json": index_without_optimizer,
    "optimizer.pt": optimizer_state,
    "samples.npz": arrays,
}
