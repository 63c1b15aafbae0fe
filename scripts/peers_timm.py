"""timm's own tests of a model on every AttNet, from a checkout of timm.

    TIMM_CHECKOUT=FOLDER python scripts/peers_timm.py --json docs/compatibility-timm.json

The functions of ``tests/test_models.py`` are called as they stand there, with the timm that is installed. Those that
can't apply are named with the reason (``LEFT_OUT``). Exits with 1 if one failed.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import timm
import tyro

from atconv.attnet import SIZES
from sit.utils.cli import one_line_errors
from sit.utils.errors import UserError, entry_point, first_line
from sit.utils.record import write_record
from sit.utils.tables import markdown_table

WEIGHTS = "no pretrained weights are registered"
SCRIPT = "TorchScript is not supported"
LEFT_OUT = {
    "test_model_inference": WEIGHTS,
    "test_model_load_pretrained": WEIGHTS,
    "test_model_features_pretrained": WEIGHTS,
    "test_model_default_cfgs_non_std": "for networks whose features are no map",
    "test_model_forward_torchscript": SCRIPT,
    "test_model_forward_fx_torchscript": SCRIPT,
    "test_model_forward_torchscript_with_features_fx": "of one RegNet alone",
}
"""tests with a model's name that are not called, and why"""


@dataclass(frozen=True)
class Arguments:
    """Call timm's tests."""

    models: tuple[str, ...] = ()
    """names of AttNets; none given means all"""
    json: Path | None = None
    """file for the outcomes"""

    def __post_init__(self) -> None:
        if unknown := set(self.models) - set(SIZES):
            raise UserError(f"`models={sorted(unknown)[0]}` is none of {', '.join(SIZES)}")


@dataclass(frozen=True)
class Outcome:
    """What a test came to on a model: ``passed``, ``skipped`` or ``failed``, and the first line of why."""

    test: str
    model: str
    result: str
    why: str = ""


def tests_of(checkout: Path) -> dict[str, Callable[..., None]]:
    """The functions of timm's test file that take a model's name.

    Raises:
        UserError: the checkout has no such file, or none of these functions.
    """
    file = checkout / "tests" / "test_models.py"
    if not file.is_file():
        raise UserError(f"{checkout}: no checkout of timm, it has no tests/test_models.py")
    spec = importlib.util.spec_from_file_location("timm_test_models", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # marks that timm's own configuration of pytest knows
        spec.loader.exec_module(module)
    found = {name: test for name, test in vars(module).items() if name.startswith("test_") and callable(test)}
    found = {name: test for name, test in found.items() if "model_name" in test.__code__.co_varnames}
    if not found:
        raise UserError(f"{file}: no test takes `model_name`; this script knows timm 1.0")
    return found


def outcome(name: str, test: Callable[..., None], model: str) -> Outcome:
    """Call a test, with the batch size that its mark has."""
    marks: list[Any] = getattr(test, "pytestmark", [])
    sizes = [mark.args[1][0] for mark in marks if mark.name == "parametrize" and mark.args[0] == "batch_size"]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            test(model_name=model, batch_size=sizes[0])
    except pytest.skip.Exception as error:
        return Outcome(name, model, "skipped", first_line(error))
    except Exception as error:
        return Outcome(name, model, "failed", f"{type(error).__name__}: {first_line(error)}")
    return Outcome(name, model, "passed")


def run(arguments: Arguments) -> list[Outcome]:
    """Call every test that applies on every network, and print what came of it."""
    if "TIMM_CHECKOUT" not in os.environ:
        raise UserError("set the environment variable TIMM_CHECKOUT to a folder with timm's repository")
    tests = tests_of(Path(os.environ["TIMM_CHECKOUT"]))
    models = arguments.models or tuple(SIZES)
    outcomes = []
    for name, test in tests.items():
        if name not in LEFT_OUT:
            for model in models:
                outcomes.append(outcome(name, test, model))
                print(f"{outcomes[-1].result}: {name}[{model}] {outcomes[-1].why}".rstrip(), flush=True)
    kinds = ("passed", "failed", "skipped")
    counts = {name: Counter(one.result for one in outcomes if one.test == name) for name in tests}
    rows = [(f"`{name}`", *(counts[name][kind] for kind in kinds), "") for name in tests if name not in LEFT_OUT]
    rows += [(f"`{name}`", "", "", "", LEFT_OUT[name]) for name in tests if name in LEFT_OUT]
    print(f"\ntimm {timm.__version__}, {len(models)} networks\n")
    print(markdown_table(("timm's test", *kinds, "not called"), rows))
    if arguments.json:
        figures = {"timm": timm.__version__, "models": models, "left_out": LEFT_OUT,
                   "counts": {kind: sum(count[kind] for count in counts.values()) for kind in kinds},
                   "outcomes": [vars(one) for one in outcomes]}  # fmt: skip
        write_record(arguments.json, "cpu", figures)
    return outcomes


@entry_point
def main() -> None:
    with one_line_errors():
        arguments = tyro.cli(Arguments, prog="scripts/peers_timm.py")
    sys.exit(any(one.result == "failed" for one in run(arguments)))


if __name__ == "__main__":
    main()
