"""ATConv's Triton kernels against float64: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

pytest.importorskip("triton", reason="Triton is not installed")

from atconv import ATConv, functional  # noqa: E402
from atconv import triton as ops  # noqa: E402
from atconv.triton import launch  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MACHINE_CODE = str(Path(__file__).parents[2] / "benchmarks" / "machine_code.py")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float64: 1e-12}

pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not ops.INTERPRETED, reason="no GPU, and Triton was imported without TRITON_INTERPRET=1"
)


def close(ours: torch.Tensor, exact: torch.Tensor, tolerance: float) -> None:
    """The relative norm of the difference is within the tolerance."""
    assert ours.shape == exact.shape
    assert (ours.double() - exact.double()).norm() <= tolerance * exact.double().norm()


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


CONVOLUTIONS = [
    ((1, 3, 3, 8), 3),
    ((2, 7, 5, 9), 3),
    ((1, 5, 19, 6), 3),
    ((2, 7, 5, 6), 5),
    ((1, 5, 9, 6), 7),
    ((1, 1, 1, 4), 3),
    ((2, 3, 5, 130), 1),
]
"""(shape, kernel size): odd sides, sides below the kernel's, channels that don't fill a tile."""
ALL = [
    (shape, k, dtype, programs) for shape, k in CONVOLUTIONS for dtype in TOLERANCE for programs in (1, launch.PROGRAMS)
]
SOME = [case for number, case in enumerate(ALL) if number % 5 == 0]
"""For the interpreter, which takes seconds a case: every shape, dtype and tile at least once, as 5 divides no count."""


@pytest.mark.parametrize("shape, k, dtype, programs", ALL if DEVICE == "cuda" else SOME)
def test_convolution_and_gradients(shape, k, dtype, programs, monkeypatch):
    """In large tiles, and in the small ones of inputs that would leave the GPU idle."""
    monkeypatch.setattr(launch, "PROGRAMS", programs)
    torch.manual_seed(sum(shape))
    v, g, kernels = random(*shape, dtype=dtype), random(*shape, dtype=dtype), random(shape[0], k * k, shape[3])

    def run(v, kernels, g, backend):
        v, kernels = v.clone().requires_grad_(), kernels.clone().requires_grad_()
        out = functional.depthwise_conv(v, kernels, backend)
        return out, *torch.autograd.grad(out, (v, kernels), g)

    ours = run(v, kernels.to(dtype), g, "triton")
    exact = run(v.double(), kernels.to(dtype).double(), g.double(), "taps")
    for one, truth in zip(ours, exact, strict=True):
        assert one.dtype == dtype
        close(one, truth, TOLERANCE[dtype])


def test_tiles_waste_little_and_keep_the_gpu_busy():
    for length, size in {4: 4, 7: 8, 14: 16, 16: 16, 28: 16, 64: 16}.items():
        options = launch.tile(999, length, length, 64, side=3, item=2)
        assert (options["ROWS"], options["COLUMNS"]) == (size, size)
    assert [launch.tile(images, 16, 16, 1152, side=3, item=2)["ROWS"] for images in (1, 8, 16, 128)] == [2, 4, 8, 16]


def test_any_strides():
    """Values and gradients that are views of something else, as after a transpose or a slice."""
    v = random(2, 9, 6, 5).permute(0, 3, 2, 1)[:, :, 1:].requires_grad_()  # (2, 5, 5, 9)
    kernels = random(2, 9, 12).permute(0, 2, 1)[:, :9].requires_grad_()
    weight = random(2, 9, 5, 5).permute(0, 3, 2, 1)
    runs = []
    for backend in ("triton", "taps"):
        out = functional.depthwise_conv(v, kernels, backend)
        runs.append((out, *torch.autograd.grad(out, (v, kernels), weight)))
    for one, truth in zip(*runs, strict=True):
        close(one, truth, 1e-5)


def test_shared_kernels():
    v, kernels = random(3, 4, 5, 6).requires_grad_(), random(1, 9, 6).requires_grad_()
    weight, runs = random(3, 4, 5, 6), []
    for backend in ("triton", "taps"):
        out = functional.depthwise_conv(v, kernels, backend)
        runs.append((out, *torch.autograd.grad(out, (v, kernels), weight)))
    for one, truth in zip(*runs, strict=True):
        close(one, truth, 1e-5)


@pytest.mark.parametrize("tokens, bins", [(9, 9), (16, 9), (256, 9), (31, 25), (10, 1), (60, 49)])
def test_pooling_is_pytorchs_forward_and_backward(tokens, bins):
    x, weight = random(2, tokens, 40).requires_grad_(), random(2, bins, 40)
    ours = ops.pool(x, bins, x.dtype)
    exact = F.adaptive_avg_pool1d(x.double().transpose(1, 2), bins).transpose(1, 2)
    close(ours, exact, 1e-6)
    close(*(torch.autograd.grad((y * weight).sum(), x)[0] for y in (ours, exact)), 1e-6)


@pytest.mark.parametrize("activation", functional.ACTIVATIONS)
@pytest.mark.parametrize("with_control, dtype, tolerance", [
    (True, torch.float32, 1e-5), (False, torch.float32, 1e-5), (True, torch.bfloat16, 2e-2),
])  # fmt: skip
def test_branch_is_the_plain_one_to_the_gradients(activation, with_control, dtype, tolerance):
    torch.manual_seed(0)
    shapes = [(2, 35, 20), (20, 20), (20,), (9, 9), (9,)] + [(20,)] * with_control
    inputs = [random(*shape).to(dtype).requires_grad_() for shape in shapes]
    weights = random(2, 9, 20), random(2, 9, 20)

    def run(inputs, backend):
        control = inputs[5] if with_control else None
        raw, inhibited = functional.make_kernels(*inputs[:5], control=control, activation=activation, backend=backend)
        total = (raw * weights[0]).sum() + (inhibited * weights[1]).sum()
        return raw, inhibited, *torch.autograd.grad(total, inputs)

    wide = [value.detach().double().requires_grad_() for value in inputs]
    for one, truth in zip(run(inputs, "triton"), run(wide, "taps"), strict=True):
        close(one, truth, tolerance)


@pytest.mark.parametrize("options", [{}, {"inhibition": False}, {"routing": False}, {"kernel_size": 5}])
def test_module_under_autocast_too(options):
    torch.manual_seed(0)
    exact = ATConv(20, backend="taps", **options).to(DEVICE)
    for parameter in exact.parameters():
        parameter.data.add_(random(*parameter.shape), alpha=0.1)
    ours = ATConv(20, backend="triton", **options).to(DEVICE)
    ours.load_state_dict(exact.state_dict())
    exact = exact.double()
    x, weight = random(2, 35, 20), random(2, 35, 20)
    truth = exact(x.double(), (5, 7))
    gradients = torch.autograd.grad((truth * weight).sum(), list(exact.parameters()))
    precisions = ((False, 1e-5), (True, 1e-2))
    for autocast, tolerance in precisions if DEVICE == "cuda" or not options else precisions[:1]:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            out = ours(x, (5, 7))
        close(out, truth, tolerance)
        found = torch.autograd.grad((out * weight).sum(), list(ours.parameters()))
        for one, expected in zip(found, gradients, strict=True):
            close(one, expected, tolerance * (3 if autocast else 1))


def penalty_gradients(function, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The gradients of the squares of a function's gradients, as a gradient penalty needs them."""
    *arguments, weight = (value.detach().clone().requires_grad_() for value in inputs)
    first = torch.autograd.grad((function(*arguments) * weight).sum(), arguments, create_graph=True)
    return torch.autograd.grad(sum(one.square().sum() for one in first), (*arguments, weight), materialize_grads=True)


