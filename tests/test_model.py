"""SiT: key names, parameter counts and initial values of the published networks; the forward pass."""

from __future__ import annotations

import json

import pytest
import torch
from accelerate import cpu_offload
from diffusers.utils import is_peft_available
from torch import nn

from sit.mixers import known_mixers, register_mixer, registry
from sit.model import MODELS, SiT, create_model, sincos_table
from sit.utils.errors import UserError

# size: attention with the table, without it, ATConv (published, 8 output channels, 1000 classes and the null class)
COUNTS = {
    "SiT-S/2": (32_963_360, 32_865_056, 31_096_664),
    "SiT-B/2": (130_512_416, 130_315_808, 123_239_000),
    "SiT-L/2": (458_102_816, 457_840_672, 432_677_008),
    "SiT-XL/2": (675_129_632, 674_834_720, 637_678_328),
}


MIXERS = [name for name in known_mixers() if name != "shift"]
"""those of the package, and not an example's"""


def on_meta(name: str, **options) -> SiT:
    with torch.device("meta"):
        return create_model(name, **options)


def numel(tensors) -> int:
    return sum(t.numel() for t in tensors)


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_are_the_published_ones(name):
    with_table, without_table, atconv = COUNTS[name]
    attention = on_meta(name, mixer="attention")
    assert numel(attention.state_dict().values()) == with_table
    assert numel(attention.parameters()) == without_table
    assert numel(on_meta(name, mixer="atconv").state_dict().values()) == atconv


def test_hybrid_count_and_order():
    hybrid = on_meta("SiT-XL/2", mixer="attention,atconv")
    assert numel(hybrid.state_dict().values()) == 656_551_436
    assert numel(hybrid.parameters()) == 656_256_524
    kinds = [type(block.attn).__name__ for block in hybrid.blocks]
    assert kinds == ["Attention", "ATConv"] * 14


def published_keys(depth: int, mixer_keys: list[str], table: bool) -> set[str]:
    both = lambda *names: {f"{name}.{kind}" for name in names for kind in ("weight", "bias")}  # noqa: E731
    keys = both("x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2", "final_layer.linear")
    keys |= both("final_layer.adaLN_modulation.1") | {"y_embedder.embedding_table.weight"}
    for i in range(depth):
        keys |= both(f"blocks.{i}.mlp.fc1", f"blocks.{i}.mlp.fc2", f"blocks.{i}.adaLN_modulation.1")
        keys |= {f"blocks.{i}.attn.{key}" for key in mixer_keys}
    return keys | ({"pos_embed"} if table else set())


def test_keys_and_shapes_are_the_published_ones():
    attention = on_meta("SiT-XL/2", mixer="attention").state_dict()
    names = ["qkv.weight", "qkv.bias", "proj.weight", "proj.bias"]
    assert set(attention) == published_keys(28, names, table=True)
    assert attention["x_embedder.proj.weight"].shape == (1152, 4, 2, 2)
    assert attention["pos_embed"].shape == (1, 256, 1152)
    assert attention["y_embedder.embedding_table.weight"].shape == (1001, 1152)
    assert attention["final_layer.linear.weight"].shape == (2 * 2 * 8, 1152)

    atconv = on_meta("SiT-XL/2", mixer="atconv").state_dict()
    linear = ["kernel_proj", "kernel_gen", "x_proj", "proj"]
    names = [f"{name}.{kind}" for name in linear for kind in ("weight", "bias")] + ["difference_control"]
    assert set(atconv) == published_keys(28, names, table=False)
    assert atconv["blocks.0.attn.kernel_gen.weight"].shape == (9, 9)
    assert atconv["blocks.0.attn.difference_control"].shape == (1152,)


def is_xavier(weight: torch.Tensor) -> bool:
    """Whether a matrix looks uniform over ±√(6 / (in + out))."""
    bound = (6 / sum(weight.shape)) ** 0.5
    reaches = bound * (1 - 20 / weight.numel()) < weight.abs().max() <= bound
    return bool(reaches) and abs(weight.std().item() * 3**0.5 / bound - 1) < 0.15


