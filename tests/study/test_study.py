"""A study on the embedded digits: trained, evaluated, reported; broken off and gone on with; from its JSONs alone."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from scipy import stats

from sit.checkpoint.load import load_for_sampling
from sit.metrics.evaluate import evaluate
from sit.metrics.features import get_extractor
from sit.metrics.generated import GeneratedImages
from sit.metrics.image_sets import DataImages
from sit.sampling.config import SamplerConfig
from sit.study import one_run, record, speed
from sit.study.alike import check_alike
from sit.study.cli import Arguments, run_study
from sit.study.config import Study, read_study
from sit.study.evaluation import evaluate_run
from sit.study.plan import disk_bytes, parameter_counts
from sit.study.runs import planned
from sit.study.schedule import Known
from sit.study.speed import training_step
from sit.study.values import LOSS
from sit.training.config import TrainConfig
from sit.training.recipes import from_mapping
from sit.training.run_folder import read_metrics
from sit.utils.errors import UserError

STUDY = """
recipe: digits
settings:
  model: SiT-XS/8
  data: digits:heldout
  vae: none:channels=1
  heldout: 0.1
  heldout_images: 20
  heldout_every: 2
  posthoc_ema: [0.05, 0.1]
  posthoc_ema_every: 2
  steps: 4
  batch_size: 4
  warmup_steps: 0
  log_every: 1
variants:
  - {name: attention, mixer: attention}
  - {name: depthwise & table, mixer: depthwise, positional_embedding: on}
seeds: [0, 1]
evaluate:
  reference: digits
  num_samples: 40
  every: 2
  sampler: {sampler: ode, method: euler, steps: 1}
"""
METRIC = "FID (digits features, not comparable with Inception FID)"
NAMES = [f"{name}-seed{seed}" for seed in (0, 1) for name in ("attention", "depthwise-table")]


def without_times(numbers: Path) -> dict:
    """A report's numbers but those that depend on the clock."""
    found = json.loads(numbers.read_text())
    del found["seconds"]
    return found


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """The folder of the finished study; its file stands beside."""
    AcceleratorState._reset_state(reset_partial_state=True)
    place = tmp_path_factory.mktemp("study")
    (place / "digits.yaml").write_text(STUDY)
    assert run_study(Arguments(str(place / "digits.yaml"), out=str(place / "out"), jobs=0))
    return place / "out"


def study_of(out: Path):
    return read_study(out.parent / "digits.yaml", str(out))


def test_runs_of_other_data_under_one_name_are_not_compared(done, tmp_path):
    """Images, VAE, features and reference are told by what is in them; earlier JSONs tell nothing and are taken."""
    stored = {name: json.loads((done / "runs" / f"{name}.json").read_text()) for name in NAMES}
    study = study_of(done)
    check_alike(study, stored)
    silent = json.loads(json.dumps(stored))
    silent[NAMES[2]]["trained_on"] = None
    for number in numbers_of(silent[NAMES[2]]):
        del number["basis"]
    check_alike(study, silent)
    for setting in ("data", "vae", "reference", "features", "classifier"):
        other = json.loads(json.dumps(stored))
        changed = other[NAMES[2]]
        if setting in ("data", "vae"):
            changed["trained_on"][{"data": "images"}.get(setting, setting)] = "0" * 32
        else:
            number = next(number for number in numbers_of(changed) if setting in number["basis"])
            number["basis"][setting]["content"] = "0" * 16
        said = f"{NAMES[2]}.json and .*{NAMES[0]}.json were made with different contents of `{setting}`"
        with pytest.raises(UserError, match=said):
            check_alike(study, other)
    out = tmp_path / "out"
    shutil.copytree(done / "runs", out / "runs")
    record.write(out / "runs" / f"{NAMES[2]}.json", changed)
    with pytest.raises(UserError, match="different contents of `classifier`"):
        run_study(Arguments(str(done.parent / "digits.yaml"), out=str(out), report_only=True))


def numbers_of(found: dict) -> list[dict]:
    return [number for numbers in found["evaluation"]["steps"].values() for number in numbers]


