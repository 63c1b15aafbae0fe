"""Sampling by the compiled network, on a GPU as CUDA graphs, against the one that is not, from the same noise.

Told are both errors against a float64 network, of what the sampler adds to the noise; the compiled one must be as near.
"""

from __future__ import annotations

import copy
import itertools

import torch
from torch import nn

from gpu_parts.errors import Worst
from gpu_parts.kernels import name_of
from gpu_parts.pieces import Figures, Part, Piece
from sit.model import SiT, create_model
from sit.sampling.config import SamplerConfig
from sit.sampling.sampler import KeyedNoise, sample
from sit.transport.transport import Transport
from sit.utils.compile import compile_for_sampling
from sit.utils.precision import full_float32

MIXERS = ("attention", "atconv", "attention,atconv")
BOUNDS = {torch.bfloat16: 3e-2, torch.float32: 1e-4, torch.float16: 4e-3}
"""on the norm of the difference of the two, by that of what the sampler adds to the noise"""
NO_WORSE = 1.5
"""how much further from float64 the compiled one may be"""
SAMPLERS = {
    "SDE, guided": SamplerConfig(sampler="sde", steps=8, cfg_scale=1.5),
    "ODE, heun2": SamplerConfig(sampler="ode", method="heun2", steps=4),
}


def make_network(mixer: str, device: torch.device, tiny: bool) -> SiT:
    """A network whose layers keep the size of what goes through them; a fresh one's answer is zero."""
    torch.manual_seed(0)
    with device:
        if tiny:
            model = SiT(8, patch_size=2, hidden_size=32, depth=2, num_heads=2, num_classes=10, mixer=mixer)
        else:
            model = create_model("SiT-B/2", mixer=mixer, depth=4)  # compiling takes long enough
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.02)
    return model.eval().requires_grad_(False)


def sampled(model: SiT, config: SamplerConfig, first: int, images: int, dtype: torch.dtype) -> torch.Tensor:
    """What the sampler adds to the noise of the images from number ``first`` on, integrated in ``dtype``."""
    device = next(model.parameters()).device
    noise = KeyedNoise(0, range(first, first + images), (4, *model.config.input_size), device)
    labels = torch.arange(first, first + images, device=device) % model.config.num_classes
    start = noise().to(dtype)
    return sample(model, Transport(), start, labels, config, step_noise=noise) - start


def compare(mixer: str, dtype: torch.dtype, device: torch.device, tiny: bool) -> Figures:
    """Two batches, so that what was recorded for the first is replayed for the second, and one image.

    A guided network is shown each image twice; so the ODE has twice as many, and no size more has to be compiled.
    """
    exact = make_network(mixer, device, tiny)
    eager = nn.Module.to(copy.deepcopy(exact), dtype=dtype)
    compiled = copy.deepcopy(eager)
    exact = nn.Module.to(exact, dtype=torch.float64)
    counters = torch._dynamo.utils.counters
    counters.clear()
    compile_for_sampling(compiled, backend="eager" if tiny else "inductor")
    worst, images = Worst(), 2 if tiny else 8
    with full_float32(), torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):  # else it would go on uncompiled
        for name, config in SAMPLERS.items():
            guided = config.cfg_scale != 1
            batch = images if guided else 2 * images
            for first, count in ((0, batch), (batch, batch), *([(0, 1)] if guided else [])):
                truth = sampled(exact, config, first, count, torch.float64)
                plain, fast = (sampled(one, config, first, count, torch.float32) for one in (eager, compiled))
                where, size = f"{name}, images {first} to {first + count - 1}", truth.norm()
                worst.add("compiled by eager", where, ((fast - plain).norm() / size).item(), BOUNDS[dtype])
                errors = [((one - truth).norm() / size).item() for one in (plain, fast)]
                worst.add("eager by float64", where, errors[0], BOUNDS[dtype])
                worst.add("compiled by float64", where, errors[1], NO_WORSE * errors[0] + 1e-6)
    if not counters["stats"]["unique_graphs"]:
        raise RuntimeError("nothing was compiled")
    skips = counters["inductor"]["cudagraph_skips"]
    worst.add("graph breaks", "all", float(sum(counters["graph_break"].values())), 0.0)
    worst.add("CUDA graphs that were not recorded", "all", float(skips), 0.0)
    return worst.figures() | {"cuda_graphs": device.type == "cuda"}


def part(device: torch.device, tiny: bool) -> Part:
    """A piece of each mixer and dtype; in the tiny form, of each mixer with another dtype."""
    pairs = zip(BOUNDS, MIXERS, strict=True) if tiny else itertools.product(BOUNDS, MIXERS)
    pieces = [
        Piece(f"{mixer}, {name_of(dtype)}", 1 if tiny else 30,
              lambda done, left, mixer=mixer, dtype=dtype: compare(mixer, dtype, device, tiny))
        for dtype, mixer in pairs
    ]  # fmt: skip
    sources = ("atconv", "sit/model.py", "sit/mixers", "sit/sampling", "sit/transport", "sit/utils/compile.py",
               "experiments/gpu_parts/sampling.py", "experiments/gpu_parts/errors.py")  # fmt: skip
    return Part("sampling", pieces, sources, {"tiny": tiny})