def test_initial_values_are_the_published_ones():
    model = small(mixer="attention,atconv,depthwise,dico,linear_attention,neighborhood", depth=6)
    zero = [block.adaLN_modulation[1] for block in model.blocks]
    zero += [model.final_layer.adaLN_modulation[1], model.final_layer.linear]
    normal = [model.y_embedder.embedding_table, model.t_embedder.mlp[0], model.t_embedder.mlp[2]]
    for layer in zero:
        assert not layer.weight.any()
    for layer in normal:
        assert abs(layer.weight.std() - 0.02) < 0.003
    assert is_xavier(model.x_embedder.proj.weight.flatten(1))
    others = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m not in zero + normal]
    assert len(others) == 6 * 2 + 2 + 4 + 2 + 3 + 2 + 2  # the MLPs, and each mixer's
    assert all(is_xavier(layer.weight) for layer in others)
    convolutions = ("conv.bias",)  # which the mixers leave as PyTorch has them
    assert all(not p.any() for n, p in model.named_parameters() if n.endswith("bias") and not n.endswith(convolutions))


PATTERNS = ["attention", "atconv", "attention,atconv", "depthwise"]


def around_mixers(model: SiT) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.named_parameters() if ".attn." not in name}


def same(ones: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    return ones.keys() == others.keys() and all(torch.equal(value, others[name]) for name, value in ones.items())


@pytest.mark.parametrize("told", [True, False])
def test_networks_that_differ_in_the_mixer_alone_begin_alike_elsewhere(told):
    """To the bit and in whatever order they are made; by a seed of theirs, or by torch's."""

    def make(mixer: str) -> SiT:
        torch.manual_seed(4)
        return small(mixer=mixer, seed=3) if told else SiT(8, 2, 4, 32, 2, 2, mixer=mixer)

    forwards = {mixer: make(mixer) for mixer in PATTERNS}
    backwards = {mixer: make(mixer) for mixer in reversed(PATTERNS)}
    for mixer in PATTERNS:
        assert same(forwards[mixer].state_dict(), backwards[mixer].state_dict())
        assert same(around_mixers(forwards[mixer]), around_mixers(forwards["attention"]))
    hybrid = forwards["attention,atconv"].blocks
    for number, mixer in enumerate(["attention", "atconv"]):
        assert same(hybrid[number].attn.state_dict(), forwards[mixer].blocks[number].attn.state_dict())


def test_initial_values_differ_by_seed_and_by_name():
    one, other = (around_mixers(small(seed=seed)) for seed in (1, 2))
    drawn = [name for name, value in one.items() if value.any()]
    assert len(drawn) == 4 + 2 * 2
    assert not any(torch.equal(one[name], other[name]) for name in drawn)
    model = small(mixer="depthwise", seed=1)
    first, second = model.blocks
    assert not torch.equal(first.mlp.fc1.weight, second.mlp.fc1.weight)
    for name, value in first.attn.named_parameters():
        assert not value.any() or not torch.equal(value, second.attn.get_parameter(name))
    assert not torch.equal(first.attn.conv.weight, small(mixer="depthwise", seed=2).blocks[0].attn.conv.weight)


def test_a_network_takes_one_draw_from_torchs_generator_and_none_with_a_seed():
    torch.manual_seed(7)
    torch.empty((), dtype=torch.int64).random_()
    after_one = torch.rand(3)
    torch.manual_seed(7)
    SiT(8, 2, 4, 32, 2, 2, mixer="depthwise")
    assert torch.equal(torch.rand(3), after_one)
    before = torch.get_rng_state()
    create_model("SiT-XS/2", seed=1, mixer="atconv", depth=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_initial_values_can_be_given_anew():
    model = awake(small(mixer="attention,depthwise", seed=1))
    model.initialize_weights(2)
    assert same(model.state_dict(), small(mixer="attention,depthwise", seed=2).state_dict())


class Scaled(nn.Linear):
    """A mixer with a buffer that its state_dict leaves out."""

    positional_embedding = True

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__(dim, dim)
        self.register_buffer("scale", torch.arange(1.0, dim + 1) / dim, persistent=False)

    def forward(self, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        return super().forward(x) * self.scale


@pytest.mark.parametrize("mixer", [*MIXERS, "scaled"])
@pytest.mark.parametrize("block", ["published", "modern"])
def test_a_network_of_the_meta_device_becomes_whole(mixer, block, monkeypatch):
    """Parameters and buffers, whatever the memory held before."""
    monkeypatch.setitem(registry._registry, "scaled", Scaled)
    options = dict(mixer=mixer, block=block, average_velocity=True, positional_grid=(8, 8), seed=0)
    direct = small(**options)
    with torch.device("meta"):
        model = small(**options)
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(7.0)
    model.initialize_weights(0)
    assert same(model.state_dict(), direct.state_dict())
    assert same(dict(model.named_buffers()), dict(direct.named_buffers()))
    inputs = torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([0, 5])
    assert torch.equal(awake(model).eval()(*inputs), awake(direct).eval()(*inputs))


def test_the_seed_of_a_named_model():
    options = dict(depth=1, input_size=8, mixer="atconv")
    one, same_one, other = (create_model("SiT-XS/2", seed=seed, **options) for seed in (1, 1, 2))
    assert same(one.state_dict(), same_one.state_dict()) and not same(one.state_dict(), other.state_dict())
    assert "seed" not in one.config


def test_a_mixers_initial_values_are_its_own(monkeypatch):
    """A layer that a mixer sets to zero stays zero, and what it draws from torch's generator is keyed."""
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))

    @register_mixer("quiet")
    class Quiet(torch.nn.Module):
        positional_embedding = False

        def __init__(self, dim, num_heads):
            super().__init__()
            self.proj = torch.nn.Linear(dim, dim)
            torch.nn.init.zeros_(self.proj.weight)
            torch.nn.init.ones_(self.proj.bias)
            self.scale = torch.nn.Parameter(torch.randn(dim))

        def forward(self, x, grid):
            return self.proj(x) * self.scale

    one, other = small(mixer="quiet", seed=1), small(mixer="attention,quiet", seed=1)
    for block in (*one.blocks, other.blocks[1]):
        assert not block.attn.proj.weight.any() and bool((block.attn.proj.bias == 1).all())
    assert torch.equal(one.blocks[1].attn.scale, other.blocks[1].attn.scale)
    assert not torch.equal(one.blocks[0].attn.scale, one.blocks[1].attn.scale)


@pytest.mark.parametrize("dropout, has", [(0.1, True), (0.5, True), (0.0, False), (0, False)])
def test_the_configuration_of_an_earlier_version(dropout, has, tmp_path):
    """It had class_dropout, a probability that only training uses."""
    model = awake(small(null_class=has))
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    assert config.pop("null_class") is has
    path.write_text(json.dumps(config | {"class_dropout": dropout}))
    read = [SiT.from_pretrained(tmp_path), SiT.from_config(SiT.load_config(tmp_path))]
    for network in read:
        assert network.config.null_class is has and "class_dropout" not in network.config
        assert len(network.y_embedder.embedding_table.weight) == 5 + has
    assert same(model.state_dict(), read[0].state_dict())


def small(**options) -> SiT:
    torch.manual_seed(0)
    return SiT(**dict(input_size=8, patch_size=2, hidden_size=32, depth=2, num_heads=2, num_classes=5) | options)


def awake(model: SiT) -> SiT:
    """Replace the zero initial values, which make the fresh network's output zero."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.1)
    return model


def test_positional_table_against_a_scalar_formula():
    table = sincos_table(16, torch.arange(3), torch.arange(5))[0]
    for row in range(3):
        for column in range(5):
            for channel in range(16):
                coordinate = column if channel < 8 else row
                angle = torch.tensor(coordinate * 10000 ** (-(channel % 4) / 4), dtype=torch.float64)
                value = angle.sin() if channel % 8 < 4 else angle.cos()
                assert table[row * 5 + column, channel] == pytest.approx(float(value), abs=1e-7)


@pytest.mark.parametrize("mixer", ["attention", "atconv", "attention,atconv"])
def test_forward_matches_a_step_by_step_evaluation(mixer):
    """A float64 evaluation written out from the paper's formulas, mixers aside."""
    model = awake(small(mixer=mixer)).double()
    x, t, y = torch.randn(3, 4, 8, 8).double(), torch.rand(3).double(), torch.tensor([0, 5, 3])
    with torch.no_grad():
        out = model(x, t, y)
        w = model.x_embedder.proj.weight
        tokens = torch.stack(
            [
                torch.einsum("ocij,bcij->bo", w, x[:, :, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2])
                for r in range(4)
                for c in range(4)
            ],
            dim=1,
        )
        tokens = tokens + model.x_embedder.proj.bias
        if "attention" in mixer:
            tokens = tokens + model.pos_embed.double()
        omega = 10000.0 ** (-torch.arange(128).float() / 128)
        angles = t.float()[:, None] * omega
        condition = model.t_embedder.mlp(torch.cat([angles.cos(), angles.sin()], 1).double())
        condition = condition + model.y_embedder.embedding_table.weight[y]
        silu = condition * torch.sigmoid(condition)
        norm = lambda z: (z - z.mean(-1, keepdim=True)) / (z.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()  # noqa: E731
        for block in model.blocks:
            m = silu @ block.adaLN_modulation[1].weight.T + block.adaLN_modulation[1].bias
            s1, c1, g1, s2, c2, g2 = (m[:, None, i * 32 : (i + 1) * 32] for i in range(6))
            tokens = tokens + g1 * block.attn(norm(tokens) * (1 + c1) + s1, (4, 4))
            hidden = (norm(tokens) * (1 + c2) + s2) @ block.mlp.fc1.weight.T + block.mlp.fc1.bias
            hidden = 0.5 * hidden * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (hidden + 0.044715 * hidden**3)))
            tokens = tokens + g2 * (hidden @ block.mlp.fc2.weight.T + block.mlp.fc2.bias)
        m = silu @ model.final_layer.adaLN_modulation[1].weight.T + model.final_layer.adaLN_modulation[1].bias
        patches = (norm(tokens) * (1 + m[:, None, 32:]) + m[:, None, :32]) @ model.final_layer.linear.weight.T
        patches = (patches + model.final_layer.linear.bias).reshape(3, 4, 4, 2, 2, 8)
        expected = torch.empty(3, 8, 8, 8).double()
        for r in range(4):
            for c in range(4):
                expected[:, :, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2] = patches[:, r, c].permute(0, 3, 1, 2)
    torch.testing.assert_close(out, expected[:, :4], atol=1e-6, rtol=1e-6)


