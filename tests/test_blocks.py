"""The modern block: RMSNorm, SwiGLU and rotary positions by their formulas; networks of it begin and train."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from sit.blocks import SiTBlock, SwiGLU
from sit.checkpoint.donor import read_donor, take
from sit.mixers import build_mixer, parse_mixers
from sit.mixers.forward_mode import plain_operations
from sit.mixers.rope import Rope
from sit.model import SIZES, SiT
from sit.training.distill import new_blocks
from sit.training.plan import multiply_accumulates
from sit.utils.errors import UserError

MIXERS = ["attention", "neighborhood", "linear_attention", "attention,atconv", "depthwise,dico", "deformable"]


def small(mixer: str = "attention", **options) -> SiT:
    sizes = dict(input_size=8, patch_size=2, hidden_size=32, depth=2, num_heads=2, num_classes=5, block="modern")
    return SiT(**sizes | options, mixer=mixer, seed=0)


def awake(model: SiT) -> SiT:
    """Replace the zero initial values, which make the fresh network's output zero."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.1)
    return model


def inputs(count: int = 3, side: int = 8) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(2)
    return torch.randn(count, 4, side, side), torch.rand(count), torch.arange(count)


# ---------------------------------------------------------------- the parts


def turned_one_by_one(x: torch.Tensor, places: list[tuple[float, float]]) -> torch.Tensor:
    """x (N, d) with tokens at (row, column): a complex number times exp(i·ω·coordinate), channel by channel."""
    out, quarter = torch.empty_like(x), x.shape[1] // 4
    for token, (row, column) in enumerate(places):
        for axis, coordinate in enumerate((column, row)):
            for j in range(quarter):
                real, imaginary = 2 * axis * quarter + j, (2 * axis + 1) * quarter + j
                angle = torch.tensor(coordinate * 10000.0 ** (-j / quarter), dtype=torch.float64)
                z = torch.complex(x[token, real], x[token, imaginary]) * torch.exp(1j * angle)
                out[token, real], out[token, imaginary] = z.real, z.imag
    return out


@pytest.mark.parametrize("grid", [(4, 4), (8, 8), (3, 5)])
def test_rotary_positions_are_those_of_the_trained_grid(grid):
    """Complex multiplication one channel after the other, at where each token's center lies in the trained grid."""
    rope = Rope(16)
    rope.laid_over = (4, 4)
    q, k = torch.randn(2, 1, 2, grid[0] * grid[1], 16, dtype=torch.float64)
    stretch = lambda place, side: (place + 0.5) / side * 4 - 0.5  # noqa: E731
    places = [(stretch(r, grid[0]), stretch(c, grid[1])) for r in range(grid[0]) for c in range(grid[1])]
    for found, given in zip(rope(q, k, grid), (q, k), strict=True):
        for head in range(2):
            expected = turned_one_by_one(given[0, head], places)
            torch.testing.assert_close(found[0, head], expected, rtol=0, atol=1e-5)  # coordinates are float32


def test_products_depend_on_the_offset_alone_and_norms_stay():
    rope, (height, width) = Rope(16), (5, 7)
    q, k = torch.randn(2, 16, dtype=torch.float64)
    everywhere = [x.expand(1, 1, height * width, 16) for x in (q, k)]
    turned_q, turned_k = (x[0, 0] for x in rope(*everywhere, (height, width)))
    torch.testing.assert_close(turned_q.norm(dim=1), q.norm().expand(height * width))
    products = (turned_q @ turned_k.T).unflatten(0, (height, width)).unflatten(2, (height, width))
    for down, right in ((0, 0), (1, 0), (0, 3), (2, 1)):
        rows, columns = range(height - down), range(width - right)
        found = torch.stack([products[r, c, r + down, c + right] for r in rows for c in columns])
        torch.testing.assert_close(found, found[:1].expand_as(found))
    assert (products[0, 0, 1, 0] - products[0, 0, 0, 1]).abs() > 1e-3


def test_positions_first_made_for_inference_may_be_trained_with():
    """Nor do those harm that were first made under a forward-mode transform."""
    rope, q = Rope(8), torch.randn(1, 1, 6, 8, requires_grad=True)
    with torch.inference_mode():
        rope(q, q, (2, 3))
    rope(q, q, (2, 3))[0].sum().backward()
    torch.func.jvp(lambda q: rope(q, q, (3, 2))[0], (q.detach(),), (q.detach(),))
    rope(q, q, (3, 2))[0].sum().backward()


def test_swiglu_and_rmsnorm_by_their_formulas():
    block = SiTBlock(24, 4.0, nn.Identity(), "modern").double()
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    torch.testing.assert_close(block.norm1(x), x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt())
    assert not list(block.norm1.parameters()) and not list(block.norm2.parameters())
    mlp: SwiGLU = block.mlp
    gate, up = (x @ layer.weight.T + layer.bias for layer in (mlp.gate, mlp.up))
    torch.testing.assert_close(mlp(x), (gate / (1 + torch.exp(-gate)) * up) @ mlp.down.weight.T + mlp.down.bias)


