"""The example of docs/mixers.md as a stranger's package: built, installed, trained with and sampled from."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import numpy as np
import pytest

from sit.mixers import parse_mixers
from sit.utils.errors import UserError

ROOT = Path(__file__).parents[2]


def run(*command: object, folder: Path, **environment: str) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The folder into which pip installed the example's files, as the document has them."""
    if not any(distributions(name="pip")):  # not imported: setuptools then changes distutils under torch.compile
        pytest.skip("the package is installed by pip")
    source = tmp_path_factory.mktemp("package")
    text = (ROOT / "docs" / "mixers.md").read_text()
    blocks = dict(re.findall(r"```\w+\n# (\S+)\n(.*?)```", text, flags=re.DOTALL))
    assert set(blocks) == {"my_mixers.py", "pyproject.toml"}
    for name, content in blocks.items():
        (source / name).write_text(content)
    assert len([line for line in blocks["my_mixers.py"].splitlines() if line]) <= 15
    target = tmp_path_factory.mktemp("site")
    run("-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check",
        "--quiet", "--target", target, source, folder=source)  # fmt: skip
    return target


def test_it_is_unknown_until_it_is_installed():
    with pytest.raises(UserError, match="unknown mixer 'shift'"):
        parse_mixers("shift")


@pytest.mark.slow
def test_it_is_trained_and_sampled_from(site, tmp_path):
    run(ROOT / "train.py", "--recipe", "digits", "--model", "SiT-XS/4", "--mixer", "shift:by=1,attention",
        "--steps", 3, "--batch-size", 8, "--log-every", 1, "--preview-every", 0, "--checkpoint-every", 3,
        "--cpu-threads", 1, "--trackers", "--output-dir", tmp_path / "run",
        folder=tmp_path, PYTHONPATH=str(site))  # fmt: skip
    run(ROOT / "sample.py", "--ckpt", tmp_path / "run", "--steps", 2, "--num-samples", 3, "--out", tmp_path / "samples",
        folder=tmp_path, PYTHONPATH=str(site))  # fmt: skip
    with np.load(tmp_path / "samples" / "samples.npz") as archive:
        assert archive["arr_0"].shape == (3, 32, 32, 3)
