"""docs/reproduce.md, rehearsed: its commands as the page has them, in order, on a small stand-in for what they need.

A folder of classes with tiny images, an autoencoder of Stable Diffusion's layout and an Inception of the right one,
both with random weights, and a reference file made by this product. What makes a command smaller is in ``SHRUNK``.
"""

from __future__ import annotations

import importlib
import json
import math
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity.utils
import yaml
from diffusers import AutoencoderKL
from few_directions import use_few_directions
from PIL import Image
from test_commands_in_docs import ROOT, commands_of, launches, merged

from sit.metrics import generated
from sit.metrics.distances import frechet_distance
from sit.metrics.features import INCEPTION_FILE
from sit.metrics.moments import Moments

PAGE = (ROOT / "docs" / "reproduce.md").read_text()
CLASSES = 25
REFERENCE = "VIRTUAL_imagenet256_labeled.npz"
FEW = "--steps 2 --num-samples 5 --batch-size 5 --cpu-threads 1 --device cpu"
SHRUNK = {
    "sit.latents encode": "--image-size 48 --workers 0 --cpu-threads 1",
    "sit.latents verify": "--images 4 --cpu-threads 1",
    "train": "--model SiT-XS/2 --image-size 48 --steps 4 --batch-size 8 --checkpoint-every 1 --keep-every 1 "
    "--mixed-precision no --workers 0 --log-every 1 --preview-every 0 --trackers --cpu-threads 1",
    "eval_fid": FEW,
    "sit.compare": f"{FEW} --at-steps 2 4 --speed-repeats 1",
}
"""what is put in place of a command's flags, or behind them; the 100,000 steps between checkpoints become one"""
STARTED = {"train": "sit.training.cli", "eval_fid": "sit.metrics.cli", "sit.compare": "sit.compare.cli",
           "sit.latents encode": "sit.latents.cli", "sit.latents verify": "sit.latents.cli"}  # fmt: skip


def lines_of(page: str) -> list[str]:
    """The commands of a page's one shell block, in order, one a line, loops written out."""
    (block,) = re.findall(r"^```bash\n(.*?)^```$", page, flags=re.M | re.S)
    loop = re.compile(r"^for (\w+) in (.+?); do\n(.*?)^done$", flags=re.M | re.S)

    def written_out(match: re.Match[str]) -> str:
        name, values, body = match.groups()
        return "".join(body.replace(f"${name}", value) for value in values.split())

    lines = loop.sub(written_out, block.replace("\\\n", " ")).splitlines()
    return [" ".join(line.split()) for line in lines if line.strip() and not line.startswith("#")]


def test_loops_are_written_out_in_order():
    page = "Words.\n```bash\n# One\na --b \\\n    c\nfor x in 1 2; do\n    d $x\n    e-$x \\\n  f\ndone\ng\n```\nWords."
    assert lines_of(page) == ["a --b c", "d 1", "e-1 f", "d 2", "e-2 f", "g"]


@pytest.fixture
def stand_in(tmp_path, monkeypatch, fresh_accelerate, inception_weights) -> Path:
    """The current folder, with all that the page takes for granted, but the reference."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for number in range(CLASSES):
        folder = Path("imagenet/train") / f"n{number:08}"
        folder.mkdir(parents=True)
        for name in ("a", "b"):
            Image.fromarray(rng.integers(0, 256, size=(48, 56, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    torch.manual_seed(0)
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    widths = dict(block_out_channels=(8, 8, 8, 8), norm_num_groups=4, layers_per_block=2)  # for 128, 256, 512, 512
    AutoencoderKL(latent_channels=4, **blocks, **widths).save_pretrained("stabilityai/sd-vae-ft-ema")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    weights = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    weights.parent.mkdir(parents=True)
    weights.symlink_to(inception_weights)

    made = {}  # by the name of its file: building it takes seconds, and five commands do
    build = torch_fidelity.utils.create_feature_extractor

    def once(*names, feature_extractor_weights_path, **options):
        if feature_extractor_weights_path not in made:
            options["feature_extractor_weights_path"] = feature_extractor_weights_path
            made[feature_extractor_weights_path] = build(*names, **options)
        return made[feature_extractor_weights_path]

    monkeypatch.setattr(torch_fidelity.utils, "create_feature_extractor", once)
    use_few_directions(monkeypatch)
    return tmp_path


def test_few_directions_are_all_that_few_images_have():
    """Against scipy's own."""
    rng = np.random.default_rng(1)
    first, second = (Moments.of(rng.standard_normal((6, 40))) for _ in range(2))
    expected = frechet_distance(first, second)
    with pytest.MonkeyPatch.context() as patch:
        use_few_directions(patch)
        assert frechet_distance(first, second) == pytest.approx(expected)


