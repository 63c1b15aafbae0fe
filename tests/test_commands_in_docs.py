"""Commands that a page or a docstring shows are ones that the programs accept."""

from __future__ import annotations

import ast
import functools
import importlib
import re
import shlex
from pathlib import Path

import pytest
import tyro

from sit.metrics import cli as metrics_cli
from sit.sampling import cli as sampling_cli
from sit.training.cli import parse_train_arguments

ROOT = Path(__file__).parent.parent
FOLDERS = "benchmarks|experiments|scripts"
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("docs/*/README.md")]
MODULES = [path for part in FOLDERS.split("|") for path in ROOT.glob(f"{part}/*.py")]
PARSERS = {
    "train": parse_train_arguments,
    "sample": lambda words: tyro.cli(sampling_cli.Arguments, args=words),
    "eval_fid": lambda words: tyro.cli(metrics_cli.Arguments, args=words),
    "eval_fid reference": lambda words: tyro.cli(metrics_cli.ReferenceArguments, args=words),
}


def commands() -> list[tuple[str, str]]:
    """(program, its arguments) of each, in backquotes or on a line of its own that a backslash may continue."""
    texts = [path.read_text() for path in PAGES] + [ast.get_docstring(ast.parse(path.read_text())) for path in MODULES]
    program = rf"(?:python|accelerate launch\b[^`\n]*?)\s+(?:(?:{FOLDERS})/(\w+)|(train|sample|eval_fid))\.py"
    found = set()
    for text in texts:
        for match in re.finditer(program + r"( reference)?(?=[\s`])([^`\n&]*)", text.replace("\\\n", " ")):
            script, command, reference, words = match.groups()
            found.add((script or command + (reference or ""), " ".join(words.split())))
    return sorted(found)


@pytest.mark.parametrize(("program", "words"), commands())
def test_a_command_that_is_shown_is_accepted(program, words):
    if program == "machine_code":
        pytest.importorskip("triton", reason="Triton is not installed")
    if (parse := PARSERS.get(program)) is None:
        script = importlib.import_module(program)
        parse = functools.partial(tyro.cli, getattr(script, "Arguments", None) or script.Config)
        parse(args=shlex.split(words, comments=True))
    else:
        parse(shlex.split(words, comments=True))
