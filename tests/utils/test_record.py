"""The command in a record is one that can be given again."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec

import pytest

from sit.utils.record import record


@pytest.mark.parametrize(
    "spec, argv, command",
    [
        (None, ["benchmarks/speed.py", "--json", "a b.json"], "python benchmarks/speed.py --json 'a b.json'"),
        (ModuleSpec("sit.study.__main__", None), ["/x/sit/study/__main__.py", "a.yaml"], "python -m sit.study a.yaml"),
        (ModuleSpec("sit.train_vae", None), ["/x/sit/train_vae.py"], "python -m sit.train_vae"),
        (None, [""], "python"),
    ],
)
def test_command(spec, argv, command, monkeypatch):
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
    monkeypatch.setattr(sys, "argv", argv)
    assert record("cpu")["command"] == command
