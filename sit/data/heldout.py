"""Which images are held out of training: a source's own test set, or a fixed share of the data.

Nothing here depends on a run's seeds, so that all runs on the same data hold out the same images. A source names its
test set by the attribute ``test_set`` (:class:`~sit.data.dataset.Source`): another specification of
:func:`~sit.data.factory.open_images`, or None where its makers held out nothing.
"""

from __future__ import annotations

import numpy as np
import torch

from sit.data.dataset import ImageData
from sit.utils.random import generator

SEED = 0
"""Keys the choice of images, for all runs alike."""


def keyed_order(labels: np.ndarray, purpose: str = "heldout") -> np.ndarray:
    """A permutation of the images whose every beginning has the classes in their proportions, to about one image.

    Each class is shuffled by a key of its own, and image number r of n in a class stands at the (r + 1/2) / n-th part
    of the order.

    Args:
        labels: (count,) int64.
        purpose: what the order is for; another purpose has another order.

    Returns:
        (count,) int64 indices, the same for the same labels.
    """
    places = np.empty(len(labels))
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        shuffled = torch.randperm(len(members), generator=generator(SEED, purpose, "class", int(label))).numpy()
        places[members[shuffled]] = (np.arange(len(members)) + 0.5) / len(members)
    ties = torch.randperm(len(labels), generator=generator(SEED, purpose, "ties")).numpy()
    return np.lexsort((ties, places))


def in_both(data: ImageData, other: ImageData, chosen: np.ndarray) -> list[int]:
    """Those of ``other``'s images ``chosen`` that ``data`` has too: by where they lie, not by their pixels."""
    places = {other.source.place(int(index)): int(index) for index in chosen}
    met = {place for index in range(len(data)) if (place := data.source.place(index)) in places}
    return sorted(places[place] for place in met)