@pytest.mark.parametrize("size", SIZES)
def test_a_block_has_as_many_parameters_as_the_published_one(size):
    _, hidden, heads = SIZES[size]
    for pattern in ("attention", "atconv", "depthwise"):
        counts = []
        with torch.device("meta"):
            for block, wanted in (("published", ()), ("modern", ("qk_norm", "rope"))):
                made = SiTBlock(hidden, 4.0, build_mixer(parse_mixers(pattern, wanted)[0], hidden, heads), block)
                counts.append(sum(p.numel() for p in made.parameters()))
        assert counts[1] == pytest.approx(counts[0], rel=0.01)
    width = {128: 344, 384: 1024, 768: 2048, 1024: 2728, 1152: 3072}[hidden]
    assert made.mlp.gate.weight.shape == (width, hidden)


# ---------------------------------------------------------------- the network


@torch.no_grad()
def test_forward_matches_a_step_by_step_evaluation():
    """In float64 from the formulas: attention with normalized, turned queries and keys between RMSNorms, and SwiGLU."""
    model = awake(small(num_heads=2)).double()
    x, t, y = inputs()
    x, t = x.double(), t.double()
    tokens = model.x_embedder(x) + model.pos_embed
    condition = model.t_embedder(t) + model.y_embedder(y)
    condition = condition * torch.sigmoid(condition)
    rms = lambda z: z / (z.square().mean(-1, keepdim=True) + 1e-6).sqrt()  # noqa: E731
    places = [(row, column) for row in range(4) for column in range(4)]

    def layer_norm(z, norm):
        away = z - z.mean(-1, keepdim=True)
        return away / (away.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias

    for block in model.blocks:
        m = block.adaLN_modulation[1](condition)
        s1, c1, g1, s2, c2, g2 = (m[:, None, i * 32 : (i + 1) * 32] for i in range(6))
        qkv = block.attn.qkv(rms(tokens) * (1 + c1) + s1)
        mixed = torch.empty_like(tokens)
        for image in range(len(x)):
            for head in range(2):
                q, k, v = (qkv[image, :, 32 * part + 16 * head : 32 * part + 16 * (head + 1)] for part in range(3))
                q = turned_one_by_one(layer_norm(q, block.attn.q_norm), places)
                k = turned_one_by_one(layer_norm(k, block.attn.k_norm), places)
                mixed[image, :, 16 * head : 16 * (head + 1)] = (q @ k.T / 4).softmax(-1) @ v
        tokens = tokens + g1 * block.attn.proj(mixed)
        z, mlp = rms(tokens) * (1 + c2) + s2, block.mlp
        gate = mlp.gate(z)
        tokens = tokens + g2 * mlp.down(gate * torch.sigmoid(gate) * mlp.up(z))
    m = model.final_layer.adaLN_modulation[1](condition)
    patches = model.final_layer.linear(rms(tokens) * (1 + m[:, None, 32:]) + m[:, None, :32])
    expected = patches.unflatten(1, (4, 4)).unflatten(3, (2, 2, 8)).permute(0, 5, 1, 3, 2, 4).reshape(3, 8, 8, 8)
    torch.testing.assert_close(model(x, t, y), expected[:, :4], rtol=1e-5, atol=1e-6)


def test_blocks_of_both_kinds_begin_alike_where_they_are_alike():
    """All but the MLPs and the norms of queries and keys; both are as published: Xavier matrices, and adaLN zero."""
    modern, published = small("attention,atconv"), small("attention,atconv", block="published")
    own, others = modern.state_dict(), published.state_dict()
    new = {name for name in own if name not in others}
    assert {name.split(".", 2)[2].rpartition(".")[0] for name in new} == {
        "mlp.gate", "mlp.up", "mlp.down", "attn.q_norm", "attn.k_norm",
    }  # fmt: skip
    assert all(torch.equal(own[name], others[name]) for name in own.keys() - new)
    for block in modern.blocks:
        for layer in (block.mlp.gate, block.mlp.up, block.mlp.down):
            bound = (6 / sum(layer.weight.shape)) ** 0.5
            assert 0.97 * bound < layer.weight.abs().max() <= bound and not layer.bias.any()
    assert not torch.equal(modern.blocks[0].mlp.gate.weight, modern.blocks[0].mlp.up.weight)


def test_a_pattern_may_say_otherwise():
    model = small("attention:rope=false,attention:qk_norm=false,linear_attention,neighborhood", depth=4)
    assert [block.attn.rope is not None for block in model.blocks if hasattr(block.attn, "rope")] == [0, 1, 1]
    normed = [isinstance(block.attn.q_norm, nn.LayerNorm) for block in model.blocks]
    assert normed == [True, False, True, True]
    assert model.config.mixer.startswith("attention:rope=false"), "the configuration has the pattern as it was given"


@pytest.mark.parametrize("mixer", MIXERS)
def test_networks_of_it_train_and_take_another_grid(mixer):
    model = awake(small(mixer))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    x, t, y = inputs()
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.01), []
    for _ in range(3):
        loss = (model(x, t, y) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
    assert not [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    x, t, y = inputs(side=12)
    with torch.no_grad():
        assert model(x, t, y).shape == x.shape and model(x, t, y).isfinite().all()
        streams = []
        for block in model.blocks:
            block.register_forward_hook(lambda module, given, out: streams.extend([given[0].dtype, out.dtype]))
        with torch.autocast("cpu", torch.bfloat16):
            half = model(x, t, y)
        assert streams == [torch.float32] * 4
        exact = model(x, t, y)
        assert (half.float() - exact).norm() < 0.05 * exact.norm()
        assert model.to(torch.bfloat16)(x.bfloat16(), t, y).dtype == torch.bfloat16


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = awake(small("attention,neighborhood"))
        if checkpointing:
            model.enable_gradient_checkpointing()
        model(*inputs()).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


@pytest.mark.parametrize("mixer", MIXERS)
def test_forward_mode_derivatives_are_central_differences(mixer):
    """By latents and time, which MeanFlow takes."""
    model = awake(small(mixer, average_velocity=True)).double()
    x, t, y = inputs()
    point = (x.double(), t.double() / 2)
    towards = (torch.randn_like(point[0]), torch.ones_like(point[1]))
    model.t_embedder.forward = lambda t: t[:, None].cos().expand(-1, 32)  # its own frequencies are float32
    call = lambda x, t: model(x, t, y, end=torch.ones(3, dtype=torch.float64))  # noqa: E731
    with plain_operations(model, torch.device("cpu")):
        value, derivative = torch.func.jvp(call, point, towards)
    with torch.no_grad():
        beyond, before = (call(*(a + s * b for a, b in zip(point, towards, strict=True))) for s in (1e-6, -1e-6))
        torch.testing.assert_close(value, call(*point))
    expected = (beyond - before) / 2e-6
    assert (derivative - expected).norm() < 1e-4 * expected.norm()


@torch.no_grad()
def test_save_and_load_and_the_configuration_of_before(tmp_path):
    model = awake(small("attention,atconv"))
    model.save_pretrained(tmp_path / "modern")
    loaded = SiT.from_pretrained(tmp_path / "modern")
    assert loaded.config.block == "modern" and torch.equal(loaded(*inputs()), model(*inputs()))
    awake(small(block="published")).save_pretrained(tmp_path / "earlier")
    path = tmp_path / "earlier" / "config.json"
    config = json.loads(path.read_text())
    assert config.pop("block") == "published"
    path.write_text(json.dumps(config))
    assert SiT.from_pretrained(tmp_path / "earlier").config.block == "published"


def test_compiled_and_exported_networks_give_the_same():
    model = awake(small("attention,atconv")).eval()
    x, t, y = inputs()
    with torch.no_grad():
        expected = model(x, t, y)
        torch.testing.assert_close(torch.compile(model, backend="aot_eager")(x, t, y), expected)
    program = torch.export.export(model, (x, t, y), dynamic_shapes=({0: torch.export.Dim("batch")},) * 3)
    for count in (1, 3):
        torch.testing.assert_close(program.module()(*inputs(count)), model(*inputs(count)))


def test_rotary_positions_cost_no_products():
    with torch.device("meta"):
        one, other = (small(f"attention:rope={wanted}") for wanted in ("true", "false"))
    assert multiply_accumulates(one, (4, 8, 8)) == multiply_accumulates(other, (4, 8, 8))


@torch.no_grad()
def test_a_network_of_another_size_keeps_the_coordinates(tmp_path):
    """Begun with one of 4x4 tokens, one of 8x8 and no table turns its tokens as that one would on its grid."""
    donor = awake(small(positional_embedding=False))
    donor.save_pretrained(tmp_path)
    given = read_donor(tmp_path)
    network = small(input_size=16, positional_embedding=False, **given.inherited((8, 8)))
    assert tuple(network.config.positional_grid) == (4, 4)
    take(network, given, [], {})
    for side in (8, 16, 12):
        x, t, y = inputs(side=side)
        torch.testing.assert_close(network(x, t, y), donor(x, t, y))


def test_beginning_with_the_other_block_is_told(tmp_path):
    awake(small(block="published")).save_pretrained(tmp_path)
    network = small()
    said = str(take(network, read_donor(tmp_path), [], {}))
    assert "afresh: blocks.*.attn (8), blocks.*.mlp (12)" in said and "not used of it: blocks.*.mlp (8)" in said
    assert "note: its block is published, not modern" in said
    assert "its mixer is attention, not attention:qk_norm=true:rope=true" in said
    assert new_blocks(network, small(block="published")) == (0, 1) and new_blocks(network, small()) == ()


def test_mistakes_are_named():
    with pytest.raises(UserError, match="`block=ancient` must be one of published, modern"):
        small(block="ancient")
    with pytest.raises(UserError, match="rope needs heads of a multiple of 4 channels, not 2"):
        small(num_heads=16)
