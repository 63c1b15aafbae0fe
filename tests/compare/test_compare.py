"""The report of runs side by side, on two small runs."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import tyro
from PIL import Image
from processes import Connected
from scipy import stats

from sit.checkpoint.info import CheckpointInfo
from sit.checkpoint.load import Loaded, load_for_sampling
from sit.checkpoint.save import save_checkpoint
from sit.checkpoint.snapshots import save_snapshot
from sit.compare.arguments import Arguments
from sit.compare.compare import command, compare
from sit.compare.report import _differences, markdown
from sit.compare.runs import grouped, open_runs
from sit.compare.speed import gradient_pass, measure_speed
from sit.latents.encode import Encode, encode
from sit.latents.vae import DIGITS_VAE
from sit.metrics import cli as eval_fid
from sit.metrics import extraction
from sit.metrics.arguments import FeatureWeights
from sit.metrics.generated import GeneratedImages
from sit.metrics.report import Number, Report
from sit.model import SiT, create_model
from sit.sampling.config import SamplerConfig
from sit.sampling.guidance import GuidedModel
from sit.sampling.ode import sample_ode
from sit.sampling.sampler import KeyedNoise
from sit.training.config import TrainConfig
from sit.training.meanflow import make_meanflow
from sit.transport.transport import Transport
from sit.utils.errors import UserError

ROOT = Path(__file__).parents[2]


def make_run(folder: Path, mixer: str, steps: tuple[int, ...], **config) -> Path:
    folder.mkdir(parents=True)
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


@pytest.fixture
def without_plots(monkeypatch) -> None:
    """Drawing takes longer than all else; :func:`test_the_report` has the files."""
    monkeypatch.setattr("sit.compare.compare.plot_losses", lambda *_: None)
    monkeypatch.setattr("sit.compare.compare.plot_metrics", lambda *_: [])


@pytest.mark.slow
def test_the_report(runs, tmp_path):
    out = tmp_path / "report"
    options = dict(num_samples=40, batch_size=20, speed_repeats=1, sampler=SamplerConfig(steps=2))
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
    speed = measure_speed({"network": loaded}, {"network": TrainConfig()}, config, count, 2)["network"]["sampling"]
    assert speed == pytest.approx(1 / evaluations, rel=1e-4)


@pytest.fixture
def shown(monkeypatch) -> list[tuple[int, bool]]:
    """The rows of each forward pass of a network, and whether it is of average velocities over a step."""
    rows, forward = [], SiT.forward

    def noting(self, x, *arguments, **conditions):
        rows.append((len(x), "end" in conditions))
        return forward(self, x, *arguments, **conditions)

    monkeypatch.setattr(SiT, "forward", noting)
    return rows


@pytest.mark.parametrize("meanflow", [{}, {"meanflow_share": 0.5, "meanflow_omega": 2.0, "meanflow_kappa": 0.5}])
def test_the_speed_of_training_is_that_of_the_objective_that_is_trained(meanflow, shown):
    """The passes that training's own objective makes of a batch: for MeanFlow its derivative and guidance too."""
    options = dict(input_size=8, patch_size=2, hidden_size=32, depth=1, num_heads=2, num_classes=10, mixer="atconv")
    config = TrainConfig(prediction="average-velocity", **meanflow)
    network = SiT(**options, average_velocity=True)
    transport = Transport(**config.transport_options())
    batch = {"latents": torch.randn(8, 4, 8, 8), "noise": torch.randn(8, 4, 8, 8), "positions": torch.arange(8)}
    batch |= {"labels": torch.arange(8), "t_uniform": torch.rand(8), "drop": torch.rand(8)}
    make_meanflow(config, transport, null_label=10)(network, batch)
    expected, shown[:] = list(shown), []
    gradient_pass(Loaded(network, transport, None, None, torch.device("cpu"), Path()), config, 8)()
    assert shown == expected and len(shown) == (4 if meanflow else 2)
    shown.clear()
    plain = Loaded(SiT(**options), Transport(), None, None, torch.device("cpu"), Path())
    gradient_pass(plain, TrainConfig(), 8)()
    assert shown == [(8, False)]
    for more in (dict(repa="dinov2"), dict(distill_from="teacher")):
        asked = SimpleNamespace(**dict(averages=False, repa=None, distill_from=None) | more)
        assert gradient_pass(plain, asked, 8) is None


def found_of(groups: dict[str, dict]) -> dict:
    """What a report is written of, of groups that are made up."""
    usual = dict(parameters=1, multiply_accumulates=1.0, steps=4, images_seen=8, objective="plain", seeds=[0])
    groups = {name: usual | {"metrics": {4: group.pop("numbers")}} | group for name, group in groups.items()}
    return {"machine": "m", "steps_left_out": {}, "groups": groups, "differences": {}}