def test_evaluations_of_another_reference_are_not_added(done):
    study = study_of(done)
    run = planned(study, {})[0]
    before = json.loads(run.json(study).read_text())["evaluation"]
    lacking = before | {"steps": {"2": before["steps"]["2"]}}
    assert evaluate_run(run, study, [2, 4], torch.device("cpu"), lacking)["steps"].keys() == {"2", "4"}
    lacking["steps"]["2"][0]["basis"]["reference"]["content"] = "0" * 16
    with pytest.raises(UserError, match=f"{run.name}.json has evaluations with other contents of `reference`"):
        evaluate_run(run, study, [2, 4], torch.device("cpu"), lacking)
    shutil.rmtree(run.work(study) / "evaluation")


def test_speeds_measured_apart(done, tmp_path, monkeypatch, capsys):
    """The report takes them, says where they are from, and is refused what is no speed; others' it leaves."""
    out = tmp_path / "out"
    shutil.copytree(done / "runs", out / "runs")
    file = str(done.parent / "digits.yaml")
    seconds = iter(range(1000))
    monkeypatch.setattr("sit.utils.timing.time.perf_counter", lambda: float(next(seconds)))
    assert run_study(Arguments(file, out=str(out), measure_speed=True))
    told = json.loads((out / "speed.json").read_text())
    assert told["seconds_per_step"] == {"attention": 1.0, "depthwise & table": 1.0} and told["repeats"] == 9
    told["seconds_per_step"]["attention"] = 2.0
    (out / "speed.json").write_text(json.dumps(told))
    assert run_study(Arguments(file, out=str(out), report_only=True))
    found = json.loads((out / "report" / "numbers.json").read_text())
    assert found["seconds"]["seconds"] == 4.0 and found["seconds"]["seconds_per_step"] == told["seconds_per_step"]
    assert "measured apart" in (out / "report" / "README.md").read_text()
    told["seconds_per_step"]["another"] = 1.0  # of a variant that is not reported: no matter
    (out / "speed.json").write_text(json.dumps(told))
    run_study(Arguments(file, out=str(out), report_only=True))
    assert "speeds" in json.loads((out / "report" / "numbers.json").read_text())
    told["seconds_per_step"] = {"attention": 1.0}
    (out / "speed.json").write_text(json.dumps(told))
    run_study(Arguments(file, out=str(out), report_only=True))
    assert "speeds" not in json.loads((out / "report" / "numbers.json").read_text())
    assert "`speed.json` lacks depthwise & table: measure them with" in (out / "report" / "README.md").read_text()
    (out / "speed.json").write_text("[]")
    with pytest.raises(UserError, match=r"speed.json holds no speeds .* give `measure_speed`"):
        run_study(Arguments(file, out=str(out), report_only=True))


def test_a_speed_is_of_the_variant_as_it_was_measured(tmp_path):
    """Of one that is another by now it is lacking; of one elsewhere, trained longer or in an earlier file not."""
    out, file = tmp_path / "out", tmp_path / "digits.yaml"
    file.write_text(STUDY)
    speed.measure(read_study(file, str(out)), repeats=1)
    assert set(json.loads((out / "speed.json").read_text())["settings"]["attention"]) == set(speed.BEARING)

    def kept(text: str) -> set[str]:
        file.write_text(text)
        return set(speed.measured(read_study(file, str(out)))["seconds_per_step"])

    both = {"attention", "depthwise & table"}
    assert kept(STUDY) == both
    assert kept(STUDY.replace("steps: 4", "steps: 9\n  learning_rate: 7e-4")) == both
    assert kept(STUDY.replace("mixer: depthwise,", "mixer: atconv,")) == {"attention"}
    assert kept(STUDY.replace("{name: attention,", "{name: attention, model: SiT-XS/4,")) == {"depthwise & table"}
    assert kept(STUDY.replace("{name: attention,", "{name: attention, repa: dinov2-vit-b,")) == {"depthwise & table"}
    assert kept(STUDY.replace("batch_size: 4", "batch_size: 8")) == set()
    told = json.loads((out / "speed.json").read_text())
    for settings in told["settings"].values():
        del settings["block"]  # what an earlier program did not know was as it is now by default
        settings["vae"] = "none:channels=1"
    (out / "speed.json").write_text(json.dumps(told))
    assert kept(STUDY) == both and kept(STUDY.replace("steps: 4", "steps: 4\n  block: modern")) == set()
    del told["settings"]
    (out / "speed.json").write_text(json.dumps(told))
    assert kept(STUDY.replace("mixer: depthwise,", "mixer: atconv,")) == both
    (out / "speed.json").write_text(json.dumps(told | {"settings": {"attention": 3}}))
    with pytest.raises(UserError, match=r"speed.json holds no speeds .* give `measure_speed`"):
        kept(STUDY)


