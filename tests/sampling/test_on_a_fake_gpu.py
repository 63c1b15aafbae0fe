"""What a GPU would be given, on tensors that have a device and shapes but no data (PyTorch's fake tensors).

Mixing devices fails there, and so does reading a value on the GPU, for which the host would have to wait.
"""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sit.mixers import known_mixers
from sit.model import SiT
from sit.sampling.config import SamplerConfig
from sit.sampling.ode import ODE_STEPS
from sit.sampling.sampler import sample
from sit.transport.transport import Transport


class FakeGPU(TorchDispatchMode):
    """Fakes what happens on the GPU and does the rest; counts the copies between the two."""

    device = torch.device("cuda")

    def __init__(self):
        super().__init__()
        self.copies = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        devices = [leaf.device for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        devices += [torch.device(kwargs["device"])] if kwargs.get("device") is not None else []
        if all(device.type == "cpu" for device in devices):
            with unset_fake_temporarily():
                return function(*args, **kwargs)
        if function.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
            self.copies += len({device.type for device in devices}) > 1
        return function(*args, **kwargs)


@pytest.fixture
def gpu():
    with FakeTensorMode(allow_non_fake_inputs=True), FakeGPU() as gpu:
        yield gpu


def small(mixer, gpu):
    with gpu.device:
        return SiT(8, 1, 4, 64, 2, 2, num_classes=10, mixer=mixer).eval()


def latents_and_labels(gpu):
    return torch.randn(2, 4, 8, 8, device=gpu.device), torch.zeros(2, dtype=torch.int64, device=gpu.device)


def test_that_waits_and_copies_are_found(gpu):
    there = torch.zeros((), device=gpu.device)
    with pytest.raises(DataDependentOutputException):
        bool(there < 1)
    assert torch.linspace(0, 1, 3).tolist() == [0, 0.5, 1] and gpu.copies == 0  # the host's own
    torch.zeros(3).to(gpu.device)
    there.to("cpu")
    assert gpu.copies == 2
    with pytest.raises(RuntimeError, match="same device"):
        there.expand(3) + torch.zeros(3)


@pytest.mark.parametrize("mixer", ("attention", "atconv"))
@pytest.mark.parametrize(
    "config",
    [SamplerConfig(steps=3, method=method, diffusion_form=form)
     for method, form in (("euler", "sigma"), ("heun", "sbdm"), ("euler", "increasing-decreasing"))]
    + [SamplerConfig(steps=3, last_step=last) for last in ("tweedie", "euler", "none")]
    + [SamplerConfig("ode", 7, name) for name in ODE_STEPS]
    + [SamplerConfig("ode", 3, "heun2", cfg_scale=1.5, cfg_interval=interval) for interval in ((0, 1), (0.2, 0.7))],
    ids=lambda config: f"{config.sampler}-{config.resolved_method}-{config.last_step}-{config.diffusion_form}",
)  # fmt: skip
def test_the_samplers_loop_waits_for_nothing(gpu, mixer, config):
    model, (noise, labels), seen = small(mixer, gpu), latents_and_labels(gpu), []
    on_step = lambda step, total, x, t: seen.append((x.device.type, gpu.copies))  # noqa: E731
    out = sample(model, Transport(), noise, labels, config, on_step=on_step)
    assert out.device.type == "cuda" and out.shape == noise.shape
    assert len(seen) == config.steps and set(seen) == {("cuda", seen[0][1])}


@pytest.mark.parametrize("mixer", known_mixers())
def test_the_loss_stays_there(gpu, mixer):
    model, (x, labels) = small(mixer, gpu).train(), latents_and_labels(gpu)
    before = gpu.copies
    loss = Transport().loss(model, x, torch.rand(2, device=gpu.device), torch.randn_like(x), y=labels)
    assert loss.device.type == "cuda" and loss.shape == (2,) and gpu.copies == before
