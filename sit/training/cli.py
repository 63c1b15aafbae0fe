"""train.py's command line."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from sit.training.config import TrainConfig, check_needed, without_idle
from sit.training.recipes import known_recipes, load_recipe, load_run_settings, run_folder
from sit.utils.cli import parse
from sit.utils.errors import UserError, entry_point
from sit.utils.program import program


@dataclass(frozen=True)
class TrainArguments:
    """Train a SiT. A recipe, or the run to resume, sets the defaults of all other flags."""

    config: Annotated[TrainConfig, tyro.conf.OmitArgPrefixes]
    recipe: str = "digits"
    """a recipe's name or a YAML file"""
    dry_run: bool = False
    """print what the run would be and cost, and start nothing"""
    gpus: int = 1
    """with --dry-run: the number of GPUs to plan for"""
    images_per_second: float | None = None
    """with --dry-run: the measured speed of all GPUs together, for the time that the steps left would take"""

    def __post_init__(self) -> None:
        if self.gpus < 1:
            raise UserError(f"`gpus` must be at least 1, not {self.gpus}")
        if self.images_per_second is not None and not 0 < self.images_per_second < math.inf:
            raise UserError(f"`images_per_second` must be positive, not {self.images_per_second}")
        for name, without in (("gpus", 1), ("images_per_second", None)):
            if not self.dry_run and getattr(self, name) != without:
                raise UserError(
                    f"`{name}={getattr(self, name)}` plays no part without `dry_run`: give that too, or leave it out "
                    "(`accelerate launch` says on how many GPUs a run trains)"
                )


def parse_train_arguments(arguments: list[str]) -> TrainArguments:
    """Read train.py's command line: ``--recipe`` (default ``digits``) or a resumed run's config, then the flags.

    Raises:
        UserError: a bad recipe or value, or an unknown flag.
    """
    recipe, resume = _value_of("--recipe", arguments), _value_of("--resume", arguments)
    if resume not in (None, "auto"):
        if _value_of("--init-from", arguments) is not None:
            raise UserError(
                f"`init_from` begins a new run and `resume={resume}` goes on with one that has its weights: give one"
            )
        if recipe is not None:
            raise UserError("`recipe` and `resume` exclude each other: a resumed run has its config")
        # without the place where the run began: its folder may have been moved or copied since
        base = dataclasses.replace(load_run_settings(run_folder(resume)), output_dir=None)
    else:
        base = load_recipe(recipe or TrainArguments.recipe)
    description = f"{TrainArguments.__doc__} Recipes: {', '.join(known_recipes())}."
    found = parse(TrainArguments, program("train"), arguments, default=TrainArguments(base), description=description)
    config = without_idle(found.config, base)
    check_needed(config, base)
    return dataclasses.replace(found, config=config)


def _value_of(flag: str, arguments: list[str]) -> str | None:
    """The value of ``flag`` on a command line that is not parsed yet; None if it is not there, or is None."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(flag, flag[:2] + flag[2:].replace("-", "_"), dest="value", nargs="?")
    value = parser.parse_known_args(arguments)[0].value
    return None if value == "None" else value


@entry_point
def main(make_evaluation: Callable[..., Any] | None = None) -> None:
    """The command; ``make_evaluation`` as :func:`sit.training.trainer.train` takes it."""
    arguments = parse_train_arguments(sys.argv[1:])
    config = arguments.config

    # the heavy imports come once the flags are parsed
    if arguments.dry_run:
        from sit.training.plan import plan
        from sit.training.start import find_start

        done = find_start(config, clear=False).step
        print(plan(config, arguments.gpus, arguments.images_per_second, done))
        return

    from sit.training.trainer import train

    folder, is_main_process = train(config, make_evaluation)
    if is_main_process:
        reference = config.data if config.data.startswith("digits") else "REFERENCE"
        print(f"run: {folder}")
        steps = 1 if config.averages else 250
        print(f"sample:   {program('sample')} --ckpt {folder} --steps {steps}")
        print(f"evaluate: {program('eval_fid')} --ckpt {folder} --reference {reference} --steps {steps}")
