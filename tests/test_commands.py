"""Every command: what it loads before its flags are read, and that its flags are those that the parser has."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_commands_in_docs import KINDS

from sit.utils.flags import command_of
from sit.utils.program import NAMES, program

ROOT = Path(__file__).parent.parent
HEAVY = {"torch", "numpy", "scipy", "diffusers", "accelerate", "timm", "torchvision", "matplotlib", "sklearn", "PIL",
         "tqdm", "torchdiffeq", "torch_fidelity", "gradio"}  # fmt: skip
HELP = """
import contextlib, io, json, runpy, sys
heavy, commands = json.loads(sys.argv[1])
told = {}
for name, words in commands.items():
    sys.argv = [*words, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        try:
            run = runpy.run_path if words[0].endswith(".py") else runpy.run_module
            run(words[0], run_name="__main__", **({} if words[0].endswith(".py") else {"alter_sys": True}))
        except SystemExit as end:
            assert not end.code, (name, end.code)
    told[name] = [said.getvalue(), sorted(set(heavy) & set(sys.modules))]
print(json.dumps(told))
"""


def words_of(name: str) -> list[str]:
    """How a name of KINDS is started: a module of ``sit`` or a file, and its subcommand."""
    module, _, subcommand = name.partition(" ")
    return [module if module.startswith("sit.") else f"{module}.py", *([subcommand] if subcommand else [])]


@pytest.fixture(scope="module")
def helps() -> dict[str, tuple[str, list[str]]]:
    """Of each command, what ``--help`` prints and which heavy modules are loaded by then, all in one process."""
    commands = {name: words_of(name) for name in KINDS}
    commands |= {name: [name] for name in ("sit.train", "sit.sample", "sit.eval")}
    done = subprocess.run(
        [sys.executable, "-c", HELP, json.dumps([sorted(HEAVY), commands])], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_help_loads_nothing_heavy(helps):
    assert {name: loaded for name, (_, loaded) in helps.items() if loaded} == {}
    assert len(helps) >= 17


@pytest.mark.parametrize("name", KINDS)
def test_the_flags_are_those_of_the_parser(helps, name):
    text = helps[name][0]
    listed = set(re.findall(r"^[│ ]*(?:-\w, )?--([a-z0-9][a-z0-9-]*)", text, flags=re.MULTILINE)) - {"help"}
    known = command_of(KINDS[name], name.split()[1:]).flags
    assert {flag.removeprefix("no-") if flag not in known else flag for flag in listed} == set(known)


def test_help_of_training_is_in_groups_with_defaults(helps):
    text = helps["train"][0]
    titles = re.findall(r"^\W*(\w+) options\W*$", text, flags=re.MULTILINE)
    assert titles == [
        "data",
        "network",
        "objective",
        "meanflow",
        "alignment",
        "beginning",
        "optimization",
        "execution",
        "files",
    ]
    plain = " ".join(re.sub(r"[│╭╰─╮╯]|-{4,}", " ", text).split())
    sections = re.split(r"(?<= )(?=\w+ options --)", plain)
    (network,) = (section for section in sections if section.startswith("network options"))
    assert "--mixer STR token mixer, e.g. attention" in network and "(default: attention)" in network
    assert "--learning-rate" not in network
    assert "--seed-noise" in next(section for section in sections if section.startswith("optimization options"))


@pytest.mark.parametrize(
    "started, wanted",
    [
        ("train.py", "python eval_fid.py"),
        ("/usr/bin/sit-train", "sit-eval"),
        (str(ROOT / "sit" / "train.py"), "python -m sit.eval"),
        (str(ROOT / "sit" / "demo" / "__main__.py"), "python -m sit.eval"),
    ],
)
def test_messages_name_commands_as_this_one_was_started(monkeypatch, started, wanted):
    monkeypatch.setattr(sys, "argv", [started])
    assert program("eval_fid") == wanted and wanted in NAMES["eval_fid"]
