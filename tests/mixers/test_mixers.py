"""The mixer slot: registry, patterns, entry points; and each mixer against its formula, written as loops."""

from __future__ import annotations

import math
import re
from inspect import signature
from pathlib import Path

import pytest
import torch
from processes import Forked

from sit.mixers import (
    MixerSpec,
    Neighborhood,
    build_mixer,
    known_mixers,
    needs_positional_embedding,
    parse_mixers,
    register_mixer,
    registry,
)
from sit.mixers.forward_mode import plain_operations
from sit.mixers.neighborhood import block_mask, dense_mask, skips_blocks
from sit.model import SiT, create_model
from sit.training.plan import multiply_accumulates
from sit.utils.errors import UserError, with_flags

DOCUMENT = (Path(__file__).parents[2] / "docs" / "mixers.md").read_text()


def test_patterns():
    assert parse_mixers("attention") == [MixerSpec("attention")]
    specs = parse_mixers("attention, atconv:kernel_size=5:inhibition=false")
    assert specs == [MixerSpec("attention"), MixerSpec("atconv", {"kernel_size": 5, "inhibition": False})]
    assert ",".join(map(str, specs)) == "attention,atconv:kernel_size=5:inhibition=false"
    assert needs_positional_embedding(specs) and not needs_positional_embedding(specs[1:])
    wanted = parse_mixers("attention:rope=false,linear_attention,atconv", ("qk_norm", "rope"))
    assert [spec.options for spec in wanted] == [{"rope": False, "qk_norm": True}, {"qk_norm": True}, {}]
    assert parse_mixers("deformable:reach=1e1")[0].options == {"reach": 10.0}  # a number, as in a recipe
    assert parse_mixers("atconv:backend=eager")[0].options == {"backend": "eager"}  # its default, None, tells no type


@pytest.mark.parametrize(
    "pattern, words",
    [
        (
            "mamba",
            "unknown mixer 'mamba'; known mixers: .*atconv, attention, deformable, depthwise, dico, linear",
        ),
        ("attention,", "unknown mixer ''"),
        ("atconv:5", "'5' is not option=value"),
        ("atconv:size=5", "no option 'size'; its options are .*kernel_size"),
        ("dico:expansion=2", "no option 'expansion'; its options are kernel_size"),
        ("atconv:kernel_size=[", r"mixer 'atconv:kernel_size=\[': kernel_size: '\[' is not a YAML scalar"),
        ("atconv:kernel_size=2001-13-01", "'2001-13-01' is not a YAML scalar"),
        ("atconv:backend=[taps]", r"backend: '\[taps\]' is not a YAML scalar"),
        ("atconv:kernel_size=3:kernel_size=5", "kernel_size stands there twice"),
        ("atconv:routing=fals", "mixer 'atconv': routing must be true or false, not 'fals'"),
        ("atconv:routing=1", "routing must be true or false, not 1"),
        ("dico:kernel_size=2.5", "kernel_size must be an integer, not 2.5"),
        ("dico:kernel_size=true", "kernel_size must be an integer, not True"),
        ("linear_attention:feature_map=2", "feature_map must be a word, not 2"),
    ],
)
def test_bad_patterns(pattern, words):
    with pytest.raises(UserError, match=words):
        parse_mixers(pattern)


@pytest.mark.parametrize(
    "pattern, heads, words",
    [
        ("attention", 3, "'attention' with 10 channels and 3 heads"),
        ("neighborhood", 3, "'neighborhood' with 10 .*10 channels can't be divided among 3 heads"),
        ("linear_attention", 3, "10 channels can't be divided among 3 heads"),
        ("linear_attention:heads=-2", 5, "there must be at least 1 head, not -2"),
        ("linear_attention:feature_map=cube", 5, "feature_map must be one of elu, relu, not 'cube'"),
        ("neighborhood:backend=magic", 5, "backend must be one of auto, sdpa, flex, not 'magic'"),
        ("attention:rope=true", 5, "'attention:rope=true' .*rope needs heads of a multiple of 4 channels, not 2"),
        ("neighborhood:kernel_size=4", 5, "kernel_size must be an odd number, not 4"),
        ("depthwise:kernel_size=2", 3, "kernel_size must be an odd number, not 2"),
    ],
)
def test_values_that_a_mixer_refuses_are_named(pattern, heads, words):
    with pytest.raises(UserError, match=words) as caught:
        build_mixer(parse_mixers(pattern)[0], 10, heads)
    assert "--" not in with_flags(str(caught.value))  # an option of a mixer is no flag of a command


