"""A study as its YAML file says it: variants of a recipe, seeds, what is chosen for each, how runs are evaluated."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_type_hints

from sit.sampling.config import SamplerConfig, check_heeded
from sit.training.config import TrainConfig
from sit.training.recipes import from_mapping, load_recipe
from sit.utils.choices import Precision
from sit.utils.errors import UserError
from sit.utils.reading import read_yaml, typed

MEASURES = ("prediction", "interpolant", "loss_weight", "train_eps", "meanflow_omega", "meanflow_kappa")
"""Fields of TrainConfig that say what the held-out loss is the loss of; a network with guidance inside its objective
learns another velocity than it is measured by."""
IMAGES = ("data", "vae", "image_size", "heldout", "heldout_images")
"""Those that say of which images; a run's JSON has their fingerprint."""
Cause = Literal["seed", "weights", "order", "noise"]
T = TypeVar("T")


@dataclass(frozen=True)
class Variant:
    """One of the things that are compared: settings over those of the study.

    Attributes:
        name: what the report calls it.
        settings: fields of TrainConfig.
        seeds: its training seeds; None takes the study's.
    """

    name: str
    settings: dict[str, Any]
    seeds: tuple[int, ...] | None = None

    @property
    def slug(self) -> str:
        """The name as part of a file's name."""
        return re.sub(r"[^\w.+-]+", "-", self.name).strip("-")


@dataclass(frozen=True)
class Selection:
    """What each variant is given at its best.

    Attributes:
        seed: the training seed of the runs that decide.
        choices: the settings to choose among.
    """

    seed: int
    choices: tuple[dict[str, Any], ...]

    def label(self, choice: int) -> str:
        """What tells the choice from the others, as part of a run's name: the value of its first setting."""
        value = next(iter(self.choices[choice].values()))
        return f"{value:g}" if isinstance(value, int | float) else re.sub(r"[^\w.+-]+", "-", str(value))


@dataclass(frozen=True)
class Way:
    """How a checkpoint is evaluated.

    Attributes:
        sampler: how its samples are made.
        ema: relative length of the averaged weights; None takes those that the checkpoint stores.
        guide_step: the step of the same run's checkpoint to guide away from; None guides away from the null label.
    """

    sampler: SamplerConfig
    ema: float | None = None
    guide_step: int | None = None


@dataclass(frozen=True)
class Evaluation:
    """How finished runs are evaluated, as eval_fid.py's arguments of these names say; ``every`` is in steps.

    The last step is evaluated besides with each of ``guidance`` (scales), of ``ema`` (relative lengths) and of
    ``autoguidance`` (scales), which guides away from the same run's checkpoint of ``guide_step``.
    """

    reference: str
    features: str | None = None
    classifier: str | None = None
    num_samples: int = 1000
    every: int | None = None
    batch_size: int = 64
    inception_weights: str | None = None
    dinov2_weights: str | None = None
    precision: Precision | None = None
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    guidance: tuple[float, ...] = ()
    ema: tuple[float, ...] = ()
    autoguidance: tuple[float, ...] = ()
    guide_step: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_samples", "every", "batch_size", "guide_step"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"evaluate: {name} must be at least 1, not {value}")
        for name in ("guidance", "ema", "autoguidance"):
            values = getattr(self, name)
            if any(value <= 0 for value in values) or len(set(values)) < len(values):
                raise UserError(f"evaluate: {name} must be positive numbers, each once, not {list(values)}")
        if self.sampler.cfg_scale in self.guidance:
            raise UserError(f"evaluate: guidance: {self.sampler.cfg_scale:g} is the sampler's own")
        if 1 in self.autoguidance:
            raise UserError("evaluate: autoguidance: 1 is without a guide, as everything else is evaluated")
        if bool(self.autoguidance) != (self.guide_step is not None):
            raise UserError("evaluate: autoguidance (scales) and guide_step (a run's own checkpoint) need each other")
        _ = self.others  # a sampler that takes no guidance is told

    @property
    def others(self) -> dict[str, Way]:
        """How the last step is evaluated besides, by name: the kind, and its value."""

        def scaled(scale: float) -> SamplerConfig:
            return dataclasses.replace(self.sampler, cfg_scale=scale)

        step = self.guide_step
        return {
            **{f"guidance {scale:g}": Way(scaled(scale)) for scale in self.guidance},
            **{f"ema {length:g}": Way(self.sampler, ema=length) for length in self.ema},
            **{
                f"autoguidance {scale:g} by step {step}": Way(scaled(scale), guide_step=step)
                for scale in self.autoguidance
            },
        }

    @property
    def usual(self) -> dict[str, str]:
        """How everything else is evaluated, in the words of :attr:`others`."""
        return {"guidance": f"{self.sampler.cfg_scale:g}", "ema": "as trained", "autoguidance": "no guide"}


