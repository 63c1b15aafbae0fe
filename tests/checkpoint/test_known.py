"""Checkpoints by name: found where they lie, downloaded where there is a network, and one line where there is none."""

from __future__ import annotations

import hashlib
import http.server
import shutil
import threading
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects

from sit.checkpoint import known
from sit.checkpoint.find import resolve
from sit.checkpoint.info import CheckpointInfo
from sit.checkpoint.known import KNOWN, KnownFile
from sit.checkpoint.load import load_for_sampling
from sit.checkpoint.save import save_checkpoint
from sit.model import SiT, create_model
from sit.transport.transport import Transport
from sit.utils.errors import UserError

CONTENT = bytes(range(256)) * 8


@pytest.fixture
def served(tmp_path):
    """The address of a file, on a server of this machine."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args) -> None:
            super().__init__(*args, directory=str(tmp_path / "served"))

        def log_message(self, *args) -> None:
            pass

    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "net.pt").write_bytes(CONTENT)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/net.pt"
    server.shutdown()
    server.server_close()


@pytest.fixture
def offer(tmp_path, monkeypatch):
    """A function that puts a file among the known ones; torch's folder of downloads is an empty one."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)

    def offer(address: str, least: int = len(CONTENT), sha256: str | None = None) -> Path:
        monkeypatch.setitem(KNOWN, "a-net", KnownFile(address, "stored.pt", least, sha256))
        return tmp_path / "hub" / "checkpoints" / "a-net.pt"

    return offer


def test_a_known_file_is_downloaded_once(served, offer, monkeypatch):
    file = offer(served, sha256=hashlib.sha256(CONTENT).hexdigest())
    assert resolve("a-net") == file and file.read_bytes() == CONTENT
    monkeypatch.setattr(torch.hub, "download_url_to_file", None)  # called again, it would fail
    assert resolve("a-net.pt") == resolve(Path("a-net")) == file


def test_a_file_where_the_published_programs_put_it_is_taken(offer, tmp_path):
    offer("http://127.0.0.1:9/nowhere")
    (tmp_path / "pretrained_models").mkdir()
    (tmp_path / "pretrained_models" / "stored.pt").write_bytes(CONTENT)
    assert resolve("a-net") == Path("pretrained_models/stored.pt")
    Path("a-net").write_bytes(b"a file of that name")
    assert resolve("a-net") == Path("a-net"), "what is here goes before names"


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(least=len(CONTENT) + 1), "was not downloaded whole: 2,048 bytes, and it has at least 2,049"),
        (dict(sha256="0" * 64), "was downloaded damaged"),
    ],
)
def test_what_comes_damaged_is_not_kept(served, offer, changes, words):
    file = offer(served, **changes)
    with pytest.raises(UserError, match=words):
        resolve("a-net")
    assert [path.name for path in file.parent.iterdir()] in ([], ["a-net.pt.lock"])


def test_without_a_network_one_line_says_what_to_put_where(offer):
    file = offer(address := "http://127.0.0.1:9/net.pt")  # nobody listens there
    with pytest.raises(UserError) as caught:
        resolve("a-net")
    said = str(caught.value)
    assert "\n" not in said and address in said and str(file) in said and "can't be downloaded" in said


def test_the_sizes_are_those_of_the_networks():
    """SiT-XL/2 as published: parameters and table, four bytes each; REPA's has half the outputs."""
    with torch.device("meta"):
        sizes = [
            sum(tensor.numel() for tensor in create_model("SiT-XL/2", learn_sigma=twice).state_dict().values())
            for twice in (True, False)
        ]
    assert [KNOWN[name].least for name in ("SiT-XL-2-256x256", "REPA-SiT-XL-2-256x256")] == [4 * n for n in sizes]


def test_a_checkpoint_that_was_uploaded_as_it_lies_is_read(tmp_path, monkeypatch):
    """By huggingface_hub's own choice of files; what is only there to go on with stays there."""
    network = SiT(8, patch_size=2, hidden_size=32, depth=1, num_heads=2, num_classes=10)
    whole, here = tmp_path / "step-0000001", tmp_path / "here"
    kept = ("optimizer.pt", "model.safetensors")
    save_checkpoint(
        whole, model=network, transport=Transport(), vae_source=None, info=CheckpointInfo(1, 1, (32, 32), 10),
        training_state=lambda folder: [(folder / name).write_bytes(b"moments") for name in kept],
    )  # fmt: skip

    def download(repository: str, *, allow_patterns, ignore_patterns) -> str:
        names = [path.relative_to(whole).as_posix() for path in whole.rglob("*") if path.is_file()]
        assert {f"training/{name}" for name in kept} < set(names)
        for name in filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (here / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(whole / name, here / name)
        return str(here)

    monkeypatch.setattr(known, "snapshot_download", download)
    assert load_for_sampling("hf-hub:someone/net", device="cpu").model.config.depth == 1
    assert not (here / "training").exists()


def test_repositories_of_the_hub(tmp_path, monkeypatch):
    asked = []

    def note(*args, **_options) -> str:
        asked.append(args)
        (tmp_path / "config.json").write_text("{}")
        return str(tmp_path)

    monkeypatch.setattr(known, "snapshot_download", note)
    monkeypatch.setattr(known, "hf_hub_download", lambda *args: str(tmp_path / "config.json"))
    assert resolve("hf-hub:someone/net") == tmp_path and asked == [("someone/net",)]
    assert resolve("hf-hub:someone/net/inside/net.pt") == tmp_path / "config.json"
    with pytest.raises(UserError, match="hf-hub:OWNER/NAME"):
        resolve("hf-hub:net")
    monkeypatch.undo()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="hf-hub:someone/net can't be had from the Hub .* download it"):
        resolve("hf-hub:someone/net")


def test_a_path_that_is_nothing_tells_the_names(tmp_path):
    with pytest.raises(UserError, match="no such run.*SiT-XL-2-256x256"):
        resolve(tmp_path / "nowhere")
