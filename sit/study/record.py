"""A run's small JSON: what the report needs of it, read from the training's folder once it is done."""

from __future__ import annotations

import dataclasses
import json
import platform
import statistics
from importlib.metadata import version
from pathlib import Path
from typing import Any

import accelerate
import torch

from sit.data.torchvision import TORCHVISION
from sit.sampling.config import guided_channels
from sit.study.config import Study
from sit.study.runs import Run
from sit.training.identity import read_identity
from sit.training.recipes import from_mapping, load_run_settings
from sit.training.run_folder import read_metrics
from sit.utils.errors import UserError
from sit.utils.files import atomic_write
from sit.utils.json_text import json_text
from sit.utils.record import record
from sit.version import __version__

FORMAT = 1
PARTS = {"config": dict, "heldout": dict | None, "evaluation": dict | None, "speed": dict, "machine": str}
"""What every JSON has, and its kind."""
HOW_IT_RUNS = {
    "output_dir", "resume", "trackers", "log_every", "preview_every", "preview_steps", "preview_cfg_scale",
    "checkpoint_every", "keep_last", "keep_every", "cpu_threads", "workers", "tf32", "compile",
    "gradient_checkpointing", "gradient_accumulation", "non_finite_limit", "heldout_every",
    "project", "eval_every", "eval_samples", "eval_reference", "repa_images",
}  # fmt: skip
"""Fields of TrainConfig in which runs of one study may differ: where, how and how closely watched they were made."""
HOW_IT_IS_EVALUATED = {"every", "batch_size", "guidance", "ema", "autoguidance", "guide_step"}
"""The same of Evaluation's."""
PLACES = ("data", "vae", "heldout", "reference", "features", "classifier", "inception_weights", "dinov2_weights")
"""Settings that name a place, which may be another on another machine: see :func:`without_folders`."""


def check_begun(run: Run, study: Study) -> None:
    """Raise UserError if the run's training was begun with settings that the study does not say any more."""
    folder = run.training(study)
    if (folder / "config.yaml").is_file():
        begun, wanted = (dataclasses.asdict(config) for config in (load_run_settings(folder), run.config))
        _check_same(folder, "begun", begun, {name: wanted[name] for name in sorted(wanted.keys() - HOW_IT_RUNS)})


def describe_training(run: Run, study: Study, device: torch.device, failed: str | None = None) -> dict[str, Any]:
    """The JSON of a run whose training is finished, without an evaluation yet; ``failed`` says why it ended early."""
    folder = run.training(study)
    rows = read_metrics(folder / "metrics.jsonl")
    losses = [row for row in rows if row.get("loss") is not None]
    return {
        "format": FORMAT,
        **_which(run, study),
        "config": {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(run.config).items()},
        "loss": [[row["step"], _rounded(row["loss"])] for row in losses],
        "heldout": _heldout(folder, rows),
        "speed": speed(losses),
        "trained_on": _trained_on(folder),
        "evaluation": None,
        **({"failed": failed} if failed else {}),
        "versions": {
            "sit": __version__,
            "torch": torch.__version__,
            "accelerate": accelerate.__version__,
            "diffusers": version("diffusers"),
            "numpy": version("numpy"),
            "python": platform.python_version(),
        },
        **record(device),
    }


def _which(run: Run, study: Study) -> dict[str, Any]:
    """Which run of the study it is."""
    choice = None if study.select is None or run.choice is None else study.select.choices[run.choice]
    return {"name": run.name, "variant": run.variant, "cause": run.cause, "seed": run.seed, "choice": choice}