def test_what_plus_minus_is_is_told_whatever_the_seeds():
    def told(*groups: tuple[list[int], float | None]) -> str:
        made = {}
        for seeds, error in groups:
            numbers = {"FID": {"value": 1.0, "error": error}, "Recall": {"value": 1.0, "error": None}}
            made[f"group {len(made)}"] = {"seeds": seeds, "numbers": numbers}
        return markdown(found_of(made), [], "command", "setting")

    over_seeds = "interval of the mean over training seeds (Student's t)"
    over_samples = "interval over samples, for these weights only"
    one, several, few = ([0], 0.5), ([0, 1], 0.5), ([0], None)
    for groups in ([one], [one, one], [one, few]):
        text = told(*groups)
        assert over_samples in text and over_seeds not in text and "a number without ± has no such interval" in text
    assert over_seeds in told(several) and over_samples not in told(several)
    assert f"With several seeds ± is the half-width of the 95 % {over_seeds}, with one it is" in told(several, one)
    assert over_samples in told(several, one)
    assert "No ± is told: too few samples for an interval over them." in told(few) and "half-width" not in told(few)
    assert over_seeds in told(several, few) and "with one seed there are too few samples" in told(several, few)


def test_what_was_timed_is_told():
    numbers = {"FID": {"value": 1.0, "error": 0.5}}
    names = {"a": "plain", "b": "MeanFlow", "c": "REPA"}
    speeds = {"a": 100.0, "b": 50.0, "c": None}
    groups = {
        name: dict(numbers=numbers, objective=kind, images_per_second={"training": speeds[name], "sampling": 10.0})
        for name, kind in names.items()
    }
    found = found_of(groups)
    text = markdown(found, [], "command", "setting")
    assert "| images/s, training | 100 (1.00x) | 50 (0.50x) | left out |" in text
    assert "The training of b is timed with MeanFlow's objective, its derivative included." in text
    assert "The training speed of c is left out: REPA needs more than its network." in text
    found["groups"] = {name: found["groups"][name] for name in "cab"}
    assert "| images/s, training | left out | 100 | 50 |" in markdown(found, [], "command", "setting")
    for group in found["groups"].values():
        del group["images_per_second"]
    assert "Speeds are" not in markdown(found, [], "command", "setting")


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"num_samples": 0}, "`num_samples` must be at least 1, not 0"),
        ({"speed_repeats": -1}, "`speed_repeats` must be at least 0, not -1"),
        ({"sampler": SamplerConfig("ode", 2, "euler", atol=1e-3)}, "`atol` plays no part with `method=euler`"),
    ],
)
def test_arguments_that_can_not_be(settings, said):
    with pytest.raises(UserError, match=said):
        Arguments(("a",), "out", **settings)


def test_what_is_refused(runs, classifier_of_three, tmp_path):
    with pytest.raises(UserError, match="is not a run's folder"):
        open_runs((str(tmp_path),), ())
    (tmp_path / "config.yaml").touch()
    with pytest.raises(UserError, match="has no complete checkpoint to compare"):
        open_runs((str(tmp_path),), ())
    with pytest.raises(UserError, match="`at_steps=20000`: .*a has no .* checkpoint of that step; its steps are: 2, 4"):
        open_runs((runs[0],), (2, 20000))
    with pytest.raises(UserError, match="`at_steps=2`: .*b has no"):
        open_runs(runs, (2, 4))
    with pytest.raises(UserError, match="give at least one"):
        open_runs((), ())
    other = make_run(tmp_path / "other", "atconv", (4,), image_size=64)
    with pytest.raises(UserError, match="was trained with image_size 64 and .* with 32"):
        open_runs((runs[0], str(other)), ())
    for features, weights, said in (
        ("inception", FeatureWeights("inception.pth"), "inception.pth are missing"),
        ("dinov2", FeatureWeights(None, "dinov2.safetensors"), "`dinov2_weights=dinov2.safetensors`: no such file"),
        ("digits", FeatureWeights("inception.pth"), "`inception_weights=inception.pth` plays no part"),
    ):
        with pytest.raises(UserError, match=said):
            compare(Arguments(runs, str(tmp_path / "no"), features=(features,), weights_files=weights))
    with pytest.raises(UserError, match="knows 3 classes, and the samples have 10"):
        compare(Arguments(runs, str(tmp_path / "no"), classifier=classifier_of_three))
    (tmp_path / "taken").mkdir()
    with pytest.raises(UserError, match="exists already"):
        compare(Arguments(runs, str(tmp_path / "taken"), num_samples=10, sampler=SamplerConfig(steps=2)))


