"""sample.py as a user runs it: grids, PNGs and npz; the same images whatever the batch; nothing half-written."""

from __future__ import annotations

import re
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from processes import Connected

from sit.checkpoint.load import load_for_sampling
from sit.data.factory import open_images
from sit.latents.vae import encode_images, scaling
from sit.sampling import cli as sample
from sit.sampling.config import SamplerConfig
from sit.sampling.guidance import GuidedModel
from sit.sampling.images import labels_named, word_for
from sit.sampling.likelihood import log_likelihood, random_signs
from sit.sampling.sampler import sample as sample_latents
from sit.utils.errors import UserError


def run(*arguments: object) -> None:
    before, sys.argv = sys.argv, ["sample.py", *map(str, arguments)]
    try:
        sample.main()
    finally:
        sys.argv = before


def test_a_grid_alone(checkpoint, tmp_path, capsys):
    run("--ckpt", checkpoint, "--steps", 2, "--out", tmp_path / "a")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["grid.png"]
    width, height = Image.open(tmp_path / "a" / "grid.png").size
    assert width > 10 * 64 and height > 4 * 64
    assert "grid.png" in capsys.readouterr().out


def test_files_agree_and_the_batch_size_does_not_matter(checkpoint, tmp_path):
    for batch in (5, 64):
        run("--ckpt", checkpoint, "--steps", 3, "--num-samples", 17, "--labels", 7, 2, "--seed", 3,
            "--cfg-scale", 2, "--batch-size", batch, "--out", tmp_path / str(batch))  # fmt: skip
    with np.load(tmp_path / "5" / "samples.npz") as one, np.load(tmp_path / "64" / "samples.npz") as other:
        assert one["arr_0"].shape == (17, 32, 32, 3) and one["arr_0"].dtype == np.uint8
        assert one["arr_1"].tolist() == [7, 2] * 8 + [7]
        assert np.array_equal(one["arr_0"], other["arr_0"])
        images = one["arr_0"]
    names = sorted(path.name for path in (tmp_path / "5").iterdir())
    assert names == sorted([f"{i:06d}.png" for i in range(17)] + ["grid.png", "samples.npz"])
    for number, image in enumerate(images):
        assert np.array_equal(np.array(Image.open(tmp_path / "5" / f"{number:06d}.png")), image)


def test_several_processes_make_the_same_images_each_once(checkpoint, tmp_path):
    words = ["--ckpt", checkpoint, "--steps", 3, "--num-samples", 11, "--labels", "2,5", "--seed", 3,
             "--batch-size", 2, "--label-order", "uniform", "--device", "cpu"]  # fmt: skip
    run(*words, "--out", tmp_path / "one")
    said = Connected(2, "-m", "sit.sample", *words, "--out", tmp_path / "two").output()
    assert said.count("samples: ") == 1
    with np.load(tmp_path / "one" / "samples.npz") as one, np.load(tmp_path / "two" / "samples.npz") as two:
        assert set(one["arr_1"]) == {2, 5} and one["arr_1"].tolist() != [2, 5] * 5 + [2]
        for name in ("arr_0", "arr_1"):
            assert np.array_equal(one[name], two[name])
    assert len({path.name for path in (tmp_path / "two").iterdir()}) == 13


def test_images_go_back_to_the_noise_that_makes_them(checkpoint, tmp_path, capsys):
    """Sampled again, the noise gives samples of the images' posteriors; the density is that by other probes."""
    words = ["--ckpt", checkpoint, "--data", "digits", "--num-samples", 3, "--batch-size", 2, "--sampler", "ODE",
             "--method", "rk4", "--steps", 6, "--device", "cpu"]  # fmt: skip
    run(*words, "--reverse", "--out", tmp_path / "reverse")
    run(*words, "--likelihood", "--probes", 64, "--out", tmp_path / "likelihood")
    said = capsys.readouterr().out
    with np.load(tmp_path / "reverse" / "inversion.npz") as one:
        back = dict(one)
    with np.load(tmp_path / "likelihood" / "inversion.npz") as two:
        both = dict(two)
    numbers = [0, 898, 1796]
    assert back["image"].tolist() == numbers and np.allclose(back["noise"], both["noise"], atol=1e-5)
    assert f"{both['bits_per_dimension'].mean():.4f}" in said

    loaded, data = load_for_sampling(checkpoint, device=torch.device("cpu")), open_images("digits", 32)
    assert back["label"].tolist() == [data[number][1] for number in numbers]
    config = SamplerConfig(sampler="ode", method="rk4", steps=6)
    noise, labels = torch.from_numpy(back["noise"]), torch.from_numpy(back["label"])
    with torch.no_grad():
        latents = sample_latents(loaded.model, loaded.transport, noise, labels, config)
    mean, std = encode_images(loaded.vae, torch.stack([data[number][0] for number in numbers]))
    shift, scale = scaling(loaded.vae.config)
    deviations = (latents - (mean - shift) * scale) / (std * scale)
    assert abs(deviations.mean()) < 0.2 and 0.85 < deviations.std() < 1.15

    probes = random_signs(64, latents, torch.Generator().manual_seed(9))
    guided = GuidedModel(loaded.model, labels, config)
    nats, _ = log_likelihood(guided, loaded.transport, latents, config, probes)
    bits = -nats.numpy() / latents[0].numel() / np.log(2)
    assert np.allclose(both["bits_per_dimension"], bits, atol=0.1) and np.ptp(bits) > 0.02


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--reverse"], "--reverse works along the ODE, on images: give --sampler ode and --data"),
        (["--likelihood", "--data", "digits"], "--likelihood works along the ODE"),
        (["--data", "digits"], "--data digits is for --reverse and --likelihood"),
        (["--reverse", "--data", "digits", "--sampler", "ode", "--labels", "1"], "leave them out"),
        (["--reverse", "--data", "nowhere", "--sampler", "ode"], "--data nowhere: no such folder"),
        (["--reverse", "--data", "digits", "--sampler", "ode", "--compile"], "--compile plays no part with --reverse"),
        (
            ["--likelihood", "--data", "digits", "--sampler", "ode", "--label-order", "uniform"],
            "--label-order uniform plays no part with --likelihood: leave it out",
        ),
        (
            ["--reverse", "--data", "digits", "--sampler", "ode", "--probes", "4"],
            "--probes 4 plays no part without --likelihood: give that too, or leave it out",
        ),
    ],
)
def test_inversion_says_what_it_needs(checkpoint, tmp_path, capsys, arguments, words):
    with pytest.raises(SystemExit):
        run("--ckpt", checkpoint, "--out", tmp_path / "a", *arguments)
    assert words in capsys.readouterr().err and not list(tmp_path.iterdir())


