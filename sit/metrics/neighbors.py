"""Numbers from nearest neighbors: improved precision and recall, density and coverage, copies of training images.

Distances are made in blocks on the device that is given, in float64: the expanded square |x|² + |y|² − 2 x·y then has a
relative error of about 1e-13 and moves no neighbor. On Apple's GPUs, which have no float64, the CPU makes them.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from sit.metrics.distances import enough
from sit.metrics.estimate import Estimate, of_mean

K = 3
"""the neighbor that sets a ball's radius, of precision and recall (Kynkäänniemi et al. 2019)"""

K_DENSITY = 5
"""the same of density and coverage (Naeem et al. 2020)"""

MEANS = ("precision", "density")
"""which of :func:`neighborhoods` are means over samples, and so have an error"""

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


def _pieces(count: int, block: int) -> Iterator[slice]:
    """So many rows, at most ``block`` at a time."""
    for first in range(0, count, block):
        yield slice(first, min(first + block, count))


def _radii(points: _Points, ks: tuple[int, ...], block: int) -> list[torch.Tensor]:
    """Squared distances (N,) of each point to its k-th nearest other one, for each of ``ks``.

    Every pair of blocks is made once, and serves both.
    """
    count, k = len(points.features), max(ks) + 1  # itself counts, at zero
    near = torch.full((count, k), torch.inf, dtype=torch.float64, device=points.device)

    def merge(rows: slice, found: torch.Tensor) -> None:
        near[rows] = _smallest(torch.cat([near[rows], _smallest(found, k)], dim=1), k)

    pieces = list(_pieces(count, block))
    for index, rows in enumerate(pieces):
        one = points.block(rows)
        for others in pieces[index:]:
            squares = _squares(one, points.block(others))
            merge(rows, squares)
            if others != rows:
                merge(others, squares.T.contiguous())
    return [near[:, k] for k in ks]


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

    Precision and density are means over samples. Recall and coverage are not: who is whose nearest neighbor changes
    with the samples that are left out, which a jackknife takes for 1.4 to 2.4 times the error that there is, so they
    have none.

    Args:
        samples: (N, D), N > k.
        reference: (M, D), M > k and M > k_density; it is held as it is in the errors.
        group: (N,) groups of the errors; None gives no errors.
        k: of precision and recall.
        k_density: of density and coverage.
        device: where distances are made.
        block: rows and columns of distances that are held at a time.

    Returns:
        The estimates by name (``precision``, ``recall``, ``density``, ``coverage``), and whether each sample lies
        within the reference's balls, (N,) bool, of which precision is the mean.
    """
    device = _with_float64(device)
    center = reference.mean(axis=0, dtype=np.float64)
    x, y = (_Points(features, center, device) for features in (samples, reference))
    own, own_wide = _radii(y, (k, k_density), block)
    (reach,) = _radii(x, (k,), block)

    # one pass over all distances between the sets
    inside = torch.zeros(len(samples), dtype=torch.bool, device=device)
    balls = torch.zeros(len(samples), dtype=torch.float64, device=device)
    recalled, covered = torch.zeros(2, len(reference), dtype=torch.bool, device=device)
    for rows in _pieces(len(samples), block):
        one = x.block(rows)
        for others in _pieces(len(reference), block):
            squares = _squares(one, y.block(others))
            held = squares <= own_wide[others]
            inside[rows] |= (squares <= own[others]).any(dim=1)
            balls[rows] += held.sum(dim=1)
            covered[others] |= held.any(dim=0)
            recalled[others] |= (squares <= reach[rows, None]).any(dim=0)

    within = inside.cpu().numpy()
    found = {
        "precision": of_mean(within, group),
        "recall": Estimate(recalled.double().mean().item()),
        "density": of_mean(balls.cpu().numpy() / k_density, group),
        "coverage": Estimate(covered.double().mean().item()),
    }
    return found, within


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
    for rows in _pieces(len(samples), block):
        one = x.block(rows)
        best = torch.full((len(one), 0), torch.inf, dtype=torch.float64, device=device)
        which = torch.zeros(len(one), 0, dtype=torch.int64, device=device)
        for others in _pieces(len(training), block):
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

    Raises:
        UserError: there are fewer than two training images.
    """
    enough(len(training), 2, "a search for copies")
    hits = memorization_scores(nearest(samples, training, device=device)[1]) < 1
    others = nearest(training, training, NEAREST + 1, device=device)[1][:, 1:]  # without itself
    return hits, float((memorization_scores(others) < 1).mean())


def _with_float64(device: torch.device | str) -> torch.device:
    device = torch.device(device)
    return torch.device("cpu") if device.type == "mps" else device
