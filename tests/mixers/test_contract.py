"""What every mixer holds to: it can be exported and leaves no trace of it, takes any dtype, and an empty batch."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sit.mixers import build_mixer, known_mixers, parse_mixers
from sit.mixers.deformable import directions, places_of_tokens
from sit.mixers.neighborhood import block_mask, dense_mask
from sit.mixers.rope import turns_of
from sit.model import SiT

OURS = [  # a benchmark, or another test, may have registered more by now
    name
    for name in known_mixers()
    if type(build_mixer(parse_mixers(name)[0], 12, 3)).__module__.partition(".")[0] in ("sit", "atconv")
]
PATTERNS = [
    *OURS,
    "attention:qk_norm=true:rope=true",
    "neighborhood:qk_norm=true:rope=true",
    "linear_attention:conv=3:qk_norm=true",
    "deformable:backend=gather",
    "atconv:backend=taps",
    "atconv:routing=false",
    "atconv:scope=window",
    "atconv:scope=window:window=3",
    "atconv:scope=token",
]
CPU = torch.device("cpu")


def built(pattern: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """A mixer of 12 channels and 3 heads with random weights and biases."""
    torch.manual_seed(0)
    mixer = build_mixer(parse_mixers(pattern)[0], 12, 3)
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return mixer.to(dtype)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_exported_first_and_then_called(pattern):
    """What export makes has no numbers, and is not kept for others of the same grid, which is one that no test has."""
    grid, (mixer, another) = (4, 11 + PATTERNS.index(pattern)), (built(pattern), built(pattern))
    x = torch.randn(2, grid[0] * grid[1], 12)
    program = torch.export.export(mixer, (x, grid)).module()
    for called in (mixer, another):
        found = called(x, grid)
        assert type(found) is torch.Tensor
        torch.testing.assert_close(found, program(x, grid))
    found.sum().backward()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_exported_with_an_open_batch(pattern):
    mixer, grid = built(pattern), (5, 7)
    shapes = {"x": {0: torch.export.Dim("batch")}, "grid": (None, None)}
    program = torch.export.export(mixer, (torch.randn(3, 35, 12), grid), dynamic_shapes=shapes).module()
    for count in (1, 4):
        x = torch.randn(count, 35, 12)
        torch.testing.assert_close(program(x, grid), mixer(x, grid))


NETWORKS = [
    *((pattern, "published") for pattern in OURS),
    *((pattern, "modern") for pattern in ("attention", "neighborhood")),
    ("deformable,attention", "published"),
    ("neighborhood,neighborhood:kernel_size=1", "published"),
]


@torch.no_grad()
@pytest.mark.parametrize("pattern, block", NETWORKS)
def test_a_network_is_compiled_whole(pattern, block):
    """Of two blocks, at the size that it was trained at and at another, which has a positional table of its own."""
    torch.compiler.reset()
    network = SiT(6, 2, 4, 16, depth=2, num_heads=2, num_classes=3, mixer=pattern, block=block).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True, dynamic=False)
    for side in (6, 10):
        inputs = torch.randn(2, 4, side, side), torch.rand(2), torch.tensor([0, 1])
        torch.testing.assert_close(compiled(*inputs), network(*inputs))


def test_a_network_exported_at_another_size_than_it_was_trained_at():
    """Its positional table is then kept between calls."""
    network = SiT(4, 1, 4, 16, depth=1, num_heads=2, num_classes=3, mixer="attention").eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    inputs = torch.randn(2, 4, 4, 29), torch.rand(2), torch.tensor([0, 1])
    program = torch.export.export(network, inputs).module()
    found = network(*inputs)
    assert type(found) is torch.Tensor
    torch.testing.assert_close(found, program(*inputs))


def test_stand_ins_are_not_kept():
    """A program that is traced gets none of the kept tensors either, which it could not mix with its own."""
    calls = [
        lambda: dense_mask((7, 31), 3, CPU),
        lambda: block_mask((7, 31), 3, CPU).kv_indices,
        lambda: turns_of(8, (7, 31), (7, 31), torch.float32, CPU),
        lambda: directions(31, CPU),
        lambda: places_of_tokens((7, 31), CPU),
    ]
    for make in calls:
        with FakeTensorMode():
            assert type(make()) is not torch.Tensor
        kept = make()
        assert type(kept) is torch.Tensor and kept is make()
        with FakeTensorMode():
            assert type(make()) is not torch.Tensor


@pytest.mark.parametrize("pattern", PATTERNS)
def test_any_dtype_under_any_autocast(pattern):
    """The result is near to float32's, of autocast's dtype, or of the network's; autocast leaves float64 alone."""
    grid, x = (5, 7), torch.randn(2, 35, 12)
    exact, narrow = built(pattern)(x, grid), (torch.float32, torch.bfloat16, torch.float16)
    alone = [(dtype, None, dtype) for dtype in (torch.float64, *narrow)]
    wide = [(torch.float64, autocast, torch.float64) for autocast in narrow[1:]]
    for case in [*alone, *wide, *itertools.product(narrow, narrow[1:], narrow)]:
        dtype, autocast, given = case  # of the network, of autocast, of the tokens
        mixer, tokens = built(pattern, dtype), x.to(given, copy=True).requires_grad_()
        with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            found = mixer(tokens, grid)
        assert found.dtype == (dtype if dtype == torch.float64 else autocast or dtype), case
        assert (found.float() - exact).norm() < 0.05 * exact.norm(), case
        found.float().sum().backward()
        assert all(value.grad.isfinite().all() for value in (tokens, *mixer.parameters())), case


@pytest.mark.parametrize("pattern", PATTERNS)
def test_an_empty_batch_is_mixed_into_one(pattern):
    mixer, x = built(pattern), torch.randn(0, 35, 12, requires_grad=True)
    found = mixer(x, (5, 7))
    assert found.shape == (0, 35, 12)
    found.sum().backward()
    assert x.grad.shape == x.shape and not mixer.proj.weight.grad.any()