def test_the_former_spelling_in_a_configuration_is_read(tmp_path):
    (spec,) = parse_mixers("neighbourhood:kernel_size=5")
    assert spec == MixerSpec("neighborhood", {"kernel_size": 5})
    assert "neighbourhood" not in known_mixers()
    SiT(4, 1, 4, 8, depth=2, num_heads=2, num_classes=3, mixer="attention,neighborhood").save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    assert config.read_text().count("neighborhood") == 1
    config.write_text(config.read_text().replace("neighborhood", "neighbourhood"))
    assert isinstance(SiT.from_pretrained(tmp_path).blocks[1].attn, Neighborhood)


def test_a_neighborhood_larger_than_the_grid_is_refused():
    with pytest.raises(UserError, match="a 5x5 neighborhood does not fit into a 4 x 6 grid"):
        build_mixer(MixerSpec("neighborhood", {"kernel_size": 5}), 8, 2, (4, 6))


def test_registration(monkeypatch):
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))

    @register_mixer("identity")
    class Identity(torch.nn.Identity):
        positional_embedding = False

        def __init__(self, dim, num_heads):
            super().__init__()

        def forward(self, x, grid):
            return x

    assert "identity" in known_mixers()
    assert isinstance(build_mixer(parse_mixers("identity")[0], 8, 2), Identity)
    with pytest.raises(ValueError, match="taken"):
        register_mixer("identity")(type("Other", (Identity,), {}))
    with pytest.raises(TypeError, match="positional_embedding"):
        register_mixer("other")(lambda dim, num_heads: None)
    with pytest.raises(ValueError, match="must be non-empty"):
        register_mixer("a:b")(Identity)


def test_a_cell_that_runs_again_registers_its_mixer_again(monkeypatch):
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))
    cell = """
@register_mixer("mine")
class Mine(torch.nn.Identity):
    positional_embedding = {}
"""
    for needed in (True, False):
        names = {"__name__": "__main__", "register_mixer": register_mixer, "torch": torch}
        exec(cell.format(needed), names)
        assert registry._registry["mine"] is names["Mine"]
        assert needs_positional_embedding(parse_mixers("mine")) is needed
    for other in ("another.module", "__main__"):
        names = {"__name__": other, "register_mixer": register_mixer, "torch": torch}
        with pytest.raises(ValueError, match="taken by .*Mine"):
            exec(cell.format(True).replace("Mine", "Mine" if other != "__main__" else "Yours"), names)


def test_a_package_brings_a_mixer_by_its_entry_point(tmp_path):
    """A distribution that is only on the path is found by name; one that is broken says so."""
    (tmp_path / "stranger.py").write_text(
        "import torch\n"
        "class Shift(torch.nn.Module):\n"
        "    positional_embedding = False\n"
        "    def __init__(self, dim, num_heads, by=1):\n"
        "        super().__init__()\n"
        "        self.by = by\n"
        "    def forward(self, x, grid):\n"
        "        return x.roll(self.by, 1)\n"
    )
    info = tmp_path / "stranger-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[sit.mixers]\nshift = stranger:Shift\nbroken = stranger:Missing\n")
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "from sit.utils.errors import UserError\n"
        "from sit.model import SiT\n"
        "m = SiT(input_size=4, patch_size=1, hidden_size=8, depth=2, num_heads=2, num_classes=2, mixer='shift:by=2')\n"
        "print([b.attn.by for b in m.blocks], m.config.positional_embedding)\n"
        "try:\n"
        "    SiT(mixer='broken')\n"
        "except UserError as error:\n"
        "    print(error)\n"
    )
    said, errors = Forked(program, tmp_path).communicate()
    first, second = said.splitlines() or [errors]
    assert first == "[2, 2] False"
    assert second.startswith("mixer 'broken' of stranger:Missing can't be loaded")


