"""Trackers: the whole configuration, one run from its first start to its last, previews, evaluations on the way."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from PIL import Image
from processes import Connected
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sit.checkpoint.load import load_for_sampling
from sit.latents.vae import NotFinite
from sit.metrics.evaluate import evaluate
from sit.metrics.features import get_extractor
from sit.metrics.few_samples import FewSamples
from sit.metrics.generated import GeneratedImages
from sit.metrics.image_sets import open_samples
from sit.sampling.config import SamplerConfig
from sit.train import evaluation_of_run
from sit.training.config import TrainConfig
from sit.training.recipes import load_recipe
from sit.training.run_folder import read_metrics
from sit.training.trackers import check_trackers
from sit.training.trainer import train
from sit.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


class Told(GeneralTracker):
    """A tracker like Weights & Biases in Accelerate, which notes what it is told."""

    name = "wandb"
    requires_logging_directory = False
    runs: list[Told] = []

    def __init__(self, project: str, **options) -> None:
        super().__init__()
        self.project, self.options, self.rows, self.images = project, options, {}, {}
        self.runs.append(self)

    def start(self) -> None:
        pass

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values: dict) -> None:
        self.settings = values

    def log(self, values: dict, step: int | None = None, **_) -> None:
        self.rows.setdefault(step, {}).update(values)

    def log_images(self, values: dict, step: int | None = None, **_) -> None:
        self.images[step] = values


def settings(folder: Path, **changes) -> TrainConfig:
    options = dict(
        model="SiT-XS/4", mixer="attention", steps=2, batch_size=8, log_every=1, preview_every=2, preview_steps=2,
        checkpoint_every=1, cpu_threads=1, output_dir=str(folder), heldout="0.01", heldout_images=4,
        trackers=("tensorboard", "wandb"), project="digits", eval_every=2, eval_samples=20,
    )  # fmt: skip
    return dataclasses.replace(load_recipe("digits"), **options | changes)


@pytest.fixture(scope="module")
def followed(tmp_path_factory) -> tuple[Path, list[Told]]:
    """A run of two steps, and of four when it has resumed; and what a tracker was told each time."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", Told)
        patch.setattr("sit.training.trackers.get_available_trackers", lambda: ["tensorboard", "wandb"])
        for changes in ({}, dict(resume="auto", steps=4)):
            AcceleratorState._reset_state(reset_partial_state=True)
            train(settings(folder, **changes), evaluation_of_run)
    return folder, list(Told.runs)


def test_a_resumed_run_is_the_same_run_of_the_tracker(followed):
    folder, (first, second) = followed
    assert first.project == second.project == "digits"
    assert first.options == second.options and first.options["resume"] == "allow"
    assert first.options["name"] == "mine" and len(first.options["id"]) == 8
    assert sorted(first.rows) == [1, 2] and sorted(second.rows) == [3, 4]


def test_the_whole_configuration_is_told(followed):
    folder, (first, second) = followed
    assert set(first.settings) == {field.name for field in dataclasses.fields(TrainConfig)}
    assert first.settings["betas"] == " ".join(map(str, settings(folder).betas))
    assert (first.settings["steps"], second.settings["steps"]) == (2, 4)
    (one, two) = sorted((folder / "logs" / "digits").glob("*/hparams.yml"))
    assert "model: SiT-XS/4" in one.read_text() and "steps: 4" in two.read_text()


def test_previews_are_images_of_the_trackers(followed):
    folder, (first, second) = followed
    png = np.asarray(Image.open(folder / "samples" / "step-0000004.png"))
    assert np.array_equal(np.asarray(second.images[4]["preview"][0]), png)
    events = EventAccumulator(str(folder / "logs" / "digits"), size_guidance={"images": 0})
    events.Reload()
    shown = events.Images("preview")
    assert [image.step for image in shown] == [2, 4] and (shown[-1].width, shown[-1].height) == png.shape[1::-1]
    assert {step.step for step in events.Scalars("eval_fid")} == {2, 4}


