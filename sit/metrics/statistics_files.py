"""Reference statistics on disk: ADM's npz, ours with what they are of, EDM2's pickles and torch-fidelity's ``.pt``.

Which features a file's moments are of is read where the file says it: our own say it in ``about``, by the hash of the
weights; ADM's by having ``mu_s``; EDM2's and torch-fidelity's by their names. A file that doesn't say is taken for what
is asked, as long as the dimensions agree, and the report says so: pytorch-fid's and clean-fid's have ``mu`` and
``sigma`` alone, and clean-fid's are of images that were resized in another way.
"""

from __future__ import annotations

import codecs
import json
import pickle
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import linalg

from sit.metrics.features import Extractor
from sit.metrics.identity import About, difference, same
from sit.metrics.image_sets import ArrayImages, Images, images_of, open_samples
from sit.metrics.moments import Moments
from sit.utils.arrays import Form, npz_forms, read_npz
from sit.utils.errors import UserError, first_line
from sit.utils.fingerprint import stamp

ABOUT = "about"
"""the array of an npz of ours that says, as JSON, whose features each mean is of"""

TOLERANCE = 1e-5
"""asymmetry and negative eigenvalues that rounding to float32 explains, relative to the largest variance"""


@dataclass(frozen=True)
class Part:
    """Moments of one kind of features.

    Attributes:
        features: of the features themselves.
        spatial: of Inception's spatial features; None if there are none.
        of: :attr:`Extractor.about`, or ``{"features": name}`` where the file's form tells it; None if nothing does.
    """

    features: Moments
    spatial: Moments | None = None
    of: About | None = None


@dataclass(frozen=True)
class Statistics:
    """A reference that is moments of its features, and perhaps some of its images.

    Attributes:
        name: the file.
        parts: its moments, of one kind of features each.
        images: some of its images; None if there are none.
    """

    name: str
    parts: tuple[Part, ...]
    images: ArrayImages | None = None

    @property
    def about(self) -> About:
        """What tells them from others."""
        return {"statistics": self.name, "files": stamp(self.name)}

    def of(self, extractor: Extractor) -> Part:
        """The moments that an extractor's features can be measured against.

        Raises:
            UserError: the file has none of these features.
        """
        named = [part for part in self.parts if part.of is not None and part.of["features"] == extractor.name]
        for part in named:
            if len(part.of) == 1 or same(part.of, extractor.about):
                return part
        if named:
            differ = difference(named[0].of, extractor.about)
            raise UserError(
                f"{self.name} has statistics of other {extractor.name} features ({differ}): make it again with these, "
                "by `eval_fid.py reference`"
            )
        unknown = [part for part in self.parts if part.of is None]
        if not unknown:
            has = ", ".join(str(part.of["features"]) for part in self.parts)
            raise UserError(f"{self.name} has statistics of {has} features, not of {extractor.name}'s: see `features`")
        return unknown[0]

    def note(self, extractor: Extractor) -> str | None:
        """What a report must say of the moments that :meth:`of` finds; None if the file says whose they are."""
        if self.of(extractor).of is not None:
            return None
        alike = " (pytorch-fid's look like this, and clean-fid's, which are of images resized in another way)"
        return f"{self.name} does not say whose features it is of{alike if extractor.name == 'inception' else ''}"


def open_reference(
    spec: str, image_size: int | None = None, vae: str | None = None, device: torch.device | str = "cpu"
) -> Images | Statistics:
    """Open a reference: statistics, or whatever :func:`sit.metrics.image_sets.open_samples` opens.

    Raises:
        UserError: there is no such thing, or it is of a wrong form.
    """
    path = Path(spec)
    if path.suffix == ".npz":
        forms = npz_forms(path)
        if "mu" in forms or "sigma" in forms:
            return _of_npz(path, forms)
        return images_of(path, forms)
    if path.suffix in (".pkl", ".pickle"):
        return _of_edm2(path)
    if path.suffix == ".pt":
        return _of_torch_fidelity(path)
    return open_samples(spec, image_size, vae, device)