def heads_of(mixer, x, heads, grid):
    """Queries, keys and values of one image x (N, C), each a list of (N, d) by head."""
    width = x.shape[1] // heads
    q, k, v = [part.split(width, dim=1) for part in (x @ mixer.qkv.weight.T + mixer.qkv.bias).chunk(3, dim=1)]
    q, k = ([normed(norm, head) for head in part] for norm, part in ((mixer.q_norm, q), (mixer.k_norm, k)))
    if getattr(mixer, "rope", None) is not None:
        q, k = ([rotated(head, grid) for head in part] for part in (q, k))
    return [q, k, v]


def rotated(x, grid):
    """x (N, d) as complex numbers, a half of them turned by the column, the other by the row."""
    token, quarter = torch.arange(len(x)), x.shape[1] // 4
    omega = torch.tensor([10000.0 ** (-j / quarter) for j in range(quarter)], dtype=torch.float64)
    parts = []
    for half, place in zip(x.chunk(2, dim=1), (token % grid[1], token // grid[1]), strict=True):
        z = torch.complex(*half.chunk(2, dim=1)) * torch.exp(1j * place[:, None] * omega)
        parts += [z.real, z.imag]
    return torch.cat(parts, dim=1)


def normed(norm, x):
    """A LayerNorm of x (N, d), if it is one."""
    if not list(norm.parameters()):
        return x
    away = x - x.mean(1, keepdim=True)
    return away / (away.square().mean(1, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias


def attend(mixer, x, heads, weight, *, grid, epsilon=0.0, beside=0.0):
    """One image x (N, C): each token the mean of the values by weight(query, keys, token), for each head; and what is
    added to it before the last linear layer."""
    mixed = torch.zeros_like(x)
    for head, (q, k, v) in enumerate(zip(*heads_of(mixer, x, heads, grid), strict=True)):
        for token in range(len(x)):
            weights = weight(q[token], k, token)
            mean = (weights[:, None] * v).sum(0) / (weights.sum() + epsilon)
            mixed[token, head * v.shape[1] : (head + 1) * v.shape[1]] = mean
    return (mixed + beside) @ mixer.proj.weight.T + mixer.proj.bias


def attention(mixer, x, grid, heads):
    return attend(mixer, x, heads, lambda q, k, token: torch.exp(k @ q / math.sqrt(len(q))), grid=grid)


def neighborhood(mixer, x, grid, heads):
    """Of all k x k windows inside of the grid a token sees the one whose middle is nearest."""
    height, width = grid
    reach = mixer.kernel_size // 2
    middles = [(row, column) for row in range(reach, height - reach) for column in range(reach, width - reach)]

    def weight(q, k, token):
        y, x = divmod(token, width)
        row, column = min(middles, key=lambda middle: (middle[0] - y) ** 2 + (middle[1] - x) ** 2)
        seen = torch.zeros(len(k), dtype=k.dtype)
        for other in range(len(k)):
            seen[other] = abs(other // width - row) <= reach and abs(other % width - column) <= reach
        assert seen.sum() == mixer.kernel_size**2
        return seen * torch.exp(k @ q / math.sqrt(len(q)))

    return attend(mixer, x, heads, weight, grid=grid)


def linear_attention(mixer, x, grid, heads):
    """The quadratic form, before the sums are exchanged."""

    def features(x):
        return x.clamp(min=0) if mixer.feature_map == "relu" else torch.where(x > 0, x + 1, x.exp())

    beside = 0.0
    if mixer.conv is not None:  # LiT
        channels = x.shape[1]
        beside = convolve(mixer, x @ mixer.qkv.weight[-channels:].T + mixer.qkv.bias[-channels:], grid)
    products = lambda q, k, token: (features(k) * features(q)).sum(1)  # noqa: E731
    return attend(mixer, x, mixer.num_heads, products, grid=grid, epsilon=1e-6, beside=beside)


def deformable(mixer, x, grid, heads):
    """Every token's taps read all values, by how near they are to the tap's place."""
    width = grid[1]
    side, values = mixer.kernel_size, x @ mixer.x_proj.weight.T + mixer.x_proj.bias
    channels, taps = x.shape[1] // heads, side**2
    mixed, places, tap = torch.zeros_like(x), torch.arange(len(x)), torch.arange(taps)
    for token in range(len(x)):
        offsets = (mixer.offsets.weight @ x[token] + mixer.offsets.bias).reshape(heads, taps, 2)
        scales = (mixer.scales.weight @ x[token]).reshape(heads, taps)
        weights = (mixer.weights.weight @ x[token] + mixer.weights.bias).reshape(heads, taps)
        for head in range(heads):
            own = slice(head * channels, (head + 1) * channels)
            far = mixer.reach / (1 + torch.exp(-scales[head] - mixer.scale_prior[head]))
            column = token % width + far * (offsets[head, :, 0] + 2 * (tap % side) / (side - 1) - 1)
            row = token // width + far * (offsets[head, :, 1] + 2 * (tap // side) / (side - 1) - 1)
            near = (1 - (column[:, None] - places % width).abs()).clamp(min=0)
            near = near * (1 - (row[:, None] - places // width).abs()).clamp(min=0)
            mixed[token, own] = weights[head] @ near @ values[:, own]
    return mixed @ mixer.proj.weight.T + mixer.proj.bias


def convolve(mixer, values, grid):
    """Values (N, C) through the depthwise convolution, tap by tap."""
    width = grid[1]
    x = values
    kernel, reach = mixer.conv.weight[:, 0], mixer.conv.weight.shape[-1] // 2
    out = mixer.conv.bias.repeat(len(x), 1)
    for token in range(len(x)):
        for other in range(len(x)):
            dy, dx = other // width - token // width, other % width - token % width
            if abs(dy) <= reach and abs(dx) <= reach:
                out[token] = out[token] + kernel[:, dy + reach, dx + reach] * values[other]
    return out


def depthwise(mixer, x, grid, heads):
    return convolve(mixer, x @ mixer.x_proj.weight.T + mixer.x_proj.bias, grid) @ mixer.proj.weight.T + mixer.proj.bias


def dico(mixer, x, grid, heads):
    z = convolve(mixer, x @ mixer.x_proj.weight.T + mixer.x_proj.bias, grid)
    z = z * (1 + torch.erf(z / math.sqrt(2))) / 2
    logits = mixer.channel_attention.weight @ (z.sum(0) / len(z)) + mixer.channel_attention.bias
    return (z / (1 + torch.exp(-logits))) @ mixer.proj.weight.T + mixer.proj.bias


PATTERNS = {
    "attention": attention,
    "neighborhood": neighborhood,
    "neighborhood:kernel_size=5": neighborhood,
    "linear_attention": linear_attention,
    "linear_attention:feature_map=relu": linear_attention,
    "linear_attention:feature_map=relu:heads=2:conv=5": linear_attention,
    "linear_attention:qk_norm=true": linear_attention,
    "attention:qk_norm=true": attention,
    "neighborhood:qk_norm=true": neighborhood,
    "attention:rope=true": attention,
    "neighborhood:qk_norm=true:rope=true": neighborhood,
    "deformable": deformable,
    "deformable:backend=gather:reach=2.5": deformable,
    "depthwise": depthwise,
    "depthwise:kernel_size=5": depthwise,
    "dico": dico,
    "dico:kernel_size=5": dico,
}
"""built-in mixers and the loops they are compared with"""


def built(pattern, dim=12, heads=3, dtype=torch.float64):
    """A mixer with random weights and biases."""
    torch.manual_seed(0)
    mixer = build_mixer(parse_mixers(pattern)[0], dim, heads).to(dtype)
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return mixer


@pytest.mark.parametrize("grid", [(5, 5), (7, 5), (5, 8)])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_each_is_its_formula_on_each_image(pattern, grid):
    """Values and gradients, for images of a batch taken one by one: none sees another."""
    mixer = built(pattern)
    x = torch.randn(2, grid[0] * grid[1], 12, dtype=torch.float64, requires_grad=True)
    towards = torch.randn_like(x)
    expected = torch.stack([PATTERNS[pattern](mixer, image, grid, 3) for image in x])
    wanted = [x, *mixer.parameters()]
    gradients = torch.autograd.grad((expected * towards).sum(), wanted)
    torch.testing.assert_close(mixer(x, grid), expected)
    torch.testing.assert_close(torch.autograd.grad((mixer(x, grid) * towards).sum(), wanted), gradients)


@pytest.mark.parametrize("pattern", [p for p in PATTERNS if not p.startswith(("attention", "neighborhood"))])
def test_lines_of_tokens_will_do(pattern):
    mixer = built(pattern)
    x = torch.randn(1, 6, 12, dtype=torch.float64)
    for grid in ((1, 6), (6, 1), (2, 3)):
        torch.testing.assert_close(mixer(x, grid)[0], PATTERNS[pattern](mixer, x[0], grid, 3))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_half_precision(pattern):
    """Under autocast and with half-precision weights: near to float32, and of the dtype that is expected."""
    mixer = built(pattern, dtype=torch.float32)
    x = torch.randn(2, 35, 12)
    exact = mixer(x, (5, 7))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = mixer(x, (5, 7))
    half = mixer.bfloat16()(x.bfloat16(), (5, 7))
    for got in (mixed, half):
        assert got.dtype == torch.bfloat16 and (got.float() - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("grid", [(5, 5), (7, 5), (5, 8)])
@pytest.mark.parametrize(
    "pattern",
    [*PATTERNS, "atconv", "atconv:backend=taps", "atconv:routing=false", "atconv:scope=window", "atconv:scope=token"],
)
def test_forward_mode_derivatives_are_central_differences(pattern, grid):
    """By the tokens and every parameter at once, where kernels that have none are set aside; also without gradients."""
    mixer = built(pattern)
    names = list(dict(mixer.named_parameters()))
    point = (
        torch.randn(2, grid[0] * grid[1], 12, dtype=torch.float64),
        *(value.detach() for value in mixer.parameters()),
    )
    towards = tuple(torch.randn_like(value) for value in point)

    def call(x, *parameters):
        return torch.func.functional_call(mixer, dict(zip(names, parameters, strict=True)), (x, grid))

    def moved(step):
        return call(*(value + step * direction for value, direction in zip(point, towards, strict=True)))

    with plain_operations(mixer, torch.device("cpu")):
        value, derivative = torch.func.jvp(call, point, towards)
        with torch.no_grad():
            torch.testing.assert_close(torch.func.jvp(call, point, towards)[1], derivative)
    with torch.no_grad():
        expected = (moved(1e-6) - moved(-1e-6)) / 2e-6
        torch.testing.assert_close(value, moved(0))
    assert (derivative - expected).norm() < 1e-6 * expected.norm()


@pytest.mark.parametrize("backend", ["grid_sample", "gather"])
def test_deformable_of_what_is_not_finite_is_not_finite(backend):
    """A step that diverges is told and skipped; an index that is no number would end the program."""
    mixer = build_mixer(parse_mixers(f"deformable:backend={backend}")[0], 12, 3)
    x = torch.randn(2, 20, 12)
    x[0, 3, 1] = float("nan")
    for grid in ((4, 5), (5, 4)):  # over an odd width the index of a place that is none overflows to 0
        assert mixer(x, grid).isnan().any(2)[0, 3]


def test_deformable_begins_as_published():
    """Every token's taps on the regular grid, near for the first group and at the whole reach for the last."""
    torch.manual_seed(0)
    mixer = build_mixer(parse_mixers("deformable")[0], 12, 3).double()
    places, weights = mixer._places(torch.randn(2, 35, 12, dtype=torch.float64), (5, 7))
    here = torch.tensor([[token % 7, token // 7] for token in range(35)])
    taps = torch.tensor([[column, row] for row in (-1, 0, 1) for column in (-1, 0, 1)])
    for group, share in enumerate((1 / 3, 2 / 3, 1)):
        expected = (here[:, None] + 6 * (share - 1e-4) * taps).expand(2, -1, -1, -1)
        torch.testing.assert_close(places[:, group], expected.double(), rtol=1e-5, atol=1e-4)
    assert weights.std(dim=(0, 2)).max() == 0 and 0 < weights.abs().max() <= 12**-0.5


def test_linear_attention_does_not_divide_by_zero():
    """A query without features (all ReLUs closed) answers with zeros and finite gradients."""
    mixer = built("linear_attention:feature_map=relu")
    with torch.no_grad():
        mixer.qkv.bias[:12] = -1e3
    x = torch.randn(1, 6, 12, dtype=torch.float64, requires_grad=True)
    out = mixer(x, (2, 3))
    out.sum().backward()
    torch.testing.assert_close(out, mixer.proj.bias.expand(1, 6, 12))
    assert x.grad.isfinite().all()


def test_the_whole_grid_as_neighborhood_is_attention():
    local, whole = built("neighborhood:kernel_size=5"), built("attention")
    local.load_state_dict(whole.state_dict())
    x = torch.randn(2, 25, 12, dtype=torch.float64)
    torch.testing.assert_close(local(x, (5, 5)), whole(x, (5, 5)))


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_attention_agrees(monkeypatch):
    """PyTorch's flex_attention, here not compiled and without gradients, as it has none on CPU."""
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr("sit.mixers.neighborhood._compiled_flex_attention", lambda: flex_attention)
    mixer, forced = built("neighborhood:backend=sdpa"), built("neighborhood:backend=flex")
    x = torch.randn(2, 17 * 11, 12, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(forced(x, (17, 11)), mixer(x, (17, 11)))
    with pytest.raises(UserError, match="can't be trained on CPU"):
        forced(x, (17, 11))


@pytest.mark.parametrize("grid, kernel_size", [((16, 16), 7), ((8, 32), 3), ((32, 32), 7), ((32, 8), 15), ((64, 8), 3)])
def test_flex_attention_is_taken_where_it_skips_blocks(grid, kernel_size):
    assert skips_blocks(grid, kernel_size) == (block_mask(grid, kernel_size, torch.device("cpu")).sparsity() > 0)


def test_a_mask_made_for_inference_may_be_trained_with():
    """Autograd refuses to keep tensors that inference mode made, and masks are kept between calls."""
    grid, cpu = (5, 9), torch.device("cpu")  # which no other test has
    with torch.inference_mode():
        built("neighborhood")(torch.randn(1, 45, 12, dtype=torch.float64), grid)
        block_mask(grid, 3, cpu)
    assert dense_mask(grid, 3, cpu) is dense_mask(grid, 3, cpu) and not dense_mask(grid, 3, cpu).is_inference()
    assert block_mask(grid, 3, cpu) is block_mask(grid, 3, cpu)
    assert not block_mask(grid, 3, cpu).kv_indices.is_inference()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="flex_attention is compiled for CUDA alone here")
@pytest.mark.parametrize("head", [16, 72])
def test_flex_attention_on_cuda(head):
    """Values and gradients on a grid of which blocks are skipped."""
    grid, results = (32, 32), []
    for backend in ("sdpa", "auto"):
        mixer = built(f"neighborhood:kernel_size=7:backend={backend}", 2 * head, 2, torch.float32).cuda()
        torch.manual_seed(1)
        x = torch.randn(2, 1024, 2 * head, device="cuda", requires_grad=True)
        out = mixer(x, grid)
        results.append((out, *torch.autograd.grad(out.square().sum(), [x, *mixer.parameters()])))
    for got, expected in zip(*reversed(results), strict=True):
        assert (got - expected).norm() < 1e-2 * expected.norm()


@pytest.mark.parametrize(
    "pattern, positional",
    [
        ("neighborhood", True),
        ("linear_attention", True),
        ("linear_attention:feature_map=relu:heads=1:conv=3:qk_norm=true", True),
        ("deformable,atconv:scope=token", False),
        ("depthwise", False),
        ("dico", False),
        ("dico,depthwise:kernel_size=5", False),
        ("atconv,linear_attention:feature_map=relu,neighborhood,dico", True),
    ],
)
def test_networks_of_it_train_and_take_another_grid(pattern, positional):
    torch.manual_seed(0)
    network = SiT((8, 6), 2, 4, 16, depth=4, num_heads=2, num_classes=3, mixer=pattern)
    assert network.config.positional_embedding is positional
    for parameter in network.parameters():  # adaLN begins with gates at zero, behind which no mixer learns
        torch.nn.init.normal_(parameter, std=0.1)
    before = {name: parameter.clone() for name, parameter in network.named_parameters()}
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    x, t, y = torch.randn(3, 4, 8, 6), torch.rand(3), torch.tensor([0, 1, 3])
    losses = []
    for _ in range(3):
        loss = (network(x, t, y) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
    still = [
        name for name, parameter in network.named_parameters() if ".attn." in name and before[name].equal(parameter)
    ]
    assert not still
    assert network(torch.randn(1, 4, 10, 14), t[:1], y[:1]).shape == (1, 4, 10, 14)


def rows(heading: str) -> dict[str, list[str]]:
    """The table of docs/mixers.md whose header starts with ``heading``: first column to the others."""
    table = DOCUMENT.split(f"\n| {heading} |")[1].split("\n\n")[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    return {line[0].strip("`"): line[1:] for line in lines}


def evaluate(formula: str, **values: int) -> int:
    """A formula as documents write it, e.g. 2NC² + k²C(d + 1)."""
    product = re.sub(r"(?<=[\w²⁴)])(?=[A-Za-z(])", "*", formula)
    return eval(product.replace("²", "**2").replace("⁴", "**4"), values)


def test_the_documents_list_of_mixers():
    listed = rows("name")
    ours = {name for name, factory in registry._registry.items() if factory.__module__.startswith("sit.")}
    assert set(listed) == ours | {"atconv"}
    for name, cells in listed.items():
        options = list(signature(registry._factory(name)).parameters)[2:]
        assert re.findall(r"`(\w+)`", cells[-1]) == options, name


@pytest.mark.parametrize("pattern", rows("pattern"))
def test_the_documents_numbers(pattern):
    """Two blocks and four are built and 28 counted on from them, as it is the same for each further pair.

    A block is the mixer's layer, the MLP's 8NC² and adaLN's 6C².
    """
    parameters, *counts, layer, positional = rows("pattern")[pattern]
    with torch.device("meta"):
        two, four = (create_model("SiT-XL/2", mixer=pattern, depth=depth) for depth in (2, 4))

    of_two, of_four = (sum(p.numel() for p in network.parameters()) for network in (two, four))
    assert f"{of_two + 13 * (of_four - of_two):,}" == parameters
    for side, told in zip((32, 64, 128), counts, strict=True):
        of_two, of_four = (multiply_accumulates(network, (4, side, side)) for network in (two, four))
        assert f"{(of_two + 13 * (of_four - of_two)) / 1e9:.2f}" == told
        if layer:
            n, c = (side // 2) ** 2, 1152
            taps = parse_mixers(pattern)[0].options.get("kernel_size", 3)
            per_block = (of_four - of_two) / 2
            assert per_block - 8 * n * c**2 - 6 * c**2 == evaluate(layer, N=n, C=c, k=taps, d=c // 16)
    assert positional == ("yes" if two.config.positional_embedding else "no")