def test_whatever_a_timed_step_reads_is_kept_beside_its_speed(done, tmp_path, monkeypatch):
    """But for what leaves the step as long as it is."""
    read: set[str] = set()

    class Watched(TrainConfig):
        def __getattribute__(self, name):
            read.add(name)
            return super().__getattribute__(name)

    real = Study.config

    def config(*words):
        made = Watched(**{field.name: getattr(real(*words), field.name) for field in dataclasses.fields(TrainConfig)})
        read.clear()  # its own checks read everything
        return made

    monkeypatch.setattr(Study, "config", config)
    study = dataclasses.replace(study_of(done), out=tmp_path, variants=study_of(done).variants[:1])
    speed.measure(study, repeats=1)
    other = {"learning_rate", "betas", "weight_decay", "ema_decay", "ema_warmup", "train_eps", "sample_eps"}
    fields = {field.name for field in dataclasses.fields(TrainConfig)}
    assert read & fields - {*speed.BEARING} == other and len(speed.BEARING) == len({*speed.BEARING} & fields)


def test_a_variant_that_is_renamed_keeps_its_runs(done, tmp_path):
    """As far as its files keep their names: the report is the same but for the name."""
    shutil.copytree(done / "runs", tmp_path / "runs")
    (tmp_path / "digits.yaml").write_text(STUDY.replace("name: depthwise & table", "name: depthwise table"))
    assert run_study(Arguments(str(tmp_path / "digits.yaml"), out=str(tmp_path), report_only=True))
    told = (done / "report" / "numbers.json").read_text().replace("depthwise & table", "depthwise table")
    assert json.loads((tmp_path / "report" / "numbers.json").read_text()) == json.loads(told)
    shutil.copytree(done / "work", tmp_path / "work")
    one = tmp_path / "runs" / f"{NAMES[1]}.json"
    found = json.loads(one.read_text())
    record.write(one, found | {"evaluation": found["evaluation"] | {"steps": {}}})
    study = read_study(tmp_path / "digits.yaml", str(tmp_path))
    one_run.do(planned(study, {})[1], study)
    assert json.loads(one.read_text())["variant"] == "depthwise table", "written anew, it says what it is called now"


def test_runs_of_different_machines_are_not_compared_at_equal_seconds(done, tmp_path):
    """Not in the section, the curves or the table; speeds that were measured apart bring them back."""
    out, file = tmp_path / "out", str(done.parent / "digits.yaml")
    shutil.copytree(done / "runs", out / "runs")
    for name in NAMES[1::2]:
        one = out / "runs" / f"{name}.json"
        record.write(one, json.loads(one.read_text()) | {"machine": "another one"})
    assert run_study(Arguments(file, out=str(out), report_only=True))
    text = (out / "report" / "README.md").read_text()
    (line,) = [line for line in text.splitlines() if "equal seconds" in line]
    assert "depthwise & table: another one)" in line and "with `measure_speed`" in line
    assert not list((out / "report").glob("*-seconds.png")) and "against seconds" not in text
    (out / "speed.json").write_text(
        json.dumps(
            {
                "command": "x", "machine": "m", "date": "today", "repeats": 1,
                "seconds_per_step": {"attention": 1.0, "depthwise & table": 2.0},
            }
        )
    )  # fmt: skip
    assert run_study(Arguments(file, out=str(out), report_only=True))
    assert "## At equal seconds" in (out / "report" / "README.md").read_text()
    assert (out / "report" / "loss-seconds.png").is_file()


