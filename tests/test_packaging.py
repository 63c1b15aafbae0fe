"""One list of dependencies, one version, and an environment file that agrees with them."""

from __future__ import annotations

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

import pytest
import yaml
from packaging.specifiers import SpecifierSet

import sit

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
    """The installed distribution's is compared in tests/atconv/test_packaging.py."""
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
    archive.extractall("unpacked", filter="data")
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


def test_what_is_installed_brings_the_commands_and_runs_anywhere(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    (distribution,) = distributions(path=[str(tmp_path / "site")])
    assert isinstance(distribution, Distribution) and distribution.version == sit.__version__
    commands = {point.name: point for point in distribution.entry_points if point.group == "console_scripts"}
    files = {"sit-train": "train.py", "sit-sample": "sample.py", "sit-eval": "eval_fid.py"}
    assert set(commands) == set(files)
    for name, file in files.items():
        module, function = commands[name].value.split(":")
        assert f"from {module} import {function}\n" in (ROOT / file).read_text()
        assert callable(commands[name].load())
    words = [sys.executable, "-P", "-m", "sit.train", "--recipe", "imagenet256-xl2-400k", "--stesp", "3"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: there is no --stesp; did you mean --steps?\n")