def test_second_derivatives():
    """On the operators that have a formula of their own, against plain operations in float64."""
    shapes = ((2, 3, 4, 5), (2, 9, 5), (2, 3, 4, 5))
    inputs = [random(*shape, dtype=torch.float64) for shape in shapes]
    plain = penalty_gradients(lambda v, kernels: functional.depthwise_conv(v, kernels, "taps"), *inputs)
    for one, truth in zip(penalty_gradients(ops.depthwise, *inputs), plain, strict=True):
        close(one, truth, 1e-12)
    inputs = [random(1, 5, 2, dtype=torch.float64), random(1, 3, 2, dtype=torch.float64)]
    plain = penalty_gradients(lambda x: F.adaptive_avg_pool1d(x.transpose(1, 2), 3).transpose(1, 2), *inputs)
    for one, truth in zip(penalty_gradients(lambda x: ops.pool(x, 3, x.dtype), *inputs), plain, strict=True):
        torch.testing.assert_close(one, truth)


def test_operators_keep_torchs_contract():
    """Shapes for tracing, derivatives and no hidden aliasing, by PyTorch's own check of custom operators."""
    v, kernels, x = random(2, 3, 4, 5), random(2, 9, 5), random(2, 12, 5)
    grad = [value.clone().requires_grad_() for value in (v, kernels, x)]
    torch.library.opcheck(ops.depthwise, (grad[0], grad[1]))
    plain = ("test_schema", "test_faketensor")  # these two are the others' gradients, and are traced with them
    torch.library.opcheck(ops.depthwise_kernel_grad, (v, v, 9, False), test_utils=plain)
    torch.library.opcheck(ops.pool, (grad[2], 9, torch.float32))
    torch.library.opcheck(ops.unpool, (random(2, 9, 5), 12, torch.bfloat16), test_utils=plain)
    torch.library.opcheck(ops.route, (grad[1], random(9, 9), random(9), random(5), "gelu_tanh"))


