"""Every script runs in a short form. That of ``kill_resume.py`` is in ``tests/training/test_trainer.py``."""

from __future__ import annotations

import json
import sys

import kill_resume
import make_digits_classifier
import make_digits_vae
import pytest
import torch
from safetensors.torch import save_file

from sit.latents.vae import load_vae
from sit.utils.errors import UserError


def test_the_vae_is_made(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "vae"
    words = ["--steps", "2", "--batch-size", "4", "--widths", "4", "4", "4", "--output-dir", str(folder)]
    monkeypatch.setattr(sys, "argv", ["scripts/make_digits_vae.py", *words])
    make_digits_vae.main()
    assert sorted(path.name for path in folder.iterdir()) == sorted(make_digits_vae.FILES)
    assert tuple(load_vae(folder).config.block_out_channels) == (4, 4, 4)
    readme = (folder / "README.md").read_text()
    assert readme.startswith(make_digits_vae.TITLE) and "python scripts/make_digits_vae.py --steps 2" in readme
    printed = capsys.readouterr().out
    figures = json.loads(printed[: printed.index("}") + 1])
    assert 0.95 < figures["svm_accuracy_on_real"] <= 1
    assert {f"psnr_db_{level}" for level in make_digits_vae.NOISE_LEVELS} < set(figures)


@pytest.mark.parametrize("module", [make_digits_vae, make_digits_classifier])
def test_digits_are_moved_a_little(module):
    """Within a few pixels, never to another range; half of the VAE's not at all."""
    channels = 3 if module is make_digits_vae else 1
    images = torch.full((64, channels, 32, 32), -1.0)
    images[:, :, 12:20, 12:20] = 1
    moved = module.warp(images, torch.Generator().manual_seed(0))
    assert moved.shape == images.shape and moved.min() >= -1 and moved.max() <= 1
    assert (moved[:, :, 14:18, 14:18].mean((1, 2, 3)) > -0.5).all(), "what is in the center stays about there"
    still = (moved == images).flatten(1).all(1).sum()
    assert 20 < still < 44 if module is make_digits_vae else still == 0


def test_contents_of_files_are_told_apart(tmp_path):
    """What decides whether two ends are the same: one changed bit of a tensor, or a plain value, is seen."""
    weights = {"a": torch.arange(3.0), "b": torch.zeros(2)}
    save_file(weights, tmp_path / "one.safetensors")
    save_file(weights | {"b": torch.tensor([0.0, -0.0])}, tmp_path / "two.safetensors")
    one, two = (kill_resume.contents(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    assert set(one) == set(two) == {"/a", "/b"} and one["/a"] == two["/a"] and one["/b"] != two["/b"]
    for name, step in (("one", 1), ("two", 2)):
        torch.save({"state": [{"step": step, "moment": torch.ones(1)}]}, tmp_path / f"{name}.pt")
    one, two = (kill_resume.contents(tmp_path / f"{name}.pt") for name in ("one", "two"))
    assert {name for name in one if one[name] != two[name]} == {"/state/0/step"}


def test_kills_of_none_are_refused():
    with pytest.raises(UserError, match="`kills` must be at least 1, not 0"):
        kill_resume.Arguments(kills=0)


@pytest.mark.parametrize("same", [True, False])
def test_the_exit_status_says_whether_the_ends_are_the_same(same, monkeypatch):
    monkeypatch.setattr(kill_resume, "run", lambda arguments: same)
    monkeypatch.setattr(sys, "argv", ["scripts/kill_resume.py", "--kills", "1"])
    with pytest.raises(SystemExit) as stopped:
        kill_resume.main()
    assert stopped.value.code == (0 if same else 1)


def test_a_mistake_is_told_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scripts/kill_resume.py", "--nonsense"])
    with pytest.raises(SystemExit) as stopped:
        kill_resume.main()
    told = capsys.readouterr().err
    assert stopped.value.code == 2 and told.startswith("error: ") and told.count("\n") == 1