def test_runs_that_do_not_repeat_each_other_are_told_apart_by_their_folders(runs, tmp_path):
    """As few parts of a path as are needed: those of a study are all called run."""
    wider = make_run(tmp_path / "wider", "attention", (4,), seed=1, batch_size=8)
    names = [run.name for run in open_runs((runs[0], str(wider)), ())]
    assert names == ["SiT-XS/2 attention (a)", "SiT-XS/2 attention (wider)"]
    paths = [
        str(make_run(tmp_path / study / name / "run", "attention", (4,), batch_size=size))
        for size, (study, name) in enumerate([("one", "x"), ("one", "y"), ("two", "x")], start=8)
    ]
    names = [run.name for run in open_runs(tuple(paths[:2]), ())]
    assert names == ["SiT-XS/2 attention (x/run)", "SiT-XS/2 attention (y/run)"]
    groups = grouped(open_runs((*paths, str(wider)), ()))
    ends = ["one/x/run", "one/y/run", "two/x/run", "/".join(wider.parts[-3:])]
    assert list(groups) == [f"SiT-XS/2 attention ({end})" for end in ends]
    for again in (runs[0], f"{runs[0]}/../a"):
        with pytest.raises(UserError, match=r"are both SiT-XS/2 attention \(a\), training seed 0: give a run once"):
            open_runs((runs[0], again), ())


def test_seeds_of_unequal_checkpoints_are_compared_at_the_steps_that_all_have(
    tmp_path, without_plots, monkeypatch, capsys
):
    """A step that is left out is neither sampled nor described; without a common step nothing is sampled."""
    steps = {0: (1, 2, 3), 1: (1, 2), 2: (3,)}
    paths = [str(make_run(tmp_path / str(seed), "atconv", own, seed=seed)) for seed, own in steps.items()]
    asked = []

    def made_up(samples, against, work):
        asked.append((samples.seed, samples.loaded.info.step))
        return SimpleNamespace(report=lambda: Report("s", 10, "r", "f", [Number("FID", samples.loaded.info.step, 0.5)]))

    monkeypatch.setattr("sit.compare.compare.measure", made_up)
    options = dict(num_samples=20, speed_repeats=0, sampler=SamplerConfig(steps=2))
    with pytest.raises(UserError, match=r"SiT-XS/2 atconv .* no step in common.*1: 1, 2; .*2: 3; leave runs out"):
        compare(Arguments(tuple(paths), str(tmp_path / "none"), **options))
    assert not asked and not (tmp_path / "none").exists()

    compare(Arguments(tuple(paths[:2]), str(tmp_path / "report"), **options))
    assert sorted(asked) == [(0, 1), (0, 2), (1, 1), (1, 2)]
    assert f"{paths[0]}: left out are steps that not every seed has: 3" in capsys.readouterr().out
    group = json.loads((tmp_path / "report" / "numbers.json").read_text())["groups"]["SiT-XS/2 atconv"]
    assert (group["steps"], group["images_seen"], max(group["metrics"])) == (2, 128, "2")
    text = (tmp_path / "report" / "README.md").read_text()
    assert "| step of the metrics; images seen | 2; 128 |" in text and "| FID | 2 |" in text
    assert f"Left out are steps that not every seed of a group has: {paths[0]}: 3." in text


