"""ATConv with kernels of windows and of each token's surroundings, against loops over tokens in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from atconv import ATConv
from atconv.scopes import smallest_window


def awake(**options) -> ATConv:
    """A float64 module of 4 channels whose every parameter is random."""
    torch.manual_seed(0)
    mixer = ATConv(4, **options).double()
    for parameter in mixer.parameters():
        parameter.data.normal_()
    return mixer


def bounds(length: int, window: int) -> list[tuple[int, int]]:
    """The windows of a side: as many as fit, as even as can be."""
    count = max(1, length // window)
    return [(part * length // count, (part + 1) * length // count) for part in range(count)]


def context(mixer: ATConv, x: torch.Tensor, grid: tuple[int, int], row: int, column: int) -> torch.Tensor:
    """What the kernel of the token at (row, column) is made from, (k², C), of tokens x (N, C)."""
    (height, width), k = grid, mixer.kernel_size
    image = x.reshape(height, width, -1)
    if mixer.scope == "token":
        seen = [(row + i - k // 2, column + j - k // 2) for i in range(k) for j in range(k)]
        return torch.stack([image[r, s] if 0 <= r < height and 0 <= s < width else 0 * image[0, 0] for r, s in seen])
    top, bottom = next(part for part in bounds(height, mixer.window) if part[0] <= row < part[1])
    left, right = next(part for part in bounds(width, mixer.window) if part[0] <= column < part[1])
    own = image[top:bottom, left:right].flatten(0, 1)
    count = len(own)
    return torch.stack([own[j * count // k**2 : math.ceil((j + 1) * count / k**2)].mean(0) for j in range(k**2)])


def naive(mixer: ATConv, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """The operator token by token, x (N, C) of one image."""
    (height, width), k = grid, mixer.kernel_size
    v = x @ mixer.x_proj.weight.T + mixer.x_proj.bias
    out = []
    for token in range(height * width):
        row, column = divmod(token, width)
        h = context(mixer, x, grid, row, column) @ mixer.kernel_proj.weight.T + mixer.kernel_proj.bias
        g = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        kernel = mixer.kernel_gen.weight @ g + mixer.kernel_gen.bias[:, None]
        if mixer.inhibition:
            kernel = kernel - torch.sigmoid(mixer.difference_control) * kernel.mean(0)
        total = torch.zeros_like(v[0])
        for i in range(k):
            for j in range(k):
                r, s = row + i - k // 2, column + j - k // 2
                if 0 <= r < height and 0 <= s < width:
                    total = total + kernel[i * k + j] * v[r * width + s]
        out.append(total)
    return torch.stack(out) @ mixer.proj.weight.T + mixer.proj.bias


@pytest.mark.parametrize("grid", [(8, 8), (7, 5), (5, 9)])
@pytest.mark.parametrize(
    "options",
    [
        dict(scope="window"),
        dict(scope="window", window=3, inhibition=False),
        dict(scope="window", window=5, kernel_size=5),
        dict(scope="token"),
        dict(scope="token", kernel_size=5),
    ],
    ids=str,
)
def test_values_and_gradients_are_the_loops(options, grid):
    mixer = awake(**options)
    x = torch.randn(2, grid[0] * grid[1], 4, dtype=torch.float64, requires_grad=True)
    expected = torch.stack([naive(mixer, image, grid) for image in x])
    towards, wanted = torch.randn_like(x), [x, *mixer.parameters()]
    gradients = torch.autograd.grad((expected * towards).sum(), wanted)
    torch.testing.assert_close(mixer(x, grid), expected)
    torch.testing.assert_close(torch.autograd.grad((mixer(x, grid) * towards).sum(), wanted), gradients)


@pytest.mark.parametrize("grid", [(5, 5), (7, 5)])
def test_one_window_is_the_image(grid):
    """To rounding: the backends sum the taps in their own orders."""
    whole, window = awake(), awake(scope="window", window=9)
    x = torch.randn(2, grid[0] * grid[1], 4, dtype=torch.float64)
    torch.testing.assert_close(window(x, grid), whole(x, grid))


@pytest.mark.parametrize("scope", ["window", "token"])
def test_autocast_keeps_the_kernels_in_float32(scope):
    mixer = awake(scope=scope).float()
    x = torch.randn(2, 64, 4)
    exact = mixer(x, (8, 8))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = mixer(x, (8, 8))
    assert mixed.dtype == torch.bfloat16 and (mixed.float() - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("grid", [(8, 8), (7, 9)])
@pytest.mark.parametrize("scope", ["window", "token"])
def test_compiled_whole_and_exported(scope, grid):
    mixer, x = awake(scope=scope), torch.randn(2, grid[0] * grid[1], 4, dtype=torch.float64)
    compiled = torch.compile(mixer, fullgraph=True, backend="eager")
    exported = torch.export.export(mixer, (x, grid)).module()
    for called in (compiled, exported):
        torch.testing.assert_close(called(x, grid), mixer(x, grid))


def test_the_smallest_window():
    for height, width, window in itertools.product((3, 8, 11), (4, 7, 15), (3, 4, 5)):
        least = min(end - start for start, end in bounds(height, window))
        least *= min(end - start for start, end in bounds(width, window))
        assert smallest_window((height, width), window) == least


def test_the_scope_has_no_part_in_the_weights():
    torch.manual_seed(0)
    whole = ATConv(4).state_dict()
    torch.manual_seed(0)
    for name, value in ATConv(4, scope="token").state_dict().items():
        assert torch.equal(value, whole.pop(name))
    assert not whole


def test_mistakes():
    for options, words in (
        (dict(window=9), "`window` is of `scope=window`, not of image: leave it out"),
        (dict(scope="world"), "`scope` must be one of image, window, token, not 'world'"),
        (dict(scope="token", backend="taps"), "does not go with `backend=taps`"),
        (dict(scope="window", routing=False), "does not go with `routing=false`"),
        (dict(scope="window", window=0), "`window` must be at least 1, not 0"),
    ):
        with pytest.raises(ValueError, match=words):
            ATConv(4, **options)
    with pytest.raises(ValueError, match="the 4 tokens of a window can't be pooled into the 9 taps"):
        ATConv(4, scope="window", window=2).check_grid((8, 8))
    ATConv(4, scope="token").check_grid((1, 2))
    with pytest.raises(ValueError, match="with scope=window an image has a kernel for each window"):
        ATConv(4, scope="window").kernels(torch.zeros(1, 64, 4))
