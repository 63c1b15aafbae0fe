"""Every experiment runs in a short form: trained, evaluated, kept, and not done again."""

from __future__ import annotations

import dataclasses
import gzip
import importlib
import json
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from sit.checkpoint.load import load_for_sampling
from sit.eval import main as evaluate_command
from sit.latents.vae import decode, scaling, unscale_latents
from sit.metrics.image_sets import DataImages
from sit.model import create_model
from sit.sampling.config import SamplerConfig
from sit.sampling.sampler import sample
from sit.study.config import read_study
from sit.study.runs import planned, to_be_known
from sit.training.recipes import load_run_settings
from sit.transport.transport import Transport
from sit.utils.errors import UserError

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "experiments"
OTHER_FOLDERS = {"benchmarks", "scripts", "tests"}
attnet_fashion, digits_settings, digits_table, grain, meanflow, training_runs, transplant = map(
    importlib.import_module,
    ("attnet_fashion", "digits_settings", "digits_table", "grain", "meanflow", "training_runs", "transplant"),
)


@pytest.fixture(scope="module")
def fashion(tmp_path_factory) -> Path:
    """A folder as torchvision's FashionMNIST, of 40 and 20 images of noise."""
    folder = tmp_path_factory.mktemp("data")
    raw = folder / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    source = np.random.default_rng(0)
    for part, count in (("train", 40), ("t10k", 20)):
        files = {"images-idx3-ubyte": (0x803, (count, 28, 28)), "labels-idx1-ubyte": (0x801, (count,))}
        for name, (magic, shape) in files.items():
            values = np.arange(count) % 10 if len(shape) == 1 else source.integers(0, 256, shape)
            content = np.array([magic, *shape], dtype=">i4").tobytes() + values.astype(np.uint8).tobytes()
            (raw / f"{part}-{name}").write_bytes(content)
            (raw / f"{part}-{name}.gz").write_bytes(gzip.compress(content))
    return folder


def test_attnet_on_fashion(fashion, tmp_path, capsys):
    arguments = attnet_fashion.Arguments(
        data=str(fashion), out=tmp_path, epochs=1, seeds=1, batch_size=4, repeats=1, timed_batch=2, device="cpu"
    )
    attnet_fashion.run(arguments)
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report["networks"]) == {"AttNet", "ConvNeXt", "ResNet"}
    assert {"machine", "date", "command"} <= set(report)
    assert capsys.readouterr().out.count("|\n") >= 4
    before = (tmp_path / "attnet-seed0.json").stat().st_mtime_ns
    attnet_fashion.run(arguments)
    assert (tmp_path / "attnet-seed0.json").stat().st_mtime_ns == before, "what is finished is not trained again"


@pytest.mark.parametrize(
    "module, options, message",
    [
        (attnet_fashion, {"models": ("Perceptron",)}, "`models=Perceptron`: choose among AttNet, ConvNeXt, ResNet"),
        (attnet_fashion, {"epochs": 0}, "`epochs` must be at least 1, not 0"),
        (attnet_fashion, {"models": ("AttNet",) * 2}, "`models=AttNet AttNet` names a network twice"),
        (
            attnet_fashion,
            {"learning_rate": 0.0},
            "`learning_rate=0.0` and `weight_decay=0.05`: the first must be above",
        ),
        (
            attnet_fashion,
            {"weight_decay": -1.0},
            "`learning_rate=0.004` and `weight_decay=-1.0`: the first must be above",
        ),
        (meanflow, {"setting": "digits", "seeds": 1}, "`seeds` must be at least 2, for intervals, not 1"),
        (meanflow, {"setting": "digits", "ratio": 0.0}, "`ratio=0.0` leaves the plain objective no step"),
        (meanflow, {"setting": "digits", "steps": 0}, "`steps` must be at least 1, not 0"),
        (meanflow, {"setting": "digits", "many_steps": 1}, "`many_steps` must be at least 2, not 1"),
        (meanflow, {"setting": "digits", "num_samples": 1}, "`num_samples` must be at least 2, not 1"),
        (transplant, {"seeds": 0}, "`seeds` must be at least 1, not 0"),
        (transplant, {"donor_steps": 0}, "`donor_steps` must be at least 1, not 0"),
        (transplant, {"num_samples": 1}, "`num_samples` must be 0, for no FID, or at least 2, not 1"),
        (transplant, {"shares": (0.5, 1.5)}, "`shares`: each must be above 0 and at most 1"),
    ],
)
def test_what_cant_be_done_is_refused(module, options, message):
    with pytest.raises(UserError, match=message):
        module.Arguments(**options)


