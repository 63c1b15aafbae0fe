"""What a page shows in a block is right: commands are accepted, by launchers too, files are there, snippets resolve.

Those commands that the embedded data is enough for run, in a shrunk form; tests/test_packaging.py runs the main job.
"""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
import shlex
import sys
from pathlib import Path

import pytest
import tyro
import yaml
from accelerate.commands.launch import launch_command_parser

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
          "for", "do", "done", "sbatch", "docker"}  # fmt: skip
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


def fenced(*languages: str) -> list[tuple[str, str]]:
    """(page, text) of all fenced blocks in one of these languages."""
    marks = "|".join(languages)
    pattern = re.compile(rf"^ *```(?:{marks})\n(.*?)^ *```", flags=re.MULTILINE | re.DOTALL)
    return [(path.relative_to(ROOT).as_posix(), text) for path in PAGES for text in pattern.findall(path.read_text())]


def fenced_lines() -> list[tuple[str, str]]:
    """(page, line) of all lines in fenced shell blocks; lines that a backslash continues are one."""
    blocks = fenced("bash", "sh", "console")
    found = [(page, line) for page, block in blocks for line in block.replace("\\\n", " ").splitlines()]
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


def test_every_block_says_its_language():
    """Shell, Python, TOML and YAML are checked here; drawings and what a program prints are text."""
    known = {"bash", "python", "toml", "yaml", "text", ""}
    found = {mark for path in PAGES for mark in re.findall(r"^ *```(\w*)$", path.read_text(), flags=re.MULTILINE)}
    assert found <= known


LAUNCHES = re.compile(r"accelerate launch\s+(?P<own>[^`\n&]*?)(?:-m\s+sit\.\w+|\b[\w/]+\.py)(?=[\s`])")


def launches(text: str) -> list[str]:
    """The words between ``accelerate launch`` and the program."""
    return [match["own"].strip() for match in LAUNCHES.finditer(text.replace("\\\n", " "))]


def test_the_launchers_own_flags_are_accelerates():
    found = {words for path in PAGES for words in launches(path.read_text())}
    assert "" in found and "--config_file docs/accelerate/8gpus.yaml" in found
    for words in found - {""}:
        arguments = launch_command_parser().parse_args([*words.replace("…", "").split(), "train.py"])
        assert arguments.training_script == "train.py", words
        assert arguments.config_file is None or (ROOT / arguments.config_file).is_file(), words


MADE = ("docs/evaluation/", "docs/digits-comparison", "docs/fashion", "docs/reliability-", "docs/digits-table.json",
        "docs/performance")  # fmt: skip
"""what commands of pages write"""


def test_files_that_fenced_commands_name_are_there():
    named = set()
    for page, line in fenced_lines():
        for word in re.findall(rf"(?<![\w/.-])(?:\.ci|docs|tests|{FOLDERS})/[\w./-]+|\b\w+\.(?:py|yml)\b", line):
            named.add((page, word))
    assert len(named) > 15
    missing = [(page, word) for page, word in named if not (ROOT / word).exists() and not word.startswith(MADE)]
    assert missing == []


def test_extras_that_pages_install_exist():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 has it")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {name for path in PAGES for name in re.findall(r'"\.\[([\w,-]+)\]"', path.read_text())}
    assert {"test", "demo", "dev", "onnx"} <= named
    assert {part for name in named for part in name.split(",")} <= set(extras)


def imported(tree: ast.AST) -> list[str]:
    """The dotted names that a program imports, from top to bottom."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def test_what_python_blocks_import_exists():
    """tests/test_pages.py, test_pipeline.py, test_packaging.py, transport/ and sampling/ run them."""
    names = {(page, name) for page, text in fenced("python") for name in imported(ast.parse(text, page))}
    assert ("README.md", "sit.SiTPipeline") in names
    unknown = []
    for page, name in names:
        try:
            pkgutil.resolve_name(name)
        except (ImportError, AttributeError):
            unknown.append(f"{page}: {name}")
    assert unknown == []


def test_toml_and_yaml_blocks_are_that():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 has it")
    assert all(tomllib.loads(text) for _, text in fenced("toml"))
    assert all(yaml.safe_load(text) for _, text in fenced("yaml"))


SHRUNK = {
    ("sample", "--ckpt RUN --steps 250"): "--steps 2",
    ("sample", "--ckpt RUN --likelihood --data digits:heldout --sampler ode --rtol 1e-5 --atol 1e-7"):
        "--num-samples 2 --rtol 0.5 --atol 0.5",
    ("sample", "--ckpt RUN --reverse --data digits --num-samples 100 --sampler ode --rtol 1e-5 --atol 1e-7"):
        "--num-samples 2 --rtol 0.5 --atol 0.5",
    ("sit.checkpoint convert", "convert runs/my-run sit.pt --layout published"): "",
    ("sit.checkpoint convert", "convert runs/my-run sit.pt --layout training"): "",
    ("sit.checkpoint inspect", "inspect FILE_OR_FOLDER"): "",
    ("train", "--data digits:train --heldout auto --heldout-every 250"):
        "--steps 2 --batch-size 4 --heldout-every 2 --heldout-images 4 --preview-every 0 --cpu-threads 1 --trackers",
}  # fmt: skip
"""commands of pages that the embedded data or a tiny checkpoint is enough for, and what is put behind their words"""
PLACES = {"RUN", "runs/my-run", "FILE_OR_FOLDER"}
STARTED = {"sample": "sit.sampling.cli", "train": "sit.training.cli",
           "sit.checkpoint convert": "sit.checkpoint.cli", "sit.checkpoint inspect": "sit.checkpoint.cli"}  # fmt: skip


@pytest.mark.parametrize("command", SHRUNK, ids=lambda command: f"{command[0].split()[-1]} {command[1][:40]}")
def test_what_the_embedded_data_is_enough_for_runs(
    command, checkpoint, fresh_accelerate, monkeypatch, tmp_path, capsys
):
    """To its end, in an empty folder, where it leaves or prints what it says."""
    program, words = command
    assert command in commands(), "no page shows it any more"
    monkeypatch.chdir(tmp_path)
    given = [str(checkpoint) if word in PLACES else word for word in words.split()]
    monkeypatch.setattr(sys, "argv", [program, *merged(given, SHRUNK[command].split())])
    importlib.import_module(STARTED[program]).main()
    made = [path for path in tmp_path.rglob("*") if path.is_file()]
    printed = capsys.readouterr().out
    if program != "sit.checkpoint inspect":
        assert made and all(path.stat().st_size for path in made if path.suffix in (".png", ".pt", ".npz", ".yaml"))
    else:
        assert made == [] and len(printed.splitlines()) > 3


def merged(words: list[str], instead: list[str]) -> list[str]:
    """``words`` without the flags that ``instead`` has, and behind them ``instead``."""
    kept, flag = [], ""
    for word in words:
        flag = word if word.startswith("--") else flag
        kept += [word] if flag not in instead else []
    return kept + instead


def test_what_these_tests_read_is_what_a_page_has():
    """A block with one mistake of each kind: the helpers see them."""
    text = "accelerate launch --num_procs 2 \\\n train.py --steps 3"
    assert launches(text) == ["--num_procs 2"]
    with pytest.raises(SystemExit):
        launch_command_parser().parse_args(["--num_procs", "2", "--nonsense", "train.py"])
    assert imported(ast.parse("from sit.model import SiTT\nimport torch.nnn")) == ["sit.model.SiTT", "torch.nnn"]
    assert merged("--a 1 2 --b 3".split(), ["--a", "4"]) == ["--b", "3", "--a", "4"]