@dataclass(frozen=True)
class Study:
    """A study; :func:`read_study` makes it.

    Attributes:
        path: its file.
        recipe: the recipe that all variants start from.
        settings: fields of TrainConfig for all of them.
        variants: what is compared; all others are compared with the first.
        seeds: training seeds.
        vary: what the seeds vary: everything (``seed``) or one cause alone, the others staying those of the first seed.
        select: what is chosen for each variant; None where nothing is.
        evaluate: how runs are evaluated; None leaves it at the held-out loss.
        keep_checkpoints: whether a run's checkpoints stay when its JSON has all that the study wants of them.
        processes: processes of one training, started by ``accelerate launch`` where there are several.
        out: folder of the study.
        text: what the file said when it was read.
    """

    path: Path
    recipe: str
    settings: dict[str, Any]
    variants: tuple[Variant, ...]
    seeds: tuple[int, ...]
    vary: tuple[Cause, ...]
    select: Selection | None
    evaluate: Evaluation | None
    keep_checkpoints: bool
    processes: int
    out: Path
    text: str = field(default="", repr=False)
    made: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)
    """what is made of it, so that it is made once"""

    def variant(self, name: str) -> Variant:
        """The variant of that name, or of the name that its files have.

        Raises:
            UserError: there is none.
        """
        for variant in self.variants:
            if name in (variant.name, variant.slug):
                return variant
        names = ", ".join(variant.name for variant in self.variants)
        raise UserError(f"`study={self.path}`: no variant is called {name!r}; there are {names}")

    def against(self, name: str) -> Study:
        """The same study with that variant first, which the others are compared with."""
        first = self.variant(name)
        others = [variant for variant in self.variants if variant is not first]
        return dataclasses.replace(self, variants=(first, *others))

    def config(self, variant: Variant, choice: int | None) -> TrainConfig:
        """The training of a variant with one of the choices, without its seeds and places."""
        source = f"`study={self.path}`"
        base = from_mapping(USUAL | self.settings, f"{source}: settings", load_recipe(self.recipe))
        if self.evaluate and self.evaluate.every:
            every = {"keep_every": self.evaluate.every, "checkpoint_every": self.evaluate.every}
            base = from_mapping(every | self.settings, source, base)
        base = from_mapping(variant.settings, f"{source}: variants: {variant.name}", base)
        if choice is None or self.select is None:
            return base
        return from_mapping(self.select.choices[choice], f"{source}: select", base)


USUAL = {"trackers": (), "preview_every": 0, "eval_every": 0, "keep_last": 1, "cpu_threads": 1}
"""What a run of a study has unless the study says otherwise: one checkpoint, nothing to look at, and as many threads
whatever else computes beside it, because a matrix product rounds by their number."""


@dataclass(frozen=True)
class _File:
    """The settings of the file, by which they are checked."""

    recipe: str
    variants: tuple[Any, ...]
    seeds: tuple[int, ...] = (0,)
    settings: dict[str, Any] = field(default_factory=dict)
    vary: Cause | tuple[Cause, ...] = "seed"
    select: dict[str, Any] | None = None
    evaluate: dict[str, Any] | None = None
    keep_checkpoints: bool = True
    processes: int = 1
    out: str | None = None


def read_study(path: str | Path, out: str | None = None) -> Study:
    """Read a study's file; ``out`` takes the place of the folder that it names.

    Raises:
        UserError: it is missing, or something in it is wrong; the message names the file and the setting.
    """
    source = f"`study={path}`"
    try:
        file = _make(_File, read_yaml(Path(path), source), source)
        study = Study(
            path=Path(path),
            text=Path(path).read_text(encoding="utf-8"),
            recipe=file.recipe,
            settings=_with_underscores(file.settings, "settings"),
            variants=tuple(_variant(entry) for entry in file.variants),
            seeds=file.seeds,
            vary=file.vary if isinstance(file.vary, tuple) else (file.vary,),
            select=None if file.select is None else _selection(file.select),
            evaluate=None if file.evaluate is None else _evaluation(file.evaluate, f"{source}: evaluate"),
            keep_checkpoints=file.keep_checkpoints,
            processes=file.processes,
            out=Path(out or file.out or Path("studies") / Path(path).stem),
        )
        _check(study)
    except UserError as error:
        raise UserError(str(error) if str(error).startswith(source) else f"{source}: {error}") from error
    return study


def _make(cls: type[T], values: Any, source: str) -> T:
    """The dataclass from a mapping; what has no default must be there."""
    found = typed(values, get_type_hints(cls), source)
    absent = [
        entry.name
        for entry in dataclasses.fields(cls)  # type: ignore[arg-type]
        if entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
    ]
    for name in absent:
        if name not in found:
            raise UserError(f"{source}: needs {name}")
    return cls(**found)


