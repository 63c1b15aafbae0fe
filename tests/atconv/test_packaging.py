"""The package `atconv` needs nothing of `sit`, and one distribution owns it and its entry point."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest

import sit

ROOT = Path(__file__).parents[2]
CODE = shutil.ignore_patterns("__pycache__")
ATTNET = """
import timm, torch, atconv.attnet
model = timm.create_model("attnet_xxs", depths=(1, 1, 1, 1), num_classes=3)
print(tuple(model(torch.zeros(2, 3, 96, 96)).shape))
"""


def run(code: str, folder: Path, path: Path) -> str:
    """What a program prints that runs in ``folder`` and looks for packages in ``path`` first."""
    environment = os.environ | {"PYTHONPATH": str(path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The folder into which pip installed this project, from a copy, so that nothing is left beside the sources."""
    if not any(distributions(name="pip")):
        pytest.skip("the project is installed by pip")
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name in ("sit", "atconv"):
        shutil.copytree(ROOT / name, source / name, ignore=CODE)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index",
               "--disable-pip-version-check", "--target", str(target), "."]  # fmt: skip
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return target


def test_one_distribution_brings_the_whole_package_and_its_entry_point(site):
    (distribution,) = distributions(path=[str(site)])
    assert (distribution.name, distribution.version) == ("sit-atconv", sit.__version__)
    points = [(point.name, point.value) for point in distribution.entry_points if point.group == "sit.mixers"]
    assert points == [("atconv", "atconv.module:ATConv")]
    wanted = {path.relative_to(ROOT) for path in (ROOT / "atconv").rglob("*") if path.suffix in (".py", ".typed")}
    assert wanted <= {path.relative_to(site) for path in (site / "atconv").rglob("*")}
    assert Path("atconv/triton/launch.py") in wanted and Path("atconv/py.typed") in wanted
    owned = {Path(file) for file in distribution.files or ()}
    assert wanted <= owned


def test_no_other_distribution_is_built_from_this_repository():
    """Two owners of one package: uninstalling either would take it from the other."""
    assert [*ROOT.glob("*/pyproject.toml"), *ROOT.glob("*/setup.*")] == []


def test_the_slot_lists_it_once_and_takes_the_installed_one(site, tmp_path):
    code = """
import json
from sit.mixers import build_mixer, known_mixers, parse_mixers
mixer = build_mixer(*parse_mixers("atconv"), 8, 2)
import atconv
print(json.dumps([known_mixers(), isinstance(mixer, atconv.ATConv), atconv.__file__]))
"""
    names, is_it, file = json.loads(run(code, tmp_path, site))
    assert names.count("atconv") == 1 and len(names) == len(set(names))
    assert is_it and Path(file).is_relative_to(site)


def test_importing_it_loads_no_heavy_library(tmp_path):
    names = ("diffusers", "timm", "sit", "torchvision", "triton")
    code = f"import sys, atconv; print([name for name in {names} if name in sys.modules])"
    assert run(code, tmp_path, ROOT) == "[]"


def test_the_folder_alone_is_enough(tmp_path):
    """As docs/atconv.md has it: the operator with torch, AttNet with timm too; nothing of ``sit`` at all."""
    shutil.copytree(ROOT / "atconv", tmp_path / "atconv", ignore=CODE)
    document = (ROOT / "docs" / "atconv.md").read_text()
    (example,) = [block.split("```")[0] for block in document.split("```python\n")[1:]]
    forbidden = "import sys\nsys.modules['sit'] = None\n"  # any import of it fails
    assert run(f"{forbidden}sys.modules['timm'] = None\n{example}print(*y.shape)", tmp_path, tmp_path) == "2 96 64"
    assert run(forbidden + ATTNET, tmp_path, tmp_path) == "(2, 3)"