def test_other_settings_than_a_finished_runs_are_refused(fashion, tmp_path):
    options = dict(data=str(fashion), out=tmp_path, epochs=1, seeds=1, batch_size=4, models=("ResNet",), repeats=0)
    attnet_fashion.run(attnet_fashion.Arguments(**options, device="cpu"))
    assert json.loads((tmp_path / "report.json").read_text())["images_per_second"] is None
    with pytest.raises(UserError, match="resnet-seed0.json was made with learning_rate 0.004, not 0.1; choose another"):
        attnet_fashion.run(attnet_fashion.Arguments(**options, device="cpu", learning_rate=0.1))


@pytest.mark.parametrize("batch_size, epochs", [(41, 9), (8, 1)])
def test_too_few_steps_for_the_schedule_are_refused(fashion, tmp_path, batch_size, epochs):
    """Five of them, or none, would end in the scheduler."""
    arguments = attnet_fashion.Arguments(
        data=str(fashion), out=tmp_path, epochs=epochs, batch_size=batch_size, device="cpu"
    )
    words = f"40 images in {epochs} epochs of `batch_size={batch_size}` are fewer than 10 steps"
    with pytest.raises(UserError, match=words):
        attnet_fashion.run(arguments)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"mixer": "mamba"}, "unknown mixer 'mamba'"),
        ({"features": "classifier:nowhere"}, "nowhere"),
        ({"data": "nowhere"}, "nowhere"),
    ],
)
def test_what_a_transplant_lacks_is_told_before_the_training(
    fashion, classifier_of_three, tmp_path, monkeypatch, changes, words
):
    monkeypatch.setattr(transplant, "ensure_trained", None)  # called, it would fail
    right = dict(data=str(fashion), features=f"classifier:{classifier_of_three}")
    with pytest.raises(UserError, match=words):
        transplant.run(transplant.Arguments(out=tmp_path, **right | changes))


def test_what_meanflow_lacks_is_told_before_the_training(fashion, classifier_of_three, tmp_path, monkeypatch):
    monkeypatch.setattr(meanflow, "ensure_trained", None)  # called, it would fail
    monkeypatch.chdir(tmp_path)
    for mixer, there, words in (
        ("mamba", None, "unknown mixer 'mamba'"),
        ("atconv", None, "no such folder data"),
        ("atconv", ("data", fashion), "fashion-mnist-convnext"),
        ("atconv", ("classifiers/fashion-mnist-convnext", classifier_of_three), "fashion-mnist-resnet"),
    ):
        if there is not None:
            Path(there[0]).parent.mkdir(exist_ok=True)
            Path(there[0]).symlink_to(there[1])
        with pytest.raises(UserError, match=words):
            meanflow.run(meanflow.Arguments("fashion", out=tmp_path, mixer=mixer))


def test_interval_of_the_mean():
    """Half of Student's 95 % interval: of three values with the deviation 0.01 it is 4.303 · 0.01 / √3."""
    results = [{"accuracies": [0.1, value], "core_minutes": 1.0} for value in (0.79, 0.80, 0.81)]
    found = attnet_fashion.summary("ResNet", results)
    assert found["mean"] == pytest.approx(0.8) and found["interval"] == pytest.approx(4.3027 * 0.01 / 3**0.5, rel=1e-4)
    assert attnet_fashion.summary("ResNet", results[:1])["interval"] is None


