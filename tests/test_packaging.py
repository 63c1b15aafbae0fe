"""One list of dependencies, one version, and a wheel that brings all of it and does the main job from any folder."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import warnings
import zipfile
from importlib.metadata import Distribution, distributions
from pathlib import Path

import numpy as np
import pytest
import yaml
from accelerate.commands.launch import launch_command, launch_command_parser
from packaging.specifiers import SpecifierSet
from test_commands_in_docs import commands_of, merged

import sit
from sit.mixers import parse_mixers
from sit.utils.errors import UserError

tomllib = pytest.importorskip("tomllib", reason="Python 3.11 has it")
ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_environment_file_installs_this_project():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    (python,) = (entry for entry in environment["dependencies"] if str(entry).startswith("python"))
    assert SpecifierSet(PROJECT["requires-python"]).contains(python.partition("=")[2])
    (pip,) = (entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    ((extra,),) = (re.findall(r"^-e \.\[(\w+)\]$", entry) for entry in pip)
    assert extra in PROJECT["optional-dependencies"], "all else is pyproject.toml's to list"


def test_one_version():
    """The installed distribution's is compared below."""
    assert f"version: {sit.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## {sit.__version__} " in (ROOT / "CHANGELOG.md").read_text()
    assert PROJECT["dynamic"] == ["version"] and "version" not in PROJECT


def test_the_readmes_test_command_installs_what_the_tests_need():
    readme = (ROOT / "README.md").read_text()
    assert 'pip install -e ".[test]" && python -m pytest' in readme


@pytest.mark.parametrize("kind", [DeprecationWarning, FutureWarning])
def test_deprecations_in_our_own_code_are_errors(kind):
    for module in ("sit", "sit.model", "sit.utils.files", "atconv", "atconv.module"):
        with pytest.raises(kind):
            warnings.warn_explicit("old", kind, "file.py", 1, module)
    for module in ("torch.nn", "sitter", "atconvolution"):
        warnings.warn_explicit("old", kind, "file.py", 1, module)