def test_rectangular_latents():
    model = awake(small(mixer="atconv", input_size=(8, 12)))
    out = model(torch.randn(2, 4, 8, 12), torch.rand(2), torch.zeros(2, dtype=torch.long))
    assert out.shape == (2, 4, 8, 12)
    assert model.config.input_size == (8, 12) or model.config.input_size == [8, 12]


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = awake(small(mixer="attention,atconv"))
        if checkpointing:
            model.enable_gradient_checkpointing()
        torch.manual_seed(2)
        out = model(torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([1, 2]))
        out.square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_save_and_load(tmp_path):
    model = awake(small(mixer="attention,atconv:inhibition=false"))
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    loaded = SiT.from_pretrained(tmp_path)
    assert loaded.config.mixer == "attention,atconv:inhibition=false"
    for (name, a), (_, b) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_mistakes_are_named():
    with pytest.raises(UserError, match="SiT-H/14"):
        create_model("SiT-H/14")
    with pytest.raises(UserError, match="9x9"):
        small(input_size=9)
    with pytest.raises(UserError, match="unknown mixer 'mamba'; known mixers: atconv, attention"):
        small(mixer="mamba")
    with pytest.raises(UserError, match="no option 'heads'"):
        small(mixer="atconv:heads=3")
    with pytest.raises(UserError, match="kernel"):
        small(mixer="atconv:kernel_size=4")
    with pytest.raises(UserError, match="mixer 'atconv' .* 4 tokens of a 2 x 2 grid"):
        small(mixer="atconv", input_size=4)
    with pytest.raises(UserError, match="`cfg_scale=1`"):
        _ = small(null_class=False).null_label