def test_transplants_of_fashion(fashion, classifier_of_three, tmp_path, capsys, monkeypatch):
    """One step of each; then nothing is trained or sampled, and the tables are the runs' own measurements."""
    arguments = transplant.Arguments(
        data=str(fashion), out=tmp_path / "runs", json=tmp_path / "found.json", seeds=2, steps=2, donor_steps=3,
        shares=(0.5,), image_size=8, batch_size=4, heldout_images=2, num_samples=12,
        features=f"classifier:{classifier_of_three}",
    )  # fmt: skip
    transplant.run(arguments)
    record = json.loads((tmp_path / "found.json").read_text())
    assert {"machine", "date", "command", "found", "needed"} <= set(record)
    found = record["found"]["1"]
    runs = tmp_path / "runs" / "seed1"
    measured = {
        place.name: [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()][-1]
        for place in runs.iterdir()
    }
    assert {name: row["step"] for name, row in measured.items()} == {
        "donor": 3, "scratch": 2, "transplant-0.5": 1, "transplant-distilled-0.5": 1
    }  # fmt: skip
    by_folder = {
        "donor": found["donor"], "scratch": found["scratch"], "transplant-0.5": found["transplant"]["0.5"],
        "transplant-distilled-0.5": found["transplant, distilled"]["0.5"],
    }  # fmt: skip
    assert {name: one["heldout_loss"] for name, one in by_folder.items()} == {
        name: row["heldout_loss"] for name, row in measured.items()
    }
    own = [json.loads((runs / name / "identity.json").read_text()) for name in measured if "transplant" in name]
    assert all(each["donor"] for each in own) and sum(each["teacher"] is not None for each in own) == 1
    printed = capsys.readouterr().out
    values = [
        record["found"][seed]["donor"]["heldout_loss"] - record["found"][seed]["scratch"]["heldout_loss"]
        for seed in "01"
    ]
    half = stats.t.ppf(0.975, 1) * abs(values[0] - values[1]) / 2
    assert f"{sum(values) / 2:+.4f} ± {half:.4f}" in printed.partition("FID after")[0]
    losses = [record["found"][seed]["donor"]["heldout_loss"] for seed in "01"]
    half = stats.t.ppf(0.975, 1) * abs(losses[0] - losses[1]) / 2
    assert f"| {sum(losses) / 2:.4f} ± {half:.4f} |" in printed
    assert "FID after" in printed and found["donor"]["fid"] > 0
    values = [
        of["transplant, distilled"]["0.5"]["heldout_loss"] - of["transplant"]["0.5"]["heldout_loss"]
        for of in record["found"].values()
    ]
    half = stats.t.ppf(0.975, 1) * abs(values[0] - values[1]) / 2
    assert f"| 0.5 | {sum(values) / 2:+.4f} ± {half:.4f} |" in printed.partition("Distilled less")[2]
    monkeypatch.setattr(training_runs, "train", None)  # called, it would fail
    monkeypatch.setattr(transplant.GeneratedImages, "batch", None)
    transplant.run(arguments)
    assert capsys.readouterr().out.splitlines()[-6:] == printed.splitlines()[-6:]
    with pytest.raises(UserError, match="donor was made with batch_size 4, not 8; choose another `out`"):
        transplant.run(dataclasses.replace(arguments, batch_size=8))
    without = dataclasses.replace(arguments, num_samples=0, seeds=1)
    transplant.run(without)
    assert "FID" not in capsys.readouterr().out
    assert json.loads((tmp_path / "found.json").read_text())["found"]["0"]["donor"]["fid"] is None


def test_one_step_against_many_on_the_digits(tmp_path, capsys, monkeypatch):
    """A step or two of each objective; the table's means, intervals and choice are those of the JSON's numbers."""
    arguments = meanflow.Arguments(
        "digits", out=tmp_path / "runs", json=tmp_path / "found.json", seeds=2, steps=1, num_samples=10, many_steps=2
    )
    meanflow.run(arguments)
    record, printed = json.loads((tmp_path / "found.json").read_text()), capsys.readouterr().out
    steps = {name: load_run_settings(tmp_path / "runs" / f"{name}-seed1").steps for name in ("meanflow", "plain")}
    assert steps == {"meanflow": 1, "plain": 2}
    fids = {
        name: [record["found"][seed]["ways"][name]["fid"] for seed in "01"] for name in record["found"]["0"]["ways"]
    }
    one = {"plain, euler, 1 step": 1}
    two = [
        "plain, euler, 2 steps",
        "plain, midpoint, 1 step",
        "plain, heun2, 1 step",
        "plain, euler, 1 step, guidance 2",
    ]
    assert {*one, *two, "plain, rk4, 1 step", "plain, SDE, 2 steps", "MeanFlow, 4 steps"} <= set(fids)
    assert not any("heun3" in name for name in fids), "three evaluations are none of those allowed"
    shown = printed.partition("All solvers")[0]
    best = min((name for name in [*two, "plain, SDE, 2 steps"]), key=lambda name: sum(fids[name]))
    half = stats.t.ppf(0.975, 1) * abs(fids[best][0] - fids[best][1]) / 2
    assert f"| {best} | {sum(fids[best]) / 2:.2f} ± {half:.2f} |" in shown
    differences = [ours - theirs for ours, theirs in zip(fids["MeanFlow, 2 steps"], fids[best], strict=True)]
    half = stats.t.ppf(0.975, 1) * abs(differences[0] - differences[1]) / 2
    assert f"{sum(differences) / 2:+.2f} ± {half:.2f}" in shown
    monkeypatch.setattr(training_runs, "train", None)  # called, it would fail
    monkeypatch.setattr(meanflow.GeneratedImages, "batch", None)
    meanflow.run(arguments)
    assert capsys.readouterr().out == printed[printed.index("seed 0") :]


