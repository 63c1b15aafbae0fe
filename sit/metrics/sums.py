"""Sums of features over processes and restarts: merged about one origin, kept on disk with what they cover."""

from __future__ import annotations

import contextlib
import os
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object

from sit.metrics.moments import GroupSums
from sit.utils.device import process_state
from sit.utils.files import atomic_write

Sums = dict[str, GroupSums]
"""the sums of each kind of features, by the name of the extractor's output"""

SUMMED = ("features", "spatial")
"""the outputs of extractors that Fréchet distances are measured on"""


def add_rows(sums: Sums, rows: dict[str, np.ndarray], group: np.ndarray, groups: int) -> None:
    """Add the rows (n, D) of what is summed to the groups (n,), in place; the first rows set the origin."""
    for name in SUMMED:
        if name in rows:
            if name not in sums:
                origin = rows[name].mean(axis=0, dtype=np.float64)
                sums[name] = GroupSums.empty(groups, rows[name].shape[1], origin)
            sums[name].add(rows[name], group)


def about(sums: GroupSums, origin: np.ndarray) -> GroupSums:
    """The same sums about another origin (D,): Σ(x − o)(x − o)ᵀ from Σ(x − p)(x − p)ᵀ, with d = p − o, is
    Σ(x − p)(x − p)ᵀ + s dᵀ + d sᵀ + n d dᵀ, where s = Σ(x − p)."""
    away = sums.origin - origin
    if not away.any():
        return sums
    count = sums.counts[:, None].astype(np.float64)
    products = sums.products.copy()
    for number in range(len(sums.counts)):
        cross = np.outer(sums.sums[number], away)
        products[number] += cross + cross.T + sums.counts[number] * np.outer(away, away)
    return GroupSums(sums.counts.copy(), sums.sums + count * away, products, origin)


def merge(parts: Iterable[Sums]) -> Sums:
    """All of them together, about the origins of the first that has each."""
    whole: Sums = {}
    for part in parts:
        for name, sums in part.items():
            whole[name] = whole[name] + about(sums, whole[name].origin) if name in whole else sums
    return whole


def over_processes(sums: Sums) -> Sums:
    """The sums of all processes together, in each of them, by collectives: no disk is shared for it.

    A process that had no images may have no sums.
    """
    state = process_state()
    if state.num_processes == 1:
        return sums
    shapes = gather_object([{name: (one.products.shape[:2], one.origin) for name, one in sums.items()}])
    wanted = [{name: told for one in reversed(shapes) for name, told in one.items()}]
    broadcast_object_list(wanted)  # one origin for all, to the bit
    whole: Sums = {}
    for name, ((groups, dimensions), origin) in sorted(wanted[0].items()):
        mine = about(sums[name], origin) if name in sums else GroupSums.empty(groups, dimensions, origin)
        for array in (mine.counts, mine.sums, mine.products):
            for part in array if array.ndim == 3 else [array]:  # a group at a time: a GPU may be full
                shared = torch.from_numpy(part).to(state.device)
                torch.distributed.all_reduce(shared)
                part[...] = shared.cpu().numpy()
        whole[name] = mine
    return whole


def save_sums(path: Path, sums: Sums, starts: Iterable[int]) -> None:
    """Write sums, and the first numbers of the chunks that they cover."""
    arrays = {f"{name}/{field}": getattr(one, field) for name, one in sums.items() for field in _FIELDS}
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, starts=np.array(sorted(starts), dtype=np.int64), **arrays)


_FIELDS = ("counts", "sums", "products", "origin")


def read_sums(path: Path) -> tuple[Sums, set[int]] | None:
    """What :func:`save_sums` wrote; None if it isn't there or is damaged."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive}
        starts = set(arrays.pop("starts").tolist())
        names = {name.rpartition("/")[0] for name in arrays}
        sums = {name: GroupSums(*(arrays[f"{name}/{field}"] for field in _FIELDS)) for name in names}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, RuntimeError, TypeError, NotImplementedError):
        return None
    return sums, starts


def partials(folder: Path) -> tuple[list[Path], Sums, set[int]]:
    """The partial sums that earlier processes left: their files, all together, and the chunks that they cover.

    A damaged file counts for nothing, and neither does one that covers a chunk a second time.
    """
    used, found, covered = [], [], set()
    for path in sorted(folder.glob("partial-*.npz"), key=lambda path: (-path.stat().st_size, path.name)):
        read = read_sums(path)
        if read is None or read[1] & covered:
            with contextlib.suppress(OSError):
                os.unlink(path)
            continue
        used.append(path)
        found.append(read[0])
        covered |= read[1]
    return used, merge(found), covered
