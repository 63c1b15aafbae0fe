"""Checkpoints of our own: what is written is what is read, and a damaged one is never used."""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from limits import file_size_limit, not_as_root, open_folder
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import sit.checkpoint.integrity as integrity
import sit.checkpoint.save as save
from sit.checkpoint.find import find_checkpoints, newest_checkpoint
from sit.checkpoint.info import CheckpointInfo
from sit.checkpoint.integrity import flaw, is_complete
from sit.checkpoint.load import load_for_sampling
from sit.checkpoint.save import save_checkpoint
from sit.model import SiT
from sit.transport.transport import Transport
from sit.utils.errors import UserError
from sit.utils.files import explain_os_errors, save_torch
from sit.utils.weight_files import WEIGHTS


def small_model(seed: int = 0, **options) -> SiT:
    torch.manual_seed(seed)
    settings = dict(input_size=4, patch_size=2, in_channels=4, hidden_size=16, depth=2, num_heads=2, num_classes=3)
    model = SiT(**settings | options)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2)
    return model


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    torch.manual_seed(5)
    vae = AutoencoderKL(latent_channels=4, block_out_channels=(8,), norm_num_groups=4, sample_size=8)
    folder = tmp_path_factory.mktemp("run") / "vae"
    vae.save_pretrained(folder)
    return folder


INFO = CheckpointInfo(
    step=7, images_seen=448, image_size=(8, 8), classes=3, label_names=["nought", "one", "zwei – ½"], data="digits"
)


def saving(state):
    """Fills ``training/`` by one file."""
    return lambda folder: torch.save(state, folder / "state.pt")


def write(folder, seed=0, vae=None, **options):
    save_checkpoint(
        folder,
        model=small_model(seed),
        transport=Transport(interpolant="gvp", prediction="noise"),
        vae_source=vae,
        info=INFO,
        **options,
    )
    return folder


def test_everything_comes_back(tmp_path, vae_folder):
    model, ema = small_model(0), small_model(1)
    folder = save_checkpoint(
        tmp_path / "run" / "checkpoints" / "step-0000007",
        model=model,
        weights=dict(ema.named_parameters()),  # as an EMA gives them: parameters, no buffers
        transport=Transport(interpolant="gvp", prediction="noise"),
        vae_source=vae_folder,
        info=INFO,
        training_state=saving({"step": 7, "raw": model.state_dict()}),
    )
    for path in (
        folder,
        folder / "transformer",
        folder / "transformer" / WEIGHTS,
        folder.parent,
        tmp_path / "run",
    ):
        loaded = load_for_sampling(path)
        assert loaded.info == INFO
        assert loaded.path == folder
        assert loaded.transport.config.interpolant == "gvp"
        assert loaded.transport.config.prediction == "noise"
        assert not loaded.model.training and not any(p.requires_grad for p in loaded.model.parameters())
        expected = ema.state_dict()
        assert loaded.model.state_dict().keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in loaded.model.state_dict().items())
    assert loaded.vae_source == str(folder / "vae")
    state = torch.load(folder / "training" / "state.pt", weights_only=True)
    assert state["step"] == 7 and torch.equal(state["raw"]["pos_embed"], model.pos_embed)


def test_wrapped_weights_get_plain_keys(tmp_path):
    weights = {f"module._orig_mod.{name}": value for name, value in small_model(3).state_dict().items()}
    write(tmp_path / "c", weights=weights)
    saved = load_file(tmp_path / "c" / "transformer" / WEIGHTS)
    assert saved.keys() == small_model().state_dict().keys()
    assert torch.equal(saved["blocks.1.mlp.fc1.weight"], small_model(3).blocks[1].mlp.fc1.weight)