def test_the_seconds_of_a_training_are_those_of_its_steps(tmp_path, monkeypatch):
    """At 10 and at 2 steps a second a step takes 0.1 and 0.5 s, not their count over the mean pace."""
    arguments = meanflow.Arguments("digits", out=tmp_path, seeds=2, steps=20, ratio=2.0)

    def logged(config, folder):
        folder.mkdir()
        rows = [(10, 10.0), (config.steps, 2.0)]
        text = [json.dumps({"step": step, "steps_per_second": pace}) for step, pace in rows]
        (folder / "metrics.jsonl").write_text("\n".join(text) + "\n")

    monkeypatch.setattr(meanflow, "ensure_trained", logged)
    monkeypatch.setattr(meanflow, "evaluated", lambda *arguments: {})
    found = meanflow.of_seed(arguments, 0)
    assert found["seconds"] == pytest.approx({"meanflow": 10 / 10 + 10 / 2, "plain": 10 / 10 + 30 / 2})


def test_solvers_are_allowed_the_evaluations_that_they_count():
    """Counted as the network is called, with rows of both halves of guidance."""
    for way in meanflow.plain_ways(5, 2.0):
        calls = []

        def velocity(x, t, y, calls=calls):
            calls.append(len(x))
            return torch.zeros_like(x)

        velocity.null_label = 10
        sample(velocity, Transport(), torch.zeros(3, 4, 2, 2), torch.arange(3), way.config)
        assert sum(calls) == 3 * way.evaluations, way.name


def test_the_share_that_a_transplant_needs():
    losses = {"0.1": 0.9, "0.2": 0.5, "0.3": 0.6, "0.5": 0.4}
    assert [transplant.share_needed(losses, target) for target in (0.5, 0.45, 0.3)] == [0.2, 0.5, None]


@pytest.mark.parametrize(
    "name", ["attnet_fashion", "digits_settings", "digits_table", "gpu_half_hour", "meanflow", "transplant"]
)
def test_every_experiment_runs_by_its_path(name, monkeypatch, capsys):
    """With its own folder alone beside the packages, as ``python experiments/NAME.py`` has it."""
    monkeypatch.setattr(sys, "path", [path for path in sys.path if Path(path).name not in OTHER_FOLDERS])
    monkeypatch.setattr(sys, "argv", [f"experiments/{name}.py", "--nonsense"])
    for other, module in list(sys.modules.items()):  # what other tests imported from there must not be found either
        if Path(getattr(module, "__file__", None) or ".").parent in {
            FOLDER,
            *(ROOT / folder for folder in OTHER_FOLDERS),
        }:
            monkeypatch.delitem(sys.modules, other)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    assert stopped.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and told.count("\n") == 1


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_study_can_be_planned(path):
    """Its runs are trainings that fit together, the first ones those that decide, and a command does it."""
    study = read_study(path)
    runs = planned(study, {})
    pixels = study.recipe == "fashion-mnist-pixels"
    assert all(run.config.heldout == ("fashion-mnist-test:data" if pixels else "none") for run in runs)
    if study.select is not None:
        assert len(runs) == len(study.variants) * len(study.select.choices)
        seeds = sum(len(variant.seeds or study.seeds) for variant in study.variants)
        assert len(runs) + to_be_known(study, {}) == len(runs) + seeds - len(study.variants)
    for run in {run.variant: run for run in planned(study, {variant.name: 0 for variant in study.variants})}.values():
        with torch.device("meta"):
            network = create_model(run.config.model, **run.config.network_options((1, 32, 32), 10))
        assert network.grid == (16, 16)
    (command,) = re.findall(r"python -m sit\.study (\S+)(?= *(?:--jobs 2)?\n)", path.read_text())
    assert ROOT / command == path


def test_digits_table(checkpoint, tmp_path, capsys):
    path = tmp_path / "table.json"
    digits_table.run(digits_table.Arguments((str(checkpoint),), 20, path, SamplerConfig(steps=2)))
    found = json.loads(path.read_text())
    assert len(found["reports"]) == 3 and {"machine", "date", "command"} <= set(found)
    assert capsys.readouterr().out.count("| atconv, ") == 2


