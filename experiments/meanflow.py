"""One step by MeanFlow against few and many steps of the plain objective, at equal training seconds.

python experiments/meanflow.py digits --out runs/meanflow-digits --json docs/meanflow/digits.json
python experiments/meanflow.py fashion --out runs/meanflow-fashion --json docs/meanflow/fashion.json

For every seed two networks of one recipe: average velocities in so many steps, and velocities in as many as take the
same time, `ratio` times as many (docs/mixers.md has the cost of a MeanFlow step, measured). The first is sampled in
1, 2 and 4 steps; the second by the SDE in 250, and by every ODE solver with fixed steps that needs 1, 2 or 4
evaluations of the network, with guidance too, which needs two for each. For each number of evaluations the solver
with the least mean FID is told apart: chosen after the fact, which favors the plain objective. MeanFlow has guidance
inside, at no cost; what the plain objective makes of the same guidance is seen in 25 steps of Heun's method.

What is finished is not trained again, nor sampled. ``fashion`` needs the latents and classifiers of docs/results.md.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from training_runs import ensure_trained

from sit.checkpoint.load import Loaded, load_for_sampling
from sit.compare.points import EVALUATIONS as OF_A_STEP
from sit.compare.points import seconds_of_training
from sit.metrics.classifier import LabelClassifier
from sit.metrics.estimate import half_width
from sit.metrics.evaluate import Against, measure
from sit.metrics.features import Extractor, get_extractor
from sit.metrics.generated import GeneratedImages
from sit.metrics.image_sets import Images
from sit.metrics.paired import over_seeds
from sit.metrics.statistics_files import Statistics, open_reference
from sit.metrics.work_folder import WorkDirectory
from sit.mixers.registry import parse_mixers
from sit.sampling.config import SamplerConfig
from sit.training.config import TrainConfig
from sit.training.recipes import load_recipe
from sit.utils.cli import one_line_errors
from sit.utils.errors import UserError, entry_point
from sit.utils.random import key
from sit.utils.record import write_record
from sit.utils.tables import markdown_table

CPU = torch.device("cpu")
EVALUATIONS = (1, 2, 4)
"""of the network, that one step or few are allowed"""


@dataclass(frozen=True)
class Setting:
    """Where it is asked.

    Attributes:
        recipe: of the plain objective.
        reference: what FID is against.
        features: what FID is on.
        classifier: what class accuracy is by; None is the digits' support vector machine.
    """

    recipe: str
    reference: str
    features: str
    classifier: str | None


SETTINGS = {
    "digits": Setting("digits", "digits", "digits", None),
    "fashion": Setting(
        "fashion-mnist",
        "fashion-mnist-test:data",
        "classifier:classifiers/fashion-mnist-convnext",
        "classifiers/fashion-mnist-resnet",
    ),
}


@dataclass(frozen=True)
class Arguments:
    """Train and sample both objectives, and tell FID and class accuracy by evaluations of the network."""

    setting: tyro.conf.Positional[Literal["digits", "fashion"]]
    """data and classifiers"""
    out: Path = Path("runs/meanflow")
    """folder of the runs"""
    json: Path | None = None
    """file for all numbers"""
    seeds: int = 3
    """the seeds 0, 1, …"""
    steps: int = 1500
    """of MeanFlow"""
    ratio: float = 2.3
    """seconds of a MeanFlow step over those of a plain one: on the digits, on two CPU cores"""
    mixer: str = "atconv"
    """in the slot"""
    num_samples: int = 1000
    """generated images of each row"""
    many_steps: int = 250
    """of the SDE"""

    def __post_init__(self) -> None:
        if self.seeds < 2:
            raise UserError(f"`seeds` must be at least 2, for intervals, not {self.seeds}")
        if self.steps < 1:
            raise UserError(f"`steps` must be at least 1, not {self.steps}")
        if not 0 < self.ratio < math.inf or self.plain_steps < 1:
            raise UserError(f"`ratio={self.ratio}` leaves the plain objective no step")
        if self.num_samples < 2:
            raise UserError(f"`num_samples` must be at least 2, not {self.num_samples}")
        if self.many_steps < 2:
            raise UserError(f"`many_steps` must be at least 2, not {self.many_steps}")

    @property
    def plain_steps(self) -> int:
        return round(self.steps * self.ratio)

    def config(self, seed: int, averages: bool) -> TrainConfig:
        """The settings of a run."""
        recipe = load_recipe(SETTINGS[self.setting].recipe)
        steps = self.steps if averages else self.plain_steps
        shared = dict(mixer=self.mixer, seed=seed, steps=steps, preview_every=0, checkpoint_every=steps, trackers=())
        objective: dict[str, Any] = {}
        if averages:
            of_digits = load_recipe("digits-meanflow")
            objective = {name: getattr(of_digits, name) for name in OBJECTIVE}
        return dataclasses.replace(recipe, **shared | objective)


OBJECTIVE = ("prediction", "time_distribution", "meanflow_omega", "meanflow_kappa")
"""what the recipe digits-meanflow sets"""


@dataclass(frozen=True)
class Way:
    """How a network is sampled.

    Attributes:
        evaluations: of the network, for one sample.
        config: the sampler.
    """

    evaluations: int
    config: SamplerConfig

    @property
    def name(self) -> str:
        config = self.config
        told = {"meanflow": "MeanFlow", "sde": "plain, SDE"}.get(config.sampler or "", f"plain, {config.method}")
        guided = f", guidance {config.cfg_scale:g}" if config.cfg_scale != 1 else ""
        return f"{told}, {config.steps} step{'s' if config.steps > 1 else ''}{guided}"


def meanflow_ways() -> Iterator[Way]:
    for steps in EVALUATIONS:
        yield Way(steps, SamplerConfig("meanflow", steps))


def plain_ways(many_steps: int, guidance: float) -> Iterator[Way]:
    """The SDE, Heun's method with guidance, and each ODE solver whose evaluations are known and allowed, both ways."""
    yield Way(many_steps, SamplerConfig("sde", many_steps))
    yield Way(100, SamplerConfig("ode", 25, "heun2", cfg_scale=guidance))
    for scale in (1.0, guidance):
        for method, each in OF_A_STEP.items():
            for steps in EVALUATIONS:
                evaluations = steps * each * (1 if scale == 1 else 2)
                if evaluations in EVALUATIONS:
                    yield Way(evaluations, SamplerConfig("ode", steps, method, cfg_scale=scale))


