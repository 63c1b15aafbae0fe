"""The runs of a study: which there are, and where each has its files."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sit.checkpoint.posthoc_ema import LIMIT, coefficients
from sit.mixers import parse_mixers
from sit.model import check_model_name
from sit.sampling.config import check_guide
from sit.study.config import IMAGES, MEASURES, Cause, Study, Variant, Way
from sit.training.config import TrainConfig, check_heeded
from sit.training.posthoc_ema import snapshot_steps
from sit.utils.errors import UserError


@dataclass(frozen=True)
class Run:
    """One training of a study.

    Attributes:
        name: what its files are called.
        variant: the variant's name.
        cause: what its seed varies.
        seed: the seed that it varies.
        choice: which of the choices it has; None where nothing is chosen.
        config: its training.
        compared: whether the report compares it; else it only helps to choose.
    """

    name: str
    variant: str
    cause: Cause
    seed: int
    choice: int | None
    config: TrainConfig
    compared: bool

    def json(self, study: Study) -> Path:
        """Its small JSON, which is enough for the report."""
        return study.out / "runs" / f"{self.name}.json"

    def grid(self, study: Study) -> Path:
        """Its samples for the report, beside the JSON."""
        return study.out / "runs" / f"{self.name}.png"

    def work(self, study: Study) -> Path:
        """The folder of what is large: the training, its log, the evaluation's chunks."""
        return study.out / "work" / self.name

    def training(self, study: Study) -> Path:
        """The training's folder."""
        return self.work(study) / "run"

    def steps_to_evaluate(self, study: Study) -> list[int]:
        """The steps whose checkpoints are evaluated, the last one among them."""
        if study.evaluate is None or not self.compared:
            return []
        every = study.evaluate.every or self.config.steps
        return sorted({*range(every, self.config.steps + 1, every), self.config.steps})


def planned(study: Study, chosen: Mapping[str, int]) -> list[Run]:
    """All runs that are known by now, in the order in which they are to be done.

    Args:
        study: the study.
        chosen: variant → its choice, where that is made already. Without it a variant has only the runs that decide.

    Raises:
        UserError: settings that don't fit together; the message names the variant.
    """
    runs: dict[str, Run] = {}
    if study.select is not None:
        for variant in study.variants:
            for choice in range(len(study.select.choices)):
                run = _run(study, variant, choice, "seed", study.select.seed)
                runs[run.name] = dataclasses.replace(run, compared=False)
    most = max(len(variant.seeds or study.seeds) for variant in study.variants)
    for number in range(most):  # a seed at a time, so that whatever is finished can be compared
        for variant in study.variants:
            seeds = variant.seeds or study.seeds
            if number >= len(seeds) or (study.select is not None and variant.name not in chosen):
                continue
            for cause in study.vary:
                run = _run(study, variant, chosen.get(variant.name), cause, seeds[number])
                runs[run.name] = run
    return list(runs.values())


def to_be_known(study: Study, chosen: Mapping[str, int]) -> int:
    """How many runs there are besides :func:`planned`'s, once the rest is chosen."""
    return len(planned(study, {variant.name: 0 for variant in study.variants} | dict(chosen))) - len(
        planned(study, chosen)
    )


def _run(study: Study, variant: Variant, choice: int | None, cause: Cause, seed: int) -> Run:
    what = (variant.name, choice, cause, seed)
    if what not in study.made:
        study.made[what] = _make_run(study, variant, choice, cause, seed)
    return study.made[what]


