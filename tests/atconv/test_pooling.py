"""The means that kernels are made from: in float32 at least, whatever the tokens are."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from atconv import ATConv
from atconv.functional import pool_tokens
from atconv.scopes import pool_windows

HALF = [torch.bfloat16, torch.float16]
SIZES = [(tokens, bins) for bins in (1, 9, 25) for tokens in (bins, 2 * bins + 1, 3 * bins, 100, 101)]


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """The relative norm of the difference."""
    return ((found.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_of_wide_tokens_they_are_the_product_with_the_matrix_to_the_bit(dtype):
    for tokens, bins in SIZES:
        x, place = torch.randn(2, tokens, 6, dtype=dtype), torch.arange(tokens)
        bounds = [(j * tokens // bins, -(-(j + 1) * tokens // bins)) for j in range(bins)]
        matrix = torch.stack([(place >= start) & (place < end) for start, end in bounds]).to(dtype)
        counts = torch.tensor([end - start for start, end in bounds])
        assert torch.equal(pool_tokens(x, bins), torch.bmm(matrix.expand(2, -1, -1), x) / counts[:, None])


@pytest.mark.parametrize("dtype", HALF)
def test_of_half_precision_they_are_those_of_the_same_numbers(dtype):
    """Values and gradients, in float32; and rounded once where they are wanted in the tokens' dtype."""
    for tokens, bins in SIZES:
        x = torch.randn(2, tokens, 6).to(dtype).requires_grad_()
        wide = x.detach().double().requires_grad_()
        exact = F.adaptive_avg_pool1d(wide.transpose(1, 2), bins).transpose(1, 2)
        found, towards = pool_tokens(x, bins, torch.float32), torch.randn(2, bins, 6)
        assert found.dtype == torch.float32 and error(found, exact) < 1e-6
        assert torch.equal(pool_tokens(x, bins), found.to(dtype))
        (ours,), (theirs,) = torch.autograd.grad(found, x, towards), torch.autograd.grad(exact, wide, towards.double())
        assert ours.dtype == dtype and error(ours, theirs) < 5e-3


def test_kernels_of_bfloat16_tokens_are_those_of_the_same_numbers():
    torch.manual_seed(0)
    mixer, x = ATConv(16), (torch.randn(2, 1024, 16) + 0.5).bfloat16()
    exact = ATConv(16).double()
    exact.load_state_dict(mixer.state_dict())
    for found, kernels in zip(mixer.kernels(x), exact.kernels(x.double()), strict=True):
        assert error(found, kernels) < 2e-6


@pytest.mark.parametrize("grid", [(8, 8), (7, 9)])
@pytest.mark.parametrize("dtype", HALF)
def test_means_of_windows_are_those_of_the_same_numbers(dtype, grid):
    for window in (4, 7):
        x = torch.randn(2, grid[0] * grid[1], 6).to(dtype)
        exact = pool_windows(x.double(), grid, window, 9)
        found = pool_windows(x, grid, window, 9, torch.float32)
        assert found.dtype == torch.float32 and error(found, exact) < 1e-6
        assert torch.equal(pool_windows(x, grid, window, 9), found.to(dtype))


@pytest.mark.parametrize("options", [{}, dict(scope="window", window=64), dict(scope="window", window=40)], ids=str)
def test_float16_tokens_whose_sum_is_beyond_float16(options):
    """4096 tokens of mean 200, a bin of which adds up to 91,000: 65,504 is the largest number."""
    torch.manual_seed(0)
    mixer, x, grid = ATConv(4, **options), torch.randn(1, 64 * 64, 4) + 200, (64, 64)
    mixer.kernel_proj.weight.data /= 100  # where the activation is neither zero nor large
    exact = mixer(x, grid)
    with torch.autocast("cpu", torch.float16):
        assert error(mixer(x, grid), exact) < 0.02
    assert error(mixer.half()(x.half(), grid), exact) < 0.02


@pytest.mark.parametrize("dtype", HALF)
def test_they_can_be_differentiated_forward_mapped_and_compiled(dtype):
    x, towards = torch.randn(3, 64, 4).to(dtype), torch.randn(3, 64, 4).to(dtype)
    mean = lambda x: pool_tokens(x, 9, torch.float32)  # noqa: E731
    value, derivative = torch.func.jvp(mean, (x,), (towards,))
    torch.testing.assert_close(derivative, mean(towards))  # it is linear
    mapped = torch.func.vmap(lambda x: mean(x[None])[0])(x)
    compiled = torch.compile(mean, fullgraph=True, backend="eager")
    for found in (value, mapped, compiled(x)):
        torch.testing.assert_close(found, mean(x))


def test_a_program_for_any_number_of_bfloat16_tokens():
    class Pool(torch.nn.Module):
        def forward(self, x):
            return pool_tokens(x, 9, torch.float32)

    sizes = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens", min=9)},)
    program = torch.export.export(Pool(), (torch.randn(3, 64, 4).bfloat16(),), dynamic_shapes=sizes).module()
    for shape in ((2, 50, 4), (4, 101, 4)):
        x = torch.randn(shape).bfloat16()
        torch.testing.assert_close(program(x), pool_tokens(x, 9, torch.float32))