BUILD = """
import os, sys, tarfile
from setuptools import build_meta
sdist = build_meta.build_sdist("dist")
with tarfile.open(os.path.join("dist", sdist)) as archive:
    archive.extractall("unpacked")
os.chdir(os.path.join("unpacked", sdist.removesuffix(".tar.gz")))
build_meta.build_wheel(os.path.join("..", "..", "dist"))
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The folder of an sdist, and of the wheel that is made of it alone."""
    source = tmp_path_factory.mktemp("source")
    for name in ("sit", "atconv"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    done = subprocess.run([sys.executable, "-c", BUILD], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return source / "dist"


def files_of_the_packages() -> set[str]:
    paths = [path for name in ("sit", "atconv") for path in (ROOT / name).rglob("*")]
    return {path.relative_to(ROOT).as_posix() for path in paths if path.is_file() and path.suffix != ".pyc"}


def test_sdist_and_wheel_have_every_file_of_the_packages(built):
    (sdist,), (wheel,) = built.glob("*.tar.gz"), built.glob("*.whl")
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    with zipfile.ZipFile(wheel) as archive:
        installed = set(archive.namelist())
    wanted = files_of_the_packages()
    assert {"sit/py.typed", "sit/recipes/digits.yaml", "atconv/attnet.py"} < wanted
    assert wanted - packed == wanted - installed == set()
    assert {"pyproject.toml", "README.md", "LICENSE"} <= packed
    strays = {name for name in installed - wanted if ".dist-info/" not in name}
    assert strays == set(), "what is in no package is not installed"


@pytest.fixture(scope="module")
def site(built, tmp_path_factory) -> Path:
    """The folder into which pip installed the wheel, and the example package of docs/mixers.md as it stands there."""
    if not any(distributions(name="pip")):  # not imported: setuptools then changes distutils under torch.compile
        pytest.skip("the wheel is installed by pip")
    package, target = tmp_path_factory.mktemp("package"), tmp_path_factory.mktemp("site")
    text = (ROOT / "docs" / "mixers.md").read_text()
    blocks = dict(re.findall(r"```\w+\n# (\S+)\n(.*?)```", text, flags=re.DOTALL))
    assert set(blocks) == {"my_mixers.py", "pyproject.toml"}
    for name, content in blocks.items():
        (package / name).write_text(content)
    assert len([line for line in blocks["my_mixers.py"].splitlines() if line]) <= 15
    (wheel,) = built.glob("*.whl")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index",
               "--disable-pip-version-check", "--target", str(target), str(wheel), str(package)]  # fmt: skip
    done = subprocess.run(command, cwd=package, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return target


def run(code: str, *arguments: str, folder: Path, path: Path) -> str:
    """What a program prints that runs in ``folder`` and looks for packages in ``path`` first."""
    environment = os.environ | {"PYTHONPATH": str(path)}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def test_one_distribution_brings_both_packages_the_commands_and_the_entry_point(site):
    (distribution,) = distributions(path=[str(site)], name="sit-atconv")
    assert isinstance(distribution, Distribution) and distribution.version == sit.__version__
    points = [(point.name, point.value) for point in distribution.entry_points if point.group == "sit.mixers"]
    assert points == [("atconv", "atconv.module:ATConv")]
    owned = {file.as_posix() for file in distribution.files or ()}
    assert files_of_the_packages() <= owned
    commands = {point.name: point for point in distribution.entry_points if point.group == "console_scripts"}
    files = {"sit-train": "train.py", "sit-sample": "sample.py", "sit-eval": "eval_fid.py"}
    assert set(commands) == set(files)
    for name, file in files.items():
        module, function = commands[name].value.split(":")
        assert f"from {module} import {function}\n" in (ROOT / file).read_text()
        assert callable(commands[name].load()) and os.access(site / "bin" / name, os.X_OK)


def test_no_other_distribution_is_built_from_this_repository():
    """Two owners of one package: uninstalling either would take it from the other."""
    assert [*ROOT.glob("*/pyproject.toml"), *ROOT.glob("*/setup.*")] == []


def test_a_command_that_pip_installed_speaks_from_any_folder(site, tmp_path):
    """Found by its recipe's name; a mistake is told by the name that was typed."""
    environment = os.environ | {"PYTHONPATH": str(site)}
    words = [site / "bin" / "sit-train", "--recipe", "imagenet256-xl2-400k", "--stesp", "3"]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: there is no --stesp; did you mean --steps?\n")


ALONE = """
import json, sys
example, attnet = json.loads(sys.argv[1])
sys.modules["sit"] = sys.modules["timm"] = None  # any import of them fails
exec(example)
heavy = [name for name in ("diffusers", "torchvision", "triton") if name in sys.modules]
del sys.modules["timm"]
exec(attnet)
del sys.modules["sit"]
from sit.mixers import build_mixer, known_mixers, parse_mixers
mixer = build_mixer(*parse_mixers("atconv"), 8, 2)
import atconv
print(json.dumps([list(y.shape), heavy, list(answer.shape), known_mixers(), isinstance(mixer, atconv.ATConv),
                  atconv.__file__]))
"""
ATTNET = """
import timm, torch, atconv.attnet
model = timm.create_model("attnet_xxs", depths=(1, 1, 1, 1), num_classes=3)
answer = model(torch.zeros(2, 3, 96, 96))
"""


def test_atconv_needs_nothing_of_sit_which_finds_the_installed_one(site, tmp_path):
    """As docs/atconv.md has it: the operator with torch alone, AttNet with timm too; then the slot lists it once."""
    document = (ROOT / "docs" / "atconv.md").read_text()
    (example,) = [block.split("```")[0] for block in document.split("```python\n")[1:]]
    told = run(ALONE, json.dumps([example, ATTNET]), folder=tmp_path, path=site)
    shape, heavy, answer, names, is_it, file = json.loads(told)
    assert (shape, heavy, answer) == ([2, 96, 64], [], [2, 3])
    assert names.count("atconv") == 1 and len(names) == len(set(names)) and "shift" in names
    assert is_it and Path(file).is_relative_to(site)


SHRUNK = {
    "train": "--mixer shift:by=1,atconv --data digits:heldout --steps 2 --batch-size 8 --log-every 1 --preview-every 0 "
    "--checkpoint-every 2 --cpu-threads 1 --trackers",
    "sample": "--steps 2 --num-samples 3 --out samples",
    "eval_fid": "--steps 2 --num-samples 12 --json numbers.json",
}
"""what is put behind the README's words, of which the last counts"""
MODULES = {"train": "sit.train", "sample": "sit.sample", "eval_fid": "sit.eval"}
ONE_AFTER_ANOTHER = """
import json, runpy, sys
from pathlib import Path
for module, *words in json.loads(sys.argv[1]):
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
import sit, atconv
Path("places.json").write_text(json.dumps([sit.__file__, atconv.__file__]))
"""
"""a program, as a start takes longer than all that it does"""


def main_job() -> list[list[str]]:
    """The README's first commands as a module and its words, in their shortest form."""
    block = (ROOT / "README.md").read_text().split("```bash\n")[1].split("```")[0]
    found = commands_of(block)
    assert [name for name, _ in found] == list(MODULES)
    return [[MODULES[name], *merged(words.split(), SHRUNK[name].split())] for name, words in found]


@pytest.mark.slow
def test_the_installed_wheel_does_the_main_job(site, tmp_path, monkeypatch):
    """Training, sampling and evaluation by ``accelerate launch -m`` in a folder without the sources.

    The network has a mixer of another installed package: that of docs/mixers.md.
    """
    with pytest.raises(UserError, match="unknown mixer 'shift'"):
        parse_mixers("shift")  # here, where it is not installed
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(site))
    Path("one_after_another.py").write_text(ONE_AFTER_ANOTHER)
    words = ["--num_processes", "1", "--cpu", "-m", "one_after_another", json.dumps(main_job())]
    launch_command(launch_command_parser().parse_args(words))
    places = json.loads(Path("places.json").read_text())
    assert all(Path(place).is_relative_to(site) for place in places)
    assert yaml.safe_load((tmp_path / "runs" / "digits" / "config.yaml").read_text())["mixer"] == "shift:by=1,atconv"
    with np.load(tmp_path / "samples" / "samples.npz") as archive:
        assert archive["arr_0"].shape == (3, 32, 32, 3)
    assert json.loads((tmp_path / "numbers.json").read_text())["sample_count"] == 12
