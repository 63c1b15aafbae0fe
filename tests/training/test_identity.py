"""A run goes on with what it was begun with, or not at all; and what its folder says can be read, or is refused."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from limits import not_as_root, open_folder
from PIL import Image
from tiny_runs import tiny_run

from sit.data.dataset import COMPARED
from sit.data.factory import open_images
from sit.latents.encode import Encode, encode
from sit.latents.vae import DIGITS_VAE, load_vae
from sit.training.config import TrainConfig, fixed_fields
from sit.training.identity import FILE, Identity, keep_identity, read_identity
from sit.training.recipes import ALWAYS_WRITTEN, load_run_settings, run_folder, run_settings
from sit.training.run_folder import read_metrics
from sit.training.trainer import train
from sit.utils.checksums import sealed
from sit.utils.errors import UserError
from sit.utils.fingerprint import weights_fingerprint

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
EARLIER = Path(__file__).parents[1] / "fixtures" / "earlier" / "run"


def small(folder: Path, **changes) -> TrainConfig:
    return tiny_run(folder, **dict(model="SiT-XS/8", steps=1, batch_size=4) | changes)


def go(config: TrainConfig) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    train(config)


def refused(config: TrainConfig, words: str) -> str:
    with pytest.raises(UserError, match=words) as caught:
        go(dataclasses.replace(config, steps=config.steps + 1, resume="auto"))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def save_image(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)


@pytest.fixture
def data(tmp_path) -> Path:
    """Twelve images of one size in bytes, in three classes."""
    for number in range(12):
        save_image(tmp_path / "data" / str(1 + number % 3) / f"{number:02d}.ppm", number)
    return tmp_path / "data"


def add_an_image(data: Path) -> None:
    save_image(data / "2" / "zz.ppm", 99)


def rename_a_class(data: Path) -> None:
    (data / "1").rename(data / "9")


def replace_all_images(data: Path) -> None:
    for number, path in enumerate(sorted(data.rglob("*.ppm"))):
        save_image(path, 1000 + number)


def add_a_class(data: Path) -> None:
    save_image(data / "4" / "a.ppm", 7)


def remove_a_class(data: Path) -> None:
    shutil.rmtree(data / "3")


CHANGES: list[tuple[Callable[[Path], None], str]] = [
    (add_an_image, "`data=.*data` holds other images than the run .*run was begun with"),
    (replace_all_images, "`data=.*data` holds other images than the run .*run was begun with"),
    (rename_a_class, r"other classes than the run .* was begun with \(without 1; with 9\)"),
    (add_a_class, r"other classes than the run .* was begun with \(with 4\)"),
    (remove_a_class, r"other classes than the run .* was begun with \(without 3\)"),
]


def test_a_run_goes_on_with_its_images_alone(data, tmp_path):
    config = small(tmp_path / "run", data=str(data))
    go(config)
    shutil.copytree(data, tmp_path / "before")
    for change, words in CHANGES:
        change(data)
        refused(config, words)
        shutil.rmtree(data)
        shutil.copytree(tmp_path / "before", data)
    go(dataclasses.replace(config, steps=2, resume="auto"))
    assert [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2]


def test_a_run_goes_on_with_its_vae_and_its_cache_alone(data, tmp_path):
    vae = shutil.copytree(DIGITS_VAE, tmp_path / "vae")
    cache = Encode(tmp_path / "cache", str(data), str(vae), image_size=32, flip=False, workers=0)
    encode(cache)
    config = small(tmp_path / "run", data=str(cache.out), vae=str(vae))
    go(config)
    add_an_image(data)
    cache.out.rename(tmp_path / "other")
    encode(cache)
    refused(config, "`data=.*cache` holds other images than the run .*run was begun with")
    shutil.rmtree(cache.out)
    (tmp_path / "other").rename(cache.out)
    go(dataclasses.replace(config, steps=2, resume="auto"))

    config = small(tmp_path / "images", data=str(data), vae=str(vae))
    go(config)
    changed = load_vae(vae)
    changed.encoder.conv_in.bias.data += 0.1
    changed.save_pretrained(vae)
    refused(config, "`vae=.*vae` holds other weights than the run .*images was begun with")


def test_data_a_vae_and_an_encoder_may_be_moved(data, tmp_path):
    """They are known by what they hold; and the folder says from then on where they are."""
    timm.models.save_for_hf(
        timm.create_model("test_vit", num_classes=0), tmp_path / "encoder", model_args={"num_classes": 0},
        safe_serialization=True,
    )  # fmt: skip
    shutil.copytree(DIGITS_VAE, tmp_path / "vae")
    places = dict(data=data, vae=tmp_path / "vae", repa=tmp_path / "encoder")
    config = small(tmp_path / "run", **{name: str(place) for name, place in places.items()}, repa_block=1)
    go(config)
    (tmp_path / "elsewhere").mkdir()
    moved = {name: str(place.rename(tmp_path / "elsewhere" / place.name)) for name, place in places.items()}
    go(dataclasses.replace(config, steps=2, resume="auto", **moved | dict(data=f"{moved['data']}/")))
    told = load_run_settings(tmp_path / "run")
    assert (told.vae, told.repa, told.data) == (moved["vae"], moved["repa"], f"{moved['data']}/")
    go(dataclasses.replace(told, steps=3, resume="auto", output_dir=config.output_dir))
    refused(dataclasses.replace(told, steps=3, output_dir=config.output_dir, repa=None, repa_block=None), "`repa")
    save_image(next(path for path in Path(moved["data"]).rglob("*") if path.is_file()), seed=77)
    refused(dataclasses.replace(told, steps=3, output_dir=config.output_dir), "`data=.*` holds other images")


def test_a_run_goes_on_with_its_encoder_alone(tmp_path):
    encoder = timm.create_model("test_vit", num_classes=0)
    timm.models.save_for_hf(encoder, tmp_path / "encoder", model_args={"num_classes": 0}, safe_serialization=True)
    config = small(tmp_path / "run", repa=str(tmp_path / "encoder"), repa_block=1, data="digits:heldout")
    go(config)
    with torch.no_grad():
        encoder.norm.weight += 1
    timm.models.save_for_hf(encoder, tmp_path / "encoder", model_args={"num_classes": 0}, safe_serialization=True)
    refused(config, "`repa=.*encoder` holds other weights than the run")


def test_a_run_of_version_0_1_0_says_from_then_on_what_it_was_trained_on(data, tmp_path):
    config = small(tmp_path / "run", data=str(data))
    go(config)
    noted = (tmp_path / "run" / FILE).read_bytes()
    (tmp_path / "run" / FILE).unlink()
    go(dataclasses.replace(config, steps=2, resume="auto"))
    assert (tmp_path / "run" / FILE).read_bytes() == noted


def test_every_byte_of_the_note_counts_and_so_do_the_settings(tmp_path):
    config = TrainConfig()
    settings = json.loads(json.dumps({name: getattr(config, name) for name in fixed_fields()}))
    one = Identity(settings, "images", ["a", "b"], "vae", None)
    keep_identity(tmp_path, one, config)
    assert read_identity(tmp_path) == one
    keep_identity(tmp_path, one, config)
    with pytest.raises(UserError, match="`seed=7` can't continue the run .* was begun with 0"):
        keep_identity(tmp_path, dataclasses.replace(one, settings=settings | {"seed": 7}), config)
    with pytest.raises(UserError, match=r"\(in another order\)"):
        keep_identity(tmp_path, dataclasses.replace(one, classes=["b", "a"]), config)
    text = (tmp_path / FILE).read_bytes()
    for position in range(len(text)):
        damaged = bytearray(text)
        damaged[position] ^= 4
        (tmp_path / FILE).write_bytes(damaged)
        with pytest.raises(UserError, match=f"{FILE} is damaged"):
            read_identity(tmp_path)


def test_a_note_of_before_has_another_block_where_there_is_no_encoder(tmp_path):
    config = TrainConfig()
    settings = json.loads(json.dumps({name: getattr(config, name) for name in fixed_fields()}))
    one = Identity(settings, "images", ["a", "b"], "vae", None)

    def write(settings: object) -> None:
        (tmp_path / FILE).write_text(sealed(dataclasses.asdict(one) | {"settings": settings}))

    write(settings | {"repa_block": 8})
    keep_identity(tmp_path, one, config)
    assert read_identity(tmp_path) == one
    write(settings | {"repa_block": 7})
    with pytest.raises(UserError, match="`repa_block=None` can't continue the run .* was begun with 7"):
        keep_identity(tmp_path, one, config)
    write(settings | {"train_eps": 0.05})  # which the velocity did not take
    assert read_identity(tmp_path) == one
    write(3)
    with pytest.raises(UserError, match=f"{FILE} is damaged"):
        read_identity(tmp_path)


def test_what_the_hash_of_the_contents_reads(tmp_path):
    """Every size, and the bytes of some images, first and last included: 100 here, of which it reads 64."""
    for number in range(100):
        save_image(tmp_path / "data" / "a" / f"{number:03d}.ppm", number)
    paths = sorted((tmp_path / "data" / "a").iterdir())
    before = open_images(str(tmp_path / "data")).contents()
    assert before == open_images(str(tmp_path / "data")).contents()
    seen = []
    for path in paths:
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        seen.append(open_images(str(tmp_path / "data")).contents() != before)
        path.write_bytes(content + b"x")
        assert open_images(str(tmp_path / "data")).contents() != before
        path.write_bytes(content)
    assert sum(seen) == COMPARED and seen[0] and seen[-1]


def test_every_source_tells_its_contents(data, tmp_path):
    import tarfile

    def tar(path: Path) -> str:
        with tarfile.open(path, "w") as archive:
            archive.add(data, ".")
        return open_images(str(path)).contents()

    before, digits = tar(tmp_path / "a.tar"), open_images("digits").contents()
    assert tar(tmp_path / "b.tar") == before
    replace_all_images(data)
    assert tar(tmp_path / "c.tar") != before
    assert digits == open_images("digits").contents() != open_images("digits:heldout").contents()
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y"])})

    def hub(shade: int) -> str:
        buffer = io.BytesIO()
        Image.fromarray(np.full((8, 8), shade, dtype=np.uint8)).save(buffer, "PNG")
        rows = {"img": [{"bytes": buffer.getvalue(), "path": None}] * 2, "label": [0, 1]}
        datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / f"set{shade}")
        source = open_images(f"datasets:{tmp_path / f'set{shade}'}").source
        source._identity = "the same"
        return source.contents()

    assert hub(3) != hub(4)


def test_weights_are_compared_bit_by_bit():
    layer = torch.nn.Linear(3, 3)
    before = weights_fingerprint(layer)
    assert weights_fingerprint(layer) == before
    with torch.no_grad():
        layer.weight[2, 1] = torch.nextafter(layer.weight[2, 1], torch.tensor(9.0))
    assert weights_fingerprint(layer) != before


def test_settings_cut_off_at_a_lines_end_are_refused(tmp_path):
    text = run_settings(TrainConfig(seed=3))
    (tmp_path / "config.yaml").write_text(text)
    assert load_run_settings(tmp_path) == TrainConfig(seed=3)
    today, earlier = text.splitlines(keepends=True), (EARLIER / "config.yaml").read_text().splitlines(keepends=True)
    assert set(ALWAYS_WRITTEN) <= {line.partition(":")[0] for line in earlier}
    for lines in (today, earlier):
        (tmp_path / "config.yaml").write_text("".join(lines))
        load_run_settings(tmp_path)
        for cut in range(len(lines)):
            (tmp_path / "config.yaml").write_text("".join(lines[:cut]))
            with pytest.raises(UserError, match="config.yaml is cut off"):
                load_run_settings(tmp_path)


def test_what_must_not_be_read_is_one_line(tmp_path):
    """Of a run that nobody may read as a whole, or of which one file or folder is closed."""
    with open_folder() as place:
        run = place / "run"
        go(small(run))
        config = small(run, steps=2, resume="auto")
        last = run / "checkpoints" / "step-0000001"
        closed = ["config.yaml", "checkpoints", "metrics.jsonl", FILE, last / "training" / "optimizer.pt"]
        closed += [last / "transformer", last / "training", "."]
        for path in (run / name for name in closed):
            mode = path.stat().st_mode
            path.chmod(0)
            AcceleratorState._reset_state(reset_partial_state=True)
            with not_as_root(), pytest.raises(UserError, match=r"can't be (read|written)") as caught:
                train(config)
            assert "\n" not in str(caught.value)
            path.chmod(mode)
            if path == run:
                path.chmod(0)
                with (
                    not_as_root(),
                    pytest.raises(UserError, match=r"`resume=.*run can't be read \(Permission denied\)"),
                ):
                    run_folder(str(run))
                path.chmod(mode)
        assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-0000001"]
        go(config)