def inner_guidance(config: TrainConfig) -> float:
    """The scale of the guidance in MeanFlow's objective: ω / (1 − κ)."""
    return config.meanflow_omega / (1 - config.meanflow_kappa)


@dataclass(frozen=True)
class Found:
    """What was measured of a way of sampling one run."""

    fid: float
    accuracy: float


def evaluated(arguments: Arguments, seed: int, folder: Path, ways: Iterator[Way]) -> dict[str, Found]:
    """FID and class accuracy of a run by each way; what is in the run's folder is not made again."""
    setting, loaded = SETTINGS[arguments.setting], load_for_sampling(folder, device=CPU)
    return {way.name: _found(arguments, setting, seed, folder, loaded, way.config) for way in ways}


def yardstick(setting: Setting) -> tuple[Images | Statistics, list[Extractor]]:
    """What FID is measured against, and on."""
    size = load_recipe(setting.recipe).image_size
    return open_reference(setting.reference, size, device=CPU), [get_extractor(setting.features, CPU)]


def _found(
    arguments: Arguments, setting: Setting, seed: int, folder: Path, loaded: Loaded, config: SamplerConfig
) -> Found:
    classifier = setting.classifier and LabelClassifier.load(
        setting.classifier, CPU, loaded.info.classes or None, loaded.info.label_names
    )
    against = Against(*yardstick(setting), classifier or None, CPU)
    samples = GeneratedImages(loaded, arguments.num_samples, seed=key(seed, "meanflow") % 2**31, config=config)
    with WorkDirectory(str(folder / "evaluation")) as work:
        measured = measure(samples, against, work)
        if measured is None:
            raise RuntimeError("this is not the main process")
        values = {number.name.partition(" (")[0]: number.value for number in measured.report().numbers}
    return Found(values["FID"], values["Class accuracy"])


