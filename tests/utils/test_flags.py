"""A command line in the words that people bring: other spellings of a value, other programs' flags, slips."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest
import tyro

from sit.utils.cli import parse
from sit.utils.errors import UserError


@dataclass(frozen=True)
class Inner:
    sampler: Literal["sde", "ode"] = "sde"
    steps: int = 250
    last_step: Literal["mean", "none"] = "mean"


@dataclass(frozen=True)
class Arguments:
    labels: tuple[str, ...] = ()
    size: int | tuple[int, int] | None = None
    flip: bool = False
    compile: bool | None = None
    precision: Literal["float32", "bfloat16"] | None = None
    mixed_precision: Literal["no", "bf16", "fp16"] | None = None
    batch_size: int = 64
    limit: float | None = 1.0
    trackers: tuple[str, ...] = ("tensorboard",)
    output_dir: str | None = None
    inner: Annotated[Inner, tyro.conf.OmitArgPrefixes] = field(default_factory=Inner)


@dataclass(frozen=True)
class Positional:
    runs: tyro.conf.Positional[tuple[str, ...]]
    out: str = "here"


def read(words: str) -> Arguments:
    return parse(Arguments, "program", words.split())


@pytest.mark.parametrize(
    "words, wanted",
    [
        ("--sampler ODE --last-step Mean", {"inner": Inner("ode")}),
        ("--last-step None", {"inner": Inner(last_step="none")}),
        ("--precision bf16", {"precision": "bfloat16"}),
        ("--precision FP32", {"precision": "float32"}),
        ("--precision none", {"precision": None}),
        ("--mixed-precision bfloat16", {"mixed_precision": "bf16"}),
        ("--mixed_precision float32", {"mixed_precision": "no"}),
        ("--mixed-precision=FP16", {"mixed_precision": "fp16"}),
        ("--compile", {"compile": True}),
        ("--compile --flip", {"compile": True, "flip": True}),
        ("--no-compile --steps 3", {"compile": False, "inner": Inner(steps=3)}),
        ("--compile false", {"compile": False}),
        ("--compile None", {"compile": None}),
        ("--no-flip", {}),
        ("--limit none", {"limit": None}),
        ("--limit -1e-3", {"limit": -1e-3}),
        ("--size 32 48", {"size": (32, 48)}),
        ("--labels 1,2 three", {"labels": ("1,2", "three")}),
        ("--output-dir None", {"output_dir": None}),
        ("--output_dir GVP", {"output_dir": "GVP"}),
    ],
)
def test_what_is_understood(words, wanted):
    assert read(words) == Arguments(**wanted)


@pytest.mark.parametrize(
    "words, told",
    [
        ("--batchsize 3", "there is no --batchsize; did you mean --batch-size?"),
        ("--no-filp", "there is no --no-filp; did you mean --no-flip?"),
        ("--num_inference_steps 20", "there is no --num-inference-steps here: use --steps"),
        ("-b 64", "there is no -b here: use --batch-size"),
        ("--epochs 5", "there is no --epochs here: use --steps (in optimizer steps: epochs × images / batch size)"),
        ("--amp", "there is no --amp here: use --mixed-precision bf16"),
        ("--results-dir=x", "there is no --results-dir here: use --output-dir (the run's own folder)"),
        ("--channels-last", "there is no --channels-last here: tokens have no channel layout to choose"),
        ("--zebra stripes", "there is no --zebra; --help lists the flags"),
        ("--zebra 1 --batchsize 2", "there is no --zebra; --help lists the flags; there is no --batchsize; did"),
        ("--no-steps 3", "there is no --no-steps; did you mean --steps?"),
        ("ODE --steps 3", "ODE: write --sampler ode"),
        ("stray --steps 3", "stray: no flag stands before it"),
        ("--steps 3 4", "--steps takes 1 value, not: 3 4"),
        ("--size 3 4 5", "--size takes 2 values, not: 3 4 5"),
        ("--flip yes", "--flip takes no value, not: yes"),
        ("--labels 3 --steps 2 --labels 5", "--labels is there twice: give all its values after one"),
    ],
)
def test_what_is_not_is_told_with_what_is(words, told):
    with pytest.raises(UserError) as error:
        read(words)
    assert str(error.value).startswith(told)


def test_of_one_value_the_last_counts():
    assert read("--steps 3 --steps 4").inner.steps == 4


def test_words_without_a_flag_where_a_command_takes_them():
    assert parse(Positional, "program", ["a", "b", "--out", "there"]) == Positional(("a", "b"), "there")
    with pytest.raises(UserError, match="there is no --output-dir here: use --out"):
        parse(Positional, "program", ["a", "--output-dir", "b"])


@dataclass(frozen=True)
class Other:
    chunk: int = 1


def test_each_subcommand_has_its_flags():
    either = Annotated[Inner, tyro.conf.subcommand("inner")] | Annotated[Other, tyro.conf.subcommand("other")]
    assert parse(either, "program", ["inner", "--sampler", "ODE"]) == Inner("ode")
    assert parse(either, "program", ["other", "--chunk", "2"]) == Other(2)
    with pytest.raises(UserError, match="there is no --chunk"):
        parse(either, "program", ["inner", "--chunk", "2"])
