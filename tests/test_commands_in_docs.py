"""Commands that a page or a docstring shows are ones that the programs accept."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest
import tyro

from sit.checkpoint.cli import COMMANDS as CHECKPOINT
from sit.compare import arguments as compare
from sit.demo import arguments as demo
from sit.latents import arguments as latents
from sit.latents.cli import COMMANDS as LATENTS
from sit.metrics import arguments as metrics
from sit.sampling import arguments as sampling
from sit.study import cli as study
from sit.training.cli import TrainArguments, parse_train_arguments
from sit.utils.cli import parse

ROOT = Path(__file__).parent.parent
FOLDERS = "benchmarks|experiments|scripts"
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("docs/*/README.md")]
MODULES = [path for part in FOLDERS.split("|") for path in ROOT.glob(f"{part}/*.py")]
MODULES += ROOT.glob("sit/**/*.py")
KINDS = {
    "train": TrainArguments,
    "sample": sampling.Arguments,
    "eval_fid": metrics.Arguments,
    "eval_fid reference": metrics.ReferenceArguments,
    "sit.checkpoint convert": CHECKPOINT,
    "sit.checkpoint convert-vae": CHECKPOINT,
    "sit.checkpoint inspect": CHECKPOINT,
    "sit.compare": compare.Arguments,
    "sit.compare curves": compare.CurvesArguments,
    "sit.demo": demo.Arguments,
    "sit.latents encode": LATENTS,
    "sit.latents verify": LATENTS,
    "sit.latents measure": LATENTS,
    "sit.study": study.Arguments,
    "sit.train_classifier": metrics.ClassifierArguments,
    "sit.train_vae": latents.VAEArguments,
}
"""what each command's flags are read into"""
SAME = {"sit.train": "train", "sit.sample": "sample", "sit.eval": "eval_fid",
        "sit-train": "train", "sit-sample": "sample", "sit-eval": "eval_fid"}  # fmt: skip
OTHERS = {"pip", "conda", "git", "cd", "python3", ".", "export", "ruff", "lint-imports", "mypy", "pre-commit", "bash",
          "for", "do", "done", "sbatch"}  # fmt: skip
"""programs of fenced commands that are not ours to parse"""


OURS = re.compile(
    rf"(?:\bpython3?|\baccelerate launch\b[^`\n&]*?)\s+"
    rf"(?:(?:{FOLDERS})/(?P<script>\w+)\.py|(?P<file>train|sample|eval_fid)\.py|-m (?P<module>sit\.\w+))(?=[\s`]|$)"
    r"|(?<![\w-])(?P<installed>sit-(?:train|sample|eval))(?=[\s`]|$)"
)
SUBCOMMANDS = {name.split()[1] for name in KINDS if " " in name}


def commands_of(text: str) -> list[tuple[str, str]]:
    """(program, its words) of each that a text has in backquotes or on a line, which a backslash may continue."""
    found = []
    text = text.replace("\\\n", " ")
    for match in OURS.finditer(text):
        words = re.split(r"[`\n;|]|&&| # ", text[match.end() :], maxsplit=1)[0].split()
        name = match["script"] or match["file"] or match["module"] or match["installed"]
        name = SAME.get(name, name)
        if words[:1] and words[0] in SUBCOMMANDS and f"{name} {words[0]}" in KINDS:
            name = f"{name} {words[0]}"
            words = words if name.startswith(("sit.latents", "sit.checkpoint")) else words[1:]
        found.append((name, " ".join(words)))
    return found


def commands() -> list[tuple[str, str]]:
    """All of pages and docstrings; a name alone speaks of a program, and is no command."""
    texts = [path.read_text() for path in PAGES] + [ast.get_docstring(ast.parse(path.read_text())) for path in MODULES]
    found = {pair for text in texts for pair in commands_of(text or "")}
    return sorted((name, words) for name, words in found if words.strip(" …") and words not in SUBCOMMANDS)


@pytest.mark.parametrize(("program", "words"), commands())
def test_a_command_that_is_shown_is_accepted(program, words):
    if program == "machine_code":
        pytest.importorskip("triton", reason="Triton is not installed")
    given = [word for word in shlex.split(words, comments=True) if word != "…"]
    if program == "train":
        parse_train_arguments(given)
    elif program in KINDS:
        parse(KINDS[program], program, given)
    else:
        script = importlib.import_module(program)
        tyro.cli(getattr(script, "Arguments", None) or script.Config, args=given)


def fenced_lines() -> list[tuple[str, str]]:
    """(page, line) of all lines in fenced shell blocks; lines that a backslash continues are one."""
    found = []
    for path in PAGES:
        for block in re.findall(r"^ *```(?:bash|sh|console)\n(.*?)^ *```", path.read_text(), flags=re.M | re.S):
            found += [(path.relative_to(ROOT).as_posix(), line) for line in block.replace("\\\n", " ").splitlines()]
    return [(page, line.strip()) for page, line in found if line.strip() and not line.strip().startswith("#")]


def test_every_fenced_command_is_one_that_the_test_above_parses():
    """Or another program's, or of the tools around the code."""
    lines = fenced_lines()
    assert len(lines) > 20
    unread = []
    for page, line in lines:
        for part in re.split(r"&&|;|\|", line.partition(" # ")[0]):
            words = part.split()
            if words and words[0] not in OTHERS and not commands_of(part) and words[:3] != "python -m pytest".split():
                unread.append(f"{page}: {part.strip()}")
    assert unread == []


def test_a_wrong_command_would_be_found():
    text = "Run `accelerate launch -m sit.train --stesp 3`, or\n    sit-sample --ckpt RUN \\\n  --magic\n"
    assert commands_of(text) == [("train", "--stesp 3"), ("sample", "--ckpt RUN --magic")]
    for (name, words), told in zip(commands_of(text), ("mean --steps", "no --magic"), strict=True):
        with pytest.raises(ValueError, match=told):
            test_a_command_that_is_shown_is_accepted(name, words)
