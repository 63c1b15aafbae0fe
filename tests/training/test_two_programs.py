"""Two programs on one folder: one works, the other says who holds it; and what else must not pass without a word."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from processes import holder_of

from sit.latents.encode import Encode, encode
from sit.metrics.work_folder import WorkDirectory
from sit.training.config import TrainConfig
from sit.training.optimization import gradient_norm
from sit.training.recipes import load_recipe
from sit.training.run_folder import new_run_folder, read_metrics
from sit.training.trainer import train
from sit.utils.errors import UserError


@pytest.fixture
def other(tmp_path):
    """Another program that holds ``tmp_path / "place"``."""
    with holder_of(tmp_path / "place") as process:
        yield process


def few(folder: Path, **changes) -> TrainConfig:
    settings = dict(
        model="SiT-XS/8", mixer="attention", steps=2, batch_size=4, log_every=1, preview_every=0, checkpoint_every=2,
        trackers=(), cpu_threads=1, output_dir=str(folder),
    )  # fmt: skip
    return dataclasses.replace(load_recipe("digits"), **settings | changes)


def test_each_program_says_who_holds_its_folder(other, tmp_path, fresh_accelerate):
    place = tmp_path / "place"
    before = sorted(path.name for path in place.iterdir())
    with pytest.raises(UserError, match=f"`output_dir={place}` is in use by process {other.pid} on"):
        train(few(place))
    with pytest.raises(UserError, match=f"`out={place}` is in use by process {other.pid} on"):
        encode(Encode(place, "digits:heldout", image_size=32))
    with (
        pytest.raises(UserError, match=f"`work_dir={place}` is in use by process {other.pid} on"),
        WorkDirectory(str(place)),
    ):
        raise AssertionError
    assert sorted(path.name for path in place.iterdir()) == before


def test_new_runs_of_one_second_take_two_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one, two = new_run_folder(None, "a"), new_run_folder(None, "a")
    assert one != two and one.is_dir() and two.is_dir()


def test_a_run_of_more_steps_is_not_taken_for_trained(tmp_path, fresh_accelerate):
    train(few(tmp_path / "run"))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "checkpoints",
        "config.yaml",
        "identity.json",
        "metrics.jsonl",
        "vae",
    ]
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(UserError, match="`steps=1`: .*step-0000002 has done 2 already; ask for more"):
        train(few(tmp_path / "run", steps=1, resume="auto"))


@pytest.mark.parametrize("limit", [None, 0.0])
def test_a_limit_of_zero_is_none(limit):
    parameter = torch.nn.Parameter(torch.zeros(3))
    parameter.grad = torch.tensor([3.0, 0.0, 4.0])
    assert gradient_norm([parameter], limit) == 5
    assert parameter.grad.tolist() == [3, 0, 4]
    with pytest.raises(UserError, match="`max_grad_norm` must be at least 0, not -1"):
        dataclasses.replace(load_recipe("digits"), max_grad_norm=-1.0)


def test_a_damaged_row_of_metrics_costs_itself_alone(tmp_path):
    rows = [json.dumps({"step": step, "loss": 0.5}).encode() for step in range(1, 5)]
    rows[1] = rows[1][:7]
    rows[2] = b"\xff\xfe" + rows[2]
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join([*rows, b"[1]", b'{"loss": 1}', b""]))
    assert [row["step"] for row in read_metrics(path)] == [1, 4]
    assert os.path.getsize(path) > 0