def test_a_report_against_another_variant(done, tmp_path):
    """Differences change their signs, the means stay, and the first report is as without it."""
    out, file = tmp_path / "out", str(done.parent / "digits.yaml")
    shutil.copytree(done / "runs", out / "runs")
    assert run_study(Arguments(file, out=str(out), report_only=True, against="depthwise-table"))
    usual, turned = (
        json.loads((out / name / "numbers.json").read_text()) for name in ("report", "report-depthwise-table")
    )
    assert usual == json.loads((done / "report" / "numbers.json").read_text())
    assert list(turned["variants"]) == ["depthwise & table", "attention"]
    assert turned["variants"] == usual["variants"]
    for metric in (LOSS, METRIC):
        ours, theirs = turned["differences"][metric]["attention"], usual["differences"][metric]["depthwise & table"]
        assert ours["value"] == pytest.approx(-theirs["value"]) and ours["error"] == pytest.approx(theirs["error"])
    assert "`, compared with depthwise & table; 4 of 4" in (out / "report-depthwise-table" / "README.md").read_text()
    shutil.rmtree(out / "report")
    for path in (out / "runs").glob("depthwise*"):
        path.unlink()
    with pytest.raises(UserError, match="`against=depthwise & table`: no run of it is done yet"):
        run_study(Arguments(file, out=str(out), report_only=True, against="depthwise & table"))
    for name in NAMES[1::2]:
        (out / "runs" / f"{name}.json").write_bytes((done / "runs" / f"{name}.json").read_bytes())
        diverged = json.loads((out / "runs" / f"{name}.json").read_text()) | {"failed": "it diverged"}
        (out / "runs" / f"{name}.json").write_text(json.dumps(diverged))
    with pytest.raises(UserError, match="`against=depthwise & table`: no run of it is done yet that did not diverge"):
        run_study(Arguments(file, out=str(out), report_only=True, against="depthwise & table"))


def test_a_step_whose_speed_is_measured_trains(done):
    """The weights move; a step of another objective is refused."""
    study = study_of(done)
    step = training_step(study.config(study.variants[0], None), torch.device("cpu"), "attention")
    network = next(cell.cell_contents for cell in step.__closure__ if hasattr(cell.cell_contents, "parameters"))
    before = [parameter.detach().clone() for parameter in network.parameters()]
    step()
    assert any(not torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))
    averages = dict(zip(step.__code__.co_freevars, step.__closure__, strict=True))["averages"].cell_contents
    assert [average.optimization_step for average in averages] == [1, 1, 1], "the plain one and two of the study's"
    part = from_mapping({"train_only": ["final_layer.linear.bias"]}, "here", study.config(study.variants[0], None))
    step = training_step(part, torch.device("cpu"), "attention")
    network = next(cell.cell_contents for cell in step.__closure__ if hasattr(cell.cell_contents, "parameters"))
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    step()
    moved = {name for name, parameter in network.named_parameters() if not torch.equal(before[name], parameter)}
    assert moved == {"final_layer.linear.bias"}, "what is frozen takes no part; its weight would move too"
    repa = from_mapping({"repa": "dinov2"}, "here", study.config(study.variants[0], None))
    with pytest.raises(UserError, match="minimizes more than the plain objective"):
        training_step(repa, torch.device("cpu"), "attention")


def test_the_disk_that_a_run_takes_is_what_was_told(done):
    """Checkpoints and snapshots; beside the weights there are configurations, and a padding of each file."""
    run = planned(study_of(done), {})[0]
    places = [done / "work" / run.name / "run" / name for name in ("checkpoints", "posthoc-ema")]
    sizes = [sum(path.stat().st_size for path in place.rglob("*") if path.is_file()) for place in places]
    assert min(sizes) > 0 and disk_bytes(run.config, *parameter_counts(run)) == pytest.approx(sum(sizes), rel=0.05)


def test_as_many_processes_as_the_study_says(done, tmp_path):
    (tmp_path / "digits.yaml").write_text(STUDY + "processes: 2\n")
    arguments = Arguments(str(tmp_path / "digits.yaml"), out=str(tmp_path / "out"), jobs=0)
    with pytest.raises(UserError, match="processes: 2, and this is a program of 1: give `jobs` of at least 1"):
        run_study(arguments)


