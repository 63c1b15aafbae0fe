"""Curves over finished evaluations, which are written here by hand."""

from __future__ import annotations

import json
import os
import shutil
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy import stats

from sit.checkpoint.load import Loaded, load_for_sampling
from sit.checkpoint.posthoc_ema import Reconstruction
from sit.compare.arguments import CurvesArguments as Arguments
from sit.compare.cli import main
from sit.compare.curves import _names, curves
from sit.compare.points import evaluations, read_points, seconds_of_training
from sit.data.digits import digits_arrays
from sit.latents.vae import vae_fingerprint
from sit.metrics.classifier import WEIGHTS
from sit.metrics.evaluate import evaluate
from sit.metrics.extraction import folder_of
from sit.metrics.features import get_extractor
from sit.metrics.generated import GeneratedImages
from sit.metrics.identity import Identity
from sit.metrics.reference import make_reference
from sit.metrics.report import Number, Report
from sit.metrics.statistics_files import open_reference
from sit.metrics.work_folder import folder_for
from sit.sampling.config import SamplerConfig
from sit.sampling.guidance import GuidedModel
from sit.sampling.sampler import SAMPLERS, KeyedNoise
from sit.training.config import TrainConfig
from sit.utils.errors import UserError

CPU = torch.device("cpu")


def drawn(work: Path, against: str = "step") -> dict[str, list[dict]]:
    return curves(read_points(Arguments(str(work), "out", against))[0])