def test_a_local_vae_is_copied_and_a_hub_name_is_named(tmp_path, vae_folder):
    """A copy: damage to the folder, or to one checkpoint, is not damage to all."""
    source = tmp_path / "source"
    shutil.copytree(vae_folder, source)
    local = write(tmp_path / "local", vae=source)
    for name in ("config.json", WEIGHTS):
        assert (local / "vae" / name).read_bytes() == (source / name).read_bytes()
    with (source / WEIGHTS).open("r+b") as file:
        file.seek(1000)
        file.write(b"damage" * 17)
    assert flaw(local) is None
    hub = write(tmp_path / "hub", vae="stabilityai/sd-vae-ft-ema")
    assert not (hub / "vae").exists()
    assert load_for_sampling(hub).vae_source == "stabilityai/sd-vae-ft-ema"
    assert load_for_sampling(hub, vae="other/vae").vae_source == "other/vae"
    with pytest.raises(UserError, match="give `vae`"):
        _ = load_for_sampling(write(tmp_path / "none")).vae


def flip(path: Path, position: int, bits: int = 1) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        (byte,) = file.read(1)
        file.seek(position)
        file.write(bytes([byte ^ bits]))


def test_each_use_compares_the_checksums_of_what_it_reads(tmp_path, vae_folder):
    """Resuming does not refuse for the VAE's sake, nor sampling for the optimizer's; neither takes what it reads."""
    run = tmp_path / "run"
    folder = write(run / "checkpoints" / "step-0000003", vae=vae_folder, training_state=saving({"step": 3}))
    training = next(path for path in (folder / "training").iterdir())
    for damaged, resumes, samples in ((folder / "vae" / WEIGHTS, True, False), (training, False, True)):
        flip(damaged, 5)
        for resumable, fits in ((True, resumes), (False, samples)):
            if fits:
                assert newest_checkpoint(run, resumable) == folder
            else:
                with pytest.raises(UserError, match="has been changed or damaged"):
                    newest_checkpoint(run, resumable)
        assert "changed or damaged" in flaw(folder)
        flip(damaged, 5)