def test_grain(tmp_path, capsys):
    """Noise has the spread that was asked for; tiles are the image's own, and as many as asked are elsewhere."""
    images = DataImages("digits", 32)
    before = images.batch(np.arange(50)).float()
    middle = (before > 60) & (before < 195)  # where nothing is clamped
    noise = (grain.Spoiled(images, 8.0, 0).batch(np.arange(50)).float() - before)[middle]
    assert noise.std() == pytest.approx(8, rel=0.03) and abs(noise.mean()) < 0.3
    exchanged = grain.Spoiled(images, 0.0, 4).batch(np.arange(50)).float()
    assert torch.equal(exchanged.flatten(1).sort().values, before.flatten(1).sort().values)
    differ = (exchanged != before).any(1).unfold(1, 8, 8).unfold(2, 8, 8).flatten(3).any(3).flatten(1).sum(1)
    assert differ.max() == 4 and torch.equal(exchanged, grain.Spoiled(images, 0.0, 4).batch(np.arange(50)).float())
    path = tmp_path / "grain.json"
    settings = dict(data="digits", reference="digits", features="digits", num_samples=40, grain=(8.0,), tiles=(16,))
    grain.run(grain.Arguments(**settings, json=path))
    found = json.loads(path.read_text())
    assert [(row["grain"], row["tiles"]) for row in found["rows"]] == [(0, 0), (8, 0), (0, 16)]
    assert found["rows"][2]["fid"] > found["rows"][0]["fid"] > 0 and {"machine", "date", "command"} <= set(found)
    assert capsys.readouterr().out.count("\n| ") == 3
    for wrong in (dict(image_size=30), dict(tiles=(17,))):
        with pytest.raises(UserError, match="must be a multiple of 8|can be exchanged"):
            grain.Arguments(**wrong)


def test_gray_levels_that_are_cut_off(checkpoint):
    """As REPA has them: 255·(x + 1)/2 without what is behind the point."""
    loaded = load_for_sampling(checkpoint)
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        pixels = loaded.vae.decode(unscale_latents(latents, scaling(loaded.vae.config))).sample
    expected = (255 * (pixels.double() + 1) / 2).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    rounded = decode(loaded.vae, latents)
    with digits_settings.cutting(loaded):
        found = decode(loaded.vae, latents)
    assert (found != expected).float().mean() < 1e-3 and (found != rounded).float().mean() > 0.2
    assert torch.equal(decode(loaded.vae, latents), rounded)


def test_digits_settings(checkpoint, tmp_path, capsys, monkeypatch):
    """Each setting's samples are those of eval_fid.py with its flags; differences are to the row's own base."""
    some = [digits_settings.PLAIN, "labels at random", digits_settings.GUIDED, "guidance of 1.5, all channels"]
    monkeypatch.setattr(digits_settings, "SETTINGS", {name: digits_settings.SETTINGS[name] for name in some})
    path, report = tmp_path / "settings.json", tmp_path / "report.json"
    digits_settings.run(digits_settings.Arguments(str(checkpoint), num_samples=40, steps=5, json=path))
    found = json.loads(path.read_text())["found"]
    flags = ["--label-order", "uniform", "--steps", "5", "--num-samples", "40", "--json", str(report)]
    monkeypatch.setattr(sys, "argv", ["eval_fid.py", "--ckpt", str(checkpoint), "--reference", "digits", *flags])
    evaluate_command()
    fid = json.loads(report.read_text())["numbers"][0]
    assert found["labels at random"]["fid"]["value"] == pytest.approx(fid["value"])
    for name, base in (("labels at random", some[0]), (some[2], some[0]), (some[3], some[2])):
        values = [found[one]["fid"]["value"] for one in (base, name)]
        pairs = np.subtract(*(found[one]["fid"]["replicates"] for one in (name, base)))
        told = found[name]["difference"]
        assert told["value"] == pytest.approx(values[1] - values[0])
        low, high = stats.ttest_1samp(pairs, 0).confidence_interval()
        assert told["error"] == pytest.approx((high - low) / 2)
    assert f"(to {digits_settings.GUIDED})" in capsys.readouterr().out
    assert digits_settings.config_of(digits_settings.Setting({"steps": 1 / 5}), 100).steps == 20
    with pytest.raises(UserError, match="fewer than 40"):
        digits_settings.Arguments(str(checkpoint), num_samples=39)
