"""ATConv against naive loops in float64, the published order of operations, finite differences, and its contract."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from atconv import ATConv
from atconv.functional import BACKENDS, depthwise_conv, inhibit, make_kernels, pool_tokens
from sit.mixers import build_mixer, parse_mixers
from sit.utils.errors import UserError

PLAIN = [name for name in BACKENDS if name != "triton"]  # test_triton.py has that one


def naive(mixer: ATConv, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """The operator, number by number, from its definition; x (N, C) of one image."""
    height, width = grid
    k, taps, (tokens, channels) = mixer.kernel_size, mixer.kernel_size**2, x.shape
    p = torch.stack([x[j * tokens // taps : math.ceil((j + 1) * tokens / taps)].mean(0) for j in range(taps)])
    h = p @ mixer.kernel_proj.weight.T + mixer.kernel_proj.bias
    g = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    v = x @ mixer.x_proj.weight.T + mixer.x_proj.bias
    y = torch.zeros_like(v)
    for c in range(channels):
        kernel = mixer.kernel_gen.weight @ g[:, c] + mixer.kernel_gen.bias
        if mixer.inhibition:
            kernel = kernel - torch.sigmoid(mixer.difference_control[c]) * kernel.mean()
        for row in range(height):
            for column in range(width):
                for i in range(k):
                    for j in range(k):
                        r, s = row + i - k // 2, column + j - k // 2
                        if 0 <= r < height and 0 <= s < width:
                            y[row * width + column, c] += kernel[i * k + j] * v[r * width + s, c]
    return y @ mixer.proj.weight.T + mixer.proj.bias


def awake(dim: int, **options) -> ATConv:
    """A float64 module whose every parameter is random."""
    torch.manual_seed(0)
    mixer = ATConv(dim, **options).double()
    for parameter in mixer.parameters():
        parameter.data.normal_()
    return mixer


@pytest.mark.parametrize("backend", PLAIN)
@pytest.mark.parametrize("grid, kernel_size", [((3, 3), 3), ((7, 5), 3), ((5, 6), 5), ((2, 1), 1)])
def test_forward_is_the_naive_loop(grid, kernel_size, backend):
    mixer = awake(4, kernel_size=kernel_size, backend=backend)
    x = torch.randn(2, grid[0] * grid[1], 4).double()
    expected = torch.stack([naive(mixer, image, grid) for image in x])
    torch.testing.assert_close(mixer(x, grid), expected)


def test_pool_first_is_project_then_pool_to_the_gradients():
    """The published order: project all tokens, pool with PyTorch's own pooling, then grouped convolution."""
    mixer, grid, (b, n, c) = awake(6), (5, 7), (3, 35, 6)
    x = torch.randn(b, n, c).double()

    def published(x):
        projected = F.linear(x, mixer.kernel_proj.weight, mixer.kernel_proj.bias)
        g = F.gelu(F.adaptive_avg_pool1d(projected.transpose(1, 2), 9), approximate="tanh")
        kernels = F.linear(g, mixer.kernel_gen.weight, mixer.kernel_gen.bias)
        kernels = kernels - mixer.difference_control.sigmoid()[:, None] * kernels.mean(2, keepdim=True)
        v = F.linear(x, mixer.x_proj.weight, mixer.x_proj.bias).transpose(1, 2).reshape(1, b * c, *grid)
        y = F.conv2d(v, kernels.reshape(b * c, 1, 3, 3), padding=1, groups=b * c).reshape(b, c, n).transpose(1, 2)
        return F.linear(y, mixer.proj.weight, mixer.proj.bias)

    # the pooling comes before the activation in both orders
    torch.testing.assert_close(mixer(x, grid), published(x))
    weight = torch.randn(b, n, c).double()
    parameters = list(mixer.parameters())
    ours = torch.autograd.grad((mixer(x, grid) * weight).sum(), parameters)
    theirs = torch.autograd.grad((published(x) * weight).sum(), parameters)
    for a, e in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("backend", PLAIN)
@pytest.mark.parametrize("options", [{}, {"inhibition": False}, {"routing": False}, {"kernel_size": 5}])
def test_gradients_by_finite_differences(options, backend):
    mixer = awake(2, backend=backend, **options)
    grid = (5, 5)
    x = torch.randn(2, 25, 2).double().requires_grad_()
    parameters = [p.detach().requires_grad_() for p in mixer.parameters()]
    names = [name for name, _ in mixer.named_parameters()]

    def call(x, *parameters):
        return torch.func.functional_call(mixer, dict(zip(names, parameters, strict=True)), (x, grid))

    # 5x5 kernels mix 25 taps by 625 weights: along random directions, not one by one
    assert torch.autograd.gradcheck(call, (x, *parameters), fast_mode="kernel_size" in options)