def test_a_checkpoint_cut_off_at_any_byte_is_recognized(tmp_path, vae_folder):
    whole = write(tmp_path / "whole", vae=vae_folder, training_state=saving({"step": 7}))
    assert is_complete(whole)
    files = [path for path in whole.rglob("*") if path.is_file() and path.name != "README.md"]  # which may be edited
    assert len(files) == 9
    index = whole / "sit.json"
    for path in files:
        content = path.read_bytes()
        cuts = range(len(content)) if path == index else sorted({0, 1, len(content) // 2, len(content) - 1})
        path.unlink()  # the VAE's files are linked: write another file, not this one
        for cut in cuts:
            path.write_bytes(content[:cut])
            assert not is_complete(whole), (path, cut)
        path.write_bytes(content)
        assert is_complete(whole)
    for path in files:
        content = path.read_bytes()
        path.unlink()
        assert "missing" in flaw(whole)
        path.write_bytes(content)


def test_files_have_the_usual_permissions(tmp_path):
    folder = write(tmp_path / "c")
    (tmp_path / "plain").touch()
    expected = (tmp_path / "plain").stat().st_mode
    assert {path.stat().st_mode for path in folder.rglob("*") if path.is_file()} == {expected}


def test_damage_that_keeps_the_size_is_recognized(tmp_path):
    folder = write(tmp_path / "c")
    path = folder / "transformer" / WEIGHTS
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert "changed" in flaw(folder)


def test_every_byte_of_the_index_counts(tmp_path):
    index = write(tmp_path / "c") / "sit.json"
    text = index.read_bytes()
    assert b'"step": 7,' in text
    index.write_bytes(text.replace(b'"step": 7,', b'"step": 9,'))
    assert "damaged" in flaw(tmp_path / "c")
    with pytest.raises(UserError, match="sit.json is cut off or damaged"):
        load_for_sampling(tmp_path / "c")
    index.write_bytes(text.replace(b'"format": 2', b'"format": 1'))
    assert "damaged" in flaw(tmp_path / "c")
    index.write_bytes(text)
    for position in range(len(text)):
        flip(index, position)
        assert flaw(tmp_path / "c"), position
        flip(index, position)
    assert is_complete(tmp_path / "c")


def test_every_byte_of_a_big_file_counts(tmp_path):
    path, size = tmp_path / "big", 9 * 2**20 + 17
    content = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    content.tofile(path)
    before = integrity.fingerprint(path)
    assert before == {"size": size, "crc32": zlib.crc32(content)}
    for position in (0, size - 1, *np.random.default_rng(1).integers(0, size, 20).tolist()):
        flip(path, position)
        assert integrity.fingerprint(path) != before
        flip(path, position)


def test_checksums_of_version_0_1_0_are_compared_as_it_did(tmp_path):
    """64 blocks of 64 KiB spread over a large file, and none of sit.json."""
    folder = tmp_path / "c"
    folder.mkdir()
    content = np.random.default_rng(0).integers(0, 256, 9 * 2**20 + 17, dtype=np.uint8).tobytes()
    (folder / "big").write_bytes(content)
    starts = [(len(content) - 65536) * block // 63 for block in range(64)]
    crc = zlib.crc32(b"".join(content[start : start + 65536] for start in starts))
    files = {"big": {"size": len(content), "crc32": crc}}
    (folder / "sit.json").write_text(json.dumps({"format": 1, "step": 4, "files": files}))
    assert flaw(folder) is None
    flip(folder / "big", starts[9] + 7)
    assert flaw(folder) == "big has been changed or damaged"


def test_the_checkpoint_before_a_damaged_one_is_used(tmp_path, caplog):
    run = tmp_path / "run"
    for step in (9, 10, 100):
        write(run / "checkpoints" / f"step-{step:07d}", seed=step)
    (run / "checkpoints" / ".step-0000200.123.tmp").mkdir()
    assert [step for step, _ in find_checkpoints(run)] == [9, 10, 100]
    newest = run / "checkpoints" / "step-0000100"
    assert newest_checkpoint(run) == newest
    with (newest / "transformer" / WEIGHTS).open("r+b") as file:
        file.truncate(100)
    loaded = load_for_sampling(run)
    assert loaded.path.name == "step-0000010"
    assert torch.equal(loaded.model.final_layer.linear.weight, small_model(10).final_layer.linear.weight)
    assert "step-0000100" in caplog.text and "100 bytes" in caplog.text
    with pytest.raises(UserError, match="not complete.*100 bytes"):
        load_for_sampling(newest)
    with pytest.raises(UserError, match="none of the 3 checkpoints.*training"):
        newest_checkpoint(run, resumable=True)


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def fails(folder):
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        write(tmp_path / "checkpoints" / "c", training_state=fails)
    assert list((tmp_path / "checkpoints").iterdir()) == []

    def full(*_, **__):  # what safetensors says on a disk without room
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(save, "save_file", full)
    with pytest.raises(UserError, match="disk is full"):
        write(tmp_path / "checkpoints" / "c")
    assert list((tmp_path / "checkpoints").iterdir()) == []


@pytest.mark.parametrize("size", [0, 300, 1000, 3000, 10_000, 30_000, 60_000, 100_000, 130_000, 160_000])
def test_a_full_disk_is_told_and_what_was_there_stays(tmp_path, size, vae_folder):
    """The system's own limit on the size of files stands in for a full disk: every writer meets a write that fails."""

    def save(folder: Path) -> None:
        save_torch({"a": torch.ones(40_000)}, folder / "optimizer.pt")

    before = write(tmp_path / "checkpoints" / "a", vae=vae_folder, training_state=save)
    with file_size_limit(size), pytest.raises(UserError, match="limit on the size of files is reached, so .* not writ"):
        write(tmp_path / "checkpoints" / "b", vae=vae_folder, training_state=save)
    assert list((tmp_path / "checkpoints").iterdir()) == [before] and flaw(before) is None


def test_torch_and_safetensors_and_python_tell_why_a_write_failed(tmp_path):
    writers = (
        lambda path: save_torch({"a": torch.ones(9999)}, path),
        lambda path: save_file({"a": torch.ones(9999)}, path),
        lambda path: path.write_bytes(bytes(39_996)),
    )
    for write_file in writers:
        with file_size_limit(5000), pytest.raises(UserError, match="limit on the size of files"):
            with explain_os_errors(tmp_path / "file"):
                write_file(tmp_path / "file")
        write_file(tmp_path / "file")
    save_torch({"a": torch.ones(9999)}, tmp_path / "file")
    assert torch.equal(torch.load(tmp_path / "file", weights_only=True)["a"], torch.ones(9999))


def test_what_must_not_be_read_is_named_and_never_passed_over():
    with open_folder() as place:
        run = place / "run"
        folders = [
            write(run / "checkpoints" / f"step-{step:07d}", training_state=saving({"step": step})) for step in (3, 4)
        ]
        last = folders[-1]
        training = next(path for path in (last / "training").iterdir())
        for path in (training, last / "sit.json", last / "training", last, run / "checkpoints"):
            mode = path.stat().st_mode
            path.chmod(0)
            with not_as_root(), pytest.raises(UserError, match=r"can't be read \(Permission denied\)"):
                newest_checkpoint(run, resumable=True)
            path.chmod(mode)
        assert newest_checkpoint(run, resumable=True) == last


def test_a_checkpoint_without_its_training_folder_still_samples(tmp_path):
    folder = write(tmp_path / "run" / "checkpoints" / "step-0000003", training_state=saving({"step": 3}))
    assert newest_checkpoint(tmp_path / "run", resumable=True) == folder
    shutil.rmtree(folder / "training")
    assert load_for_sampling(tmp_path / "run").path == folder
    with pytest.raises(UserError, match="training"):
        newest_checkpoint(tmp_path / "run", resumable=True)


def test_wrong_weights_are_refused(tmp_path):
    with pytest.raises(ValueError, match="not this network's: blocks.0"):
        write(tmp_path / "c", weights={k: v for k, v in small_model().state_dict().items() if "blocks.0" not in k})
    assert list(tmp_path.iterdir()) == []


def test_a_bare_network_folder_is_read(tmp_path):
    model = small_model(4)
    model.save_pretrained(tmp_path / "net")
    loaded = load_for_sampling(tmp_path / "net")
    assert torch.equal(loaded.model.pos_embed, model.pos_embed)
    assert loaded.transport.config.interpolant == "linear"
    assert (loaded.info.classes, loaded.info.mixer) == (3, "attention")


def test_mistakes_are_named_in_one_line(tmp_path, vae_folder):
    def message(path, **options) -> str:
        with pytest.raises(UserError) as caught:
            load_for_sampling(path, **options)
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)
        return str(caught.value)

    assert "no such" in message(tmp_path / "nowhere")
    assert "neither a run" in message(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    assert "no checkpoint yet" in message(tmp_path / "run")
    assert "AutoencoderKL" in message(vae_folder)
    assert "`num_heads`" in message(write(tmp_path / "c"), num_heads=3)
    with pytest.raises(UserError, match="exists already"):
        write(tmp_path / "c")

    bare = tmp_path / "bare"
    small_model().save_pretrained(bare)
    content = (bare / WEIGHTS).read_bytes()
    for cut in (0, 5, 1000, len(content) - 1):
        (bare / WEIGHTS).write_bytes(content[:cut])
        assert "cut off" in message(bare)
    (bare / WEIGHTS).unlink()
    assert WEIGHTS in message(bare)
    config = json.loads((bare / "config.json").read_text())
    small_model(depth=3).save_pretrained(bare)
    (bare / "config.json").write_text(json.dumps(config))
    assert "do not fit" in message(bare)
    (bare / "config.json").write_text("{")
    with pytest.raises(UserError, match="cut off"):
        load_for_sampling(bare)

    empty = tmp_path / "empty-vae"
    empty.mkdir()
    shutil.copy(vae_folder / "config.json", empty)
    with pytest.raises(UserError, match="empty-vae"):
        write(tmp_path / "d", vae=empty)
    with pytest.raises(UserError, match="`vae=./nowhere`"):
        write(tmp_path / "d", vae="./nowhere")
    assert not (tmp_path / "d").exists()
