"""Checkpoints of our own: what is written is what is read, and a damaged one is never used."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError
from safetensors.torch import load_file

import sit.checkpoint.integrity as integrity
import sit.checkpoint.save as save
from sit.checkpoint.find import find_checkpoints, newest_checkpoint
from sit.checkpoint.info import WEIGHTS, CheckpointInfo
from sit.checkpoint.integrity import flaw, is_complete
from sit.checkpoint.load import load_for_sampling
from sit.checkpoint.save import save_checkpoint
from sit.model import SiT
from sit.transport.transport import Transport
from sit.utils.errors import UserError


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


def test_local_vae_is_linked_and_a_hub_name_is_named(tmp_path, vae_folder):
    local = write(tmp_path / "local", vae=vae_folder)
    for name in ("config.json", WEIGHTS):
        assert os.path.samefile(local / "vae" / name, vae_folder / name)
    hub = write(tmp_path / "hub", vae="stabilityai/sd-vae-ft-ema")
    assert not (hub / "vae").exists()
    assert load_for_sampling(hub).vae_source == "stabilityai/sd-vae-ft-ema"
    assert load_for_sampling(hub, vae="other/vae").vae_source == "other/vae"
    with pytest.raises(UserError, match="give `vae`"):
        _ = load_for_sampling(write(tmp_path / "none")).vae


def test_vae_is_copied_where_links_are_refused(tmp_path, vae_folder, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EXDEV, "another device")

    monkeypatch.setattr(os, "link", refuse)
    folder = write(tmp_path / "c", vae=vae_folder)
    assert (folder / "vae" / WEIGHTS).read_bytes() == (vae_folder / WEIGHTS).read_bytes()
    assert is_complete(folder)


def test_a_checkpoint_cut_off_at_any_byte_is_recognized(tmp_path, vae_folder):
    whole = write(tmp_path / "whole", vae=vae_folder, training_state=saving({"step": 7}))
    assert is_complete(whole)
    files = [path for path in whole.rglob("*") if path.is_file()]
    assert len(files) == 8
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


def test_fingerprint_of_a_big_file_sees_both_ends_and_lost_pages(tmp_path):
    path = tmp_path / "big"
    size = 9 * 2**20 + 17
    content = bytearray(torch.randint(0, 255, (size,), generator=torch.Generator().manual_seed(0)).byte().numpy())
    path.write_bytes(content)
    before = integrity.fingerprint(path)
    assert before == integrity.fingerprint(path) and before["size"] == size
    for start, stop in ((0, 1), (size - 1, size), (size // 2, size // 2 + 2**18)):
        damaged = content.copy()
        damaged[start:stop] = bytes((b + 1) % 256 for b in damaged[start:stop])
        path.write_bytes(damaged)
        assert integrity.fingerprint(path) != before


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


def test_a_full_disk_is_told_from_the_errors_of_torch_and_safetensors(tmp_path):
    """The limit on the size of files stands in for a full disk: the libraries meet a write that fails."""
    code = """
import errno, resource, shutil, sys, types
from pathlib import Path
import torch
from safetensors.torch import save_file
from sit.utils.errors import UserError
from sit.utils.files import explain_os_errors, _FULL
_FULL.add(errno.EFBIG)
shutil.disk_usage = lambda path: types.SimpleNamespace(free=0)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
for save in (lambda p: torch.save({"a": torch.ones(9999)}, p), lambda p: save_file({"a": torch.ones(9999)}, p),
             lambda p: p.write_bytes(bytes(9999))):
    path = Path(sys.argv[1]) / "file"
    try:
        with explain_os_errors(path):
            save(path)
    except UserError as error:
        assert "disk is full" in str(error)
    else:
        raise SystemExit("not noticed")
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


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
        assert "can't be read" in message(bare)
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
