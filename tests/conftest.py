"""What several test modules need."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when it is imported
if "PYTEST_XDIST_WORKER" in os.environ:  # threads of several workers on the same cores wait for one another
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)

from accelerate.state import AcceleratorState  # noqa: E402 - it may import Triton


def pytest_xdist_auto_num_workers(config) -> int:
    """A worker a core, and no more than four, since each needs a gigabyte."""
    return min(os.cpu_count() or 1, 4)


@pytest.fixture(scope="session", autouse=True)
def digits_are_encoded_once():
    """Most trainings in the tests read the embedded digits, whose encoding takes longer than their few steps."""
    from sit.latents import factory
    from sit.latents.vae import vae_fingerprint

    made, encode = {}, factory.encode_in_memory

    def once(images, vae, flip, progress=True):
        if not images.name.startswith("digits"):
            return encode(images, vae, flip, progress=progress)
        key = images.name, images.image_size, vae_fingerprint(vae), str(vae.dtype), flip
        if key not in made:
            made[key] = encode(images, vae, flip, progress=progress)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factory, "encode_in_memory", once)
        yield


@pytest.fixture(scope="session", autouse=True)
def nothing_waits_for_the_disk():
    """Files are to outlast a loss of power, which no test can cause; those of ``os.fsync`` look at its calls."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture
def fresh_accelerate():
    """Accelerate keeps its state in the process; each training run of a test starts without it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A checkpoint folder of a tiny network with random weights, on the digits."""
    from sit.checkpoint.info import CheckpointInfo
    from sit.checkpoint.save import save_checkpoint
    from sit.latents.vae import DIGITS_VAE
    from sit.model import SiT
    from sit.transport.transport import Transport

    torch.manual_seed(0)
    model = SiT(8, patch_size=2, hidden_size=32, depth=1, num_heads=2, num_classes=10, mixer="atconv")
    for parameter in model.parameters():
        parameter.data.normal_(std=0.1)
    folder = tmp_path_factory.mktemp("checkpoints") / "step-0000001"
    info = CheckpointInfo(1, 1, (32, 32), 10, [str(d) for d in range(10)], "digits", "atconv")
    return save_checkpoint(folder, model=model, transport=Transport(), vae_source=DIGITS_VAE, info=info)


@pytest.fixture(scope="session")
def classifier_of_three(tmp_path_factory) -> str:
    """The folder of a classifier with random weights that knows three classes."""
    from sit.metrics.classifier import Classifier, ClassifierConfig, save_classifier

    folder = tmp_path_factory.mktemp("classifier")
    save_classifier(Classifier(ClassifierConfig("test_resnet", {}, 32, ["a", "b", "c"])), folder)
    return str(folder)


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory) -> Path:
    """An Inception weights file of the right layout with random values."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Blank(FeatureExtractorInceptionV3):
        def load_state_dict(self, state):
            pass

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save({}, path)
    network = Blank("blank", ["2048"], feature_extractor_weights_path=str(path))
    torch.save(network.state_dict(), path)
    return path
