"""Statistics on disk: whose features they are of is read and checked, foreign files are read safely or refused."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from sit.metrics.classifier import Classifier, ClassifierConfig, save_classifier
from sit.metrics.distances import frechet_distance
from sit.metrics.features import Extractor, get_extractor
from sit.metrics.moments import Moments
from sit.metrics.statistics_files import Part, named_arrays, open_reference
from sit.utils.errors import UserError

CPU = torch.device("cpu")
RNG = np.random.default_rng(0)


def moments(dim: int) -> Moments:
    return Moments.of(RNG.normal(size=(4 * dim, dim)))


def extractor(name: str, value: float = 0.0) -> Extractor:
    """One of that name, whose only weight has that value."""
    network = nn.Linear(1, 1)
    nn.init.constant_(network.weight, value)
    nn.init.constant_(network.bias, 0)
    return Extractor(name, name, network, ("features",))


def test_what_was_written_is_read_and_belongs_to_its_features(tmp_path):
    one, dinov2 = extractor("inception"), extractor("dinov2")
    parts = [Part(moments(6), moments(5), one.about), Part(moments(4), None, dinov2.about)]
    np.savez(tmp_path / "both.npz", **named_arrays(parts))
    read = open_reference(str(tmp_path / "both.npz"))
    for wanted, maker in zip(parts, (one, dinov2), strict=True):
        found = read.of(maker)
        assert np.array_equal(found.features.mu, wanted.features.mu)
        assert np.array_equal(found.features.sigma, wanted.features.sigma)
        assert (found.spatial is None) == (wanted.spatial is None) and read.note(maker) is None
    with pytest.raises(UserError, match="both.npz has statistics of other inception features .weights: .* make it ag"):
        read.of(extractor("inception", 1.0))
    with pytest.raises(UserError, match="has statistics of inception, dinov2 features, not of digits's"):
        read.of(extractor("digits"))


def test_another_classifiers_statistics_are_refused(tmp_path):
    """Both have as many features: only the weights tell them apart."""
    makers = []
    for seed in range(2):
        torch.manual_seed(seed)
        folder = tmp_path / str(seed)
        folder.mkdir()
        save_classifier(Classifier(ClassifierConfig("test_resnet", {}, 32, ["a", "b", "c"])), folder)
        makers.append(get_extractor(f"classifier:{folder}", CPU))
    dim = makers[0](torch.zeros(1, 3, 32, 32, dtype=torch.uint8))["features"].shape[1]
    np.savez(tmp_path / "first.npz", **named_arrays([Part(moments(dim), None, makers[0].about)]))
    read = open_reference(str(tmp_path / "first.npz"))
    assert read.of(makers[0]).of == makers[0].about
    with pytest.raises(UserError, match="first.npz has statistics of other classifier features .weights"):
        read.of(makers[1])
    (tmp_path / "0").rename(tmp_path / "moved")  # the same weights elsewhere are the same features
    assert read.of(get_extractor(f"classifier:{tmp_path / 'moved'}", CPU)).of == makers[0].about


def test_files_that_do_not_say_whose_features_they_hold(tmp_path):
    inception, digits = extractor("inception"), extractor("digits")
    whole, spatial = moments(6), moments(5)
    np.savez(tmp_path / "adm.npz", mu=whole.mu, sigma=whole.sigma, mu_s=spatial.mu, sigma_s=spatial.sigma)
    adm = open_reference(str(tmp_path / "adm.npz"))
    assert adm.of(inception).spatial is not None and adm.note(inception) is None
    with pytest.raises(UserError, match="has statistics of inception features, not of digits's"):
        adm.of(digits)
    np.savez_compressed(tmp_path / "plain.npz", mu=whole.mu, sigma=whole.sigma)
    plain = open_reference(str(tmp_path / "plain.npz"))
    assert "plain.npz does not say whose features it is of" in plain.note(inception)
    assert "clean-fid's" in plain.note(inception) and "clean-fid" not in plain.note(digits)
    np.savez(tmp_path / "odd.npz", mu=whole.mu, sigma=whole.sigma, about=np.array(json.dumps({"mu": [1]})))
    with pytest.raises(UserError, match="odd.npz: its `about` can't be read .*: make it again"):
        open_reference(str(tmp_path / "odd.npz"))


def test_edm2s_pickles_are_read_without_running_them(tmp_path):
    inception, dinov2 = moments(6), moments(4)
    content = {"fid": vars(inception), "fd_dinov2": vars(dinov2)}
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        path = tmp_path / f"img{protocol}.pkl"
        path.write_bytes(pickle.dumps(content, protocol=protocol))
        read = open_reference(str(path))
        for name, expected in (("inception", inception), ("dinov2", dinov2)):
            found = read.of(extractor(name)).features
            assert frechet_distance(found, expected) == pytest.approx(0, abs=1e-9)
    old = pickle.dumps(content, protocol=0).replace(b"numpy._core", b"numpy.core")  # as NumPy 1 wrote it
    (tmp_path / "old.pkl").write_bytes(old)
    assert open_reference(str(tmp_path / "old.pkl")).of(extractor("inception"))


class Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("suffix", [".pkl", ".pt"])
def test_a_file_that_would_run_something_is_refused(tmp_path, suffix):
    proof, path = tmp_path / "ran", tmp_path / f"bad{suffix}"
    content = {"fid": Touch(proof), "mu": Touch(proof)}
    if suffix == ".pt":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match="bad.pkl is refused: more than arrays .*pathlib|bad.pt is no file of torch-f"):
        open_reference(str(path))
    assert not proof.exists()


@pytest.mark.parametrize("content", [b"", b"\x80", pickle.dumps([1]), pickle.dumps({"fid": {"mu": 3, "sigma": 4}})])
def test_damaged_pickles(tmp_path, content):
    (tmp_path / "a.pkl").write_bytes(content)
    with pytest.raises(UserError, match="a.pkl"):
        open_reference(str(tmp_path / "a.pkl"))


def test_torch_fidelitys_cache(tmp_path):
    """Its name says whose features they are; the arrays are NumPy's."""
    whole = moments(6)
    named, unnamed = tmp_path / "cifar10-inception-v3-compat-stat-fid-2048.pt", tmp_path / "other.pt"
    for path in (named, unnamed):
        torch.save(vars(whole), path)
        read = open_reference(str(path))
        assert np.array_equal(read.of(extractor("inception")).features.sigma, whole.sigma)
    assert open_reference(str(named)).note(extractor("inception")) is None
    assert "does not say" in open_reference(str(unnamed)).note(extractor("inception"))
    with pytest.raises(UserError, match="none.pt can't be read"):
        open_reference(str(tmp_path / "none.pt"))


def lopsided() -> np.ndarray:
    sigma = np.eye(4)
    sigma[0, 1] = 0.1
    return sigma


@pytest.mark.parametrize(
    "sigma, words",
    [
        (lopsided(), "it is not symmetric"),
        (np.diag([1.0, 1, 1, -0.01]), "it has negative eigenvalues"),
        (np.ones((4, 4)) - np.eye(4), "it has negative eigenvalues"),
    ],
)
def test_what_is_no_covariance(tmp_path, sigma, words):
    np.savez(tmp_path / "bad.npz", mu=np.zeros(4), sigma=sigma)
    with pytest.raises(UserError, match=f"bad.npz: sigma is no covariance: {words}"):
        open_reference(str(tmp_path / "bad.npz"))


def test_singular_covariances_and_rounded_ones_are_fine(tmp_path):
    few = np.cov(RNG.normal(size=(5, 40)) @ RNG.normal(size=(40, 40)), rowvar=False)
    for kind in (np.float64, np.float32):
        np.savez(tmp_path / "few.npz", mu=np.zeros(40), sigma=few.astype(kind))
        assert open_reference(str(tmp_path / "few.npz")).parts
