"""Training a part of the parameters: which are named by patterns, and all others stay as they are."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from sit.model import SiT
from sit.utils.errors import UserError


def freeze(network: nn.Module, frozen: Sequence[str], trained: Sequence[str]) -> list[str]:
    """Turn off the gradients of parameters, in place: to be called before the optimizer and the averages are made.

    Args:
        network: with a projector, if it has one. That belongs to the objective: only ``frozen`` reaches it.
        frozen: patterns of names (``fnmatch``) that are not trained.
        trained: patterns of the only names that are; empty means all.

    Returns:
        The names of the frozen parameters.

    Raises:
        UserError: a pattern that no name matches, or nothing is left to train.
    """
    names = [name for name, _ in network.named_parameters()]
    for argument, patterns in (("freeze", frozen), ("train_only", trained)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise UserError(f"`{argument}={pattern}`: no parameter has such a name; {_near(pattern, names)}")
    chosen = [name for name in names if not trained or _matches(name, trained) or name.startswith(SiT.PROJECTOR)]
    chosen = [name for name in chosen if not _matches(name, frozen)]
    if not any(not name.startswith(SiT.PROJECTOR) for name in chosen):
        told = " and ".join(f"`{name}`" for name, given in (("freeze", frozen), ("train_only", trained)) if given)
        raise UserError(f"{told} leave nothing of the network to train")
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name in chosen)
    return [name for name in names if name not in chosen]


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _near(pattern: str, names: Sequence[str]) -> str:
    """What the pattern may have meant: a part of names, else names that look like it, else what names look like."""
    part = pattern.strip("*.")
    if part and any(part in name for name in names):
        return f"did you mean *{part}*?"
    if near := difflib.get_close_matches(pattern, names, n=3, cutoff=0.5):
        return f"did you mean {' or '.join(near)}?"
    return f"there are {', '.join(names[:3])}, …"