def test_a_run_leaves_what_the_report_needs(done):
    assert sorted(path.stem for path in (done / "runs").glob("*.json")) == sorted(NAMES)
    for name in NAMES:
        found, folder = json.loads((done / "runs" / f"{name}.json").read_text()), done / "work" / name / "run"
        rows = read_metrics(folder / "metrics.jsonl")
        measured = [row["heldout_loss"] for row in rows if "heldout_loss" in row]
        assert found["heldout"]["steps"] == [2, 4] and found["heldout"]["loss"] == pytest.approx(measured, rel=1e-6)
        images = json.loads((folder / "heldout" / "step-0000004.json").read_text())["loss"]
        assert sum(map(sum, found["heldout"]["per_image"])) == pytest.approx(sum(map(sum, images)), rel=1e-4)
        assert len(images) == 20 and found["config"]["positional_embedding"] == ("auto" if "att" in name else "on")
        assert found["loss"] == [[row["step"], pytest.approx(row["loss"], rel=1e-4)] for row in rows if "loss" in row]
        paces = sorted(1 / row["steps_per_second"] for row in rows if "loss" in row)
        assert paces[1] * 0.999 <= found["speed"]["seconds_per_step"] <= paces[2] * 1.001
        assert list(found["evaluation"]["steps"]) == ["2", "4"] and found["versions"]["torch"] and found["machine"]
        assert Image.open(done / "runs" / f"{name}.png").size == (320, 64)
        assert not (done / "work" / name / "evaluation").exists()
    assert {json.loads((done / "runs" / f"{name}.json").read_text())["evaluation"]["seed"] for name in NAMES[:2]} == {
        json.loads((done / "runs" / f"{NAMES[0]}.json").read_text())["evaluation"]["seed"]
    }, "runs of a seed are evaluated with the same noise"


def test_the_report_is_what_scipy_says_of_the_jsons(done):
    found = json.loads((done / "report" / "numbers.json").read_text())
    losses = {name: json.loads((done / "runs" / f"{name}.json").read_text())["heldout"]["loss"][-1] for name in NAMES}
    first, second = ([losses[f"{name}-seed{seed}"] for seed in (0, 1)] for name in ("attention", "depthwise-table"))
    test = stats.ttest_rel(second, first)
    told = found["differences"][LOSS]["depthwise & table"]
    assert told["value"] == pytest.approx(sum(second) / 2 - sum(first) / 2)
    low, high = test.confidence_interval()
    assert told["error"] == pytest.approx((high - low) / 2) and told["p_value"] == pytest.approx(test.pvalue)
    assert told["p_value_holm"] >= told["p_value"] and METRIC in found["differences"]
    images = [json.loads((done / "runs" / f"{name}.json").read_text())["heldout"]["per_image"] for name in NAMES[:2]]
    means = [[sum(row) / 8 for row in rows] for rows in images]
    image = found["per_image"]["depthwise & table"]["0"]
    assert image["t"] == pytest.approx(stats.ttest_rel(means[1], means[0]).statistic)
    assert len(found["points"]) == 8 and found["agreement"]["all"]["value"] == pytest.approx(
        stats.spearmanr(*zip(*((point["loss"], point["fid"]) for point in found["points"]), strict=True)).statistic
    )
    text = (done / "report" / "README.md").read_text()
    for file in ("loss-seconds.png", "fid-seconds.png", "loss-by-time.png", "fid-against-loss.png", "samples.png"):
        assert f"]({file})" in text and Image.open(done / "report" / file).size[0] > 100
    assert f"{told['value']:+.4g} ± {told['error']:.2g}: {told['verdict']}" in text
    assert "4 of 4 runs are done" in text


def test_the_jsons_alone_are_enough(done, tmp_path, monkeypatch):
    """Carried to another machine, where nothing else is: nothing is trained, and the report is the same."""
    shutil.copytree(done / "runs", tmp_path / "runs")
    monkeypatch.setattr(one_run, "train", lambda config: pytest.fail("trained again"))
    assert run_study(Arguments(str(done.parent / "digits.yaml"), out=str(tmp_path), jobs=0))
    for file in ("numbers.json", "README.md", "samples.png"):
        assert (tmp_path / "report" / file).read_bytes() == (done / "report" / file).read_bytes()
    (tmp_path / "runs" / f"{NAMES[3]}.json").unlink()
    assert [run.name for run in Known(study_of(done)).state().missing(study_of(done))] == []
    left = read_study(done.parent / "digits.yaml", str(tmp_path))
    assert [run.name for run in Known(left).state().missing(left)] == [NAMES[3]]


