"""Checkpoints by name: the published ones, whose addresses are here, and repositories of the Hub.

A published file is taken from where it lies already (``pretrained_models/``, where SiT's and REPA's programs put it, or
torch's folder of downloads), and downloaded into the latter otherwise.
"""

from __future__ import annotations

import contextlib
import logging
import urllib.error
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import torch
from filelock import FileLock
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from sit.utils.errors import UserError, first_line
from sit.utils.files import atomic_write, explain_os_errors
from sit.utils.hub import quiet_hub
from sit.utils.sizes import size_text

HUB = "hf-hub:"
"""What begins the name of a repository on the Hub, as in timm: ``hf-hub:owner/name`` or ``hf-hub:owner/name/net.pt``"""

TAKEN = ("*.json", "*.safetensors", "*.py")
"""what is downloaded of a repository that is a checkpoint's folder; ``training/`` in it is not"""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class KnownFile:
    """A file that its authors publish.

    Attributes:
        address: where their program downloads it.
        stored: its name under ``pretrained_models/``, where their program puts it.
        least: bytes that it has at least: four for each number of the network that it is of.
        sha256: of the whole file; None where the authors tell none. What is in it has checksums of its own, which
            reading compares (:mod:`sit.checkpoint.weights_file`).
    """

    address: str
    stored: str
    least: int
    sha256: str | None = None


_DROPBOX = "https://www.dl.dropboxusercontent.com/scl/fi"

KNOWN = {
    "SiT-XL-2-256x256": KnownFile(
        f"{_DROPBOX}/as9oeomcbub47de5g4be0/SiT-XL-2-256.pt?rlkey=uxzxmpicu46coq3msb17b9ofa&dl=0",
        stored="SiT-XL-2-256x256.pt",
        least=4 * 675_129_632,
    ),
    "REPA-SiT-XL-2-256x256": KnownFile(
        f"{_DROPBOX}/cxedbs4da5ugjq5wg3zrg/last.pt?rlkey=8otgrdkno0nd89po3dpwngwcc&st=apcc645o&dl=0",
        stored="last.pt",
        least=4 * 675_111_184,
    ),
}
"""The published checkpoints by the names that commands take; SiT's ``download.py`` and REPA's ``utils.py`` have the
addresses. ATConv's diffusion networks are announced and not published."""


def from_name(name: str) -> Path | None:
    """The file or folder that the name of a known checkpoint or of the Hub stands for, downloaded if need be.

    Args:
        name: of :data:`KNOWN`, with or without ``.pt``, or one that begins with :data:`HUB`.

    Returns:
        Where it is; None if the name is neither.

    Raises:
        UserError: it can't be had; the message says what to put where.
    """
    if name.startswith(HUB):
        return _from_hub(name)
    known = KNOWN.get(stem := name.removesuffix(".pt"))
    return None if known is None else _published(stem, known)


def _published(name: str, known: KnownFile) -> Path:
    here = Path("pretrained_models") / known.stored
    if here.is_file():
        return here
    file = Path(torch.hub.get_dir()) / "checkpoints" / f"{name}.pt"
    if file.is_file():
        return file
    with explain_os_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{file}.lock"):  # of several processes, one downloads
        if not file.is_file():
            logger.warning("note: downloading %s, %s, to %s", name, size_text(known.least), file)
            _download(name, known, file)
    return file


def _download(name: str, known: KnownFile, file: Path) -> None:
    with atomic_write(file) as temporary:
        try:
            torch.hub.download_url_to_file(known.address, str(temporary), known.sha256, progress=False)
        except (urllib.error.URLError, HTTPException, TimeoutError, ConnectionError) as error:
            raise UserError(
                f"{name} is not here and can't be downloaded ({first_line(getattr(error, 'reason', error))}): put the "
                f"file of {known.address} at {file}"
            ) from error
        except RuntimeError as error:  # torch's, for another hash
            raise UserError(f"{name} was downloaded damaged ({first_line(error)}); try again") from error
        if (size := temporary.stat().st_size) < known.least:
            raise UserError(
                f"{name} was not downloaded whole: {size:,} bytes, and it has at least {known.least:,}; try again, or "
                f"put the file of {known.address} at {file}"
            )


def _from_hub(name: str) -> Path:
    parts = name.removeprefix(HUB).split("/")
    if len(parts) < 2 or not all(parts):
        raise UserError(f"{name}: a checkpoint of the Hub is {HUB}OWNER/NAME or {HUB}OWNER/NAME/FILE")
    repository, inside = "/".join(parts[:2]), "/".join(parts[2:])
    try:
        with quiet_hub():
            if inside:
                return Path(hf_hub_download(repository, inside))
            return Path(snapshot_download(repository, allow_patterns=TAKEN, ignore_patterns=["training/*"]))
    except (HfHubHTTPError, EntryNotFoundError, HFValidationError, OfflineModeIsEnabled, OSError) as error:
        raise UserError(
            f"{name} can't be had from the Hub ({first_line(error)}): where there is a network, download it, and give "
            "its folder or file"
        ) from error


def is_name(path: str | Path) -> bool:
    """Whether a path is a name that :func:`from_name` knows, and nothing on the disk."""
    with contextlib.suppress(OSError):
        if Path(path).exists():
            return False
    return str(path).startswith(HUB) or str(path).removesuffix(".pt") in KNOWN