def test_an_evaluation_on_the_way_is_that_of_the_checkpoint(followed):
    folder, (first, second) = followed
    rows = {row["step"]: row for row in read_metrics(folder / "metrics.jsonl") if "eval_fid" in row}
    assert sorted(rows) == [2, 4] and rows[2]["eval_fid"] == first.rows[2]["eval_fid"] != rows[4]["eval_fid"]
    loaded = load_for_sampling(folder)
    options = dict(seed=settings(folder).seed, config=SamplerConfig(steps=2, cfg_scale=1.5))
    samples, device = GeneratedImages(loaded, 20, **options), torch.device("cpu")
    report = evaluate(samples, open_samples("digits"), get_extractor("digits", device), device=device)
    values = {number.name.split(" (")[0]: number.value for number in report.numbers}
    for key, name in (("eval_fid", "FID"), ("eval_precision", "Precision"), ("eval_class_accuracy", "Class accuracy")):
        assert rows[4][key] == pytest.approx(values[name], rel=1e-6), name
    heldout = [row["step"] for row in read_metrics(folder / "metrics.jsonl") if "heldout_loss" in row]
    assert heldout == [2, 4]
    assert [place.name.split("-")[0] for place in (folder / "evaluation").iterdir()] == ["reference"]


def test_the_card_of_a_checkpoint_has_recipe_and_metrics(followed):
    folder, _ = followed
    card = (folder / "checkpoints" / "step-0000004" / "README.md").read_text()
    last = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    fid = next(row["eval_fid"] for row in reversed(last) if "eval_fid" in row)
    assert f"| eval_fid | {fid:.6g} |" in card and "\nmodel: SiT-XS/4\n" in card and "`digits" in card
    assert str(folder) not in card


def test_what_can_not_be_evaluated_is_told(tmp_path):
    with pytest.raises(UserError, match="`eval_every=5` needs `eval_reference`"):
        TrainConfig(data=str(tmp_path), eval_every=5)
    with pytest.raises(UserError, match="`eval_samples` must be at least 2, not 1"):
        TrainConfig(eval_samples=1)
    with pytest.raises(UserError, match="nowhere: no such folder"):
        evaluation_of_run(TrainConfig(eval_every=1, eval_reference=str(tmp_path / "nowhere")), torch.device("cpu"))


def test_a_network_of_average_velocities_is_evaluated_without_guidance():
    config = dataclasses.replace(load_recipe("digits-meanflow"), eval_every=1)
    sampler = evaluation_of_run(config, torch.device("cpu")).config
    assert config.preview_cfg_scale > 1 and (sampler.sampler, sampler.cfg_scale) == ("meanflow", 1.0)


def test_samples_that_are_not_finite_cost_a_line(checkpoint, tmp_path):
    """In every process: the evaluation itself says so, after all have made their part."""
    loaded = load_for_sampling(checkpoint, device="cpu")
    few = FewSamples("digits:heldout", 12, SamplerConfig(steps=2), seed=0, image_size=32, device=torch.device("cpu"))
    assert few(loaded, tmp_path)["fid"] > 0
    loaded.model.final_layer.linear.bias.data.fill_(torch.inf)
    with pytest.raises(NotFinite, match="not finite"):
        few(loaded, tmp_path)
    assert [place.name.split("-")[0] for place in tmp_path.iterdir()] == ["reference"], "nothing of it is kept"


ONE_OF_TWO = """
import sys
from pathlib import Path
import torch
from sit.checkpoint.load import load_for_sampling
from sit.latents.vae import NotFinite
from sit.metrics import extraction
from sit.metrics.few_samples import FewSamples
from sit.metrics.generated import GeneratedImages
from sit.sampling.config import SamplerConfig

extraction.CHUNK, batch = 6, GeneratedImages.batch

def failing(self, numbers):
    if 7 in numbers:
        raise NotFinite("no numbers")
    return batch(self, numbers)

GeneratedImages.batch = failing
few = FewSamples("digits:heldout", 12, SamplerConfig(steps=2), seed=0, image_size=32, device=torch.device("cpu"))
try:
    few(load_for_sampling(sys.argv[1]), Path(sys.argv[2]))
except NotFinite:
    print("told")
"""


@pytest.mark.distributed
def test_samples_that_are_not_finite_in_one_process_are_told_in_both(checkpoint, tmp_path):
    (tmp_path / "program.py").write_text(ONE_OF_TWO)
    assert Connected(2, tmp_path / "program.py", checkpoint, tmp_path / "work").output() == "told\n" * 2


def test_a_tracker_of_ones_own_is_taken(monkeypatch):
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "mine", Told)
    check_trackers(["mine"])