def test_the_table_of_models_is_complete():
    assert {"SiT-S/2", "SiT-B/4", "SiT-L/8", "SiT-XL/2"} <= set(MODELS)


def test_reversed_time_is_hidden_by_the_network():
    """A network trained on s = 1 − t to give dx/ds, asked for dx/dt at t, answers with −(its output at 1 − t)."""
    plain, reverse = awake(small()), awake(small(time_reversed=True))
    x, t, y = torch.randn(3, 4, 8, 8), torch.tensor([0.0, 0.25, 1.0]), torch.tensor([0, 5, 3])
    with torch.no_grad():
        torch.testing.assert_close(reverse(x, t, y), -plain(x, 1 - t, y), rtol=0, atol=0)
        assert not torch.allclose(reverse(x, t, y), -plain(x, t, y), atol=1e-3)


def test_times_in_half_precision_are_taken_as_they_are():
    """1 − t in bfloat16 would be another time."""
    reverse = awake(small(time_reversed=True))
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([0.01, 0.3]).bfloat16(), torch.tensor([0, 5])
    with torch.no_grad():
        torch.testing.assert_close(reverse(x, t, y), reverse(x, t.float(), y), rtol=0, atol=0)
        assert not torch.equal(reverse(x, t.float(), y), reverse(x, 1 - (1 - t).float(), y))