def test_seeds_are_repetitions(tmp_path, without_plots, monkeypatch):
    """Means, Student's intervals and paired differences against SciPy, from evaluations that are made up."""
    paths, values = [], {"attention": [5.0, 7.0, 6.0], "atconv": [4.0, 6.5, 4.5]}
    for mixer in values:
        for seed in range(3):
            paths.append(str(make_run(tmp_path / f"{mixer}-{seed}", mixer, (2,), seed=seed)))
    seeds = []

    def made_up(samples, against, work):
        mixer, seed = samples.loaded.path.parent.parent.name.split("-")
        seeds.append((mixer, int(seed), samples.seed))
        fid = Number("FID", values[mixer][int(seed)], 0.5)
        return SimpleNamespace(report=lambda: Report("s", 10, "r", "f", [fid, Number("Class accuracy", 0.5)]))

    monkeypatch.setattr("sit.compare.compare.measure", made_up)
    options = dict(num_samples=20, speed_repeats=0, sampler=SamplerConfig(steps=2))
    compare(Arguments(tuple(paths), str(tmp_path / "report"), **options))
    found = json.loads((tmp_path / "report" / "numbers.json").read_text())
    assert found["sampler"]["cfg_channels"] == 3
    ours = found["groups"]["SiT-XS/2 atconv"]
    assert ours["seeds"] == [0, 1, 2] and ours["metrics"]["2"]["FID"]["values"] == values["atconv"]
    low, high = stats.t.interval(0.95, 2, loc=5.0, scale=stats.sem(values["atconv"]))
    assert ours["metrics"]["2"]["FID"]["value"] == pytest.approx(5.0)
    assert ours["metrics"]["2"]["FID"]["error"] == pytest.approx((high - low) / 2)
    paired = found["differences"]["SiT-XS/2 atconv"]["FID"]
    test = stats.ttest_rel(values["atconv"], values["attention"]).confidence_interval(0.95)
    assert paired["value"] - paired["error"] == pytest.approx(test.low)
    assert paired["value"] + paired["error"] == pytest.approx(test.high)
    text = (tmp_path / "report" / "README.md").read_text()
    assert "| FID | 6 ± 2.5 | 5 ± 3.3 |" in text and f"-1 ± 1.2: {paired['verdict']} |" in text
    assert "| step | 2 |" in text.split("## Difference")[1], "the step of the differences"
    assert paired["over"] == "training seeds" and paired["verdict"].startswith("not told apart: ")
    assert found["differences"]["SiT-XS/2 atconv"]["Class accuracy"]["verdict"] == "not told apart"
    assert seeds == [(mixer, seed, seed) for mixer in values for seed in range(3)], "evaluated with its training seed"
    compare(Arguments(tuple(paths), str(tmp_path / "one"), evaluation_seed=7, **options))
    assert {seed for *_, seed in seeds[6:]} == {7}


def test_what_eval_fid_left_is_read_and_one_seed_is_paired_by_samples(runs, tmp_path, without_plots, monkeypatch):
    """Nothing is sampled again; the difference's interval is that of the paired groups, and holds for these weights."""
    made, batch = [], GeneratedImages.batch
    monkeypatch.setattr(
        GeneratedImages, "batch", lambda self, numbers: made.append(self.loaded.path) or batch(self, numbers)
    )
    work = ["--work-dir", str(tmp_path / "work"), "--num-samples", "60", "--steps", "2"]
    newest = [Path(run) / "checkpoints" / "step-0000004" for run in runs]
    reports = []
    for checkpoint in newest:
        out = tmp_path / f"{len(reports)}.json"
        words = ["--ckpt", str(checkpoint), "--reference", "digits", *work, "--json", str(out)]
        monkeypatch.setattr("sys.argv", ["eval_fid.py", *words])
        eval_fid.main()
        reports.append({number["name"]: number for number in json.loads(out.read_text())["numbers"]})
    assert set(made) == set(newest)
    made.clear()
    options = dict(num_samples=60, at_steps=(4,), speed_repeats=0, sampler=SamplerConfig(steps=2))
    compare(Arguments(runs, str(tmp_path / "report"), work_dir=str(tmp_path / "work"), **options))
    assert not set(made) & set(newest), "sampled again"
    found = json.loads((tmp_path / "report" / "numbers.json").read_text())
    name = next(name for name in reports[0] if name.startswith("FID ("))
    groups = [found["groups"][f"SiT-XS/2 {mixer}"]["metrics"]["4"] for mixer in ("attention", "atconv")]
    assert [group[name]["value"] for group in groups] == [report[name]["value"] for report in reports]
    cell = found["differences"]["SiT-XS/2 atconv"][name]
    one, other = (report[name]["replicates"] for report in reports)
    interval = stats.ttest_rel(other, one).confidence_interval(0.95)
    assert cell["error"] == pytest.approx((interval.high - interval.low) / 2)
    assert cell["value"] == pytest.approx(groups[1][name]["value"] - groups[0][name]["value"])
    assert cell["over"] == "samples" and cell["verdict"].endswith("for these weights only")

    compare(Arguments(runs, str(tmp_path / "again"), work_dir=str(tmp_path / "work"), evaluation_seed=1, **options))
    assert set(made) == set(newest), "another evaluation seed gives other samples"


def test_runs_without_a_seed_in_common_have_no_difference_and_the_report_says_so():
    groups = {"a": {}, "b": {}, "c": {}}
    (told, _) = _differences({"groups": groups, "differences": {}})
    assert told.startswith("No difference to a is told for b, c: a pair needs runs of one training seed")
    table = {"FID": {"value": 1.0, "error": 0.5, "over": "samples", "count": 10, "step": 4, "verdict": "worse"}}
    lines = _differences({"groups": groups, "differences": {"b": table}})
    assert lines[0].startswith("No difference to a is told for c: ")
    assert not any(
        "No difference" in line for line in _differences({"groups": {"a": {}, "b": {}}, "differences": {"b": table}})
    )