@pytest.mark.usefixtures("fresh_accelerate")
def test_broken_off_and_gone_on_with_it_is_the_same(done, tmp_path, monkeypatch):
    """Once in a training, once before a JSON, once in an evaluation; finished runs are not trained again."""
    shutil.copytree(done / "runs", tmp_path / "runs", ignore=shutil.ignore_patterns("depthwise*seed1*"))
    arguments = Arguments(str(done.parent / "digits.yaml"), out=str(tmp_path), jobs=0)
    begun = []

    def breaking(place: str, after: int):
        """Have the ``after``-th call from now on of a function end the program, as an interrupt would."""
        module, _, name = place.rpartition(".")
        owner = __import__(module, fromlist=[name])
        real, calls = getattr(owner, name), []

        def call(*args, **kwargs):
            calls.append(1)
            if len(calls) == after:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(owner, name, call)
            run_study(arguments)

    real_train = one_run.train
    monkeypatch.setattr(one_run, "train", lambda config: begun.append(config.seed) or real_train(config))
    breaking("sit.training.trainer.learning_rate_at", 4)  # in step 4, after the checkpoint of step 2
    assert [path.name for path in (tmp_path / "work" / NAMES[3] / "run" / "checkpoints").iterdir()] == ["step-0000002"]
    breaking("sit.study.evaluation.measure", 2)
    breaking("sit.study.record.write", 1)
    threads = []
    monkeypatch.setattr("sit.study.evaluation.use_threads", threads.append)
    assert run_study(arguments)
    assert threads == [1], "an evaluation computes with the run's own"
    assert begun == [1, 1], "the training was begun, gone on with, and finished"
    assert without_times(tmp_path / "report" / "numbers.json") == without_times(done / "report" / "numbers.json")


@pytest.mark.usefixtures("fresh_accelerate")
def test_other_guidance_and_averages_are_evaluated_afterwards(done, tmp_path, monkeypatch):
    """Of runs that are done, and nothing but them; the numbers are those of an evaluation by itself."""
    shutil.copytree(done, tmp_path / "out")
    (tmp_path / "digits.yaml").write_text(
        STUDY.replace(
            "  num_samples", "  guidance: [2.0]\n  ema: [0.1]\n  autoguidance: [2.0]\n  guide_step: 2\n  num_samples"
        )
    )
    study = read_study(tmp_path / "digits.yaml", str(tmp_path / "out"))
    assert len(Known(study).state().missing(study)) == 4
    sampled = []
    monkeypatch.setattr(one_run, "train", lambda config: pytest.fail("trained again"))
    real = GeneratedImages.__init__
    monkeypatch.setattr(
        GeneratedImages, "__init__",
        lambda images, *args, **kwargs: sampled.append(kwargs["config"].cfg_scale) or real(images, *args, **kwargs),
    )  # fmt: skip
    assert run_study(Arguments(str(tmp_path / "digits.yaml"), out=str(study.out), jobs=0))
    assert sampled == [2.0, 1.0, 2.0] * 4
    before, now = (json.loads((out / "runs" / f"{NAMES[0]}.json").read_text()) for out in (done, study.out))
    assert now["evaluation"]["steps"] == before["evaluation"]["steps"] and before["evaluation"]["others"] == {}
    place = study.out / "work" / NAMES[0] / "run"
    for way, ema, scale, guide in (
        ("guidance 2", None, 2.0, None),
        ("ema 0.1", 0.1, 1.0, None),
        ("autoguidance 2 by step 2", None, 2.0, place / "checkpoints" / "step-0000002"),
    ):
        loaded = load_for_sampling(place, ema=ema, guide=guide)
        config = SamplerConfig("ode", 1, "euler", cfg_scale=scale)
        samples = GeneratedImages(loaded, 40, seed=now["evaluation"]["seed"], config=config)
        cpu = torch.device("cpu")
        report = evaluate(samples, DataImages("digits", None), get_extractor("digits", cpu), device=cpu)
        found = {number["name"]: number["value"] for number in now["evaluation"]["others"][way]}
        assert found == {number.name: pytest.approx(number.value) for number in report.numbers}
    text = (study.out / "report" / "README.md").read_text()
    for best in ("guidance", "length of the averaged weights", "guidance by a checkpoint of its own"):
        assert f"## Each variant at its best {best}\n" in text
    (tmp_path / "digits.yaml").write_text(STUDY.replace("  num_samples", "  guidance: [3.0]\n  num_samples"))
    another = read_study(tmp_path / "digits.yaml", str(study.out))
    kept = evaluate_run(planned(another, {})[0], another, [2, 4], torch.device("cpu"), now["evaluation"])["others"]
    asked = {"guidance 2", "ema 0.1", "autoguidance 2 by step 2"}
    assert set(kept) == asked | {"guidance 3"}, "what the study asks no more for stays"
    fewer = evaluate_run(planned(another, {})[0], another, [4], torch.device("cpu"), now["evaluation"])
    assert fewer["steps"] == now["evaluation"]["steps"], "of steps too"
    shutil.rmtree(study.out / "work" / NAMES[0] / "run" / "checkpoints")
    (study.out / "runs" / f"{NAMES[0]}.json").write_bytes((done / "runs" / f"{NAMES[0]}.json").read_bytes())
    run = Known(study).state().runs[0]
    with pytest.raises(UserError, match="has no checkpoint of step 2 to evaluate"):
        evaluate_run(run, study, [2, 4], torch.device("cpu"), before["evaluation"])