def _make_run(study: Study, variant: Variant, choice: int | None, cause: Cause, seed: int) -> Run:
    label = "" if choice is None or study.select is None else f"-{study.select.label(choice)}"
    base = (variant.seeds or study.seeds)[0]
    if cause == "seed" or seed == base:  # with the first seed, whatever varies is as it is
        cause, name, seeds = "seed", f"{variant.slug}{label}-seed{seed}", {"seed": seed}
    else:
        name, seeds = f"{variant.slug}{label}-{cause}{seed}", {"seed": base, f"seed_{cause}": seed}
    places = {"output_dir": str(study.out / "work" / name / "run"), "resume": "auto"}
    try:
        config = dataclasses.replace(study.config(variant, choice), **seeds, **places)
        parse_mixers(config.mixer)
        check_model_name(config.model)
        check_heeded(config)
    except UserError as error:
        where = f"`study={study.path}`"
        raise UserError(str(error) if str(error).startswith(where) else f"{where}: {variant.name}: {error}") from error
    _check_steps(study, variant, config)
    return Run(name, variant.name, cause, seed, choice, config, compared=True)


def _is_kept(config: TrainConfig, step: int) -> bool:
    """Whether the checkpoint of a step before the last is there in the end."""
    kept = not config.keep_last or (config.keep_every is not None and step % config.keep_every == 0)
    return kept and step % config.checkpoint_every == 0


def _check_steps(study: Study, variant: Variant, config: TrainConfig) -> None:
    """Raise UserError unless there will be checkpoints and held-out losses where the study reads them."""
    where = f"`study={study.path}`: {variant.name}"
    every = study.evaluate.every if study.evaluate else None
    if every and (every % config.checkpoint_every or (config.keep_every != every and config.keep_last)):
        raise UserError(
            f"{where}: evaluate: every {every} steps needs checkpoints there: checkpoint_every must divide it, and "
            f"keep_every be {every} or keep_last 0"
        )
    guide = study.evaluate.guide_step if study.evaluate else None
    if guide is not None and not (guide < config.steps and _is_kept(config, guide)):
        raise UserError(
            f"{where}: evaluate: guide_step must be one of a checkpoint that is kept before step {config.steps}, not "
            f"{guide}: let checkpoint_every and keep_every divide it"
        )
    _check_ways(study, where, config)
    if study.select is not None and (moved := sorted(study.select.choices[0].keys() & {*MEASURES, *IMAGES})):
        raise UserError(f"{where}: select compares held-out losses, which are not comparable where {moved[0]} differs")
    if study.select is not None and config.heldout == "none":
        raise UserError(f"{where}: select chooses by the held-out loss: set heldout")


def _check_ways(study: Study, where: str, config: TrainConfig) -> None:
    """Raise UserError unless a network trained so can be evaluated in all the ways that the study asks for."""
    if study.evaluate is None:
        return
    for way in (Way(study.evaluate.sampler), *study.evaluate.others.values()):
        try:
            sampler = way.sampler.resolve(config.averages)
            check_guide(None if way.guide_step is None else f"the checkpoint of step {way.guide_step}", sampler)
        except UserError as error:
            raise UserError(f"{where}: evaluate: {error}") from error
        if sampler.cfg_scale != 1 and way.guide_step is None and not config.class_dropout:
            raise UserError(
                f"{where}: evaluate: guidance is away from no label, and class_dropout is 0: none is learned"
            )
        if way.ema is not None:
            _check_length(where, config, way.ema)


def _check_length(where: str, config: TrainConfig, length: float) -> None:
    """Raise UserError unless the average of that length can be put together from the snapshots that there will be."""
    if not config.posthoc_ema:
        raise UserError(
            f"{where}: evaluate: ema puts averages together from snapshots: set posthoc_ema, such as [0.05, 0.1]"
        )
    stored = [(sigma, step) for step in snapshot_steps(config) for sigma in config.posthoc_ema]
    try:
        _, error = coefficients(stored, length, config.steps)
    except ValueError as reason:
        raise UserError(f"{where}: evaluate: ema: {reason}") from reason
    if error > LIMIT:
        raise UserError(
            f"{where}: evaluate: ema: {length:g} can't be reached from {len(stored)} snapshots of "
            f"{', '.join(f'{sigma:g}' for sigma in config.posthoc_ema)}: the profile would be {100 * error:.0f} % off, "
            f"more than {100 * LIMIT:.0f} %; take a length nearer to those, or lower posthoc_ema_every"
        )