def test_compiles_without_graph_breaks_and_under_checkpointing():
    mixer = ATConv(16, backend="triton").to(DEVICE)
    x = random(2, 20, 16)
    expected = mixer(x, (4, 5))
    expected.sum().backward()
    gradient = mixer.proj.weight.grad.clone()
    mixer.zero_grad()
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    out = torch.utils.checkpoint.checkpoint(compiled, x, (4, 5), use_reentrant=False)
    out.sum().backward()
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(mixer.proj.weight.grad, gradient)


def test_kernels_compile_for_hopper_and_stay_in_registers():
    """To machine code, which needs no GPU: what the interpreter accepts, the compiler may not."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, MACHINE_CODE, "--images", "2", "--channels", "1152"]
    command += ["--grids", "16", "--kernel-sizes", "3", "5"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in result.stdout.splitlines() if "sm_" in line]
    assert {row[0] for row in rows} == {"convolve", "correlate", "average", "spread", "route"}, result.stderr[-2000:]
    assert all(int(row[-2]) == 0 for row in rows), result.stdout  # bytes spilled


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_without_gpu_and_interpreter_the_message_says_so(monkeypatch):
    monkeypatch.setattr(ops, "INTERPRETED", False)  # as it is where Triton was imported without TRITON_INTERPRET=1
    with pytest.raises(ValueError, match="`backend=triton` needs a GPU"):
        ATConv(8, backend="triton")


def test_chosen_on_a_gpu():
    assert functional.fastest_backend(torch.empty(1, device="meta")) == "taps"
    assert functional.fastest_backend(torch.empty(1)) == "channels_last"
    if DEVICE == "cuda":
        assert functional.fastest_backend(torch.empty(1, device="cuda")) == "triton"


@pytest.mark.parametrize("transform", ["jvp", "dual numbers", "grad", "vmap"])
def test_transforms_take_plain_operations(monkeypatch, transform):
    """PyTorch drops the tangents of such operators without a word; an accelerator's own choice is looked at apart."""
    mixer = ATConv(5, backend="triton").double()
    x, towards = torch.randn(2, 1, 12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    on_cuda = SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setattr(functional, "HAS_TRITON", True)
    chosen = []

    def mixed(tokens):
        chosen.append(functional.fastest_backend(on_cuda))
        return mixer(tokens, (3, 4))

    def derivative():
        if transform == "jvp":
            return torch.func.jvp(mixed, (x,), (towards,))[1]
        if transform == "grad":
            return torch.func.grad(lambda tokens: mixed(tokens).sum())(x)
        if transform == "vmap":
            return torch.func.vmap(mixed)(x[None])[0]
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(mixed(forward_ad.make_dual(x, towards))).tangent

    with pytest.raises(ValueError, match="`backend=triton` has no forward-mode derivatives"):
        derivative()
    mixer.backend = None
    found = derivative()
    assert chosen == ["taps"] * 2 and functional.fastest_backend(on_cuda) == "triton"
    if transform in ("jvp", "dual numbers"):
        ahead, behind = (mixer(x + sign * 1e-6 * towards, (3, 4)) for sign in (1, -1))
        torch.testing.assert_close(found, (ahead - behind) / 2e-6, rtol=1e-6, atol=1e-8)
