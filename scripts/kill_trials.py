"""Kill programs at random file operations, start them again, and compare the end with that of undisturbed ones.

    OMP_NUM_THREADS=1 python scripts/kill_trials.py --json docs/reliability-kills.json

Training, encoding, evaluation and sampling run in forked processes, small but as their commands run them. Each is run
once undisturbed, which counts the operations on files that it opens for writing, makes, renames or removes. A trial
kills it (SIGKILL) before one of them, drawn at random, or up to 20 ms later, in the middle of a write; and starts it
again without a kill. Then its folder must hold the same files with the same bytes, and nothing else. Of
``optimizer.pt`` every tensor's bytes and every number are compared, as its pickle says the same in different ways; of
``metrics.jsonl`` all but the speed; of ``samples.npz`` the arrays, as a zip has dates. Exits with 1 if a
folder does not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from sit.latents.encode import Encode, encode
from sit.metrics import extraction
from sit.metrics import run as evaluation
from sit.sampling import run as sampling
from sit.sampling.config import SamplerConfig
from sit.training.config import TrainConfig
from sit.training.recipes import load_recipe
from sit.training.trainer import train
from sit.utils.cli import one_line_errors
from sit.utils.errors import UserError, entry_point
from sit.utils.record import write_record

LIMIT = 300
"""seconds after which a process counts as hanging"""

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
EVENTS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod", "os.link")


@dataclass
class Arguments:
    """Kill and start again."""

    training: int = 50
    """SIGKILLs of each"""
    encoding: int = 20
    evaluation: int = 20
    sampling: int = 20
    seed: int = 0
    """of the moments"""
    json: str | None = None
    """a file for the counts"""

    def __post_init__(self) -> None:
        for name in PROGRAMS:
            if getattr(self, name) < 0:
                raise UserError(f"`{name}` must be at least 0, not {getattr(self, name)}")


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


def count_operations(folder: Path, kill_at: int | None, delay: float) -> list[int]:
    """Count, in a list's only item, this process's operations on ``folder``; kill it at one of them, or soon after."""
    count = [0]
    inside = os.path.realpath(folder) + os.sep

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if not isinstance(flags, int) or not flags & WRITES:
                return
        elif event in EVENTS:
            path = arguments[0]
        else:
            return
        if not isinstance(path, (str, bytes, os.PathLike)) or not os.path.abspath(os.fsdecode(path)).startswith(inside):
            return
        count[0] += 1
        if count[0] == kill_at:
            if not delay:
                os.kill(os.getpid(), signal.SIGKILL)
            threading.Thread(target=kill_later, args=(delay,), daemon=True).start()

    sys.addaudithook(hook)
    return count


def kill_later(delay: float) -> None:
    time.sleep(delay)
    os.kill(os.getpid(), signal.SIGKILL)


def run_forked(
    program: Callable[[Path], None], folder: Path, checkpoint: Path, kill_at: int | None = None, delay: float = 0.0
) -> int | None:
    """Run a program in a process of its own with ``folder`` as its current one.

    Returns:
        How many operations on files it did; None if it was killed.

    Raises:
        UserError: it failed or hung; its output is at the end of the message.
    """
    folder.mkdir(exist_ok=True)
    said, told = folder.with_suffix(".txt"), folder.with_suffix(".count")
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException), open(said, "w") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            signal.alarm(LIMIT)
            os.chdir(folder)
            count = count_operations(folder, kill_at, delay)
            try:
                program(checkpoint)
                told.write_text(str(count[0]))
                os._exit(0)
            except BaseException:
                import traceback

                traceback.print_exc()
        os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL and kill_at is not None:
        return None
    if status:
        raise UserError(f"{program.__name__} ended with {status}: {said.read_text()[-2000:]}")
    return int(told.read_text())


def contents(folder: Path) -> dict[str, Any]:
    """What each file says by its path, hidden ones and empty folders included: bytes, but for :data:`READERS`."""
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
    del index["checksum"], index["files"]["training/optimizer.pt"]
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


def try_kills(name: str, kills: int, place: Path, checkpoint: Path, chance: random.Random) -> dict[str, Any]:
    """All trials of one program; what came out, and where it differed."""
    program = PROGRAMS[name]
    operations = run_forked(program, place / f"{name}-whole", checkpoint)
    expected = contents(place / f"{name}-whole")
    killed, different = 0, []
    for trial in range(kills):
        kill_at, delay = chance.randint(1, operations), chance.choice([0.0, chance.uniform(0, 0.02)])
        folder = place / f"{name}-{trial}"
        killed += run_forked(program, folder, checkpoint, kill_at, delay) is None
        run_forked(program, folder, checkpoint)
        found = contents(folder)
        if found != expected:
            names = [path for path in sorted(found.keys() | expected.keys()) if found.get(path) != expected.get(path)]
            different.append({"operation": kill_at, "delay": delay, "files": names})
        shutil.rmtree(folder)
    return {"operations": operations, "kills": kills, "met": killed, "different": different}


def run(arguments: Arguments, place: Path) -> dict[str, dict[str, Any]]:
    """All trials of all programs, printed as they end."""
    run_forked(make_checkpoint, place / "made", Path())
    checkpoint, results = place / "made" / "run", {}
    chance = random.Random(arguments.seed)
    for name in PROGRAMS:
        if kills := getattr(arguments, name):
            results[name] = try_kills(name, kills, place, checkpoint, chance)
            told = {key: value if key != "different" else len(value) for key, value in results[name].items()}
            print(f"{name}: {told}", flush=True)
            for trial in results[name]["different"]:
                print(f"  {trial}", flush=True)
    return results


@entry_point
def main() -> None:
    with one_line_errors():
        arguments = tyro.cli(Arguments, prog="scripts/kill_trials.py")
    with tempfile.TemporaryDirectory() as place:
        results = run(arguments, Path(place))
    if arguments.json:
        write_record(arguments.json, "cpu", {"trials": results})
    sys.exit(any(result["different"] for result in results.values()))


if __name__ == "__main__":
    main()