def test_pooling_is_pytorchs():
    for tokens, bins in ((9, 9), (16, 9), (256, 9), (31, 25), (10, 1)):
        x = torch.randn(2, tokens, 3).double()
        expected = F.adaptive_avg_pool1d(x.transpose(1, 2), bins).transpose(1, 2)
        torch.testing.assert_close(pool_tokens(x, bins), expected)


@pytest.mark.parametrize("backend", PLAIN)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("shape, k", [((1, 3, 3, 8), 3), ((2, 7, 5, 33), 3), ((3, 17, 31, 20), 5), ((1, 1, 1, 4), 3)])
def test_convolution_and_gradients_against_float64(shape, k, dtype, tolerance, backend):
    torch.manual_seed(sum(shape))
    v, g = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    kernels = torch.randn(shape[0], k * k, shape[3]).to(dtype)

    def run(v, kernels, g, backend):
        v, kernels = v.clone().requires_grad_(), kernels.clone().requires_grad_()
        out = depthwise_conv(v, kernels, backend)
        return out, *torch.autograd.grad(out, (v, kernels), g)

    exact = run(v.double(), kernels.double(), g.double(), "taps")
    for ours, truth in zip(run(v, kernels, g, backend), exact, strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - truth).norm() <= tolerance * truth.norm()


def test_shared_kernels_are_those_of_every_image():
    v, kernels = torch.randn(3, 4, 5, 6).double(), torch.randn(1, 9, 6).double()
    for backend in PLAIN:
        expected = depthwise_conv(v, kernels.expand(3, -1, -1), "taps")
        torch.testing.assert_close(depthwise_conv(v, kernels, backend), expected)


def test_autocast_keeps_the_kernel_branch_in_float32():
    mixer = awake(32).float()
    x = torch.randn(2, 64, 32)
    with torch.autocast("cpu", torch.bfloat16):
        out = mixer(x, (8, 8))
        raw, inhibited = mixer.kernels(x)
    assert out.dtype == torch.bfloat16 and raw.dtype == inhibited.dtype == torch.float32
    exact = [k.float() for k in awake(32).kernels(x.double())]
    torch.testing.assert_close(raw, exact[0], rtol=1e-4, atol=1e-3)
    full = mixer(x, (8, 8))
    assert (out.float() - full).norm() < 2e-2 * full.norm()


def test_a_network_in_bfloat16_works():
    mixer = awake(32).bfloat16()
    x = torch.randn(2, 64, 32).bfloat16()
    exact = awake(32).to(torch.float64)
    for parameter, rounded in zip(exact.parameters(), mixer.parameters(), strict=True):
        parameter.data = rounded.double()
    truth = exact(x.double(), (8, 8))
    assert (mixer(x, (8, 8)).double() - truth).norm() < 1e-2 * truth.norm()
    ours, exact = mixer.kernels(x), exact.kernels(x.double())
    for narrow, wide in zip(ours, exact, strict=True):
        assert narrow.dtype == torch.float32 and (narrow.double() - wide).norm() < 1e-2 * wide.norm()


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("scope", ["image", "window", "token"])
def test_nothing_that_is_made_without_gradients_claims_one(scope, without):
    mixer = awake(4, scope=scope)
    with without():
        results = [mixer(torch.randn(1, 20, 4).double(), (4, 5))]
        if scope == "image":
            results += mixer.kernels(torch.randn(1, 20, 4).double())
    assert not any(result.requires_grad for result in results)


@torch.no_grad()
def test_weights_of_a_layer_that_is_computed_elsewhere_are_no_dead_ends():
    """They say that they have a gradient, and it is the layer's own."""
    layer = awake(4).kernel_proj
    weight, bias = layer()
    with torch.enable_grad():
        torch.autograd.grad(weight.sum() + bias.sum(), list(layer.parameters()))


def test_compiles_without_graph_breaks():
    mixer = awake(16).float()
    x = torch.randn(2, 20, 16, requires_grad=True)
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    weight = torch.randn(2, 20, 16)
    outs = [module(x, (4, 5)) for module in (mixer, compiled)]
    torch.testing.assert_close(*outs)
    grads = [torch.autograd.grad((out * weight).sum(), [x, *mixer.parameters()]) for out in outs]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_inhibition_removes_its_share_of_the_mean():
    kernels = torch.randn(2, 9, 3).double()
    everything = inhibit(kernels, torch.full((3,), 50.0).double())
    torch.testing.assert_close(everything.mean(1), torch.zeros(2, 3).double(), atol=1e-12, rtol=0)
    nothing = inhibit(kernels, torch.full((3,), -50.0).double())
    torch.testing.assert_close(nothing, kernels)
    torch.testing.assert_close(inhibit(kernels, torch.zeros(3).double()).mean(1), 0.5 * kernels.mean(1))