FEW = ["--data", "digits", "--num-samples", 1, "--sampler", "ode", "--method", "euler", "--steps", 1, "--device", "cpu"]


@pytest.mark.parametrize("way", ["--reverse", "--likelihood"])
def test_inversion_refuses_a_folder_in_use_before_it_computes(checkpoint, tmp_path, capsys, monkeypatch, way):
    (tmp_path / "mine").write_text("precious")
    monkeypatch.setattr("sit.sampling.inversion.inverted", None)  # called, it would fail
    with pytest.raises(SystemExit):
        run("--ckpt", checkpoint, way, *FEW, "--out", tmp_path)
    assert "exists already" in capsys.readouterr().err and [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_inversion_that_fails_leaves_nothing(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("sit.sampling.inversion.inverted", None)
    with pytest.raises(TypeError):
        run("--ckpt", checkpoint, "--reverse", *FEW, "--out", tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_every_inversion_has_a_folder_of_its_own(checkpoint, tmp_path, capsys, monkeypatch):
    """As samples have, it is named by the time; what is done and the seed tell those of one second apart."""
    monkeypatch.chdir(tmp_path)
    now = time.mktime((2026, 1, 2, 3, 4, 5, 0, 0, -1))
    for seconds, way, seed in ((0, "--reverse", 0), (1, "--reverse", 0), (1, "--likelihood", 0), (1, "--reverse", 7)):
        then = time.localtime(now + seconds)
        with monkeypatch.context() as patch:
            patch.setattr("time.strftime", lambda form, strftime=time.strftime, then=then: strftime(form, then))
            run("--ckpt", checkpoint, way, *FEW, "--seed", seed)
    names = ["20260102-030405-reverse-seed0", "20260102-030406-likelihood-seed0"]
    names += [f"20260102-030406-reverse-seed{seed}" for seed in (0, 7)]
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == names
    assert all((tmp_path / "samples" / name / "inversion.npz").is_file() for name in names)
    assert f"noise:   samples/{names[0]}/inversion.npz" in capsys.readouterr().out


NAMES = ["tench, Tinca tinca", "three", "golden_retriever", "Tabby Cat", "7"]


@pytest.mark.parametrize(
    "words, wanted",
    [
        (["1", "2"], [1, 2]),
        (["1,2"], [1, 2]),
        (["three", "0"], [1, 0]),
        (["Golden", "Retriever", "three"], [2, 1]),
        (["golden retriever"], [2]),
        (["golden_retriever,tabby cat"], [2, 3]),
        (["tabby", "cat,1"], [3, 1]),
        (["tench, tinca tinca", "3"], [0, 3]),
        (["7"], [4]),
        ([], []),
    ],
)
def test_classes_by_number_and_by_name(words, wanted):
    assert labels_named(words, NAMES, 5) == wanted


def test_a_numeral_is_the_class_that_has_it_for_a_name():
    names = ["1", "3", "5", "7"]
    assert labels_named(["3", "7", "1,5", "0"], names, 4) == [1, 3, 0, 2, 0]
    assert [labels_named([word_for(label, names)], names, 4) for label in range(4)] == [[0], [1], [2], [3]]
    assert [word_for(label, names) for label in range(4)] == ["0", "3", "2", "7"]
    assert [word_for(label, "0123") for label in range(4)] == list("0123")


def test_an_image_too_small_for_a_mixer_is_one_line(checkpoint, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run("--ckpt", checkpoint, "--image-size", 16, "--steps", 2, "--out", tmp_path / "small")
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: --image-size 16 16 is too small for atconv: the 4 tokens of a 2 x 2 grid")
    assert error.endswith("; take a larger one") and "--kernel-size" not in error


@pytest.mark.parametrize("way", ["--reverse", "--likelihood"])
def test_the_batch_size_does_not_matter_to_an_adaptive_solver_backwards(checkpoint, tmp_path, way):
    for size in (1, 3):
        run("--ckpt", checkpoint, way, "--data", "digits:heldout", "--sampler", "ode", "--num-samples", 3, "--rtol",
            0.1, "--atol", 0.1, "--batch-size", size, "--out", tmp_path / str(size))  # fmt: skip
    with np.load(tmp_path / "1" / "inversion.npz") as one, np.load(tmp_path / "3" / "inversion.npz") as three:
        assert all(np.array_equal(one[name], three[name]) for name in one.files)


def test_a_name_of_several_classes():
    names = ["crane", "a_b", "crane", "A B"]
    assert labels_named(["A B"], names, 4) == [3], "as it is written goes before other capitals"
    assert labels_named(["a_b", "2"], names, 4) == [1, 2]
    for word, labels in (("Crane", "0, 2"), ("a b", "1, 3")):
        with pytest.raises(UserError, match=f"names several classes of this network: give one of {labels}"):
            labels_named([word], names, 4)


@pytest.mark.parametrize(
    "words, told",
    [
        (["zebra", "dog"], "zebra` is no class of this network: it has the labels 0 to 4"),
        (["thre"], "thre` is no class of this network; did you mean three"),
        (["9"], "9` is out of range"),
        (["-1"], "-1` is out of range"),
    ],
)
def test_a_class_that_there_is_not(words, told):
    with pytest.raises(UserError, match=told):
        labels_named(words, NAMES, 5)


def test_another_image_size(checkpoint, tmp_path):
    run("--ckpt", checkpoint, "--steps", 2, "--num-samples", 2, "--image-size", 48, 32, "--out", tmp_path / "a")
    with np.load(tmp_path / "a" / "samples.npz") as archive:
        assert archive["arr_0"].shape == (2, 48, 32, 3)


def test_precision(checkpoint, tmp_path):
    """bfloat16 is near float32 and not the same; one number is the side of a square."""
    images = {}
    for precision in ("float32", "bfloat16"):
        run("--ckpt", checkpoint, "--steps", 3, "--num-samples", 2, "--precision", precision, "--image-size", 48,
            "--out", tmp_path / precision)  # fmt: skip
        with np.load(tmp_path / precision / "samples.npz") as archive:
            images[precision] = archive["arr_0"].astype(float)
    assert images["float32"].shape == (2, 48, 48, 3)
    assert 0 < np.abs(images["float32"] - images["bfloat16"]).mean() < 2


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--steps", "0"], "--steps must be at least 1"),
        (["--steps", "-5"], "--steps must be at least 1"),
        (["--labels", "10"], "--labels 10 is out of range: this network has the classes 0 to 9"),
        (["--device", "cpu", "--precision", "tf32"], "--precision tf32 is for GPUs, and this is cpu"),
        (["--sampler", "magic"], "invalid choice 'magic'"),
        (["--sampler", "ode", "--method", "heun9"], "the methods of --sampler ode are .*dopri5"),
        (["--num-samples", "0"], "--num-samples must be at least 1"),
        (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["--image-size", "30", "32"], "--image-size 30 32: both must be multiples of 8"),
        (["--device", "abacus"], "--device abacus can't be used"),
        (["--cfg-interval", "0.7", "0.2"], "--cfg-interval"),
        (["--cfg-channels", "0"], "--cfg-channels plays no part with --cfg-scale 1"),
        (["--probes", "2"], "--probes 2 plays no part without --likelihood"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(checkpoint, tmp_path, capsys, arguments, words):
    with pytest.raises(SystemExit) as stop:
        run("--ckpt", checkpoint, "--out", tmp_path / "a", *arguments)
    told = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and told.startswith("error: ")
    assert re.search(words, told), told
    assert not list(tmp_path.iterdir())


def test_a_folder_in_use_is_left_alone(checkpoint, tmp_path, capsys):
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(SystemExit):
        run("--ckpt", checkpoint, "--steps", 2, "--out", tmp_path)
    assert "exists already" in capsys.readouterr().err and (tmp_path / "mine").read_text() == "precious"


def test_missing_and_foreign_checkpoints(tmp_path, capsys):
    (tmp_path / "foreign.pt").write_bytes(b"not a checkpoint")
    for path in (tmp_path / "none", tmp_path / "foreign.pt", tmp_path):
        with pytest.raises(SystemExit) as stop:
            run("--ckpt", path, "--out", tmp_path / "out")
        assert stop.value.code == 2 and str(path) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