@pytest.mark.parametrize("grid", [(8, 8), (4, 8), (6, 2), (2, 2), (3, 5)])
def test_positional_table_on_another_grid(grid):
    """Each token has the sines and cosines of its center in the trained grid, written out one by one."""
    model = small(hidden_size=16, input_size=8)  # trained grid 4x4
    table = model.positional_table(grid)
    assert table.shape == (1, grid[0] * grid[1], 16)
    for row in range(grid[0]):
        for column in range(grid[1]):
            for channel in range(16):
                place, size = (column, grid[1]) if channel < 8 else (row, grid[0])
                coordinate = (place + 0.5) / size * 4 - 0.5
                angle = torch.tensor(coordinate * 10000 ** (-(channel % 4) / 4), dtype=torch.float64)
                value = angle.sin() if channel % 8 < 4 else angle.cos()
                assert table[0, row * grid[1] + column, channel] == pytest.approx(float(value), abs=1e-6)


def test_positional_table_on_the_trained_grid_is_the_stored_one():
    model = small()
    model.pos_embed.fill_(3.0)
    assert torch.equal(model.positional_table((4, 4)), model.pos_embed)


@pytest.mark.parametrize("mixer", ["attention", "atconv", "attention,atconv"])
@pytest.mark.parametrize("latent", [(16, 16), (8, 24), (12, 6)])
def test_other_grids_than_the_trained_one(mixer, latent):
    model = awake(small(mixer=mixer))
    x = torch.randn(2, 4, *latent)
    with torch.no_grad():
        out = model(x, torch.rand(2), torch.tensor([1, 2]))
    assert out.shape == x.shape and out.isfinite().all()


def test_stretching_a_grid_by_two_keeps_what_the_network_sees():
    """On constant inputs, attention without positions is blind to the number of tokens; with the stretched table the
    mean output moves little, while a table that went on beyond the trained grid would move it more."""
    model = awake(small(mixer="attention", hidden_size=64))
    t, y = torch.full((1,), 0.4), torch.zeros(1, dtype=torch.long)
    with torch.no_grad():
        trained = model(torch.ones(1, 4, 8, 8), t, y).mean((0, 2, 3))
        stretched = model(torch.ones(1, 4, 16, 16), t, y).mean((0, 2, 3))
        model.positional_table = lambda grid: sincos_table(64, torch.arange(8), torch.arange(8))
        continued = model(torch.ones(1, 4, 16, 16), t, y).mean((0, 2, 3))
    assert (stretched - trained).norm() < 0.3 * (continued - trained).norm()


def step_by_step(model: SiT, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The forward pass of a network with a table on its trained grid, the residual stream float32 at each sum."""
    stream = model.x_embedder(x).float() + model.pos_embed.float()
    c = model.t_embedder(t) + model.y_embedder(y)
    modulated = lambda norm, shift, scale: norm(stream) * (1 + scale[:, None]) + shift[:, None]  # noqa: E731
    for block in model.blocks:
        shift1, scale1, gate1, shift2, scale2, gate2 = block.adaLN_modulation(c).chunk(6, dim=1)
        branch = block.attn(modulated(block.norm1, shift1, scale1), model.grid)
        stream = stream + (gate1[:, None] * branch).float()
        branch = block.mlp(modulated(block.norm2, shift2, scale2))
        stream = stream + (gate2[:, None] * branch).float()
    shift, scale = model.final_layer.adaLN_modulation(c).chunk(2, dim=1)
    out = model.final_layer.linear(modulated(model.final_layer.norm_final, shift, scale))
    out = out.unflatten(1, model.grid).unflatten(3, (2, 2, 8)).permute(0, 5, 1, 3, 2, 4)
    return out.reshape(len(x), 8, *x.shape[2:])[:, :4]


def test_autocast_costs_no_more_than_its_products():
    """The stream of 28 blocks stays in float32, so the error is that of the products in bfloat16."""
    model = awake(small(mixer="attention", hidden_size=64, num_heads=4, depth=28))
    x, t, y = torch.randn(4, 4, 8, 8), torch.rand(4), torch.tensor([0, 5, 3, 1])
    with torch.no_grad():
        exact = model(x, t, y)
        torch.testing.assert_close(step_by_step(model, x, t, y), exact, rtol=1e-3, atol=1e-4)
        with torch.autocast("cpu", torch.bfloat16):
            ours, wide = (out.float() for out in (model(x, t, y), step_by_step(model, x, t, y)))
    assert (ours - exact).norm() <= 1.05 * (wide - exact).norm()


@pytest.mark.parametrize("latent", [(8, 8), (16, 12)])
@pytest.mark.parametrize("mixer", MIXERS)
def test_dtypes_of_the_residual_stream(mixer, latent):
    """float32 under autocast, whether or not there is a table; the weights' own without it, on any grid."""
    model, streams = awake(small(mixer=mixer)), []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: streams.extend([inputs[0].dtype, output.dtype]))
    x, t, y = torch.randn(2, 4, *latent), torch.rand(2), torch.tensor([0, 5])
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            model(x, t, y)
        assert streams == [torch.float32] * 4
        for dtype in (torch.bfloat16, torch.float64):
            streams.clear()
            model = model.to(dtype)
            assert model(x.to(dtype), t, y).dtype == dtype
            assert streams == [dtype] * 4