def test_initial_values_and_names():
    mixer = ATConv(8)
    assert set(mixer.state_dict()) == {
        *(f"{n}.{k}" for n in ("kernel_proj", "kernel_gen", "x_proj", "proj") for k in ("weight", "bias")),
        "difference_control",
    }
    assert not mixer.difference_control.any() and not mixer.proj.bias.any()
    assert set(ATConv(8, routing=False, inhibition=False).state_dict()) == {
        "kernel", "x_proj.weight", "x_proj.bias", "proj.weight", "proj.bias",
    }  # fmt: skip


def test_initial_values_of_the_two_published_variants():
    """Xavier-uniform with zero biases (SiT), or as a 1x1 convolution's (REPA): uniform within 1/sqrt(C), biases too."""
    torch.manual_seed(0)
    for init, bound in (("xavier", (6 / 128) ** 0.5), ("conv", 1 / 8)):
        mixer = ATConv(64, init=init)
        for layer in (mixer.kernel_proj, mixer.x_proj, mixer.proj):
            assert 0.99 * bound < layer.weight.abs().max() <= bound
            assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
            assert (0.9 * bound < layer.bias.abs().max() <= bound) if init == "conv" else not layer.bias.any()
        assert 0.8 * (6 / 18) ** 0.5 < mixer.kernel_gen.weight.abs().max() <= (6 / 18) ** 0.5
        assert not mixer.kernel_gen.bias.any() and not mixer.difference_control.any()
    with pytest.raises(ValueError, match="`init` must be one of xavier, conv, not 'normal'"):
        ATConv(8, init="normal")


def test_silu_and_gelu_are_what_they_say():
    x = torch.randn(1, 9, 2).double()
    eye, zero = torch.eye(2).double(), torch.zeros(2).double()
    mix = torch.eye(9).double(), torch.zeros(9).double()
    for name, formula in (
        ("silu", lambda h: h / (1 + torch.exp(-h))),
        ("gelu", lambda h: h * 0.5 * (1 + torch.erf(h / 2**0.5))),
    ):
        torch.testing.assert_close(make_kernels(x, eye, zero, *mix, control=None, activation=name)[0], formula(x))


def test_mistakes():
    with pytest.raises(ValueError, match="`kernel_size` must be an odd number, not 4"):
        ATConv(8, kernel_size=4)
    with pytest.raises(ValueError, match="`kernel_size` must be an odd number, not True"):
        ATConv(8, kernel_size=True)
    for dim in (0, 8.0, True):
        with pytest.raises(ValueError, match=f"`dim` must be at least 1, not {dim}"):
            ATConv(dim)
    with pytest.raises(ValueError, match="`activation` must be one of gelu_tanh, gelu, silu, not 'relu'"):
        ATConv(8, activation="relu")
    with pytest.raises(ValueError, match="`backend` must be one of taps, channels_last, triton, not 'cudnn'"):
        ATConv(8, backend="cudnn")
    with pytest.raises(ValueError, match="10 tokens are no grid of 3 x 3"):
        ATConv(8)(torch.randn(1, 10, 8), (3, 3))
    with pytest.raises(ValueError, match="4 tokens of a 2 x 2 grid can't be pooled into the 9 taps of a 3x3 kernel"):
        ATConv(8)(torch.randn(1, 4, 8), (2, 2))
    with pytest.raises(ValueError, match="8 taps"):
        depthwise_conv(torch.randn(1, 3, 3, 2), torch.randn(1, 8, 2))
    with pytest.raises(ValueError, match="don't fit"):
        depthwise_conv(torch.randn(2, 3, 3, 2), torch.randn(3, 9, 2))
    with pytest.raises(UserError, match="mixer 'atconv:kernel_size=2' with 8 channels and 1 heads: kernel_size must"):
        build_mixer(parse_mixers("atconv:kernel_size=2")[0], 8, 1)


def test_exports_with_an_open_batch_without_routing():
    """tests/test_export.py has it with routing, in AttNet and in SiT."""
    mixer = awake(4, routing=False)

    class OnAGrid(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mixer = mixer

        def forward(self, x):
            return self.mixer(x, (4, 5))

    sizes = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(OnAGrid(), (torch.randn(3, 20, 4).double(),), dynamic_shapes=sizes).module()
    for batch in (1, 7):
        x = torch.randn(batch, 20, 4).double()
        torch.testing.assert_close(exported(x), mixer(x, (4, 5)))
