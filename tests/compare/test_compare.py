"""The report of runs side by side, on two small runs."""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import tyro
from PIL import Image
from scipy import stats

from sit.checkpoint.info import CheckpointInfo
from sit.checkpoint.load import load_for_sampling
from sit.checkpoint.save import save_checkpoint
from sit.compare.compare import Arguments, command, compare, open_runs
from sit.compare.speed import measure_speed
from sit.latents.vae import DIGITS_VAE
from sit.metrics.features import FeatureWeights
from sit.metrics.report import Number, Report
from sit.model import create_model
from sit.sampling.config import SamplerConfig
from sit.sampling.guidance import GuidedModel
from sit.sampling.ode import sample_ode
from sit.sampling.sampler import KeyedNoise
from sit.training.config import TrainConfig
from sit.transport.transport import Transport
from sit.utils.errors import UserError


def make_run(folder: Path, mixer: str, steps: tuple[int, ...], **config) -> Path:
    folder.mkdir()
    settings = dict(data="digits", image_size=32, model="SiT-XS/2", mixer=mixer) | config
    (folder / "config.yaml").write_text(TrainConfig(**settings).to_yaml())
    rows = [{"step": step, "loss": 1 / step} for step in range(1, steps[-1] + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for step in steps:
        torch.manual_seed(step)
        model = create_model("SiT-XS/2", mixer=mixer, input_size=8, num_classes=10)
        info = CheckpointInfo(step, 64 * step, (32, 32), 10, [str(d) for d in range(10)], "digits", mixer)
        place = folder / "checkpoints" / f"step-{step:07d}"
        save_checkpoint(place, model=model, transport=Transport(), vae_source=DIGITS_VAE, info=info)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[str, str]:
    place = tmp_path_factory.mktemp("runs")
    return str(make_run(place / "a", "attention", (2, 4))), str(make_run(place / "b", "atconv", (4,)))


@pytest.mark.slow
def test_the_report(runs, tmp_path):
    out = tmp_path / "report"
    options = dict(num_samples=100, batch_size=50, speed_repeats=1, sampler=SamplerConfig(steps=2))
    compare(Arguments(runs, str(out), **options))
    numbers = json.loads((out / "numbers.json").read_text())["groups"]
    attention, atconv = numbers["SiT-XS/2 attention"], numbers["SiT-XS/2 atconv"]
    assert sorted(attention["metrics"]) == ["2", "4"] and sorted(atconv["metrics"]) == ["4"]
    assert attention["images_seen"] == 256
    n, c, depth = 16, 128, 6
    difference = (4 * n * c * c + 2 * n * n * c) - (2 * n * c * c + 9 * c * c + 81 * c + 9 * n * c)
    # the pooling is a product with a 9 x N matrix; the convolution of 9 taps is counted as one
    measured = attention["multiply_accumulates"] - atconv["multiply_accumulates"]
    assert measured == pytest.approx(depth * difference, rel=0.05)
    for run in (attention, atconv):
        assert all(speed > 0 for speed in run["images_per_second"].values())
    text = (out / "README.md").read_text()
    for file in re.findall(r"\]\((\S+\.png)\)", text):
        assert Image.open(out / file).size[0] > 100
    assert "FID (digits features, not comparable with Inception FID)" in text
    assert f"{attention['parameters']:,}" in text
    for kind in ("training", "sampling"):
        first, second = (run["images_per_second"][kind] for run in (attention, atconv))
        assert f"| images/s, {kind} | {first:.4g} (1.00x) | {second:.4g} ({second / first:.2f}x) |" in text


@pytest.mark.parametrize(
    "config, evaluations",
    [
        (SamplerConfig("ode", 12, "euler"), 12),
        (SamplerConfig("ode", 12, "heun2"), 24),
        (SamplerConfig("ode", 3, "rk4"), 12),
        (SamplerConfig("ode", 12, "heun2", cfg_scale=1.5), 48),
        (SamplerConfig("sde", 50), 50),
        (SamplerConfig("sde", 10, "heun"), 19),  # the last step is one evaluation
        (SamplerConfig("sde", 10, "heun", last_step="none"), 20),
        (SamplerConfig("ode"), None),
    ],
    ids=lambda value: f"{value.sampler}-{value.resolved_method}" if isinstance(value, SamplerConfig) else "",
)
def test_the_speed_of_sampling_counts_every_evaluation(checkpoint, config, evaluations, monkeypatch):
    """With a clock that goes on by a second for each row that the network is shown."""
    loaded, count = load_for_sampling(checkpoint), 16
    if evaluations is None:  # the solver decides, on the CPU for every image by itself
        models = [GuidedModel(loaded.model, torch.tensor([index % 10]), config) for index in range(count)]
        for index, model in enumerate(models):
            noise = KeyedNoise(0, [index], (4, 8, 8), "cpu")()
            with torch.no_grad():
                sample_ode(model, loaded.transport, noise, config)
        evaluations = sum(model.evaluations for model in models) / count
    seconds = [0.0]
    loaded.model.register_forward_pre_hook(lambda module, inputs: seconds.append(seconds[-1] + len(inputs[0])))

    def clock() -> float:
        seconds.append(seconds[-1] + 1e-6)  # the training is of another network
        return seconds[-1]

    monkeypatch.setattr("sit.utils.timing.time", SimpleNamespace(perf_counter=clock))
    speed = measure_speed({"network": loaded}, config, count, 2)["network"]["sampling"]
    assert speed == pytest.approx(1 / evaluations, rel=1e-4)


def test_what_is_refused(runs, classifier_of_three, tmp_path):
    with pytest.raises(UserError, match="is not a run's folder"):
        open_runs((str(tmp_path),), ())
    with pytest.raises(UserError, match="has no complete checkpoint to compare; its steps are: 2, 4"):
        open_runs((runs[0],), (3,))
    with pytest.raises(UserError, match="give at least one"):
        open_runs((), ())
    other = make_run(tmp_path / "other", "atconv", (4,), image_size=64)
    with pytest.raises(UserError, match="was trained with image_size 64 and .* with 32"):
        open_runs((runs[0], str(other)), ())
    weights = FeatureWeights("inception.pth", "dinov2.safetensors")
    for features, said in (("inception", "inception.pth are missing"), ("dinov2", "`dinov2_weights=dinov2.safetens")):
        with pytest.raises(UserError, match=said):
            compare(Arguments(runs, str(tmp_path / "no"), features=features, weights_files=weights))
    with pytest.raises(UserError, match="knows 3 classes, and the samples have 10"):
        compare(Arguments(runs, str(tmp_path / "no"), classifier=classifier_of_three))
    (tmp_path / "taken").mkdir()
    with pytest.raises(UserError, match="exists already"):
        compare(Arguments(runs, str(tmp_path / "taken"), num_samples=10, sampler=SamplerConfig(steps=2)))
    names = [run.name for run in open_runs((runs[0], runs[0]), ())]
    assert names == ["SiT-XS/2 attention (a)"] * 2
    wider = make_run(tmp_path / "wider", "attention", (4,), seed=1, batch_size=8)
    names = [run.name for run in open_runs((runs[0], str(wider)), ())]
    assert names == ["SiT-XS/2 attention (a)", "SiT-XS/2 attention (wider)"]  # other settings: no repetition


def test_seeds_are_repetitions(tmp_path, monkeypatch):
    """Means, Student's intervals and paired differences against SciPy, from evaluations that are made up."""
    paths, values = [], {"attention": [5.0, 7.0, 6.0], "atconv": [4.0, 6.5, 4.5]}
    for mixer in values:
        for seed in range(3):
            paths.append(str(make_run(tmp_path / f"{mixer}-{seed}", mixer, (2,), seed=seed)))
    calls = []

    def made_up(samples, *arguments, **options):
        calls.append(samples.name)
        mixer, seed = samples.loaded.path.parent.parent.name.split("-")
        return Report("s", 10, "r", "f", [Number("FID", values[mixer][int(seed)], 0.5), Number("Class accuracy", 0.5)])

    monkeypatch.setattr("sit.compare.compare.evaluate", made_up)
    options = dict(num_samples=20, speed_repeats=0, sampler=SamplerConfig(steps=2), work_dir=str(tmp_path / "work"))
    compare(Arguments(tuple(paths), str(tmp_path / "report"), **options))
    found = json.loads((tmp_path / "report" / "numbers.json").read_text())
    ours = found["groups"]["SiT-XS/2 atconv"]
    assert ours["seeds"] == [0, 1, 2] and ours["metrics"]["2"]["FID"]["values"] == values["atconv"]
    low, high = stats.t.interval(0.95, 2, loc=5.0, scale=stats.sem(values["atconv"]))
    assert ours["metrics"]["2"]["FID"]["value"] == pytest.approx(5.0)
    assert ours["metrics"]["2"]["FID"]["error"] == pytest.approx((high - low) / 2)
    paired = found["differences"]["SiT-XS/2 atconv"]["FID"]
    test = stats.ttest_rel(values["atconv"], values["attention"]).confidence_interval(0.95)
    assert paired["value"] - paired["error"] == pytest.approx(test.low)
    assert paired["value"] + paired["error"] == pytest.approx(test.high)
    assert "| FID | 6 ± 2.5 | 5 ± 3.3 |" in (tmp_path / "report" / "README.md").read_text()
    assert len(calls) == 6
    compare(Arguments(tuple(paths), str(tmp_path / "again"), **options))
    assert len(calls) == 6, "what is in --work-dir is made again"
    os.utime(next(Path(paths[0]).glob("checkpoints/*/transformer/*.safetensors")), ns=(0, 0))
    compare(Arguments(tuple(paths), str(tmp_path / "retrained"), **options))
    assert len(calls) == 7, "replaced weights are another evaluation, and only those"


def test_the_command_that_is_printed_makes_the_same_arguments():
    sampler = SamplerConfig(sampler="ode", method="heun2", steps=7, cfg_interval=(0.1, 0.9))
    weights = FeatureWeights(dinov2_weights="dinov2.safetensors")
    options = dict(reference="digits", at_steps=(1, 2), sampler=sampler, weights_files=weights)
    arguments = Arguments(("a b", "c"), "out", **options)
    words = shlex.split(command(arguments))
    assert words[:3] == ["python", "-m", "sit.compare"]
    assert tyro.cli(Arguments, args=words[3:]) == arguments
