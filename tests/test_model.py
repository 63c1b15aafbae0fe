"""SiT: key names, parameter counts and initial values of the published networks; the forward pass."""

from __future__ import annotations

import pytest
import torch

from sit.model import MODELS, SiT, create_model, sincos_table
from sit.utils.errors import UserError

# size: attention with the table, without it, ATConv (published, 8 output channels, 1000 classes and the null class)
COUNTS = {
    "SiT-S/2": (32_963_360, 32_865_056, 31_096_664),
    "SiT-B/2": (130_512_416, 130_315_808, 123_239_000),
    "SiT-L/2": (458_102_816, 457_840_672, 432_677_008),
    "SiT-XL/2": (675_129_632, 674_834_720, 637_678_328),
}


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


def test_initial_values():
    model = small(mixer="attention,atconv")
    for block in model.blocks:
        assert not block.adaLN_modulation[1].weight.any()
    assert not model.final_layer.linear.weight.any()
    weight = model.blocks[0].mlp.fc1.weight
    bound = (6 / sum(weight.shape)) ** 0.5
    assert weight.abs().max() <= bound and weight.abs().max() > 0.95 * bound
    assert abs(model.y_embedder.embedding_table.weight.std() - 0.02) < 0.003
    assert all(not p.any() for n, p in model.named_parameters() if n.endswith("bias"))


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
    with pytest.raises(UserError, match="--cfg-scale"):
        _ = small(class_dropout=0.0).null_class


def test_the_table_of_models_is_complete():
    assert {"SiT-S/2", "SiT-B/4", "SiT-L/8", "SiT-XL/2"} <= set(MODELS)


def test_reversed_time_is_hidden_by_the_network():
    """A network trained on s = 1 − t to give dx/ds, asked for dx/dt at t, answers with −(its output at 1 − t)."""
    plain, reverse = awake(small()), awake(small(time_reversed=True))
    x, t, y = torch.randn(3, 4, 8, 8), torch.tensor([0.0, 0.25, 1.0]), torch.tensor([0, 5, 3])
    with torch.no_grad():
        torch.testing.assert_close(reverse(x, t, y), -plain(x, 1 - t, y), rtol=0, atol=0)
        assert not torch.allclose(reverse(x, t, y), -plain(x, t, y), atol=1e-3)


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
