"""Whether the intervals that an evaluation prints hold: a simulation with known distributions.

    python benchmarks/intervals.py --json docs/evaluation/intervals.json

Two models draw features of known Gaussian mixtures, a component a class, from the same labels and noise, again and
again. Every number that is printed is made each time with its 95 % interval, of one model and of the difference of
both, with labels in turn and drawn at random, and the difference over 3 and 5 training seeds. *Coverage* is how often
an interval holds the true value; *ratio* is the printed standard error (root mean square) over the true one.

The true value of FID at infinity and of the loss is known in closed form. That of a number that depends on how many
samples there are is its mean over all replications. True errors are spreads over the replications.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from checks import at_least_one
from tqdm import tqdm

from sit.metrics.distances import (
    RootedMoments,
    frechet,
    frechet_at_infinity,
    frechet_distance,
    inception_score,
    kernel_distance,
)
from sit.metrics.estimate import Estimate, jackknife_groups, of_mean
from sit.metrics.moments import GroupSums, Moments
from sit.metrics.neighbors import MEANS, neighborhoods
from sit.metrics.paired import Difference, over_images, over_samples, over_seeds
from sit.utils.cli import one_line_errors
from sit.utils.errors import UserError, entry_point
from sit.utils.record import machine, write_record
from sit.utils.tables import markdown_table

LABELS = ("balanced", "uniform")
SEEDS = (3, 5)


@dataclass
class Arguments:
    """Simulate evaluations."""

    replications: int = 600
    """of the Fréchet distances and the training seeds"""
    of_all: int = 200
    """replications of every number, which take ten times as long; at most as many"""
    samples: int = 1000
    """of one evaluation"""
    dimensions: int = 32
    classes: int = 20
    reference: int = 500
    """reference features of precision, recall, density, coverage and KID"""
    json: Path | None = None
    """file for all numbers"""

    def __post_init__(self) -> None:
        at_least_one(self, "dimensions", "classes")
        if self.replications < 2 or self.of_all == 1:
            raise UserError("`replications` must be at least 2, and `of_all` 0 or at least 2: one has no spread")
        if self.samples < 40:
            raise UserError(f"`samples` must be at least 40, from which on there are intervals, not {self.samples}")


@dataclass(frozen=True, eq=False)
class Model:
    """Features m_c + L_c z of class c: centers (C, D) and factors (C, D, D)."""

    centers: np.ndarray
    factors: np.ndarray

    def draw(self, labels: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """Features (N, D) of labels (N,) and noise (N, D)."""
        found = np.empty_like(noise)
        for label in range(len(self.centers)):
            rows = labels == label
            found[rows] = self.centers[label] + noise[rows] @ self.factors[label].T
        return found

    def moments(self) -> Moments:
        """Exact ones, each class as often."""
        within = np.mean([factor @ factor.T for factor in self.factors], axis=0)
        return Moments(self.centers.mean(axis=0), within + np.cov(self.centers, rowvar=False, bias=True))

    def moved(self, by: np.ndarray) -> Model:
        """With other centers, as another training seed has them."""
        return Model(self.centers + by, self.factors)


def worlds(classes: int, dimensions: int) -> tuple[Model, Model, Model]:
    """The data, and two models of them that err in centers and in variance, the second a little less."""
    rng = np.random.default_rng(0)
    scale = np.exp(-np.arange(dimensions) / (dimensions / 3))  # a spectrum that decays, as features' do
    centers = rng.normal(size=(classes, dimensions)) * scale
    factors = (np.eye(dimensions) + 0.3 * rng.normal(size=(classes, dimensions, dimensions)) / dimensions**0.5) * scale
    wrong = 0.25 * rng.normal(size=(classes, dimensions)) * scale + 0.1 * scale
    first = Model(centers + wrong, 0.85 * factors)
    second = Model(centers + 0.9 * wrong + 0.05 * rng.normal(size=wrong.shape) * scale, 0.87 * factors)
    return Model(centers, factors), first, second


@dataclass(frozen=True, eq=False)
class Setting:
    """What all evaluations share."""

    arguments: Arguments
    data: Model
    reference: RootedMoments
    real: np.ndarray

    @classmethod
    def of(cls, arguments: Arguments) -> tuple[Setting, tuple[Model, Model]]:
        data, first, second = worlds(arguments.classes, arguments.dimensions)
        rng = np.random.default_rng(1)
        labels = np.arange(arguments.reference) % arguments.classes
        real = data.draw(labels, rng.normal(size=(arguments.reference, arguments.dimensions)))
        return cls(arguments, data, RootedMoments.of(data.moments()), real), (first, second)

    def draws(self, rng: np.random.Generator, order: str) -> tuple[np.ndarray, np.ndarray]:
        """Labels (N,) and noise (N, D) of one evaluation."""
        count, classes = self.arguments.samples, self.arguments.classes
        labels = np.arange(count) % classes if order == "balanced" else rng.integers(classes, size=count)
        return labels, rng.normal(size=(count, self.arguments.dimensions))

    def evaluate(self, features: np.ndarray, labels: np.ndarray, everything: bool) -> dict[str, Estimate]:
        """The Fréchet distances of features (N, D), or every number."""
        return dict(self._numbers(features, labels, everything))

    def _numbers(self, features: np.ndarray, labels: np.ndarray, everything: bool) -> Iterator[tuple[str, Estimate]]:
        group = jackknife_groups(len(features), labels)
        sums = GroupSums.of(features, group)
        fid = frechet(sums, self.reference)
        yield "FID", fid
        yield "FID at infinity", frechet_at_infinity(sums, self.reference, fid)
        if not everything:
            return
        away = ((features[:, None] - self.data.centers[None]) ** 2).sum(axis=-1)
        yield "Inception score", inception_score(-away, group)
        yield "Class accuracy", of_mean(away.argmin(axis=1) == labels, group)
        found, _ = neighborhoods(features, self.real, group)
        yield from ((name.capitalize(), found[name]) for name in MEANS)
        yield "KID", kernel_distance(features, self.real, group, size=150)


Row = tuple[str, str, str]
"""labels, what is compared, the number"""

Outcome = tuple[float, float, float]
"""value, printed standard error, half the printed interval"""


def of_samples(
    setting: Setting, models: tuple[Model, Model], rng: np.random.Generator, *, everything: bool
) -> Iterator[tuple[Row, Outcome]]:
    """One replication of the numbers of the first model, and of the difference of the two."""
    for order in LABELS:
        labels, noise = setting.draws(rng, order)
        first, second = (setting.evaluate(model.draw(labels, noise), labels, everything) for model in models)
        for name, one in first.items():
            yield (order, "one run", name), (one.value, one.standard_error, one.error)
            yield (order, "difference", name), _outcome(over_samples(one, second[name]))
    losses = rng.normal(size=500)
    yield ("", "difference", "held-out loss"), _outcome(over_images(losses, losses + 0.1 * rng.exponential(size=500)))


def of_seeds(setting: Setting, models: tuple[Model, Model], rng: np.random.Generator) -> Iterator[tuple[Row, Outcome]]:
    """One replication of the difference over training seeds: of FID, which moves with the seed in both models."""
    for order in LABELS:
        values: list[list[float]] = [[], []]
        same = setting.draws(rng, order)
        alike: list[list[float]] = [[], []]
        for _ in range(max(SEEDS)):
            own = setting.draws(rng, order)  # an evaluation seed of this training seed's own
            shared = rng.normal(size=models[0].centers.shape)
            for model, found, judged_alike in zip(models, values, alike, strict=True):
                by = 0.02 * (shared + rng.normal(size=shared.shape)) * setting.reference.moments.sigma.diagonal() ** 0.5
                for (labels, noise), into in ((own, found), (same, judged_alike)):
                    sums = GroupSums.of(model.moved(by).draw(labels, noise))
                    into.append(frechet_distance(sums.moments(), setting.reference))
        for count in SEEDS:
            for what, (one, other) in ((f"{count} seeds", values), (f"{count} seeds on the same noise", alike)):
                difference = over_seeds(dict(enumerate(one[:count])), dict(enumerate(other[:count])))
                yield (order, what, "FID"), _outcome(difference)


def _outcome(difference: Difference) -> Outcome:
    return difference.value, difference.standard_error, difference.error


def simulate(arguments: Arguments) -> list[dict[str, Any]]:
    """All rows: labels, what is compared, the number, coverage, ratio, and the true error."""
    setting, models = Setting.of(arguments)
    outcomes: dict[Row, list[Outcome]] = defaultdict(list)
    for replication in tqdm(range(arguments.replications), desc="replications", disable=None):
        rng = np.random.default_rng([2, replication])
        found = of_samples(setting, models, rng, everything=replication < arguments.of_all)
        for row, outcome in chain(found, of_seeds(setting, models, rng)):
            outcomes[row].append(outcome)
    at_infinity = [frechet_distance(model.moments(), setting.reference) for model in models]
    known = {"held-out loss": {"difference": 0.1}}
    known["FID at infinity"] = {"one run": at_infinity[0], "difference": at_infinity[1] - at_infinity[0]}
    rows = []
    for (order, what, name), found in outcomes.items():
        values, errors, halves = np.array(found).T
        true = known.get(name, {}).get(what, values.mean())
        spread = values.std(ddof=1)
        rows.append(
            {
                "labels": order,
                "compared": what,
                "number": name,
                "replications": len(values),
                "true": float(true),
                "mean": float(values.mean()),
                "true_error": float(spread),
                "ratio": float(np.sqrt((errors**2).mean()) / spread) if spread else None,
                "coverage": float((np.abs(values - true) <= halves).mean()),
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """A row for each number and comparison, coverage and ratio by the labels."""
    cells: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for row in rows:
        ratio = "never another value" if row["ratio"] is None else f"{row['ratio']:.2f}"
        text = f"{row['coverage']:.1%}, {ratio}"
        for order in (row["labels"],) if row["labels"] else LABELS:
            cells[row["compared"], row["number"]][order] = text
    lines = [(what, name, *(found[order] for order in LABELS)) for (what, name), found in cells.items()]
    lines.sort(key=lambda line: [row["compared"] for row in rows].index(line[0]))
    return markdown_table(["", "number", "labels in turn: coverage, ratio", "labels at random"], lines)


@entry_point
def main() -> None:
    with one_line_errors():
        arguments = tyro.cli(Arguments, prog="benchmarks/intervals.py")
    rows = simulate(arguments)
    print(machine("cpu"))
    print(table(rows))
    if arguments.json:
        settings = {name: value for name, value in vars(arguments).items() if name != "json"}
        write_record(arguments.json, "cpu", {"settings": settings, "rows": rows})


if __name__ == "__main__":
    main()
