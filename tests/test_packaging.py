"""One list of dependencies, one version, and an environment file that agrees with them."""

from __future__ import annotations

import re
import warnings
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
