"""Numbers from nearest neighbors: improved precision and recall, density and coverage, copies of training images.

Distances are made in blocks on the device that is given, in float64: the expanded square |x|² + |y|² − 2 x·y then has a
relative error of about 1e-13 and moves no neighbor. On Apple's GPUs, which have no float64, the CPU makes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch

from sit.metrics.estimate import Estimate, jackknife, of_mean

K = 3
"""the neighbor that sets a ball's radius, of precision and recall (Kynkäänniemi et al. 2019)"""

K_DENSITY = 5
"""the same of density and coverage (Naeem et al. 2020)"""

NEAREST = 50
"""neighbors that tell how near is near, of copies (Carlini et al. 2301.13188, section 5.1)"""

BLOCK = 2048
"""rows and columns of distances that are held at a time: 32 MiB"""


class _Points:
    """Features (N, D) in memory, given out as float64 blocks on a device, less a center (D,)."""

    def __init__(self, features: np.ndarray, center: np.ndarray, device: torch.device) -> None:
        self.features, self.device = torch.from_numpy(np.ascontiguousarray(features)), device
        self.center = torch.from_numpy(center).to(device)

    def block(self, rows: slice) -> torch.Tensor:
        return self.features[rows].to(self.device).double() - self.center


def _squares(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Squared distances (n, m) of x (n, D) and y (m, D)."""
    products = torch.addmm((y * y).sum(dim=1)[None], x, y.T, alpha=-2)
    return products.add_((x * x).sum(dim=1)[:, None]).clamp_(min=0)


def _smallest(values: torch.Tensor, k: int) -> torch.Tensor:
    """The k smallest along the last dimension in rising order, filled up with infinity."""
    found = values.topk(min(k, values.shape[-1]), largest=False).values
    return torch.nn.functional.pad(found, (0, k - found.shape[-1]), value=torch.inf)


def _pieces(sizes: list[int], block: int) -> Iterator[tuple[int, slice]]:
    """Groups that lie behind one another, cut into rows of at most ``block``: (group, rows)."""
    start = 0
    for number, size in enumerate(sizes):
        for first in range(start, start + size, block):
            yield number, slice(first, min(first + block, start + size))
        start += size


def _nearest_by_group(points: _Points, sizes: list[int], k: int, block: int) -> torch.Tensor:
    """Squared distances (N, G, k) of each point to its k nearest in each group; itself counts, at zero.

    Every pair of blocks is made once, and serves both.
    """
    near = torch.full((sum(sizes), len(sizes), k), torch.inf, dtype=torch.float64, device=points.device)
    pieces = list(_pieces(sizes, block))

    def merge(rows: slice, group: int, found: torch.Tensor) -> None:
        near[rows, group] = _smallest(torch.cat([near[rows, group], _smallest(found, k)], dim=1), k)

    for index, (group, rows) in enumerate(pieces):
        one = points.block(rows)
        for other_group, others in pieces[index:]:
            squares = _squares(one, points.block(others))
            merge(rows, other_group, squares)
            if others != rows:
                merge(others, group, squares.T.contiguous())
    return near


def neighborhoods(
    samples: np.ndarray,
    reference: np.ndarray,
    group: np.ndarray | None = None,
    *,
    k: int = K,
    k_density: int = K_DENSITY,
    device: torch.device | str = "cpu",
    block: int = BLOCK,
) -> tuple[dict[str, Estimate], np.ndarray]:
    """Precision, recall, density and coverage of samples against a reference.

    A feature's ball reaches to its k-th nearest neighbor in its own set. Precision is the share of samples within the
    ball of any reference feature, recall the share of reference features within the ball of any sample (Kynkäänniemi
    et al. 2019, as ADM's suite has them). Density is how many of the reference's balls a sample lies in, over k, on
    average; coverage is the share of the reference's balls that hold a sample (Naeem et al. 2020, eq. 4 and 5).

    Args:
        samples: (N, D), N > k.
        reference: (M, D), M > k and M > k_density; it is held as it is in the errors.
        group: (N,) groups of the jackknife; None gives no errors.
        k: of precision and recall.
        k_density: of density and coverage.
        device: where distances are made.
        block: rows and columns of distances that are held at a time.

    Returns:
        The estimates by name (``precision``, ``recall``, ``density``, ``coverage``), and whether each sample lies
        within the reference's balls, (N,) bool, of which precision is the mean.
    """
    device = _with_float64(device)
    order = np.arange(len(samples)) if group is None else np.argsort(group, kind="stable")
    sizes = [len(samples)] if group is None else np.bincount(group).tolist()
    center = reference.mean(axis=0, dtype=np.float64)
    x, y = (_Points(features, center, device) for features in (samples[order], reference))

    # how far each ball reaches, of the samples without each group too
    own = _nearest_by_group(y, [len(reference)], max(k, k_density) + 1, block)[:, 0]
    near = _nearest_by_group(x, sizes, k + 1, block)
    radii = [_smallest(near.flatten(1), k + 1)[:, k]]
    for number in range(len(sizes) if group is not None else 0):
        rest = near.clone()
        rest[:, number] = torch.inf
        radii.append(_smallest(rest.flatten(1), k + 1)[:, k])
    del near

    # one pass over all distances between the sets
    inside = torch.zeros(len(samples), dtype=torch.bool, device=device)
    balls = torch.zeros(len(samples), dtype=torch.float64, device=device)
    closest = torch.full((len(sizes), len(reference)), torch.inf, dtype=torch.float64, device=device)
    recalled = torch.zeros(len(radii), len(reference), dtype=torch.bool, device=device)
    for number, rows in _pieces(sizes, block):
        one = x.block(rows)
        for _, others in _pieces([len(reference)], block):
            squares = _squares(one, y.block(others))
            inside[rows] |= (squares <= own[others, k]).any(dim=1)
            balls[rows] += (squares <= own[others, k_density]).sum(dim=1)
            closest[number, others] = torch.minimum(closest[number, others], squares.amin(dim=0))
            for one_left, reach in enumerate(radii):
                if one_left != number + 1:
                    recalled[one_left, others] |= (squares <= reach[rows, None]).any(dim=0)

    back = np.empty(len(samples), dtype=np.int64)
    back[order] = np.arange(len(samples))
    within = inside.cpu().numpy()[back]
    covered = closest <= own[:, k_density]
    held = [covered]
    if group is not None:
        held += [torch.cat([covered[:number], covered[number + 1 :]]) for number in range(len(sizes))]
    found = {
        "precision": of_mean(within, group),
        "recall": _of_shares(recalled, sizes),
        "density": of_mean(balls.cpu().numpy()[back] / k_density, group),
        "coverage": _of_shares([part.any(dim=0) for part in held], sizes),
    }
    return found, within


def _of_shares(hits: Iterable[torch.Tensor], sizes: list[int]) -> Estimate:
    """From what all samples hit of the reference, (M,) bool, and, where there are groups, all but each group."""
    whole, *without = (one.double().mean().item() for one in hits)
    return jackknife(whole, np.array(without), np.array(sizes)) if without else Estimate(whole)


def nearest(
    samples: np.ndarray,
    training: np.ndarray,
    count: int = NEAREST,
    *,
    device: torch.device | str = "cpu",
    block: int = BLOCK,
) -> tuple[np.ndarray, np.ndarray]:
    """The training images nearest to each sample.

    Args:
        samples: (N, D) features or pixels.
        training: (M, D) the same of the training images.
        count: how many neighbors; all where there are fewer.
        device: where distances are made.
        block: rows and columns of distances that are held at a time.

    Returns:
        Their numbers (N, count) int64, nearest first, and their Euclidean distances (N, count) float64.
    """
    device, count = _with_float64(device), min(count, len(training))
    center = training.mean(axis=0, dtype=np.float64)
    x, y = (_Points(features, center, device) for features in (samples, training))
    numbers, distances = [], []
    for _, rows in _pieces([len(samples)], block):
        one = x.block(rows)
        best = torch.full((len(one), 0), torch.inf, dtype=torch.float64, device=device)
        which = torch.zeros(len(one), 0, dtype=torch.int64, device=device)
        for _, others in _pieces([len(training)], block):
            squares = torch.cat([best, _squares(one, y.block(others))], dim=1)
            among = torch.cat(
                [which, torch.arange(others.start, others.stop, device=device).expand(len(one), -1)], dim=1
            )
            best, places = squares.topk(min(count, squares.shape[1]), largest=False)
            which = among.gather(1, places)
        numbers.append(which.cpu())
        distances.append(best.sqrt().cpu())
    return torch.cat(numbers).numpy(), torch.cat(distances).numpy()


def memorization_scores(distances: np.ndarray, alpha: float = 0.5) -> np.ndarray:
    """How near each sample is to its nearest training image, against its other near ones; below 1 it counts as a copy.

    d_1 / (α · mean of d_1 … d_n), with α = 0.5 and n = 50 in Carlini et al. (2301.13188, section 5.1).

    Args:
        distances: (N, n) to the n nearest training images, nearest first, of :func:`nearest`.
        alpha: which share of the usual distance is near enough.
    """
    usual = alpha * distances.mean(axis=1)
    return np.divide(distances[:, 0], usual, out=np.zeros(len(distances)), where=usual > 0)


def copies(
    samples: np.ndarray, training: np.ndarray, *, device: torch.device | str = "cpu"
) -> tuple[np.ndarray, float]:
    """Which samples count as copies of training images, and how many real images would.

    Features may leave out what tells images apart, so that new real images count as copies too; only a share above
    theirs speaks of memory.

    Args:
        samples: (N, D) features.
        training: (M, D) those of all training images.
        device: where distances are made.

    Returns:
        Whether each sample is a copy, (N,) bool, and the share of training images that are, each against the others.
    """
    hits = memorization_scores(nearest(samples, training, device=device)[1]) < 1
    others = nearest(training, training, NEAREST + 1, device=device)[1][:, 1:]  # without itself
    return hits, float((memorization_scores(others) < 1).mean())


def _with_float64(device: torch.device | str) -> torch.device:
    device = torch.device(device)
    return torch.device("cpu") if device.type == "mps" else device
