"""Every experiment runs in a short form: trained, evaluated, kept, and not done again."""

from __future__ import annotations

import gzip
import importlib
import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sit.sampling.config import SamplerConfig
from sit.training.cli import parse_train_arguments
from sit.training.recipes import load_recipe
from sit.utils.errors import UserError

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "experiments"
OTHER_FOLDERS = {"benchmarks", "scripts", "tests"}
attnet_fashion, digits_table, fashion_mixers = map(
    importlib.import_module, ("attnet_fashion", "digits_table", "fashion_mixers")
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
        data=str(fashion), out=tmp_path, epochs=1, seeds=1, batch_size=20, repeats=1, timed_batch=2, device="cpu"
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
        (attnet_fashion, {"limit": 5}, "`limit=5` must be at least the batch size of 128"),
        (fashion_mixers, {"mixers": ("fourier",)}, "`mixers=fourier`: unknown"),
        (fashion_mixers, {"jobs": 0}, "`jobs` must be at least 1, not 0"),
        (fashion_mixers, {"steps": 0}, "`steps` must be at least 1, not 0"),
    ],
)
def test_what_cant_be_done_is_refused(module, options, message):
    with pytest.raises(UserError, match=message):
        module.Arguments(**options)


def test_other_settings_than_a_finished_runs_are_refused(fashion, tmp_path):
    options = dict(data=str(fashion), out=tmp_path, epochs=1, seeds=1, batch_size=20, models=("ResNet",), repeats=0)
    attnet_fashion.run(attnet_fashion.Arguments(**options, device="cpu"))
    assert json.loads((tmp_path / "report.json").read_text())["images_per_second"] is None
    with pytest.raises(UserError, match="resnet-seed0.json was made with learning_rate 0.004, not 0.1; choose another"):
        attnet_fashion.run(attnet_fashion.Arguments(**options, device="cpu", learning_rate=0.1))


def test_interval_of_the_mean():
    """Half of Student's 95 % interval: of three values with the deviation 0.01 it is 4.303 · 0.01 / √3."""
    results = [{"accuracies": [0.1, value], "core_minutes": 1.0} for value in (0.79, 0.80, 0.81)]
    found = attnet_fashion.summary("ResNet", results)
    assert found["mean"] == pytest.approx(0.8) and found["interval"] == pytest.approx(4.3027 * 0.01 / 3**0.5, rel=1e-4)
    assert attnet_fashion.summary("ResNet", results[:1])["interval"] is None


@pytest.mark.parametrize("name", ["attnet_fashion", "digits_table", "fashion_mixers"])
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


def test_mixers_and_seeds_are_commands_that_train_py_reads(tmp_path, monkeypatch):
    commands = []

    def note(command, **options):
        commands.append(command)
        return subprocess.CompletedProcess(command, int("2" in command[command.index("--seed") + 1]))

    monkeypatch.setattr(fashion_mixers.subprocess, "run", note)
    fashion_mixers.run(fashion_mixers.Arguments(seeds=(0, 1), steps=7, jobs=1, out=tmp_path))
    configs = [parse_train_arguments(command[2:]).config for command in commands]
    mixers = ["attention", "atconv", "attention,atconv", "atconv:routing=false", "atconv:inhibition=false"]
    assert [(config.seed, config.mixer) for config in configs] == [(seed, mixer) for seed in (0, 1) for mixer in mixers]
    recipe = load_recipe("fashion-mnist")
    for config in configs:
        assert (config.steps, config.model, config.data, config.vae) == (7, recipe.model, recipe.data, recipe.vae)
        assert Path(config.output_dir).parent == tmp_path
    with pytest.raises(UserError, match="static-seed2 stopped with exit code 1; see .*static-seed2.log"):
        fashion_mixers.run(fashion_mixers.Arguments(seeds=(2,), mixers=("static",), jobs=1, out=tmp_path))


@pytest.mark.slow
def test_fashion_mixers(tmp_path, capsys):
    """On the digits, as the latents of Fashion-MNIST are not at hand."""
    arguments = fashion_mixers.Arguments(
        seeds=(0,), mixers=("static",), recipe="digits", steps=2, checkpoint_every=2, jobs=1, out=tmp_path
    )
    fashion_mixers.run(arguments)
    assert (tmp_path / "static-seed0" / "checkpoints" / "step-0000002" / "sit.json").is_file()
    fashion_mixers.run(arguments)
    assert "static-seed0: done" in capsys.readouterr().out


def test_digits_table(checkpoint, tmp_path, capsys):
    path = tmp_path / "table.json"
    digits_table.run(digits_table.Arguments((str(checkpoint),), 20, path, SamplerConfig(steps=2)))
    found = json.loads(path.read_text())
    assert len(found["reports"]) == 3 and {"machine", "date", "command"} <= set(found)
    assert capsys.readouterr().out.count("| atconv, ") == 2
