"""What the runs' JSONs say, by variant and seed: held-out losses and metrics, and which losses may be compared."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sit.study.config import MEASURES, Study
from sit.training.config import TrainConfig, as_said_today

LOSS = "Loss, held out"
"""what the held-out loss is called among the metrics"""


@dataclass(frozen=True)
class Found:
    """The runs of one variant that there are, by seed; those of one cause alone.

    Attributes:
        name: the variant's.
        records: seed → the run's JSON.
    """

    name: str
    records: dict[int, dict[str, Any]]

    def loss(self, step: int | None = None) -> dict[int, float]:
        """Seed → held-out loss after ``step``, None for the last; where it was measured."""
        return {seed: value for seed, one in self.records.items() if (value := loss_at(one, step)) is not None}

    def metric(self, name: str, step: int | None = None) -> dict[int, float]:
        """Seed → a metric of the evaluation after ``step``, None for the last; where it was measured."""
        found = {seed: metrics_at(one, step).get(name) for seed, one in self.records.items()}
        return {seed: value for seed, value in found.items() if value is not None}

    def loss_by_time(self) -> dict[str, dict[int, float]]:
        """t → seed → held-out loss at that time after the last step, where it was measured."""
        found: dict[str, dict[int, float]] = {}
        for seed, one in self.records.items():
            if heldout := at_the_end(one):
                for time, value in zip(heldout["times"], heldout["by_time"][-1], strict=True):
                    found.setdefault(f"{time:.4g}", {})[seed] = value
        return found

    @property
    def usual_machine(self) -> str:
        """The machine that has most of the runs, the first of equals."""
        machines = [one["machine"] for one in self.records.values()]
        return max(machines, key=machines.count) if machines else ""

    @property
    def seconds_per_step(self) -> float | None:
        """The median over the runs of :attr:`usual_machine`."""
        usual = self.usual_machine
        paces = [one["speed"]["seconds_per_step"] for one in self.records.values() if one["machine"] == usual]
        known = [pace for pace in paces if pace]
        return statistics.median(known) if known else None


def loss_at(record: Mapping[str, Any], step: int | None = None) -> float | None:
    """A run's held-out loss after ``step``, None for its last; None where it was not measured."""
    wanted, heldout = record["config"]["steps"] if step is None else step, record["heldout"]
    if heldout is None or wanted not in heldout["steps"]:
        return None
    return heldout["loss"][heldout["steps"].index(wanted)]


def at_the_end(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a run measured of the held-out images after its last step; None where it did not."""
    heldout = record["heldout"]
    return heldout if heldout is not None and heldout["step"] == record["config"]["steps"] else None


def measure_of(record: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a run's held-out loss is of: losses are compared where this is the same."""
    heldout = record["heldout"] or {}
    usual = TrainConfig()  # what an earlier program did not know was as it is now by default
    config = as_said_today(record["config"])
    settings = (config.get(name, getattr(usual, name)) for name in MEASURES)
    return heldout.get("images"), heldout.get("times"), *settings


def of_one_measure(
    study: Study, records: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The runs, those without a held-out loss that measure another thing than the first variant's; and their variants.

    A network that predicts the noise has another loss than one that predicts the velocity, whichever is better.
    """
    order = [variant.name for variant in study.variants]
    measured = [one for one in records.values() if one["heldout"] is not None]
    if not measured:
        return {name: dict(one) for name, one in records.items()}, []
    first = measure_of(min(measured, key=lambda one: order.index(one["variant"])))
    kept, other = {}, set()
    for name, one in records.items():
        differs = one["heldout"] is not None and measure_of(one) != first
        kept[name] = {**one, "heldout": None} if differs else dict(one)
        other |= {one["variant"]} if differs else set()
    return kept, sorted(other, key=order.index)


def metrics_at(record: Mapping[str, Any], step: int | None = None) -> dict[str, float]:
    """A run's metrics after ``step``, None for its last, by name; empty where it was not evaluated."""
    steps = (record["evaluation"] or {"steps": {}})["steps"]
    numbers = steps.get(str(record["config"]["steps"] if step is None else step), [])
    return {number["name"]: number["value"] for number in numbers}


def sample_errors(record: Mapping[str, Any]) -> dict[str, float]:
    """Metric → half the width of its 95 % interval over samples of a run after its last step, where it has one."""
    numbers = (record["evaluation"] or {"steps": {}})["steps"].get(str(record["config"]["steps"]), [])
    return {number["name"]: number["error"] for number in numbers if number.get("error") is not None}


def fid_name(records: Iterable[Mapping[str, Any]]) -> str | None:
    """What the Fréchet distance is called in the evaluations; None if there is none."""
    names = (name for record in records for name in metrics_at(record))
    return next((name for name in names if name.startswith(("FID", "FD-")) and "at infinity" not in name), None)


def groups(study: Study, records: Mapping[str, Mapping[str, Any]], cause: str) -> list[Found]:
    """The runs by variant, in the study's order; with one cause, those that vary it and those of the first seed.

    Args:
        study: the study.
        records: run's name → its JSON, of the runs that are compared.
        cause: what the seeds vary.
    """
    found = []
    for variant in study.variants:
        base = (variant.seeds or study.seeds)[0]
        own = {
            one["seed"]: dict(one)
            for one in records.values()
            if one["variant"] == variant.name and (one["cause"] == cause or one["seed"] == base)
        }
        found.append(Found(variant.name, dict(sorted(own.items()))))
    return found