def run(program: str, words: list[str], monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", [program, *words])
    importlib.import_module(STARTED[program]).main()


@pytest.fixture
def sampled(monkeypatch) -> list[tuple[str, int, int]]:
    """(run, step, number of images) of all that is sampled to be evaluated."""
    made = []
    sample = generated.sample_images

    def noting(loaded, indices, *arguments, **options):
        made.append((loaded.path.parents[1].name, loaded.info.step, len(indices)))
        return sample(loaded, indices, *arguments, **options)

    monkeypatch.setattr(generated, "sample_images", noting)
    return made


@pytest.mark.slow
def test_the_page_from_the_first_command_to_the_report(stand_in, sampled, monkeypatch, capsys):
    Path("few").mkdir()
    for number in range(6):
        shutil.copy(f"imagenet/train/n{number:08}/a.png", f"few/{number}.png")
    run("eval_fid", f"reference --data few --image-size 48 --out {REFERENCE} --cpu-threads 1".split(), monkeypatch)

    ran, said, before = [], [], {}
    for line in lines_of(PAGE):
        ((program, words),) = commands_of(line)
        assert launches(line) in ([], ["--config_file docs/accelerate/8gpus.yaml"])
        capsys.readouterr()
        if program == "sit.compare":
            before = {path: path.stat().st_mtime_ns for path in Path("work").rglob("*.npz")}
            assert sorted(sampled) == [("xl2-atconv", 4, 5), ("xl2-attention", 4, 5)]
            sampled.clear()
        run(program, merged(words.split(), SHRUNK[program].split()), monkeypatch)
        if "--dry-run" in words:
            assert not Path("runs").exists()
        ran.append(program)
        said.append(capsys.readouterr().out)
    latents, training = ["sit.latents encode", "sit.latents verify"], ["train"] * 3
    assert ran == [*latents, *training, "eval_fid", "eval_fid", "sit.compare"]
    assert f"latents of {2 * CLASSES} images in latents/imagenet256" in said[0]
    assert "4 entries compared" in said[1] and "SiT-XS/2" in said[2]

    # Step 5 took the samples of step 4 as they were, and made those of the earlier checkpoint alone.
    assert sorted(sampled) == [("xl2-atconv", 2, 5), ("xl2-attention", 2, 5)]
    assert before and all(path.stat().st_mtime_ns == time for path, time in before.items())
    report, numbers = Path("comparison/README.md").read_text(), json.loads(Path("comparison/numbers.json").read_text())
    for mixer in ("attention", "atconv"):
        config = yaml.safe_load(Path(f"runs/xl2-{mixer}/config.yaml").read_text())
        assert (config["mixer"], config["data"], config["learn_sigma"]) == (mixer, "latents/imagenet256", True)
        (group,) = (found for found in numbers["groups"].values() if found["mixer"] == mixer)
        told = json.loads(Path(f"xl2-{mixer}.json").read_text())["numbers"]
        evaluated = {number["name"]: number["value"] for number in told}
        assert {"FID", "sFID"} <= set(evaluated) and all(map(math.isfinite, evaluated.values()))
        assert {name: number["value"] for name, number in group["metrics"]["4"].items()} == evaluated
        assert set(group["metrics"]) == {"2", "4"} and f"{evaluated['FID']:.4g}" in report
    assert "uniform labels" in report and "5 samples a checkpoint" in report