def test_a_folder_and_a_latent_cache_of_it_are_the_same_data(runs, tmp_path):
    cache = tmp_path / "cache"
    encode(Encode(cache, "digits", image_size=32))
    through = make_run(tmp_path / "through", "atconv", (4,), data=str(cache))
    assert [run.config.data for run in open_runs((runs[0], str(through)), ())] == ["digits", str(cache)]
    other = make_run(tmp_path / "part", "atconv", (4,), data="digits:train")
    for one in (runs[0], str(through)):
        with pytest.raises(UserError, match=f"was trained with data digits:train and {one} with"):
            open_runs((one, str(other)), ())
    gone = make_run(tmp_path / "gone", "atconv", (4,), data=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="was trained with data .*nowhere and .* with digits"):
        open_runs((runs[0], str(gone)), ())


def test_runs_are_compared_with_the_average_that_is_asked_for(tmp_path, without_plots, monkeypatch):
    """Here the only one that is kept: weights of one value."""
    run = make_run(tmp_path / "a", "atconv", (2, 4))
    network = load_for_sampling(run).model
    for step in (2, 4):
        save_snapshot(run, step, {0.1: {name: torch.full_like(p, 2**-7) for name, p in network.named_parameters()}})
    seen, batch = set(), GeneratedImages.batch

    def noted(samples, numbers):
        seen.update((samples.name, p.unique().item()) for p in samples.loaded.model.parameters())
        return batch(samples, numbers)

    monkeypatch.setattr(GeneratedImages, "batch", noted)
    options = dict(num_samples=20, speed_repeats=0, sampler=SamplerConfig(steps=2), ema=0.1)
    compare(Arguments((str(run),), str(tmp_path / "report"), **options))
    assert {weight for _, weight in seen} == {2**-7}
    assert all("EMA of relative length 0.1 " in name for name, _ in seen)
    found = json.loads((tmp_path / "report" / "numbers.json").read_text())["ema"]
    assert found["sigma_rel"] == 0.1 and found["largest_profile_error"] < 1e-6
    text = (tmp_path / "report" / "README.md").read_text()
    assert "20 samples a checkpoint, EMA of relative length 0.1, balanced labels" in text and "--ema 0.1" in text
    before = len(seen)
    with pytest.raises(UserError, match="`ema=0.05` can't be reached at step 2"):
        compare(Arguments((str(run),), str(tmp_path / "other"), **options | dict(ema=0.05)))
    assert len(seen) == before and not (tmp_path / "other").exists()


def test_the_command_that_is_printed_makes_the_same_arguments():
    sampler = SamplerConfig(sampler="ode", method="heun2", steps=7, cfg_scale=2, cfg_interval=(0.1, 0.9))
    weights = FeatureWeights(dinov2_weights="dinov2.safetensors")
    options = dict(reference="digits", at_steps=(1, 2), sampler=sampler, weights_files=weights)
    arguments = Arguments(("a b", "c"), "out", **options)
    words = shlex.split(command(arguments))
    assert words[:3] == ["python", "-m", "sit.compare"]
    assert tyro.cli(Arguments, args=words[3:]) == arguments


@pytest.mark.distributed
def test_on_two_processes_as_on_one(runs, tmp_path, without_plots, monkeypatch):
    """In chunks of 16 images, so that either has some."""
    monkeypatch.setattr(extraction, "CHUNK", 16)
    options = dict(num_samples=40, at_steps=(4,), speed_repeats=0, sampler=SamplerConfig(steps=2), batch_size=10)
    compare(Arguments(runs, str(tmp_path / "one"), reference="digits:heldout", **options))
    words = ["--num-samples", 40, "--at-steps", 4, "--speed-repeats", 0, "--steps", 2, "--batch-size", 10]
    words += ["--reference", "digits:heldout", "--out", tmp_path / "two"]
    said = Connected(2, "-m", "sit.compare", *runs, *words).output()
    assert said.count("report: ") == 1
    one, two = (json.loads((tmp_path / name / "numbers.json").read_text()) for name in ("one", "two"))
    for group in one["groups"]:
        for name, number in one["groups"][group]["metrics"]["4"].items():
            assert two["groups"][group]["metrics"]["4"][name]["value"] == pytest.approx(number["value"], rel=1e-6), name
    assert two["differences"]["SiT-XS/2 atconv"].keys() == one["differences"]["SiT-XS/2 atconv"].keys()