DIVERGING = """
recipe: digits
settings: {model: SiT-XS/8, data: digits:heldout, vae: none:channels=1, heldout: 0.1, heldout_images: 20, steps: 4,
           batch_size: 4, warmup_steps: 0, log_every: 1, non_finite_limit: 1}
variants: [{name: A, mixer: attention}]
seeds: [0, 1]
select: {seed: 0, learning_rate: [RATES]}
"""


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("rates, failed", [("1e-3, 1e38", 1), ("1e37, 1e38", 2)])
def test_a_training_that_diverges_is_a_result(tmp_path, monkeypatch, rates, failed):
    """Its JSON says so, it is not chosen, it is not trained again, and the report says how it ended."""
    (tmp_path / "diverging.yaml").write_text(DIVERGING.replace("RATES", rates))
    arguments = Arguments(str(tmp_path / "diverging.yaml"), out=str(tmp_path / "out"), jobs=0)
    assert run_study(arguments)
    runs = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "out" / "runs").glob("*.json")}
    assert sum("failed" in one for one in runs.values()) == failed and len(runs) == 4 - failed
    assert "stopped, as --non-finite-limit is 1" in runs["A-1e+38-seed0"]["failed"].replace("`", "").replace(
        "non_finite_limit", "--non-finite-limit"
    )
    numbers = (tmp_path / "out" / "report" / "numbers.json").read_text()
    found = json.loads(numbers, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert found["failed"].keys() == {name for name, one in runs.items() if "failed" in one}
    assert found["selection"]["A"]["losses"]["1e+38"] is None
    assert found["selection"]["A"]["chosen"] == ("0.001" if failed == 1 else None)
    text = (tmp_path / "out" / "report" / "README.md").read_text()
    assert "## Runs that diverged" in text and ("none is chosen" in text) == (failed == 2)
    monkeypatch.setattr(one_run, "train", lambda config: pytest.fail("trained again"))
    assert run_study(arguments)


def test_what_would_fail_after_the_training_fails_before_it(done, tmp_path, monkeypatch):
    """The reference and the classifier are opened first; another study's report is not written over."""
    monkeypatch.setattr(one_run, "train", lambda config: pytest.fail("trained"))
    for change, said in (
        (("reference: digits", f"features: digits\n  reference: {tmp_path}/nowhere"), "nowhere"),
        (("  num_samples", f"  classifier: {tmp_path}/none\n  num_samples"), "none is no classifier"),
        (("  num_samples", "  features: classifier:nothing\n  num_samples"), "nothing is no classifier"),
    ):
        (tmp_path / "digits.yaml").write_text(STUDY.replace(*change))
        with pytest.raises(UserError, match=said):
            run_study(Arguments(str(tmp_path / "digits.yaml"), out=str(tmp_path / "out"), jobs=0))
    shutil.copytree(done / "runs", tmp_path / "out" / "runs")
    shutil.copytree(done / "report", tmp_path / "out" / "report")
    (tmp_path / "another.yaml").write_text(STUDY)
    for changes in (dict(jobs=0), dict(report_only=True)):
        with pytest.raises(UserError, match="is the report of digits.yaml, not of another.yaml: give another `out`"):
            run_study(Arguments(str(tmp_path / "another.yaml"), out=str(tmp_path / "out"), **changes))


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_training_begun_with_other_settings_is_refused(done, tmp_path, monkeypatch):
    """Its evaluation failed, the file was changed since: no JSON says what the run did not have."""
    monkeypatch.setattr(one_run, "train", lambda config: pytest.fail("trained"))
    shutil.copytree(done / "work", tmp_path / "work")
    (tmp_path / "digits.yaml").write_text(STUDY.replace("  batch_size: 4", "  batch_size: 4\n  learning_rate: 0.5"))
    with pytest.raises(UserError, match=r"run was begun with learning_rate 0\.\d+, and the study says 0\.5"):
        run_study(Arguments(str(tmp_path / "digits.yaml"), out=str(tmp_path), jobs=0))


def test_a_json_of_something_else_is_refused(done, tmp_path):
    shutil.copytree(done / "runs", tmp_path / "runs")
    study = read_study(done.parent / "digits.yaml", str(tmp_path))
    run = Known(study).state().runs[0]
    kept = json.loads(run.json(study).read_text())
    for change, said in (
        ({"config": kept["config"] | {"learning_rate": 0.1}}, "was made with learning_rate 0.1, and the study says"),
        ({"format": 0}, "is not a run's JSON .*format 0.*remove it"),
        ({"config": kept["config"] | {"nonsense": 1}}, "unknown setting 'nonsense'"),
        ({"config": [1]}, "is not a run's JSON .*config of type list.*remove it"),
        ({"evaluation": "good"}, "is not a run's JSON .*evaluation of type str.*remove it"),
        (
            {"evaluation": kept["evaluation"] | {"settings": kept["evaluation"]["settings"] | {"num_samples": 7}}},
            "was evaluated with num_samples 7, and the study says 40",
        ),
    ):
        record.write(run.json(study), kept | change)
        with pytest.raises(UserError, match=said):
            Known(study).state()
    for part in ("config", "format", "heldout", "evaluation", "speed", "machine"):
        record.write(run.json(study), {name: value for name, value in kept.items() if name != part})
        with pytest.raises(UserError, match=f"is not a run's JSON .*'{part}'.*remove it"):
            Known(study).state()
    run.json(study).write_text(json.dumps(kept)[:500])
    with pytest.raises(UserError, match="is not a run's JSON"):
        Known(study).state()
    record.write(run.json(study), kept | {"config": kept["config"] | {"cpu_threads": 9, "log_every": 7}})
    os.utime(run.json(study), ns=(1, 1))  # written anew, whatever the clock's grain
    assert Known(study).state().missing(study) == [], "how a run was made does not matter"


def test_another_machines_folders_are_other_places(done, tmp_path):
    shutil.copytree(done / "runs", tmp_path / "runs")
    for place in (tmp_path / "runs").glob("*.json"):
        place.write_text(place.read_text().replace('"output_dir": "', '"output_dir": "/elsewhere'))
    (tmp_path / "digits.yaml").write_text(STUDY)
    study = read_study(tmp_path / "digits.yaml", str(tmp_path))
    assert Known(study).state().missing(study) == []
    (tmp_path / "digits.yaml").write_text(STUDY.replace("digits:heldout", "digits:train"))
    with pytest.raises(UserError, match="was made with data digits:heldout, and the study says digits:train"):
        Known(read_study(tmp_path / "digits.yaml", str(tmp_path))).state()