def _of_npz(path: Path, forms: Mapping[str, Form]) -> Statistics:
    """ADM's file, or ours, in which ``mu_NAME`` and ``sigma_NAME`` may follow for other features."""
    told = _told(path, read_npz(path, [ABOUT])[ABOUT]) if ABOUT in forms else {}
    told = told or {"mu": {"features": "inception"} if "mu_s" in forms else None}
    spatial = _npz_moments(path, forms, "mu_s", "sigma_s")
    parts = []
    for mu, of in told.items():
        sigma = mu.replace("mu", "sigma", 1)
        moments = _npz_moments(path, forms, mu, sigma)
        if moments is None:
            raise UserError(f"{path}: {mu} and {sigma} must both be there")
        parts.append(Part(moments, spatial if of and of["features"] == "inception" else None, of))
    images = images_of(path, forms) if "arr_0" in forms else None
    return Statistics(str(path), tuple(parts), images)


def _npz_moments(path: Path, forms: Mapping[str, Form], mu: str, sigma: str) -> Moments | None:
    """:func:`_moments` of an npz, unpacked once its headers are known to be those of moments."""
    shapes = [forms[name].shape for name in (mu, sigma) if name in forms]
    if len(shapes) == 2 and (len(shapes[0]) != 1 or not shapes[0][0] or shapes[1] != 2 * shapes[0]):
        raise UserError(f"{path}: {mu} {shapes[0]} and {sigma} {shapes[1]} are not moments of one thing")
    return _moments(path, read_npz(path, (mu, sigma)), mu, sigma)


def _told(path: Path, array: np.ndarray) -> dict[str, About]:
    """What :func:`named_arrays` put into ``about``."""
    try:
        told = json.loads(str(array[()]))
        if not all(isinstance(about, dict) and isinstance(about["features"], str) for about in told.values()):
            raise ValueError("it names no features")
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise UserError(f"{path}: its `{ABOUT}` can't be read ({first_line(error)}): make it again") from error
    return told


def _moments(path: Path, arrays: dict[str, Any], mu: str, sigma: str) -> Moments | None:
    """The moments of these names, checked; None if neither is there."""
    if mu not in arrays and sigma not in arrays:
        return None
    if mu not in arrays or sigma not in arrays:
        raise UserError(f"{path}: {mu} and {sigma} must both be there")
    for name in (mu, sigma):
        value = arrays[name]
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiu" or not np.isfinite(value).all():
            kind = value.dtype if isinstance(value, np.ndarray) else type(value).__name__
            raise UserError(f"{path}: {name} ({kind}) must be finite real numbers")
    mean, covariance = arrays[mu].astype(np.float64), arrays[sigma].astype(np.float64)
    if mean.ndim != 1 or not len(mean) or covariance.shape != (len(mean), len(mean)):
        raise UserError(f"{path}: {mu} {mean.shape} and {sigma} {covariance.shape} are not moments of one thing")
    _check_covariance(path, sigma, covariance)
    return Moments(mean, covariance)


def _check_covariance(path: Path, name: str, covariance: np.ndarray) -> None:
    """Refuse what is no covariance: not symmetric, or with negative eigenvalues beyond what rounding explains."""
    slack = TOLERANCE * max(float(np.abs(np.diag(covariance)).max()), np.finfo(np.float64).tiny)
    if np.abs(covariance - covariance.T).max() > slack:
        raise UserError(f"{path}: {name} is no covariance: it is not symmetric")
    try:
        linalg.cholesky(covariance + slack * np.eye(len(covariance)), check_finite=False)
    except linalg.LinAlgError as error:
        raise UserError(f"{path}: {name} is no covariance: it has negative eigenvalues") from error