def speed(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Seconds of a step: the median over the rows, which work beside it hardly moves, and each row's."""
    paces = [[row["step"], _rounded(1 / row["steps_per_second"])] for row in rows if row.get("steps_per_second")]
    return {"seconds_per_step": statistics.median(pace for _, pace in paces) if paces else None, "rows": paces}


def _heldout(folder: Path, rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Held-out losses: means at every measurement, and those of each image at the last; None if there are none."""
    curve = [row for row in rows if "heldout_loss" in row]
    files = sorted((folder / "heldout").glob("step-*.json"))
    if not curve or not files:
        return None
    last = json.loads(files[-1].read_text())
    by_time = [name for name in curve[-1] if name.startswith("heldout_loss_t")]
    return {
        "steps": [row["step"] for row in curve],
        "loss": [_rounded(row["heldout_loss"], 7) for row in curve],
        "by_time": [[_rounded(row[name], 7) for name in by_time] for row in curve],
        "times": last["times"],
        "images": last["images"],
        "step": last["step"],
        "per_image": [[_rounded(value) for value in row] for row in last["loss"]],
    }


def _trained_on(folder: Path) -> dict[str, str] | None:
    """Hashes of the training images and the VAE; None if the run's folder doesn't tell."""
    identity = read_identity(folder)
    return None if identity is None else {"images": identity.images, "vae": identity.vae}


def _rounded(value: float, digits: int = 5) -> float:
    return float(f"{value:.{digits}g}")


def write(path: Path, found: dict[str, Any]) -> None:
    """Write a run's JSON whole: a line for each of its entries, so that it is small and can be looked at."""
    lines = [f"{json.dumps(name)}: {json_text(value)}" for name, value in found.items()]
    with atomic_write(path) as temporary:
        temporary.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def read(run: Run, study: Study) -> dict[str, Any] | None:
    """A run's JSON; None if there is none.

    Which run it is, the study says: the variant may have been renamed since, as far as its files keep their names.

    Raises:
        UserError: it can't be read, or is of a run with other settings.
    """
    path = run.json(study)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        settings = found["config"]
        if found["format"] != FORMAT:
            raise ValueError(f"format {found['format']!r} and not {FORMAT}")
        for name, kinds in PARTS.items():
            if not isinstance(found[name], kinds):
                raise TypeError(f"{name} of type {type(found[name]).__name__}")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a run's JSON ({error!r}); remove it, and the run is made again") from error
    made, wanted = dataclasses.asdict(from_mapping(settings, str(path))), dataclasses.asdict(run.config)
    _check_same(path, "made", made, {name: wanted[name] for name in sorted(wanted.keys() - HOW_IT_RUNS)})
    if study.evaluate is not None and found["evaluation"] is not None:
        wanted = json.loads(json.dumps(dataclasses.asdict(study.evaluate)))
        wanted = {name: wanted[name] for name in sorted(wanted.keys() - HOW_IT_IS_EVALUATED)}
        channels = _guided_latents(found["evaluation"])
        evaluated, wanted = (_by_guided_channels(one, channels) for one in (found["evaluation"]["settings"], wanted))
        _check_same(path, "evaluated", evaluated, wanted)
    return found | _which(run, study)


def _guided_latents(evaluation: dict[str, Any]) -> int | None:
    """The channels of the latents that an evaluation guided, 4 if it doesn't say; None if it guided nothing."""
    usual = evaluation["settings"].get("sampler") or {}
    if usual.get("cfg_scale", 1) == 1 and not any("guidance" in name for name in evaluation.get("others", {})):
        return None
    return evaluation.get("latent_channels", 4)


def _by_guided_channels(settings: dict[str, Any], channels: int | None) -> dict[str, Any]:
    """An evaluation's settings with how many of the latents' channels were guided, whatever it was said by.

    So the three channels of before are today's default of latents of 4, and another thing than that of 16.
    """
    sampler = settings.get("sampler")
    if not isinstance(sampler, dict):
        return settings
    guided = None if channels is None else guided_channels(sampler.get("cfg_channels"), channels)
    return settings | {"sampler": sampler | {"cfg_channels": guided}}


def _check_same(path: Path, done: str, then: dict[str, Any], now: dict[str, Any]) -> None:
    for name, value in now.items():
        before = then.get(name)  # what an earlier program did not know was not set
        same = without_folders(before) == without_folders(value) if name in PLACES else before == value
        if not same:
            raise UserError(
                f"{path} was {done} with {name} {before}, and the study says {value}: remove it, rename the "
                "variant, or choose another `out`"
            )


def without_folders(place: Any) -> str:
    """What stays the same of a place on another machine: the last part of its path, with kind, split and options.

    torchvision's sets are the same whatever folder they are in, so of them the kind alone.
    """
    kind, colon, rest = str(place).partition(":")
    if not colon:
        return Path(kind).name
    return kind if kind in TORCHVISION else f"{kind}:{Path(rest).name}"


def is_finished(run: Run, study: Study, found: dict[str, Any] | None) -> bool:
    """Whether nothing is left to do for a run with this JSON."""
    if found is None:
        return False
    if found.get("failed"):
        return True
    steps = run.steps_to_evaluate(study)
    if not steps or study.evaluate is None:
        return True
    evaluated = found["evaluation"] or {"steps": {}}
    others = study.evaluate.others.keys() <= evaluated.get("others", {}).keys()
    return set(map(str, steps)) <= evaluated["steps"].keys() and others