def make_run(folder: Path, seed: int, mixer: str = "atconv", **settings) -> Path:
    folder.mkdir()
    config = TrainConfig(mixer=mixer, seed=seed, output_dir=str(folder), **settings)
    (folder / "config.yaml").write_text(config.to_yaml())
    rows = [{"step": 10, "loss": 1.0, "steps_per_second": 5.0}, {"step": 20, "loss": 1.0, "steps_per_second": 2.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def evaluated(work: Path, run: Path, step: int, value: float, seed: int = 0, **sampler) -> None:
    """A finished evaluation of a run's checkpoint, which tells no more than is needed."""
    settings = {"sampler": asdict(SamplerConfig(**sampler).resolve(False)), "labels": "balanced", "seed": seed}
    about = settings | {"network": f"{run.name} {step}"}
    source = {"checkpoint": str(run / "checkpoints" / f"step-{step:07d}"), "step": step}
    write_numbers(folder_for(work, "samples", about, source), value)


def evaluated_with(work: Path, loaded: Loaded, value: float, **options) -> Path:
    """The file of a finished evaluation of a checkpoint, told as an evaluation tells it."""
    sampler = SamplerConfig(steps=10, cfg_scale=1.5)
    samples = GeneratedImages(loaded, 100, config=sampler, **options)
    return write_numbers(folder_of(samples, work, "samples"), value, samples.name)


def write_numbers(place: Path, value: float, samples: str = "s", reference: str = "digits", number: int = 0) -> Path:
    basis = {"reference": Identity(reference, reference)}
    fid = Number("FID (digits features)", value, 0.5, basis=basis)
    report = Report(samples, 100, reference, "digits features", [fid, Number("FID at infinity (digits)", 100.0)])
    path = place / f"numbers-{number}.json"
    path.write_text(report.to_json())
    return path


def test_against_the_training_step_over_seeds(tmp_path):
    work, values = tmp_path / "work", {0: 4.0, 1: 6.0, 2: 4.5}
    for seed, value in values.items():
        run = make_run(tmp_path / f"run{seed}", seed)
        evaluated(work, run, 20, value, seed=seed)
        if seed < 2:
            evaluated(work, run, 10, 2 * value, seed=seed)
    evaluated(work, make_run(tmp_path / "other", 0, "attention"), 20, 9.0)
    found = drawn(work)
    assert set(found) == {"SiT-XS/2 atconv", "SiT-XS/2 attention"}
    first, last = found["SiT-XS/2 atconv"]
    assert (first["x"], first["value"], first["seeds"]) == (10, 10.0, [0, 1])
    assert last["x"] == 20 and sorted(last["values"]) == [4.0, 4.5, 6.0]
    low, high = stats.t.interval(0.95, 2, loc=last["value"], scale=stats.sem(list(values.values())))
    assert last["error over training seeds"] == pytest.approx((high - low) / 2)
    assert last["errors over samples"] == [0.5] * 3
    assert found["SiT-XS/2 attention"][0]["error over training seeds"] is None

    seconds = drawn(work, "seconds")["SiT-XS/2 atconv"]
    assert [point["x"] for point in seconds] == [2.0, 7.0]


@pytest.fixture
def two_runs(checkpoint, tmp_path) -> list[dict[int, Loaded]]:
    """The checkpoints of two runs that differ by their seed alone, by step, each of other weights."""
    found = []
    for seed in range(2):
        run, loaded = make_run(tmp_path / f"run{seed}", seed), {}
        for step in (10, 20):
            place = shutil.copytree(checkpoint, run / "checkpoints" / f"step-{step:07d}")
            one = load_for_sampling(checkpoint)
            one.path, one.info = place, replace(one.info, step=step)
            for parameter in one.model.parameters():
                parameter.mul_(1 + 0.1 * (seed + step))
            loaded[step] = one
        found.append(loaded)
    return found


def test_evaluations_of_other_weights_guides_sizes_vaes_and_precisions_are_other_curves(two_runs, checkpoint, tmp_path):
    """Two training seeds and two steps of each, as evaluations tell them."""
    work, another = tmp_path / "work", load_for_sampling(checkpoint)

    def evaluate_all(value: float, **changed) -> None:
        for run in two_runs:
            for step, loaded in run.items():
                one = replace(loaded, guide={"own": run[10], "another": another}.get(changed.get("guide")))
                if "ema" in changed:  # an average is other weights, and is told to be some way off at each step
                    one.average = Reconstruction(changed["ema"], step, (), 0.001 * step)
                    one.model = deepcopy(loaded.model)
                    for parameter in one.model.parameters():
                        parameter.add_(changed["ema"])
                one.vae = changed.get("vae", one.vae)
                evaluated_with(work, one, value + step, image_size=changed.get("size"))

    evaluate_all(100.0)
    evaluate_all(200.0, ema=0.1)
    evaluate_all(300.0, ema=0.05)
    evaluate_all(400.0, guide="own")
    evaluate_all(500.0, guide="another")
    evaluate_all(600.0, size=(64, 32))
    vae = deepcopy(another.vae)
    next(vae.parameters()).data.add_(0.1)
    evaluate_all(800.0, vae=vae)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high" if before == "highest" else "highest")
        evaluate_all(700.0)
    finally:
        torch.set_float32_matmul_precision(before)
    found = drawn(work)
    by_value = {line[0]["value"] - 10: name for name, line in found.items()}
    assert sorted(by_value) == [100.0 * number for number in range(1, 9)]
    for name, line in found.items():
        first = line[0]["value"] - 10
        assert [(point["x"], point["value"]) for point in line] == [(10, first + 10), (20, first + 20)], name
        assert [point["seeds"] for point in line] == [[0, 1]] * 2, name
    assert "weights EMA of relative length 0.1," in by_value[200.0] and "guide none" in by_value[200.0]
    assert "weights EMA of relative length 0.05," in by_value[300.0]
    assert "weights as stored, guide its own step-0000010" in by_value[400.0]
    assert f"guide {checkpoint} (" in by_value[500.0]
    assert "latents [4, 16, 8]" in by_value[600.0] and "latents [4, 8, 8]" in by_value[100.0]
    assert "products in" in by_value[700.0] and f"VAE {vae_fingerprint(vae)}" in by_value[800.0]


def test_an_evaluation_that_was_made_twice(two_runs, tmp_path):
    """With other samples it counts once, whatever its hash; other numbers of them, or other runs, are other curves."""
    for seeds, kept in ((range(4), [0, 1]), (range(3, 7), [3, 3])):  # the training seed, or the lowest
        work = tmp_path / f"seeds from {seeds[0]}"
        for seed in seeds:
            for loaded in (run[step] for run in two_runs for step in run):
                evaluated_with(work, loaded, float(seed), seed=seed)
        (line,) = drawn(work).values()
        assert [(point["values"], point["seeds"]) for point in line] == [(kept, [0, 1])] * 2

    write_numbers(sorted(work.glob("samples-*"))[0], 50.0, reference="another", number=1)
    found = drawn(work)
    values = {name.split(", ")[1]: [point["values"] for point in line] for name, line in found.items()}
    assert values == {"reference digits (digits)": [[3, 3]] * 2, "reference another (another)": [[50.0]]}

    twin = make_run(tmp_path / "twin", 1)
    evaluated(tmp_path / "work", twin, 20, 1.0)
    evaluated(tmp_path / "work", Path(two_runs[1][20].path).parent.parent, 20, 2.0)
    found = drawn(tmp_path / "work")
    assert {name: line[0]["values"] for name, line in found.items()} == {
        f"SiT-XS/2 atconv, folder {tmp_path / 'twin'}": [1.0],
        f"SiT-XS/2 atconv, folder {tmp_path / 'run1'}": [2.0],
    }


def test_against_guidance_and_evaluations(tmp_path, monkeypatch, capsys):
    work, run = tmp_path / "work", make_run(tmp_path / "run", 0)
    for scale in (1.0, 1.5):
        for steps in (10, 20):
            evaluated(work, run, 20, scale * steps, cfg_scale=scale, steps=steps)
    evaluated(work, run, 20, 1.0, sampler="ode")  # adaptive: it can't be placed on the axis of evaluations
    told = [read_points(Arguments(str(work), "out", against))[1] for against in ("guidance", "evaluations")]
    assert told == [[], [f"of the evaluations in {work} 1 have no place on this axis"]]
    guided = drawn(work, "guidance")
    assert [[point["value"] for point in line] for line in guided.values()].count([10.0, 15.0]) == 1
    assert any("sampler's steps 20" in name for name in guided)
    by_steps = drawn(work, "evaluations")
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
    with pytest.raises(UserError, match="has no finished evaluation .* 1 can't be read"):
        read_points(Arguments(str(tmp_path / "work"), "out"))


def test_settings_that_differ_name_the_curves(tmp_path):
    """Four learning rates, two steps and two seeds of each: no evaluation is lost, and each rate is told."""
    work, rates = tmp_path / "work", (1e-4, 3e-4, 1e-3, 3e-3)
    for number, rate in enumerate(rates):
        for seed in range(2):
            run = make_run(tmp_path / f"run{number}{seed}", seed, learning_rate=rate)
            for step in (10, 20):
                evaluated(work, run, step, 100.0 * number + step + seed, seed=seed)
    found = drawn(work)
    assert {name: [point["values"] for point in line] for name, line in found.items()} == {
        f"SiT-XS/2 atconv, training's learning_rate {rate}": [
            [100.0 * number + step + seed for seed in range(2)] for step in (10, 20)
        ]
        for number, rate in enumerate(rates)
    }


def test_no_two_curves_have_one_name():
    alike = [{"run": "a"}] * 3 + [{"run": "a (2)"}, {"run": "b"}]
    assert _names(alike) == ["a", "a (2)", "a (3)", "a (2) (2)", "b"]
    fields = [{"run": "a", "here": 1}, {"run": "a", "here": 2, "there": 3}, {"run": "a"}]
    assert _names(fields) == ["a, here 1", "a, here 2", "a"], "what others don't have tells nothing apart"


def write_reference(kind: str, path: Path, images: np.ndarray) -> None:
    """Digits, as images, as statistics that say what they are of, or as moments that don't."""
    path.unlink(missing_ok=True)
    pixels = path if kind == "images" else path.with_name("pixels.npz")
    np.savez(pixels, arr_0=np.repeat(images[..., None], 3, axis=3))
    if kind != "images":
        extractors, making = [get_extractor("digits", CPU)], dict(keep=20, device=CPU, batch_size=64)
        make_reference(open_reference(str(pixels)), extractors, path, path.parent / "making", **making)
    if kind == "moments":
        with np.load(path) as archive:
            moments = {name: archive[name] for name in ("mu", "sigma")}
        np.savez(path, **moments)


def measured(work: Path, loaded: Loaded, reference: Path | str, *, features: str = "digits", metric: str) -> float:
    """A metric of a few samples, by an evaluation that leaves it in the work folder."""
    samples = GeneratedImages(loaded, 20, config=SamplerConfig(steps=2))
    extractor = get_extractor(features, CPU)
    report = evaluate(samples, open_reference(str(reference)), extractor, device=CPU, work_dir=str(work))
    return next(one.value for one in report.numbers if one.name.startswith(f"{metric} ("))


@pytest.mark.parametrize(
    ("kind", "metric"), [("images", "FID"), ("images", "KID"), ("statistics", "KID"), ("moments", "FID")]
)
def test_numbers_against_other_content_of_one_path_are_other_curves(kind, metric, two_runs, tmp_path):
    """Real evaluations of two steps; the reference is made again in place, then again as at first, at another path."""
    digits, work, run = digits_arrays()[0], tmp_path / "work", two_runs[0]
    values = []
    for first, steps in ((0, (10, 20)), (400, (10, 20)), (900, (20,))):
        write_reference(kind, tmp_path / "ref.npz", digits[first : first + 60])
        values.append([measured(work, run[step], tmp_path / "ref.npz", metric=metric) for step in steps])
    (tmp_path / "elsewhere").mkdir()
    write_reference(kind, tmp_path / "elsewhere" / "other.npz", digits[:60])
    values[0].append(measured(work, run[10], tmp_path / "elsewhere" / "other.npz", metric=metric))
    assert values[0][0] == pytest.approx(values[0].pop()), "the content is the same"

    found = curves(read_points(Arguments(str(work), "out", metric=metric))[0])
    lines = sorted([point["value"] for point in line] for line in found.values())
    assert [len(line) for line in lines] == [len(line) for line in sorted(values)]
    assert np.concatenate(lines) == pytest.approx(np.concatenate(sorted(values)))
    assert all(f", reference {tmp_path}" in name for name in found)


def test_features_of_a_classifier_that_was_trained_again_are_another_curve(two_runs, classifier_of_three, tmp_path):
    """In its folder; a copy of the first, under another name, is the first."""
    work, run, folder = tmp_path / "work", two_runs[0], shutil.copytree(classifier_of_three, tmp_path / "classifier")
    copy = shutil.copytree(folder, tmp_path / "copy")

    def number(step: int, classifier: Path) -> float:
        return measured(work, run[step], "digits:heldout", features=f"classifier:{classifier}", metric="FID")

    first = [number(10, folder)]
    tensors = load_file(folder / WEIGHTS)
    save_file({name: tensor * 1.5 for name, tensor in tensors.items()}, folder / WEIGHTS)
    again = [number(20, folder)]
    first.append(number(20, copy))
    found = [[point["value"] for point in line] for line in drawn(work).values()]
    assert sorted(found) == sorted([first, again])


def test_a_run_that_was_trained_again_in_its_folder(two_runs, tmp_path):
    """The newest evaluation counts, whatever the hashes, and the curve says so; a copy of the run is the same run."""
    loaded, work = two_runs[0][10], tmp_path / "work"
    before, after = (replace(loaded, model=deepcopy(loaded.model)) for _ in "12")
    next(after.model.parameters()).data.add_(1.0)
    paths = {1.0: evaluated_with(work, before, 1.0), 2.0: evaluated_with(work, after, 2.0)}
    evaluated_with(work, two_runs[0][20], 3.0)
    for newest in paths:
        for value, path in paths.items():
            os.utime(path, (10.0, 20.0 if value == newest else 10.0))
        (line,) = drawn(work).values()
        assert [point["values"] for point in line] == [[newest], [3.0]]
        assert [point["other weights before"] for point in line] == [True, False]

    work = tmp_path / "two paths"
    evaluated_with(work, before, 1.0)
    copy = shutil.copytree(Path(before.path).parent.parent, tmp_path / "copy")
    before.path = copy / Path(before.path).relative_to(tmp_path / "run0")
    evaluated_with(work, before, 2.0, seed=1)
    (line,) = drawn(work).values()
    assert [(point["values"], point["other weights before"]) for point in line] == [([1.0], False)]


def test_a_work_folder_is_read_alike_from_any_folder(two_runs, tmp_path, monkeypatch):
    """What it says of checkpoints and guides does not depend on the folder in which the samples were made."""
    loaded, guide = (replace(two_runs[0][step], path=two_runs[0][step].path) for step in (20, 10))
    here, there = tmp_path, tmp_path / "elsewhere"
    there.mkdir()
    monkeypatch.chdir(here)
    for one in (loaded, guide):
        one.path = Path(os.path.relpath(one.path, here))
    loaded.guide = guide
    work = tmp_path / "work"
    evaluated_with(work, loaded, 1.0)
    seen = []
    for folder in (here, there):
        monkeypatch.chdir(folder)
        (point,) = read_points(Arguments(str(work), "out", against="step"))[0]
        seen.append(point)
    assert seen[0] == seen[1] and seen[0].seed == 0 and seen[0].fixed["guide"] == "its own step-0000010"


def test_numbers_of_another_version_are_left_out_and_told(tmp_path):
    work, run = tmp_path / "work", make_run(tmp_path / "run", 0)
    evaluated(work, run, 20, 1.0)
    (place,) = work.iterdir()
    old = json.loads((place / "numbers-0.json").read_text())
    for number in old["numbers"]:
        number |= {"value": 5.0}
        del number["basis"]
    del old["version"]  # as the version before wrote it
    (place / "numbers-0.json").write_text(json.dumps(old))
    with pytest.raises(UserError, match="in .*work 1 have numbers of another version, .* `work_dir` make them again"):
        read_points(Arguments(str(work), "out"))

    write_numbers(place, 1.0, number=1)
    points, told = read_points(Arguments(str(work), "out"))
    assert [point.number.value for point in points] == [1.0] and not told, "they were made again"
    (place / "numbers-2.json").write_text(json.dumps(old | {"reference": "another"}))
    points, told = read_points(Arguments(str(work), "out"))
    assert [point.number.value for point in points] == [1.0] and "1 have numbers of another version" in told[0]


@pytest.mark.parametrize("shared", [True, False])
def test_an_interval_without_the_samples_spread_says_so(shared, tmp_path, monkeypatch):
    """Trainings that are evaluated with one seed of samples at step 20, each with its own at step 10."""
    work = tmp_path / "work"
    for seed in range(3):
        run = make_run(tmp_path / f"run{seed}", seed)
        evaluated(work, run, 10, 2.0 + seed, seed=seed)
        evaluated(work, run, 20, 1.0 + seed, seed=min(seed, 1) if shared else seed)
    monkeypatch.setattr("sys.argv", ["sit.compare", "curves", "--work-dir", str(work), "--out", str(tmp_path / "out")])
    main()
    told = json.loads((tmp_path / "out" / "curves.json").read_text())
    (name,), (line,) = told["curves"], told["curves"].values()
    assert [point["samples' seeds"] for point in line] == [[0, 1, 2], [0, 1, 1] if shared else [0, 1, 2]]
    assert [point["samples' spread left out"] for point in line] == [False, shared]
    assert len(told["notes"][name]) == shared
    page = (tmp_path / "out" / "README.md").read_text()
    assert ("At training step 20: different trainings share their samples' seed" in page) == shared