def tiny(mixer: str, **options) -> SiT:
    sizes = dict(input_size=8, in_channels=4, hidden_size=32, depth=2, num_heads=2, num_classes=5)
    network = SiT(**sizes | options, mixer=mixer, seed=0).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    return network


@torch.no_grad()
def test_diffusers_words_give_the_same_prediction():
    """DiTTransformer2DModel's names of the arguments, its output class, and its tuple."""
    network, x, y = tiny("attention"), torch.randn(2, 4, 8, 8), torch.tensor([1, 5])
    expected = network(x, torch.tensor([0.3, 0.3]), y)
    words = dict(hidden_states=x, timestep=torch.tensor([0.3, 0.3]), class_labels=y)
    assert torch.equal(network(**words).sample, expected) and torch.equal(network(**words)[0], expected)
    assert torch.equal(network(**words | {"timestep": 0.3}).sample, expected)
    as_tuple = network(**words, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], expected)
    assert torch.equal(network(x, words["timestep"], y, return_dict=True).sample, expected)
    for incomplete in (dict(hidden_states=x, timestep=0.3), dict(x=x, y=y), {}):
        with pytest.raises(TypeError, match="needs x, t and y"):
            network(**incomplete)


@torch.no_grad()
@pytest.mark.parametrize(
    "mixer", [*known_mixers(), "atconv:scope=window", "atconv:scope=token", "linear_attention:qk_norm=true"]
)
def test_offloaded_and_narrowly_stored_weights(mixer):
    """Accelerate's offloading of each layer, and diffusers' storage in eight bits, which is the weights rounded so."""
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([0.2, 0.7]), torch.tensor([1, 5])
    network, expected = tiny(mixer), tiny(mixer)(x, t, y)
    cpu_offload(network, torch.device("cpu"))
    assert network.blocks[0].mlp.fc1.weight.is_meta
    assert torch.equal(network(x, t, y), expected)

    network, rounded = tiny(mixer), tiny(mixer)
    network.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert network.blocks[0].mlp.fc1.weight.dtype == torch.float8_e4m3fn
    for name, module in rounded.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding) and not name.startswith("t_embedder"):
            for parameter in module.parameters():
                parameter.copy_(parameter.to(torch.float8_e4m3fn).float())
    torch.testing.assert_close(network(x, t, y), rounded(x, t, y))


def test_lora_adapters(tmp_path):
    """An adapter changes nothing before it is trained; trained, saved and read it gives the same elsewhere."""
    if not is_peft_available():
        with pytest.raises(ModuleNotFoundError, match="peft"):
            tiny("attention").load_lora_adapter({})
        pytest.skip("PEFT is not installed")
    from peft import LoraConfig

    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([0.2, 0.7]), torch.tensor([1, 5])
    network, plain = tiny("attention"), tiny("attention")
    network.add_adapter(LoraConfig(r=2, target_modules=["qkv", "proj"]))
    torch.testing.assert_close(network(x, t, y), plain(x, t, y))
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    network.save_lora_adapter(tmp_path)
    assert not torch.allclose(network(x, t, y), plain(x, t, y))
    plain.load_lora_adapter(tmp_path, prefix=None)
    torch.testing.assert_close(network(x, t, y), plain(x, t, y))