def of_seed(arguments: Arguments, seed: int) -> dict[str, Any]:
    """What was found of both objectives, and the seconds that they trained, None where a damaged log doesn't tell."""
    found: dict[str, Any] = {"seconds": {}, "ways": {}}
    for averages, name in ((True, "meanflow"), (False, "plain")):
        config, folder = arguments.config(seed, averages), arguments.out / f"{name}-seed{seed}"
        ensure_trained(config, folder)
        found["seconds"][name] = seconds_of_training(folder, config.steps)
        guidance = inner_guidance(arguments.config(seed, True))
        ways = meanflow_ways() if averages else plain_ways(arguments.many_steps, guidance)
        found["ways"] |= evaluated(arguments, seed, folder, ways)
    return found


def mean_fid(found: Mapping[int, Any], way: str) -> float:
    """Over the seeds."""
    return sum(of["ways"][way].fid for of in found.values()) / len(found)


def rivals(found: Mapping[int, Any], ways: list[Way]) -> dict[int, str]:
    """Evaluations → the plain objective's way with the least mean FID."""
    best: dict[int, str] = {}
    for way in ways:
        before = best.get(way.evaluations)
        if before is None or mean_fid(found, way.name) < mean_fid(found, before):
            best[way.evaluations] = way.name
    return best


def table(found: Mapping[int, Any], arguments: Arguments, everything: bool) -> str:
    """FID and accuracy by way, with 95 % intervals over the seeds, and MeanFlow less its rival, paired by seed."""
    plain = list(plain_ways(arguments.many_steps, inner_guidance(arguments.config(0, True))))
    best, rows = rivals(found, plain), []
    for way in [*meanflow_ways(), *plain]:
        is_meanflow = way.config.sampler == "meanflow"
        if not (everything or is_meanflow or best[way.evaluations] == way.name):
            continue
        cells = []
        for number, digits in (("fid", ".2f"), ("accuracy", ".1%")):
            values = [getattr(of["ways"][way.name], number) for of in found.values()]
            cells.append(f"{sum(values) / len(values):{digits}} ± {half_width(values):{digits}}")
        if is_meanflow:
            first, second = (
                {seed: of["ways"][name].fid for seed, of in found.items()} for name in (best[way.evaluations], way.name)
            )
            difference = over_seeds(first, second)
            cells.append(f"{difference.value:+.2f} ± {difference.error:.2f}")
        else:
            cells.append("")
        rows.append([str(way.evaluations), way.name, *cells])
    rows.sort(key=lambda row: int(row[0]))
    header = ["evaluations", "sampled by", "FID", "class accuracy", "FID less the best plain one's, paired"]
    return markdown_table(header, rows, align="rl")


def run(arguments: Arguments) -> None:
    """Train and sample what is missing, print the tables, and keep all numbers as JSON."""
    setting = SETTINGS[arguments.setting]
    parse_mixers(arguments.mixer)  # what is wrong or missing is told before hours of training
    yardstick(setting)
    if setting.classifier is not None:
        LabelClassifier.load(setting.classifier, CPU)
    found = {seed: of_seed(arguments, seed) for seed in range(arguments.seeds)}
    for seed, of in found.items():
        told = {name: "not told" if value is None else f"{value:.0f} s" for name, value in of["seconds"].items()}
        seconds = ", ".join(f"{name} {value}" for name, value in told.items())
        print(f"seed {seed}, training: {seconds}")
    print(
        f"\n{table(found, arguments, everything=False)}\n\nAll solvers:\n\n{table(found, arguments, everything=True)}"
    )
    if arguments.json is not None:
        told = {
            seed: of | {"ways": {name: dataclasses.asdict(one) for name, one in of["ways"].items()}}
            for seed, of in found.items()
        }
        settings = dataclasses.asdict(arguments) | {"out": str(arguments.out), "json": str(arguments.json)}
        write_record(arguments.json, CPU, {"settings": settings, "found": told})


@entry_point
def main() -> None:
    with one_line_errors():
        arguments = tyro.cli(Arguments, prog="experiments/meanflow.py")
    run(arguments)


if __name__ == "__main__":
    main()
