"""Files that say nonsense: one line that names the file, before anything of the size that they name is made."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import struct
import zipfile
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file

from sit.checkpoint.load import load_for_sampling
from sit.data.factory import open_images
from sit.data.reading import BadImage
from sit.latents.cache import CachedLatents
from sit.latents.datasets import LatentData
from sit.latents.encode import Encode, Verify, encode, verify
from sit.latents.vae import DIGITS_VAE, load_vae, scaling
from sit.metrics.image_sets import FileImages, open_samples
from sit.metrics.statistics_files import open_reference
from sit.model import SiT
from sit.training.recipes import load_recipe
from sit.utils.errors import UserError


@pytest.fixture(scope="module")
def published() -> dict[str, torch.Tensor]:
    return SiT(8, hidden_size=16, depth=1, num_heads=2, num_classes=3, mixer="atconv", seed=0).state_dict()


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("cache")
    for name in "ab":
        (place / "images" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(place / "images" / name / "0.png")
    return encode(Encode(place / "cache", str(place / "images"), "digits", 8, workers=0))


def refused(read, path: Path | str, *words: str) -> None:
    """``read`` ends in one line that names ``path`` and has the words."""
    with pytest.raises(UserError) as caught:
        read()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1000 and str(path) in message
    for word in words:
        assert word in message


def changed(path: Path, **values) -> None:
    """Replace values of a JSON file; the file may be a link to another."""
    content = json.loads(path.read_text()) | values
    path.unlink()
    path.write_text(json.dumps(content))


# --- configurations of a checkpoint -----------------------------------------------------------------------------------

CONFIGS = {
    "text for a number": ({"hidden_size": "16"}, "hidden_size: '16' is not a whole number"),
    "true for a number": ({"depth": True}, "depth: True is not a whole number"),
    "no patches": ({"patch_size": 0}, "patch_size must be at least 1"),
    "no heads": ({"num_heads": 0}, "num_heads must be at least 1"),
    "null": ({"input_size": None}, "input_size: None"),
    "a number for a mixer": ({"mixer": 5}, "mixer: 5 is not text"),
    "quantized": ({"quantization_config": {"bits": 4}}, "quantized"),
    "endless depth": ({"depth": 10**7}, "1 blocks for a depth of 10000000"),
    "endless width": ({"hidden_size": 10**6}, "do not fit its config.json"),
    "endless latents": ({"input_size": 10**9}, "beyond any latent"),
    "endless classes": ({"num_classes": 10**12}, "do not fit its config.json"),
    "endless MLP": ({"mlp_ratio": float("inf")}, "mlp_ratio"),
    "an unknown name": ({"hidden_sizes": 32}, "unknown setting 'hidden_sizes'"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_networks_config(kind, checkpoint, tmp_path):
    values, words = CONFIGS[kind]
    folder = shutil.copytree(checkpoint / "transformer", tmp_path / "net")
    changed(folder / "config.json", **values)
    refused(lambda: load_for_sampling(folder), folder, words)


@pytest.mark.parametrize(
    "values, words",
    [
        ({"sample_eps": "0.1"}, "sample_eps: '0.1' is not a number or null"),
        ({"sample_eps": 3.0}, "sample_eps must be in [0, 0.5)"),
        ({"prediction": 5}, "prediction: 5"),
        ({"interpolant": "x"}, "x"),
        ({"interpolnt": "gvp"}, "unknown setting 'interpolnt'"),
    ],
)
def test_a_transports_config(values, words, checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "folder")
    (folder / "sit.json").unlink()
    changed(folder / "transport" / "transport_config.json", **values)
    refused(lambda: load_for_sampling(folder), folder / "transport" / "transport_config.json", words)


@pytest.mark.parametrize(
    "values, words",
    [({"id2label": ["a", "b"]}, "a mapping"), ({"id2label": {"x": "a"}}, "from 0 on"), ({"vae_name": 5}, "vae_name")],
)
def test_a_model_index(values, words, checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "folder")
    (folder / "sit.json").unlink()
    shutil.rmtree(folder / "vae")
    changed(folder / "model_index.json", **values)
    refused(lambda: load_for_sampling(folder), folder / "model_index.json", words)


@pytest.mark.parametrize("values", [{"image_size": 32}, {"step": "4"}, {"label_names": [1]}, {"step": True}])
def test_a_checkpoints_index(values, checkpoint, tmp_path):
    from sit.checkpoint.info import read_info
    from sit.checkpoint.integrity import read_index
    from sit.utils.checksums import sealed

    folder = shutil.copytree(checkpoint, tmp_path / "folder")
    index = read_index(folder) | values
    (folder / "sit.json").write_text(sealed(index))  # with its own checksum, as a program with a fault would
    refused(lambda: read_info(folder), folder / "sit.json", *values)


def test_json_that_is_nested_without_end(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint / "transformer", tmp_path / "net")
    (folder / "config.json").write_text("[" * 10**5)
    refused(lambda: load_for_sampling(folder), folder / "config.json", "not JSON")


# --- published files --------------------------------------------------------------------------------------------------

ARGUMENTS = {
    "num_classes": 3.0,
    "sample_eps": "0.1",
    "class_dropout_prob": "0.1",
    "vae": ["mse"],
    "image_size": "32",
    "model": 5,
    "path_type": 1,
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_the_arguments_in_a_published_file(name, published, tmp_path):
    path = tmp_path / "x.pt"
    args = argparse.Namespace(**{"image_size": 64, name: ARGUMENTS[name]})
    torch.save({"ema": published, "args": args}, path)
    refused(lambda: load_for_sampling(path), path, name)


WEIGHTS = {
    "0-dim": lambda tensor: tensor.new_zeros(()),
    "1-dim": lambda tensor: tensor.flatten(),
    "empty": lambda tensor: tensor.new_zeros(0, *tensor.shape[1:]),
    "whole numbers": lambda tensor: tensor.to(torch.int64),
    "not stored whole": lambda tensor: tensor.new_zeros(1).expand(10**12),
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_the_weights_in_a_published_file(kind, published, tmp_path):
    path = tmp_path / "x.pt"
    for name in ("x_embedder.proj.weight", "y_embedder.embedding_table.weight", "blocks.0.attn.kernel_gen.weight"):
        torch.save(published | {name: WEIGHTS[kind](published[name])}, path)
        refused(lambda: load_for_sampling(path, image_size=64), path)


def test_a_block_of_a_high_number(published, tmp_path):
    path = tmp_path / "x.pt"
    torch.save(published | {"blocks.9999999.mlp.fc1.weight": torch.ones(2, 2)}, path)
    refused(lambda: load_for_sampling(path, image_size=64), path, "9999999")


def test_a_pt_file_whose_members_are_packed(published, tmp_path):
    whole, path = tmp_path / "whole.pt", tmp_path / "x.pt"
    torch.save(published, whole)
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in source.namelist():
            packed.writestr(name, source.read(name))
    refused(lambda: load_for_sampling(path, image_size=64), path, "compressed")


def test_the_training_checkpoint_of_a_dit_is_no_sit(published, tmp_path):
    """Its keys are those of a SiT, and only its command line tells."""
    path = tmp_path / "dit.pt"
    for model in ("DiT-S/2", "LightningDiT-XL/1"):
        torch.save({"ema": published, "args": argparse.Namespace(model=model, image_size=64)}, path)
        refused(lambda: load_for_sampling(path), path, model)
    torch.save({"ema": published, "args": argparse.Namespace(model="SiT-S/2", image_size=64)}, path)
    assert load_for_sampling(path, num_heads=2).info.image_size == (64, 64)


# --- VAEs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        {"scaling_factor": None},
        {"scaling_factor": "1"},
        {"scaling_factor": 0},
        {"scaling_factor": float("nan")},
        {"latents_mean": [0.0]},
        {"latents_mean": [0.0] * 4, "latents_std": [1.0, 1.0, 0.0, 1.0]},
        {"latents_mean": [1.0] * 4, "shift_factor": 0.5},
        {"block_out_channels": [10**9] * 3},
        {"layers_per_block": 10**7},
        {"block_out_channels": 4},
    ],
    ids=str,
)
def test_a_vaes_config(values, tmp_path):
    folder = shutil.copytree(DIGITS_VAE, tmp_path / "vae")
    changed(folder / "config.json", **values)
    refused(lambda: load_vae(folder), f"`vae={folder}`")


def test_a_vaes_config_that_leaves_out_the_default_scaling(tmp_path):
    """As that of stabilityai/sd-vae-ft-ema does; diffusers' default is Stable Diffusion's 0.18215."""
    folder = shutil.copytree(DIGITS_VAE, tmp_path / "vae")
    config = json.loads((folder / "config.json").read_text())
    for name in ("scaling_factor", "shift_factor", "latents_mean", "latents_std"):
        config.pop(name, None)
    (folder / "config.json").write_text(json.dumps(config))
    assert scaling(load_vae(folder).config) == (0.0, 0.18215)


def test_a_vae_of_another_networks_latents_is_told_before_sampling(checkpoint, tmp_path):
    from sit.sampling.config import SamplerConfig
    from sit.sampling.images import sample_images

    AutoencoderKL(latent_channels=3, block_out_channels=(8,), norm_num_groups=4).save_pretrained(tmp_path / "vae")
    loaded = load_for_sampling(checkpoint, vae=tmp_path / "vae")

    def sampled(*_, **__):
        raise AssertionError("it was sampled first")

    loaded.model.forward = sampled
    making = sample_images(loaded, torch.arange(1), torch.tensor([0]), seed=0, config=SamplerConfig(steps=2))
    refused(lambda: next(making), tmp_path / "vae", "3 channels", "has 4")


# --- arrays -----------------------------------------------------------------------------------------------------------


def npy(shape: tuple[int, ...], descr: str = "|u1", content: bytes = b"") -> bytes:
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + content


def npz(path: Path, members: dict[str, bytes], how: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", how) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


IMAGES = npy((2, 4, 4, 3), content=bytes(range(96)))


def test_whole_npz_files_are_read(tmp_path):
    path = npz(
        tmp_path / "x.npz", {"arr_0.npy": IMAGES, "arr_1.npy": npy((2,), "<i8", bytes(16))}, zipfile.ZIP_DEFLATED
    )
    found = open_samples(str(path))
    assert found.batch(np.arange(2)).flatten().sum() == sum(range(96)) and found.labels.tolist() == [0, 0]


def test_npz_files_that_promise_too_much(tmp_path):
    path = tmp_path / "x.npz"
    for shape in [(10**15, 4, 4, 3), (3, 4, 4, 3), (1, 4, 4, 3), (2, -4, -4, 3)]:
        npz(path, {"arr_0.npy": npy(shape, content=bytes(range(96)))})
        refused(lambda: open_samples(str(path)), path)


def test_a_zip_bomb_is_not_unpacked_to_see_what_it_is(tmp_path):
    """A gigabyte of zeros in a megabyte: of the wrong form, it is refused by its header."""
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("arr_0.npy", "w") as member:
        member.write(npy((1 << 26,), "<f8"))
        for _ in range(1 << 9):
            member.write(bytes(1 << 20))
    before = _peak()
    refused(lambda: open_samples(str(path)), path, "must be uint8 images")
    refused(lambda: open_reference(str(path)), path, "must be uint8 images")
    assert _peak() - before < 100 << 20


def _peak() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def test_damaged_encrypted_and_otherwise_packed_npz_files(tmp_path):
    path = npz(tmp_path / "x.npz", {"arr_0.npy": IMAGES}, zipfile.ZIP_DEFLATED)
    content = bytearray(path.read_bytes())
    damaged = content.copy()
    damaged[80] ^= 255  # within the packed bytes
    encrypted, unknown = content.copy(), content.copy()
    for at in (6, content.index(b"PK\x01\x02") + 8):
        encrypted[at] |= 1
    for at in (8, content.index(b"PK\x01\x02") + 10):
        unknown[at] = 97
    for changed_content, word in [(damaged, ""), (encrypted, "encrypted"), (unknown, "compressed in a way")]:
        path.write_bytes(changed_content)
        refused(lambda: open_samples(str(path)), path, word)


def test_labels_and_moments_of_a_cache(cache, tmp_path):
    for name, content in [
        ("labels.npy", npy((10**15,), "<i8", bytes(16))),
        ("labels.npy", b"\x93NUMPY\x01\x00\xff\xff{'descr"),
        ("moments-00000.npy", npy((10**15, 2, 2, 4, 2, 2), "<f2", bytes(16))),
    ]:
        folder = shutil.copytree(cache, tmp_path / f"{name}-{len(content)}")
        (folder / name).write_bytes(content)
        refused(partial(CachedLatents, folder), f"`data={folder}`", name)


@pytest.mark.parametrize("values", [{"count": "2"}, {"classes": "ab"}, {"latent_shape": [4, 2]}, {"shard_size": 0}])
def test_a_caches_manifest(values, cache, tmp_path):
    folder = shutil.copytree(cache, tmp_path / "cache")
    changed(folder / "manifest.json", **values)
    refused(lambda: CachedLatents(folder), folder / "manifest.json")


def test_a_negative_seed_of_verify(cache):
    refused(lambda: verify(Verify(cache, seed=-1)), "`seed=-1`", "negative")


def test_moments_that_float16_does_not_hold():
    mean = torch.zeros(3, 4, 2, 2)
    LatentData(mean, mean, np.zeros(3), ["a"], {"scaling_factor": 1.0})
    for value in (float("nan"), 1e6):
        mean[1, 0, 0, 0] = value
        with pytest.raises(UserError, match="`data=latents`: of image 1 the VAE makes values that are not finite"):
            LatentData(mean, torch.zeros_like(mean), np.zeros(3), ["a"], {"scaling_factor": 1.0})


# --- recipes and images -----------------------------------------------------------------------------------------------


def test_recipes(tmp_path):
    path, other = tmp_path / "a.yaml", tmp_path / "b.yaml"
    for text, words in [
        (f"base: {path}\n", "its own base"),
        (f"base: {other}\n", "its own base"),
        ("steps: true\n", "steps: True is not a whole number"),
        ("data: " + "[" * 3000 + "]" * 3000, "YAML"),
        ("data: [1, 2]\n", "data: (1, 2) is not text"),
        ("base: [1]\n", "base"),
        ("? [1]\n: 2\n", "not readable YAML"),
        ("steps: &a [1]\nbatch_size: [*a, *a]\n", "steps"),
    ]:
        path.write_text(text)
        other.write_text(f"base: {path}\n")
        refused(lambda: load_recipe(str(path)), tmp_path, words)
    for number in range(40):
        (tmp_path / f"{number}.yaml").write_text(f"base: {tmp_path / str(number + 1)}.yaml\n")
    refused(lambda: load_recipe(str(tmp_path / "0.yaml")), tmp_path, "too deep")


def test_a_class_folder_that_is_not_named_in_utf8(tmp_path):
    folder = os.fsencode(tmp_path) + b"/set/caf\xe9"
    os.makedirs(folder)
    Image.new("RGB", (8, 8)).save(os.fsdecode(folder) + "/0.png")
    refused(lambda: open_images(str(tmp_path / "set")), tmp_path / "set", "caf", "UTF-8")


def test_an_image_of_too_many_pixels_is_named(tmp_path):
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0))
    (tmp_path / "large.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    with pytest.raises(BadImage, match=r"large\.png"):
        FileImages(tmp_path).batch(np.array([0]))


def test_weights_in_shards_and_variants_are_read(checkpoint, tmp_path):
    """As diffusers writes them; several variants leave it open which is meant."""
    whole = load_for_sampling(checkpoint).model
    for name, options in [("shards", {"max_shard_size": "20KB"}), ("fp16", {"variant": "fp16"})]:
        whole.save_pretrained(tmp_path / name, **options)
        again = load_for_sampling(tmp_path / name).model.state_dict()
        assert all(torch.equal(again[key], tensor) for key, tensor in whole.state_dict().items())
    assert len(list((tmp_path / "shards").glob("*-of-*.safetensors"))) > 1

    from sit.checkpoint.convert import Convert, convert

    for name in ("shards", "fp16"):
        file = convert(Convert(tmp_path / name, tmp_path / f"{name}.safetensors", layout="published"))
        assert all(torch.equal(tensor, whole.state_dict()[key]) for key, tensor in load_file(file).items())
    save_file(dict(whole.state_dict()), tmp_path / "fp16" / "diffusion_pytorch_model.other.safetensors")
    refused(lambda: load_for_sampling(tmp_path / "fp16"), tmp_path / "fp16", "several variants")
    next((tmp_path / "shards").glob("*-00002-of-*")).unlink()
    refused(lambda: load_for_sampling(tmp_path / "shards"), tmp_path / "shards", "00002-of-")


def test_a_published_file_with_another_vae_takes_that_ones_factor(published, tmp_path):
    """The digits' VAE has 4 pixels a latent; all published networks were trained with 8."""
    from sit.checkpoint.convert import Convert, convert
    from sit.checkpoint.hints import Hints

    path = tmp_path / "x.pt"
    torch.save(published, path)
    for vae, size in ((None, 64), (DIGITS_VAE, 32), ("some/name-on-the-hub", 64)):
        loaded = load_for_sampling(path, vae=vae, image_size=size)
        assert tuple(loaded.model.config.input_size) == (8, 8) and loaded.info.image_size == (size, size)
    hints = Hints(image_size=32)
    refused(lambda: load_for_sampling(path, vae=DIGITS_VAE, image_size=36), path, "multiples of 8 ")
    ours = load_for_sampling(convert(Convert(path, tmp_path / "ours", vae=str(DIGITS_VAE), hints=hints)))
    assert tuple(ours.model.config.input_size) == (8, 8) and ours.info.image_size == (32, 32)


def test_a_pt_file_is_compared_with_its_checksums(published, tmp_path):
    """One bit anywhere in the weights; a file that was written without checksums is read all the same."""
    path = tmp_path / "x.pt"
    torch.save(published, path)
    content = path.read_bytes()
    weight = published["blocks.0.mlp.fc1.weight"].numpy().tobytes()
    damaged = bytearray(content)
    damaged[content.index(weight) + len(weight) // 2] ^= 1
    path.write_bytes(damaged)
    refused(lambda: load_for_sampling(path, image_size=64), path, "checksum")
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(published, path)
    finally:
        torch.serialization.set_crc32_options(True)
    load_for_sampling(path, image_size=64)


def test_a_pipelines_vae_of_other_channels_is_told_before_sampling(checkpoint, tmp_path):
    from sit.pipeline import SiTPipeline
    from sit.transport.transport import Transport

    def sampled(*_, **__):
        raise AssertionError("it was sampled first")

    network = load_for_sampling(checkpoint).model
    network.forward = sampled
    vae = AutoencoderKL(latent_channels=3, block_out_channels=(8,), norm_num_groups=4)
    refused(lambda: SiTPipeline(network, Transport(), vae)(1, 1.0, num_inference_steps=2), "`vae=vae/`", "has 4")
