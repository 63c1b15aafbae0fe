"""Curves over finished evaluations, which are written here by hand."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from PIL import Image
from scipy import stats

from sit.checkpoint.load import load_for_sampling
from sit.compare.arguments import CurvesArguments as Arguments
from sit.compare.cli import main
from sit.compare.curves import curves, evaluations, read_points, seconds_of_training
from sit.metrics.report import Number, Report
from sit.metrics.work_folder import folder_for
from sit.sampling.config import SamplerConfig
from sit.sampling.guidance import GuidedModel
from sit.sampling.sampler import SAMPLERS, KeyedNoise
from sit.training.config import TrainConfig
from sit.utils.errors import UserError


def make_run(folder: Path, seed: int, mixer: str = "atconv") -> Path:
    folder.mkdir()
    config = TrainConfig(mixer=mixer, seed=seed, output_dir=str(folder))
    (folder / "config.yaml").write_text(config.to_yaml())
    rows = [{"step": 10, "loss": 1.0, "steps_per_second": 5.0}, {"step": 20, "loss": 1.0, "steps_per_second": 2.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def evaluated(work: Path, run: Path, step: int, value: float, seed: int = 0, **sampler) -> None:
    """A finished evaluation of a run's checkpoint."""
    settings = {"sampler": asdict(SamplerConfig(**sampler).resolve(False)), "labels": "balanced", "seed": seed}
    about = settings | {"network": f"{run.name} {step}"}
    source = {"checkpoint": str(run / "checkpoints" / f"step-{step:07d}"), "step": step}
    place = folder_for(work, "samples", about, source)
    numbers = [Number("FID (digits features)", value, 0.5), Number("FID at infinity (digits features)", 100.0)]
    (place / "numbers-0.json").write_text(Report("s", 100, "digits", "digits features", numbers).to_json())


def test_against_the_training_step_over_seeds(tmp_path):
    work, values = tmp_path / "work", {0: 4.0, 1: 6.0, 2: 4.5}
    for seed, value in values.items():
        run = make_run(tmp_path / f"run{seed}", seed)
        evaluated(work, run, 20, value, seed=seed)
        if seed < 2:
            evaluated(work, run, 10, 2 * value, seed=seed)
    evaluated(work, make_run(tmp_path / "other", 0, "attention"), 20, 9.0)
    found = curves(read_points(Arguments(str(work), "out")))
    assert set(found) == {"SiT-XS/2 atconv", "SiT-XS/2 attention"}
    first, last = found["SiT-XS/2 atconv"]
    assert (first["x"], first["value"], first["seeds"]) == (10, 10.0, [0, 1])
    assert last["x"] == 20 and sorted(last["values"]) == [4.0, 4.5, 6.0]
    low, high = stats.t.interval(0.95, 2, loc=last["value"], scale=stats.sem(list(values.values())))
    assert last["error over training seeds"] == pytest.approx((high - low) / 2)
    assert last["errors over samples"] == [0.5] * 3
    assert found["SiT-XS/2 attention"][0]["error over training seeds"] is None

    seconds = curves(read_points(Arguments(str(work), "out", "seconds")))["SiT-XS/2 atconv"]
    assert [point["x"] for point in seconds] == [2.0, 7.0]


def test_against_guidance_and_evaluations(tmp_path, monkeypatch, capsys):
    work, run = tmp_path / "work", make_run(tmp_path / "run", 0)
    for scale in (1.0, 1.5):
        for steps in (10, 20):
            evaluated(work, run, 20, scale * steps, cfg_scale=scale, steps=steps)
    evaluated(work, run, 20, 1.0, sampler="ode")  # adaptive: it can't be placed on the axis of evaluations
    guided = curves(read_points(Arguments(str(work), "out", "guidance")))
    assert [[point["value"] for point in line] for line in guided.values()].count([10.0, 15.0]) == 1
    assert any("sampler's steps 20" in name for name in guided)
    by_steps = curves(read_points(Arguments(str(work), "out", "evaluations")))
    assert sorted([point["x"] for point in line] for line in by_steps.values()) == [[10, 20], [10, 20]]

    words = ["curves", "--work-dir", str(work), "--out", str(tmp_path / "out"), "--against", "guidance"]
    monkeypatch.setattr("sys.argv", ["sit.compare", *words])
    main()
    assert f"curves: {tmp_path / 'out' / 'README.md'}" in capsys.readouterr().out
    text = (tmp_path / "out" / "README.md").read_text()
    assert "--against guidance" in text and "| guidance scale | FID | runs | half-width over samples |" in text
    assert Image.open(tmp_path / "out" / "curves.png").size[0] > 100
    assert json.loads((tmp_path / "out" / "curves.json").read_text())["curves"].keys() == guided.keys()


@pytest.mark.parametrize(
    "config",
    [
        SamplerConfig("sde", 10),
        SamplerConfig("sde", 10, "heun"),
        SamplerConfig("sde", 10, "heun", last_step="none"),
        *(SamplerConfig("ode", 6, method) for method in ("euler", "midpoint", "heun2", "heun3", "rk4")),
    ],
    ids=lambda config: f"{config.sampler}-{config.resolved_method}-{config.last_step}",
)
def test_network_evaluations_are_those_that_sampling_makes(checkpoint, config):
    loaded = load_for_sampling(checkpoint)
    model, noise = GuidedModel(loaded.model, torch.tensor([1]), config), KeyedNoise(0, [0], (4, 8, 8), "cpu")
    with torch.no_grad():
        SAMPLERS[config.sampler](model, loaded.transport, noise(), config, step_noise=noise, on_step=None)
    assert evaluations(asdict(config)) == model.evaluations


def test_what_can_not_be_drawn(tmp_path):
    with pytest.raises(UserError, match="`work_dir=.*none`: no such folder"):
        read_points(Arguments(str(tmp_path / "none"), "out"))
    run = make_run(tmp_path / "run", 0)
    evaluated(tmp_path / "work", run, 20, 1.0)
    with pytest.raises(UserError, match="no finished evaluation of a checkpoint with `metric=KID` .* against step"):
        read_points(Arguments(str(tmp_path / "work"), "out", metric="KID"))
    assert seconds_of_training(run, 15) == pytest.approx(2 + 2.5) and seconds_of_training(run, 21) is None
    assert evaluations(asdict(SamplerConfig("ode"))) is None
    (next((tmp_path / "work").iterdir()) / "numbers-0.json").write_text("{")
    with pytest.raises(UserError, match="has no finished evaluation"):
        read_points(Arguments(str(tmp_path / "work"), "out"))
