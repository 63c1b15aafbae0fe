"""The latent cache: contents, restarting, several processes, verification, damage, size."""

from __future__ import annotations

import itertools
import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from limits import file_size_limit
from PIL import Image
from processes import Connected

from sit.data.factory import open_images
from sit.latents.cache import CachedLatents, Manifest, is_cache
from sit.latents.datasets import encode_in_memory
from sit.latents.encode import Encode, Verify, encode, verify
from sit.latents.vae import DIGITS_VAE, encode_images, load_vae
from sit.latents.with_images import CacheWithImages
from sit.training.config import TrainConfig
from sit.training.data import open_training_data
from sit.training.loader import training_batches
from sit.utils.errors import UserError

COUNT = 46


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for number in range(COUNT):
        (folder / f"class{number % 3}").mkdir(exist_ok=True)
        pixels = np.random.RandomState(number).randint(0, 255, (40, 36, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((9, 10)).save(folder / f"class{number % 3}" / f"{number:02d}.png")
    return folder


@pytest.fixture
def wish(images, tmp_path) -> Encode:
    return Encode(
        out=tmp_path / "latents", data=str(images), image_size=16, batch_size=4, chunk=8, shard_size=19, workers=0
    )


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory) -> Path:
    """A finished cache, not to be written into."""
    out = tmp_path_factory.mktemp("whole") / "latents"
    return encode(Encode(out, str(images), image_size=16, batch_size=4, chunk=8, shard_size=19, workers=1))


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_entries_are_the_moments_of_images_and_flipped_images(whole, images):
    cache, images, vae = CachedLatents(whole), open_images(str(images), 16), load_vae("digits")
    assert len(cache) == COUNT and np.array_equal(cache.labels, images.labels) and cache.classes == images.classes
    assert [shard.shape for shard in cache.shards] == [(n, 2, 2, 4, 4, 4) for n in (19, 19, 8)]
    for index in (0, 18, 19, 45):
        for flipped in (False, True):
            pixels = images[index][0].flip(-1) if flipped else images[index][0]
            expected = torch.cat(encode_images(vae, pixels[None], 4)).half()
            assert np.array_equal(cache.moments(np.array([index]), np.array([flipped]))[0], expected.numpy())


def test_training_from_the_cache_is_bitwise_training_from_memory(tmp_path):
    out = encode(Encode(tmp_path / "latents", "digits:heldout", batch_size=64, workers=0))
    memory = encode_in_memory(open_images("digits:heldout"), load_vae("digits"), flip=True, progress=False)
    options = {"seed": 1, "global_batch": 24, "start_images": 340}
    for workers in (0, 2):
        remembered = training_batches(memory, **options)
        cached = training_batches(CachedLatents(out, True), workers=workers, **options)
        for a, b in itertools.islice(zip(remembered, cached, strict=True), 4):
            assert all(torch.equal(a[name], b[name]) for name in a) and a.keys() == b.keys()


@pytest.mark.parametrize("stops", [(1,), (2, 3), (0, 1, 1)])
def test_an_encoding_that_stopped_goes_on_to_the_same_bytes(wish, whole, stops):
    for stop in stops:
        encode(wish, stop_after=stop)
        assert is_cache(wish.out) and not (wish.out / "manifest.json").exists()
        with pytest.raises(UserError, match="not yet finished"):
            CachedLatents(wish.out)
    with open(wish.out / "journal-00000.txt", "a") as journal:
        journal.write("chunk 5 of")  # as a crash would leave it
    encode(wish)
    assert contents(wish.out) == contents(whole)
    before = (wish.out / "manifest.json").stat().st_mtime_ns
    assert encode(wish) == wish.out and (wish.out / "manifest.json").stat().st_mtime_ns == before


@pytest.mark.distributed
def test_killed_at_any_moment_and_on_two_processes(wish, whole, tmp_path):
    words = ["--out", wish.out, "--data", wish.data, "--image-size", 16, "--workers", 0]
    words += ["--batch-size", 4, "--chunk", 8, "--shard-size", 19]
    command = "-m", "sit.latents", "encode", *words
    running, deadline = Connected(2, *command), time.monotonic() + 60
    while time.monotonic() < deadline and running.running() and not any(wish.out.glob("journal-*")):
        time.sleep(0.01)
    running.kill()
    assert Connected(2, *command).output().count("46 images") == 1
    assert contents(wish.out) == contents(whole)


@pytest.mark.distributed
def test_two_processes_share_the_chunks_and_one_finishes(wish, whole, tmp_path):
    """Stopped after two chunks each, as their journals note."""
    program = tmp_path / "program.py"
    program.write_text(SHARED)
    Connected(2, program, wish.out, wish.data).output()
    journals = {file.name: file.read_text().split("\n") for file in wish.out.glob("journal-*")}
    assert {name: [line for line in lines if line] for name, lines in journals.items()} == {
        f"journal-0000{process}.txt": [f"chunk {chunk} of 6 done {crc_of_chunk(whole, chunk):08x}" for chunk in chunks]
        for process, chunks in ((0, (0, 2)), (1, (1, 3)))
    }
    encode(wish)
    assert contents(wish.out) == contents(whole)


SHARED = """
import sys
from pathlib import Path
from sit.latents.encode import Encode, encode

out, data = sys.argv[1:]
encode(Encode(Path(out), data, image_size=16, batch_size=4, chunk=8, shard_size=19, workers=0), stop_after=2)
"""


def crc_of_chunk(whole: Path, chunk: int) -> int:
    finished = np.concatenate([np.load(file) for file in sorted(whole.glob("moments-*"))])
    return zlib.crc32(finished[8 * chunk : 8 * chunk + 8].tobytes())


def on_the_disk(entries: np.ndarray, whole: Path) -> list[bool]:
    """Which chunks of 8 entries are those of the finished cache."""
    finished = np.concatenate([np.load(file) for file in sorted(whole.glob("moments-*"))])
    return [np.array_equal(entries[at : at + 8], finished[at : at + 8]) for at in range(0, COUNT, 8)]


def test_a_chunk_is_noted_once_its_bytes_are_flushed(wish, whole, monkeypatch):
    """What is on the disk and in the journal whenever something is flushed; the shards begin at entries 0, 19, 38."""
    events, fsync = [], os.fsync

    def watch(descriptor: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
        journals = list(wish.out.glob("journal-*"))
        if journals and name.startswith(("moments", "journal")):
            written = np.concatenate([np.load(file) for file in sorted(wish.out.glob("moments-*"))])
            notes = journals[0].read_text().count("done")
            events.append((name.split(".")[0], on_the_disk(written, whole).count(True), notes))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watch)
    encode(wish)
    touched = [(0,), (0,), (0, 1), (1,), (1, 2), (2,)]  # shards, by hand
    expected = []
    for chunk, shards in enumerate(touched):
        expected += [(f"moments-{shard:05d}", chunk + 1, chunk) for shard in shards]
        expected.append(("journal-00000", chunk + 1, chunk + 1))
    assert events == expected


@pytest.mark.parametrize("value", [float("nan"), 1e6])
def test_latents_that_are_not_finite_are_refused(wish, tmp_path, value):
    """A VAE that gives no numbers, and one whose numbers float16 can't hold."""
    vae = load_vae(DIGITS_VAE)
    vae.encoder.conv_out.bias.data[0] = value
    vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(UserError, match="`vae=.*vae` gives values that are not finite in float32"):
        encode(replace(wish, vae=str(tmp_path / "vae")))
    assert not any("done" in journal.read_text() for journal in wish.out.glob("journal-*"))
    assert not (wish.out / "manifest.json").exists()


def test_verify_finds_every_changed_byte(copy):
    """And training every one too, but for the entries of caches that are too large to be read at its start."""
    rng, vae = np.random.default_rng(0), load_vae("digits")
    for name in ("moments-00000.npy", "moments-00002.npy", "labels.npy", "manifest.json"):
        content = (copy / name).read_bytes()
        start = 0 if name == "manifest.json" else 128  # NumPy's header, of which some bytes say nothing
        for position in [start, len(content) - 1, *rng.integers(start, len(content), 30).tolist()]:
            damaged = bytearray(content)
            damaged[position] ^= 1 << int(rng.integers(8))
            (copy / name).write_bytes(damaged)
            with pytest.raises(UserError, match=r"entries \d+ to \d+ are damaged|labels.npy|manifest.json"):
                if name.startswith("moments"):
                    verify(Verify(copy, images=1))
                else:
                    CachedLatents(copy)
            if name.startswith("moments"):
                cache = CachedLatents(copy)
                with pytest.raises(UserError, match=r"entries \d+ to \d+ are damaged; remove it and encode again"):
                    cache.check(vae, "digits")
        (copy / name).write_bytes(content)
    assert verify(Verify(copy, images=1))["compared"] == 1
    CachedLatents(copy).check(vae, "digits")


def test_verify_names_what_it_is_given(whole, tmp_path):
    with pytest.raises(UserError, match=f"^{tmp_path}/nowhere is no latent cache"):
        verify(Verify(cache=tmp_path / "nowhere"))
    for tolerance in (math.nan, -1.0):
        with pytest.raises(UserError, match=f"`tolerance={tolerance}` must be 0 or more"):
            verify(Verify(cache=whole, tolerance=tolerance))


def test_verify_finds_a_changed_entry_and_a_changed_list(copy, images, tmp_path):
    figures = verify(Verify(copy, images=100))
    assert figures["compared"] == COUNT and figures["worst"] < 1e-3
    in_the_words_of_version_0_1_0(copy / "manifest.json")  # without checksums, which would find it first
    shard = np.load(copy / "moments-00001.npy", mmap_mode="r+")
    shard[3, 1, 0] += 0.5
    shard.flush()
    with pytest.raises(UserError, match=r"entry 22 .*png, flipped\) differs"):
        verify(Verify(copy, images=100))
    shard[3, 1, 0] = np.nan
    shard.flush()
    with pytest.raises(UserError, match="entry 22"):
        verify(Verify(copy, images=100))
    moved = Path(shutil.copytree(images, tmp_path / "moved"))
    with pytest.raises(UserError, match="differs"):
        verify(Verify(copy, data=str(moved), images=100))
    (moved / "class0" / "00.png").unlink()
    with pytest.raises(UserError, match="is not the list of images"):
        verify(Verify(copy, data=str(moved)))


@pytest.mark.parametrize("spec", ["datasets:{}", "{}/a.parquet", "{}/*.parquet"])
def test_a_set_of_the_datasets_library_may_be_moved(spec, tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y"])})
    images = [Image.fromarray(np.full((16, 16), 20 * number, dtype=np.uint8)) for number in range(6)]
    made = datasets.Dataset.from_dict({"img": images, "label": [0, 1] * 3}, features=features)
    made.save_to_disk(tmp_path / "set")
    made.to_parquet(tmp_path / "set" / "a.parquet")
    old, new = spec.format(tmp_path / "set"), spec.format(tmp_path / "moved")
    wish = Encode(tmp_path / "latents", old, image_size=16, batch_size=2, chunk=2, workers=0)
    encode(wish, stop_after=1)
    (tmp_path / "set").rename(tmp_path / "moved")
    wish = replace(wish, data=new)
    assert verify(Verify(encode(wish), data=new))["compared"] == 6
    beside = CacheWithImages(wish.out, images=new)
    assert [int(image[0].max()) for image in beside.images] == [20 * number for number in range(6)]


def test_training_refuses_another_vae_or_size(whole, tmp_path):
    cache, vae = CachedLatents(whole), load_vae("digits")
    cache.check(vae, "digits", 16)
    cache.check(load_vae("digits", dtype=torch.bfloat16), "digits", None)
    with pytest.raises(UserError, match="`image_size=32`"):
        cache.check(vae, "digits", 32)
    with torch.no_grad():
        vae.decoder.conv_out.bias += 1
    with pytest.raises(UserError, match="weights"):
        cache.check(vae, "mine", 16)
    vae = load_vae(DIGITS_VAE)
    vae.register_to_config(scaling_factor=0.5)
    with pytest.raises(UserError, match="scaling"):
        cache.check(vae, "mine", 16)
    with pytest.raises(UserError, match="latent cache"):
        open_images(str(whole))


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_cache_of_any_precision_is_known_by_its_vae(precision, wish, tmp_path):
    """Weights that float16 can't hold: rounding them to it first is still seen in bfloat16."""
    vae = load_vae("digits")
    with torch.no_grad():
        for number, weight in enumerate(vae.parameters()):
            source = torch.Generator().manual_seed(number)
            weight.mul_(1 + 1e-3 * torch.randn(weight.shape, generator=source))
    vae.save_pretrained(tmp_path / "vae")
    out = encode(replace(wish, vae=str(tmp_path / "vae"), precision=precision))
    again = load_vae(tmp_path / "vae")
    CachedLatents(out).check(again, "vae")
    assert verify(Verify(out, images=3))["compared"] == 3
    with torch.no_grad():
        again.encoder.conv_in.bias += 0.1
    with pytest.raises(UserError, match="whose weights are not those of"):
        CachedLatents(out).check(again, "vae")


def test_opening_training_data_refuses_a_cache_of_another_vae_or_size(whole, tmp_path):
    config = TrainConfig(data=str(whole), vae="digits", image_size=16)
    opened = open_training_data(config, torch.device("cpu"))
    assert len(opened.data) == COUNT and opened.vae_name == "digits"
    with pytest.raises(UserError, match="holds latents of 16-pixel images, not `image_size=32`"):
        open_training_data(replace(config, image_size=32), torch.device("cpu"))
    vae = load_vae(DIGITS_VAE)
    vae.decoder.conv_out.bias.data += 1
    vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(UserError, match="was made by `vae=digits`, whose weights are not those of `vae=.*vae`;"):
        open_training_data(replace(config, vae=str(tmp_path / "vae")), torch.device("cpu"))


def test_without_flipped_images(wish):
    cache = CachedLatents(encode(replace(wish, flip=False)))
    assert cache.shards[0].shape == (19, 1, 2, 4, 4, 4)
    next(training_batches(cache, 0, 8))
    with pytest.raises(UserError, match="`flip` needs the flipped images"):
        CachedLatents(wish.out, flip=True)


def in_the_words_of_version_0_1_0(file: Path) -> None:
    """What that version wrote where this one writes ``file``."""
    values = json.loads(file.read_text())
    for name in ("contents", "rows_per_checksum", "checksums", "labels_checksum", "checksum"):
        del values[name]
    values["mirrored"], values["crop"] = values.pop("flipped"), values["crop"].replace("adm-center", "adm-centre")
    file.write_text(json.dumps(values, indent=1))


def test_manifests_and_plans_of_version_0_1_0_are_read(wish, copy, whole):
    in_the_words_of_version_0_1_0(copy / "manifest.json")
    today = CachedLatents(whole).manifest
    earlier = replace(today, contents="", rows_per_checksum=0, checksums=[], labels_checksum=0)
    assert CachedLatents(copy, flip=True).manifest == earlier
    assert verify(Verify(copy, images=9))["compared"] == 9
    assert encode(replace(wish, out=copy)) == copy, "it is finished, and nothing else is asked for"
    with pytest.raises(UserError, match="another flipped .True there, False asked for"):
        encode(replace(wish, out=copy, flip=False))
    encode(wish, stop_after=2)
    in_the_words_of_version_0_1_0(wish.out / "encoding.json")
    journal = wish.out / "journal-00000.txt"
    journal.write_text(re.sub(r"done \w+", "done", journal.read_text()))
    encode(wish)
    assert contents(wish.out) == contents(whole)


def test_another_wish_is_refused_and_what_is_there_kept(wish, copy, tmp_path):
    encode(wish, stop_after=1)
    there = contents(wish.out)
    for other in (replace(wish, image_size=32), replace(wish, flip=False), replace(wish, chunk=4)):
        with pytest.raises(UserError, match="`out=.*` holds an encoding with another"):
            encode(other)
    assert contents(wish.out) == there
    with pytest.raises(UserError, match="image size"):
        encode(replace(wish, out=copy, image_size=32))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("x")
    for out in (tmp_path / "taken", tmp_path / "taken" / "thesis.txt"):
        with pytest.raises(UserError, match="holds no latent cache"):
            encode(replace(wish, out=out))
    for bad in ({"batch_size": 0}, {"chunk": 0}, {"workers": -1}, {"image_size": 18}):
        with pytest.raises(UserError, match=f"`{next(iter(bad))}="):
            encode(replace(wish, out=tmp_path / "new", **bad))
    assert not (tmp_path / "new").exists()


def test_a_disk_too_small_is_told_before_anything_is_written(wish, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10, 5, 5))
    with pytest.raises(UserError, match="has .* left, and the latents take .*: make room"):
        encode(wish)
    assert not wish.out.exists()


@pytest.mark.parametrize("size", [0, 100, 128, 129, 1000, 2000, 4000, 8000, 9855])
def test_a_full_disk_leaves_a_restartable_encoding(wish, whole, size):
    """The system's own limit on the size of files; a shard has 9,856 bytes, which are reserved at the start."""
    assert (whole / "moments-00000.npy").stat().st_size == 9856
    with file_size_limit(size), pytest.raises(UserError, match="limit on the size of files is reached"):
        encode(wish)
    assert not wish.out.exists() or not any(wish.out.glob("moments-*"))
    encode(wish)
    assert contents(wish.out) == contents(whole)


def test_room_for_the_whole_cache_is_taken_at_the_start(wish):
    encode(wish, stop_after=0)
    for shard in wish.out.glob("moments-*"):
        assert shard.stat().st_blocks * 512 >= shard.stat().st_size


@pytest.mark.parametrize("damage", ["zeros", "gone", "cut", "flip"])
def test_shards_changed_while_it_stood_still_are_made_anew(wish, whole, damage, capsys):
    encode(wish, stop_after=5)
    shard = wish.out / "moments-00001.npy"
    content = bytearray(shard.read_bytes())
    if damage == "gone":
        shard.unlink()
    else:
        content[1000] ^= 16
        shard.write_bytes({"zeros": bytes(len(content)), "cut": content[:999], "flip": content}[damage])
    encode(wish)
    assert "not as they were written" in capsys.readouterr().out
    assert contents(wish.out) == contents(whole)


def test_a_shard_that_is_zeroed_before_the_end_is_no_finished_cache(wish, whole, monkeypatch):
    from sit.latents import encode as module

    def zeroed(config, *arguments) -> None:
        encode_chunks(config, *arguments)
        shard = config.out / "moments-00001.npy"
        shard.write_bytes(bytes(shard.stat().st_size))

    encode_chunks = module._encode_chunks
    monkeypatch.setattr(module, "_encode_chunks", zeroed)
    with pytest.raises(UserError, match="3 of 6 chunks are not on the disk as they were written; start"):
        encode(wish)
    assert not (wish.out / "manifest.json").exists()
    monkeypatch.setattr(module, "_encode_chunks", encode_chunks)
    encode(wish)
    assert contents(wish.out) == contents(whole)


def test_a_corrupt_image_stops_the_encoding_and_is_named(wish, tmp_path):
    moved = Path(shutil.copytree(wish.data, tmp_path / "moved"))
    mended = (moved / "class1" / "25.png").read_bytes()
    (moved / "class1" / "25.png").write_bytes(mended[:60])
    wish = replace(wish, data=str(moved), workers=1)
    message = ""
    try:  # not pytest.raises: it keeps the traceback, and with it the loader, whose end then takes five seconds
        encode(wish)
    except UserError as error:
        message = str(error)
    assert "25.png" in message
    (moved / "class1" / "25.png").write_bytes(mended)
    assert len(CachedLatents(encode(wish))) == COUNT


def test_chunks_of_images_that_have_changed_are_made_anew(wish, tmp_path, capsys):
    moved = Path(shutil.copytree(wish.data, tmp_path / "moved"))
    wish = replace(wish, data=str(moved))
    encode(wish, stop_after=3)
    files = sorted(moved.rglob("*.png"))
    for file in files[:12]:  # those of the first chunk and a half
        pixels = np.asarray(Image.open(file))
        Image.fromarray(255 - pixels).save(file)
    files[-1].write_bytes(files[-2].read_bytes())  # a chunk that was not yet made
    capsys.readouterr()
    out = encode(wish)
    said = "images have changed since: 24 of 24 entries were compared with theirs, and 2 of 3 chunks are encoded again"
    assert said in capsys.readouterr().out
    assert contents(out) == contents(encode(replace(wish, out=tmp_path / "anew")))


def test_damaged_caches_are_refused(copy):
    def refused(words: str) -> None:
        with pytest.raises(UserError, match=words) as caught:
            CachedLatents(copy)
        assert str(copy) in str(caught.value)

    for name in ("moments-00002.npy", "labels.npy"):
        content = (copy / name).read_bytes()
        for broken in (content[:-100], content[:10], b"", b"x" * 500):
            (copy / name).write_bytes(broken)
            refused(name)
        (copy / name).unlink()
        refused(name)
        np.save(copy / name, np.zeros(3))
        refused(f"{name} doesn't match")
        (copy / name).write_bytes(content)
    labels = np.load(copy / "labels.npy")
    for place, wrong in ((0, -1), (COUNT - 1, -1), (COUNT - 1, 3)):
        np.save(copy / "labels.npy", np.where(np.arange(COUNT) == place, wrong, labels))
        refused("labels.npy has labels outside its 3 classes")
    np.save(copy / "labels.npy", labels)
    assert len(CachedLatents(copy)) == COUNT
    manifest = json.loads((copy / "manifest.json").read_text())
    for broken in ("", "[]", "{}", json.dumps(manifest | {"format": 9}), json.dumps({"format": 1})):
        (copy / "manifest.json").write_text(broken)
        refused("manifest.json")


def test_pickled_for_a_worker_it_takes_paths_not_data(whole):
    cache = CachedLatents(whole)
    packed = pickle.dumps(cache)
    assert len(packed) < 5_000
    some = (np.array([40, 2]), np.array([True, False]))
    assert np.array_equal(pickle.loads(packed).moments(*some), cache.moments(*some))


OPENED = """
import sys
from sit.latents.cache import CachedLatents
import numpy as np, psutil
cache = CachedLatents(sys.argv[1])
cache.moments(np.arange(0, len(cache), 10_007), np.zeros(129, dtype=bool))
print(len(cache), psutil.Process().memory_info().rss, "torch" in sys.modules)
"""


def synthetic_cache(folder: Path, manifest: Manifest) -> None:
    """A cache of zeros: sparse files of full length, which take no space on the disk."""
    folder.mkdir()
    for name, shape in manifest.shards():
        np.lib.format.open_memmap(folder / name, mode="w+", dtype=np.float16, shape=shape)
    np.save(folder / "labels.npy", np.arange(manifest.count) % len(manifest.classes))
    (folder / "manifest.json").write_text(manifest.text())


def test_a_cache_of_imagenets_size_opens_in_little_memory(whole, tmp_path):
    manifest = replace(
        CachedLatents(whole).manifest, count=1_281_167, classes=[str(n) for n in range(1000)], latent_shape=(4, 32, 32),
        shard_size=2**17, checksums=[],
    )  # fmt: skip
    synthetic_cache(tmp_path / "large", manifest)
    command = [sys.executable, "-c", OPENED, str(tmp_path / "large")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    count, resident, with_torch = ended.stdout.split()
    assert int(count) == 1_281_167 and 10e6 < int(resident) < 200e6 and with_torch == "False"