def named_arrays(parts: Sequence[Part]) -> dict[str, np.ndarray]:
    """The arrays of an npz of ours: moments in ADM's names, and ``about``, what they are of.

    Those of a second and later kind of features, each with ``of``, are ``mu_NAME`` and ``sigma_NAME``.
    """
    arrays: dict[str, np.ndarray] = {}
    told: dict[str, About] = {}
    for number, part in enumerate(parts):
        suffix = f"_{part.of['features']}" if number else ""
        arrays |= {f"mu{suffix}": part.features.mu, f"sigma{suffix}": part.features.sigma}
        told[f"mu{suffix}"] = part.of
        if part.spatial is not None:
            arrays |= {"mu_s": part.spatial.mu, "sigma_s": part.spatial.sigma}
    return arrays | {ABOUT: np.array(json.dumps(told))}


_RECONSTRUCT, _FROM_BUFFER = (np.zeros(1).__reduce_ex__(protocol)[0] for protocol in (2, 5))
"""what pickled arrays are built by, which NumPy has moved from one module to another"""


class _ArraysOnly(pickle.Unpickler):
    """Builds plain values and NumPy arrays of numbers; anything else that a pickle names is refused."""

    ALLOWED = {
        ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
        ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
        ("numpy.core.numeric", "_frombuffer"): _FROM_BUFFER,
        ("numpy._core.numeric", "_frombuffer"): _FROM_BUFFER,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): codecs.encode,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return self.ALLOWED[module, name]


_EDM2 = {"fid": "inception", "fd_dinov2": "dinov2"}
"""EDM2's metrics → our features: the same Inception graph, and the hub's DINOv2, on the same resized images"""


def _of_edm2(path: Path) -> Statistics:
    """EDM2's ``.pkl``: a dict of its metrics, each with ``mu`` and ``sigma``."""
    content = _unpickled(path)
    found = []
    if isinstance(content, dict):
        for metric, features in _EDM2.items():
            if isinstance(content.get(metric), dict):
                moments = _moments(path, content[metric], "mu", "sigma")
                if moments is not None:
                    found.append(Part(moments, None, {"features": features}))
    if not found:
        raise UserError(f"{path} has none of EDM2's statistics ({', '.join(_EDM2)}, each with mu and sigma)")
    return Statistics(str(path), tuple(found))


def _unpickled(path: Path) -> Any:
    try:
        with open(path, "rb") as file:
            return _ArraysOnly(file).load()
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from error
    except pickle.UnpicklingError as error:
        mend = "save its mu and sigma by numpy.savez, where you trust the file, and give the npz"
        raise UserError(f"{path} is refused: more than arrays would be built ({first_line(error)}): {mend}") from error
    except Exception as error:  # a damaged pickle makes NumPy and Python raise whatever they meet
        raise UserError(f"{path} is cut off or no pickle of statistics ({first_line(error)})") from error


_TORCH_FIDELITY = "inception-v3-compat-stat-fid-2048"
"""what torch-fidelity calls its cached statistics of the features that ours are"""


def _of_torch_fidelity(path: Path) -> Statistics:
    """torch-fidelity's cached ``.pt``: a dict with ``mu`` and ``sigma``; its name says of which features."""
    try:
        numbers = [type(np.dtype(kind)) for kind in (np.float32, np.float64)]
        allowed = [_RECONSTRUCT, np.ndarray, np.dtype, *numbers, codecs.encode]
        with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror or error}") from error
    except Exception as error:  # torch raises whatever it meets in a damaged or foreign file
        raise UserError(f"{path} is no file of torch-fidelity's statistics ({first_line(error)})") from error
    if isinstance(content, dict):
        content = {name: _plain(value) for name, value in content.items()}
    moments = _moments(path, content, "mu", "sigma") if isinstance(content, dict) else None
    if moments is None:
        raise UserError(f"{path} has no statistics of torch-fidelity, mu and sigma")
    of = {"features": "inception"} if _TORCH_FIDELITY in path.name else None
    return Statistics(str(path), (Part(moments, None, of),))


def _plain(value: Any) -> Any:
    return value.numpy() if isinstance(value, torch.Tensor) else value