def _with_underscores(settings: dict[str, Any], place: str) -> dict[str, Any]:
    """The settings under their fields' names, which may be written with hyphens as flags are."""
    found: dict[str, Any] = {}
    for spelled, value in settings.items():
        name = str(spelled).replace("-", "_")
        if name in found:
            raise UserError(f"{place}: {name} is there twice, as {spelled} too")
        found[name] = value
    return found


def _variant(entry: Any) -> Variant:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise UserError(f"variants: each is a mapping with a name and settings, not {entry!r}")
    settings = {name: value for name, value in entry.items() if name not in ("name", "seeds")}
    settings = _with_underscores(settings, f"variants: {entry['name']}")
    seeds = entry.get("seeds")
    if seeds is not None and not (isinstance(seeds, list) and all(type(seed) is int for seed in seeds) and seeds):
        raise UserError(f"variants: {entry['name']}: seeds must be a list of integers, not {seeds!r}")
    return Variant(entry["name"], settings, tuple(seeds) if seeds is not None else None)


def _selection(values: dict[str, Any]) -> Selection:
    values = _with_underscores(values, "select")
    seed = values.pop("seed", None)
    if type(seed) is not int:
        raise UserError(f"select: needs seed, the training seed of the runs that decide, not {seed!r}")
    if not values or not all(isinstance(column, list) and column for column in values.values()):
        raise UserError("select: needs settings with a list of values each, such as learning_rate: [2e-3, 4e-3]")
    if len({len(column) for column in values.values()}) > 1:
        raise UserError(f"select: the lists of {', '.join(values)} must be as long as each other")
    rows = zip(*values.values(), strict=True)
    selection = Selection(seed, tuple(dict(zip(values, row, strict=True)) for row in rows))
    labels = [selection.label(choice) for choice in range(len(selection.choices))]
    if len(set(labels)) < len(labels):
        raise UserError(f"select: {next(iter(values))} has a value twice")
    return selection


def _evaluation(values: dict[str, Any], source: str) -> Evaluation:
    sampler = values.get("sampler", {})
    if not isinstance(sampler, dict):
        raise UserError(f"evaluate: sampler is a mapping, such as {{sampler: ode, steps: 25}}, not {sampler!r}")
    sampler = SamplerConfig(**typed(sampler, get_type_hints(SamplerConfig), f"{source}: sampler"))
    found = _make(Evaluation, values | {"sampler": sampler}, source)
    if not found.guidance and not found.autoguidance:  # with them, settings of guidance have their part
        check_heeded(sampler)
    return found


def _check(study: Study) -> None:
    """Refuse what can be seen to be wrong before anything is trained."""
    if not study.variants:
        raise UserError("variants: name at least one")
    slugs = [variant.slug for variant in study.variants]
    if twice := sorted({slug for slug in slugs if not slug or slugs.count(slug) > 1}):
        raise UserError(f"variants: two are called {twice[0]!r}, as far as a file's name goes; give each its own name")
    for variant in study.variants:
        for place, seeds in (("seeds", study.seeds), (f"variants: {variant.name}: seeds", variant.seeds)):
            if seeds is not None and (not seeds or len(set(seeds)) < len(seeds)):
                raise UserError(f"{place} must name at least one seed, and each once")
    if not study.vary or len(set(study.vary)) < len(study.vary):
        raise UserError(f"vary must name at least one of {', '.join(get_args(Cause))}, and each once")
    if study.vary != ("seed",):
        for variant in study.variants:
            if variant.seeds and variant.seeds[0] != study.seeds[0]:
                raise UserError(
                    f"variants: {variant.name}: seeds must begin with {study.seeds[0]}, as the study's do: all runs "
                    "share that seed's randomness but for the cause that vary names"
                )
    for variant in study.variants if study.select else ():
        if both := [name for name in study.select.choices[0] if name in variant.settings]:
            raise UserError(
                f"variants: {variant.name}: {both[0]} is chosen for each variant by select, so that its own would "
                "never be used: leave one of them out"
            )
    if study.processes < 1:
        raise UserError(f"processes must be at least 1, not {study.processes}")
    for place, settings in [
        ("settings", study.settings),
        *((f"variants: {variant.name}", variant.settings) for variant in study.variants),
        *(("select", choice) for choice in (study.select.choices if study.select else ())),
    ]:
        for name in OWN:
            if name in settings:
                raise UserError(f"{place}: {name} is the study's own to set{OWN[name]}")


OWN = {
    "eval_every": "; give evaluate: every",
    "output_dir": "; give `out`",
    "resume": "",
    "seed": "; give seeds",
    "seed_weights": "; give vary: weights",
    "seed_order": "; give vary: order",
    "seed_noise": "; give vary: noise",
}
"""Fields of TrainConfig that a study sets for each run, and what to give instead."""
