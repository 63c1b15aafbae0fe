"""Muon with AdamW: its step by the formula in float64, whose which parameters are, steps left out, exact resuming."""

from __future__ import annotations

import copy
import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from tiny_runs import tiny_run
from torch import nn

from sit.model import SiT
from sit.training.config import TrainConfig
from sit.training.frozen import freeze
from sit.training.muon import MuonWithAdamW, hidden_matrices
from sit.training.optimization import make_optimizer
from sit.training.schedule import learning_rate_at
from sit.training.trainer import train
from sit.utils.errors import UserError

RATE, DECAY = 0.01, 0.3


def orthogonalized(matrix: torch.Tensor) -> torch.Tensor:
    """Five steps of Newton and Schulz's iteration with Muon's coefficients, on the singular values alone."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return left @ values.diag() @ right


def drawn(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(24, 24), (48, 16), (12, 40)])
def test_the_steps_of_a_matrix_are_its_formula(shape):
    """Nesterov's momentum made orthogonal; all singular values near 1, so the step is as large as AdamW's usually."""
    weight = nn.Parameter(drawn(shape, 0))
    optimizer = MuonWithAdamW([weight], [], lr=RATE, betas=(0.9, 0.99), weight_decay=DECAY)
    expected, momentum = weight.detach().double(), torch.zeros(shape, dtype=torch.float64)
    for step in range(1, 4):
        before, gradient = weight.detach().clone(), drawn(shape, step)
        weight.grad = gradient
        optimizer.step()
        momentum = 0.95 * momentum + 0.05 * gradient.double()
        direction = orthogonalized(0.05 * gradient.double() + 0.95 * momentum)
        moved = (before.double() * (1 - RATE * DECAY) - weight.detach().double()) / RATE
        wanted = 0.2 * max(shape) ** 0.5 * direction
        assert (moved - wanted).norm() < 0.02 * wanted.norm()  # it computes in bfloat16
        assert 0.15 < moved.square().mean().sqrt() < 0.25
        values = torch.linalg.svdvals(moved) / (0.2 * max(shape) ** 0.5)
        assert 0.6 < values.min() and values.max() < 1.25
        expected = expected * (1 - RATE * DECAY) - RATE * wanted
    assert (weight.detach() - expected).norm() < 0.02 * (expected - drawn(shape, 0)).norm()


def named(network: nn.Module) -> set[str]:
    ours = {id(parameter) for parameter in hidden_matrices(network)}
    return {name for name, parameter in network.named_parameters() if id(parameter) in ours}


def test_which_parameters_are_muons():
    sizes = dict(input_size=8, hidden_size=32, num_heads=2, num_classes=5)
    network = SiT(**sizes, depth=3, mixer="attention,atconv,dico", block="modern", average_velocity=True)
    inside = {0: ("qkv", "proj"), 1: ("kernel_proj", "kernel_gen", "x_proj", "proj")}
    inside |= {2: ("x_proj", "channel_attention", "proj")}
    wanted = {f"blocks.{number}.attn.{layer}.weight" for number, layers in inside.items() for layer in layers}
    wanted |= {f"blocks.{number}.mlp.{layer}.weight" for number in range(3) for layer in ("gate", "up", "down")}
    assert named(network) == wanted
    freeze(network, ["blocks.1.*", "*.up.*"], ())
    left = {name for name in wanted if not name.startswith("blocks.1.") and ".up." not in name}
    assert named(network) == left
    matrices, others = make_optimizer(network, TrainConfig(optimizer="muon")).param_groups
    assert len(matrices["params"]) == len(left) and all(p.requires_grad for p in others["params"])
    trained = {id(p) for p in network.parameters() if p.requires_grad}
    assert {id(p) for group in (matrices, others) for p in group["params"]} == trained
    assert (matrices["lr"], others["lr"]) == (1e-4, 1e-4)


def test_where_one_of_the_two_has_nothing_to_train():
    network = SiT(8, hidden_size=32, depth=1, num_heads=2, num_classes=5)
    freeze(network, (), ["blocks.*.mlp.*.weight"])
    (group,) = make_optimizer(network, TrainConfig(optimizer="muon")).param_groups
    assert len(group["params"]) == 2
    freeze(network, (), ["final_layer.*"])
    with pytest.raises(UserError, match="`optimizer=muon`: all matrices that Muon is for, .* are frozen; use adamw"):
        make_optimizer(network, TrainConfig(optimizer="muon"))


def both(seed: int = 0) -> tuple[nn.Parameter, nn.Parameter, MuonWithAdamW]:
    matrix, other = nn.Parameter(drawn((6, 5), seed)), nn.Parameter(drawn((5,), seed))
    return matrix, other, MuonWithAdamW([matrix], [other], lr=RATE, betas=(0.8, 0.9), weight_decay=DECAY)


def test_all_else_is_pytorchs_adamw():
    _, other, optimizer = both()
    alone = nn.Parameter(other.detach().clone())
    adamw = torch.optim.AdamW([alone], lr=RATE, betas=(0.8, 0.9), weight_decay=DECAY)
    for step in range(3):
        other.grad = alone.grad = drawn((5,), step)
        optimizer.step()
        adamw.step()
    torch.testing.assert_close(other, alone)


@pytest.mark.parametrize("bad", [(0, 3), (2,), ()])
def test_steps_that_the_device_leaves_out_change_nothing(bad):
    """To the bit, as if they had not been; the first among them, before there is any momentum."""
    matrix, other, optimizer = both()
    expected = both()
    for step in range(5):
        gradients = drawn((6, 5), step), drawn((5,), step)
        if step not in bad:
            for parameter, gradient in zip(expected, gradients, strict=False):
                parameter.grad = gradient.clone()
            expected[2].step()
        else:
            gradients[0][1, 2], gradients[1][3] = float("nan"), float("inf")
        matrix.grad, other.grad = gradients
        optimizer.found_inf = torch.tensor(float(step in bad))
        optimizer.step()
        del optimizer.found_inf
    assert torch.equal(matrix, expected[0]) and torch.equal(other, expected[1])
    ours, theirs = (made.state_dict()["state"] for made in (optimizer, expected[2]))
    for number, state in theirs.items():
        assert state.keys() == ours[number].keys()
        assert all(torch.equal(value, ours[number][name]) for name, value in state.items())


def test_a_state_dict_goes_on_to_the_bit():
    one, other = both(), both(seed=7)
    for step in range(4):
        if step == 2:
            with torch.no_grad():
                for mine, its in zip(other[:2], one[:2], strict=True):
                    mine.copy_(its)
            other[2].load_state_dict(copy.deepcopy(one[2].state_dict()))
        for made in (one, other) if step >= 2 else (one,):
            made[0].grad, made[1].grad = drawn((6, 5), step), drawn((5,), step)
            made[2].step()
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def test_no_closure():
    with pytest.raises(TypeError, match="closure"):
        both()[2].step(lambda: 0.0)


def run(config: TrainConfig) -> dict[str, torch.Tensor]:
    AcceleratorState._reset_state(reset_partial_state=True)
    train(config)
    return load_file(Path(config.output_dir) / "checkpoints" / "step-0000004" / "training" / "model.safetensors")


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    options = dict(block="modern", optimizer="muon", mixer="attention,atconv:kernel_size=1", weight_decay=0.1)
    rates = dict(learning_rate=0.01, warmup_steps=2, final_learning_rate=1e-3, freeze=("x_embedder.*",))
    return tiny_run(tmp_path / "a", steps=4, checkpoint_every=2, **options, **rates)


def test_a_run_with_both_options_resumes_exactly(config, tmp_path, fresh_accelerate):
    whole = run(config)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "checkpoints" / "step-0000004")
    again = run(dataclasses.replace(config, output_dir=str(tmp_path / "b"), resume=str(tmp_path / "b")))
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)
    states = [
        torch.load(tmp_path / name / "checkpoints/step-0000004/training/optimizer.pt", weights_only=True)["optimizer"]
        for name in "ab"
    ]
    kinds = {name: set(state) for name, state in states[0]["state"].items()}
    assert kinds["blocks.0.mlp.gate.weight"] == {"momentum_buffer"}
    assert kinds["blocks.0.adaLN_modulation.1.weight"] == {"step", "exp_avg", "exp_avg_sq"}
    assert not any(name.startswith("x_embedder") for name in kinds)
    for name, state in states[0]["state"].items():
        assert all(torch.equal(value, states[1]["state"][name][kind]) for kind, value in state.items())
    assert [group["lr"] for group in states[0]["param_groups"]] == [learning_rate_at(3, config)] * 2
    with pytest.raises(UserError, match="`optimizer=adamw` can't continue the run .* begun with muon"):
        run(dataclasses.replace(config, optimizer="adamw", resume=str(tmp_path / "a"), steps=5))
