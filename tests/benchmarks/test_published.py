"""benchmarks/published.py, with checkouts that the test makes: programs of the same names around tiny networks."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import published
import pytest
import torch

from sit.utils.errors import UserError

MODELS = """
from torch import nn
from sit.model import create_model

class Network(nn.Module):
    def __init__(self, **options):
        super().__init__()
        made = create_model("SiT-XS/8", mixer="{mixer}", **options)
        self.__dict__["made"] = made  # whose weights are this one's, by their names
        for name, child in made.named_children():
            self.add_module(name, child)
        for name, buffer in made.named_buffers(recurse=False):
            self.register_buffer(name, buffer)

    def forward(self, x, t, y):
        return {factor} * self.made(x, t, y)

SiT_models = {{"{prefix}XS/8": Network}}
"""
TRAIN = """
import a_module_that_is_not_installed

@torch.no_grad()
def update_ema(ema_model, model, decay=0.9999):
    averaged = OrderedDict(ema_model.named_parameters())
    for name, parameter in model.named_parameters():
        averaged[name].lerp_(parameter, 1 - decay)
    assert not any(parameter.requires_grad for parameter in averaged.values())
"""
TRANSPORT = """
from .steps import Sampler, Transport

def create_transport():
    return Transport()
"""
STEPS = '''
"""The linear path by its formulas: v = x1 - x0, score = (t v - x) / (1 - t), w = 1 - t."""
import torch

class Transport:
    def training_losses(self, model, x1, model_kwargs):
        t, x0 = torch.rand(len(x1)), torch.randn_like(x1)
        when = t[:, None, None, None]
        out = model(when * x1 + (1 - when) * x0, t, **model_kwargs)
        return {"loss": (out - (x1 - x0)).square().flatten(1).mean(1)}

class Sampler:
    def __init__(self, transport):
        pass

    def sample_ode(self, *, sampling_method, num_steps):
        assert sampling_method == "euler"

        def run(x, model, **kwargs):
            for k in range(num_steps - 1):
                x = x + model(x, torch.full((len(x),), k / (num_steps - 1)), **kwargs) / (num_steps - 1)
            return [x]

        return run

    def sample_sde(self, *, diffusion_form, num_steps):
        assert diffusion_form == "sigma"
        dt, last = 0.96 / (num_steps - 1), 0.04

        def drift(x, t, model, kwargs):
            v = model(x, torch.full((len(x),), t), **kwargs)
            return v + (t * v - x)

        def run(x, model, **kwargs):
            for k in range(num_steps - 1):
                noise = torch.randn(x.shape)
                x = x + drift(x, k * dt, model, kwargs) * dt + (2 * (1 - k * dt) * dt) ** 0.5 * noise
            return [x + drift(x, 0.96, model, kwargs) * last]

        return run
'''


def write_checkout(mixer: str, folder: Path, factor: float = 1.0) -> Path:
    """The repository of a mixer, whose network's output is ``factor`` times ours."""
    repository = published.REPOSITORIES[mixer]
    program = folder / repository.program
    (program / "transport").mkdir(parents=True)
    (program / "models.py").write_text(MODELS.format(mixer=mixer, factor=factor, prefix=repository.prefix))
    (program / "train.py").write_text(TRAIN)
    (program / "transport" / "__init__.py").write_text(TRANSPORT)
    (program / "transport" / "steps.py").write_text(STEPS)
    return folder


@pytest.fixture
def checkouts(tmp_path, monkeypatch) -> dict[str, Path]:
    made = {mixer: write_checkout(mixer, tmp_path / mixer) for mixer in published.REPOSITORIES}
    for mixer, folder in made.items():
        monkeypatch.setenv(published.REPOSITORIES[mixer].variable, str(folder))
    return made


WORDS = "--scopes training sde --dtypes float32 --sizes XS/8 --tokens 16 --batch-size 2 --steps 3 --repeats 1".split()
WORDS += "--device cpu --cpu-threads 1".split()


def test_what_is_printed_and_kept(checkouts, monkeypatch, capsys, tmp_path):
    file = tmp_path / "found.json"
    command = ["benchmarks/published.py", *WORDS, "--json", str(file)]
    monkeypatch.setattr(sys, "argv", command)
    names, threads = set(sys.modules), torch.get_num_threads()
    published.main()
    assert torch.get_num_threads() == threads
    assert not {"models", "transport", "transport.steps"} & (set(sys.modules) - names), "one can follow the other"
    found, out = json.loads(file.read_text()), capsys.readouterr().out
    assert found["command"] == shlex.join(["python", *command]) and found["machine"] in out
    rows = found["rows"]
    assert [(row["scope"], row["mixer"]) for row in rows] == [
        (scope, mixer) for scope in ("training", "sde") for mixer in ("attention", "atconv")
    ]
    assert len(found["loads"]) == 3
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("|")]
    for row, cells in zip(rows, table[2:], strict=True):
        attention = next(other for other in rows if other["scope"] == row["scope"])
        assert attention["mixer"] == "attention" and cells[5] == row["mixer"]
        theirs, ours = row["published_seconds"], row["ours_seconds"]
        assert row["ratio"] == theirs / ours and theirs > 0
        assert cells[8:10] == [f"{theirs / ours:.2f}", f"{attention['published_seconds'] / ours:.2f}"]
        assert row["difference"] < 1e-5, "the test's sampler and ours, from the same noise"


@pytest.mark.parametrize("scope, dtype, most", [("ode", "float32", 1e-5), ("sde", "bfloat16", 0.02)])
def test_both_sample_the_same(checkouts, scope, dtype, most):
    case = published.Case(scope, "XS/8", 16, 2, dtype)
    opened = published.open_checkout(published.REPOSITORIES["attention"])
    theirs, ours, apart = published.programs(case, "attention", opened, published.Arguments(steps=3, device="cpu"))
    torch.manual_seed(5)
    expected = theirs()
    torch.manual_seed(5)
    found = ours()
    assert found.dtype == torch.float32 and found.shape == (2, 4, 32, 32)
    assert apart < most and (found - expected).norm() < most * expected.norm()
    assert apart > 1e-5 or dtype == "float32", "bfloat16 is in use"


def test_a_step_of_each_program_trains(checkouts):
    """Weights move, and with them the average: the first step of AdamW is the learning rate in each direction."""
    case = published.Case("training", "XS/8", 16, 2, "float32")
    opened = published.open_checkout(published.REPOSITORIES["atconv"])
    inputs = published.make_inputs(case, torch.device("cpu"))
    averages = []
    opened = published.Published(
        opened.repository, opened.networks, opened.transport, lambda ema, net: averages.append((ema, net))
    )
    theirs = opened.network("XS/8", 32)
    config = published.TrainConfig(model="SiT-XS/8", mixer="atconv")
    ours = published.create_model(config.model, input_size=32, mixer="atconv")
    ours.load_state_dict(theirs.state_dict())
    before = ours.blocks[0].mlp.fc1.weight.detach().clone()
    for step in (published.their_step(opened, theirs, inputs), published.our_step(ours, inputs, config)):
        assert step() > 0
    for network in (theirs, ours):
        moved = (network.blocks[0].mlp.fc1.weight - before).detach().abs()
        assert moved.max() == pytest.approx(1e-4, rel=0.01) and (moved > 9e-5).float().mean() > 0.9
    ((average, trained),) = averages
    assert trained is theirs and torch.equal(average.blocks[0].mlp.fc1.weight, before)


def test_programs_that_compute_something_else_are_refused(checkouts, tmp_path, monkeypatch):
    folder = write_checkout("attention", tmp_path / "other", factor=1.1)
    monkeypatch.setenv("SIT_CHECKOUT", str(folder))
    for scope in ("training", "ode"):
        options = {"scopes": (scope,), "sizes": ("XS/8",), "tokens": (16,), "dtypes": ("float32",), "device": "cpu"}
        arguments = published.Arguments(mixers=("attention",), batch_size=2, repeats=1, **options)
        with pytest.raises(UserError, match="attention, in float32 differs by 0.* from willisma/SiT"):
            published.run(arguments)


def test_what_is_missing_is_told_in_one_line(checkouts, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks/published.py", *WORDS])

    def refused() -> str:
        with pytest.raises(SystemExit):
            published.main()
        (line,) = capsys.readouterr().err.splitlines()
        return line

    (checkouts["atconv"] / "generation" / "SiT" / "train.py").unlink()
    assert "is no checkout of price112/Attentive-Convolution: no " in refused()
    (checkouts["attention"] / "train.py").write_text("")
    assert "has no function update_ema" in refused()
    (checkouts["attention"] / "models.py").write_text("import a_module_that_is_not_installed")
    assert "SIT_CHECKOUT: " in (line := refused()) and "No module named 'a_module_that_is_not_installed'" in line
    monkeypatch.delenv("SIT_CHECKOUT")
    assert refused() == ("error: SIT_CHECKOUT is not set: let it name the folder of a checkout of willisma/SiT")
    for options, message in (
        ({"tokens": (200,)}, "`tokens=200`: the grid is square"),
        ({"steps": 1}, "`steps` must be at least 2"),
        ({"sizes": ("Q/2",)}, "unknown model 'SiT-Q/2'"),
    ):
        with pytest.raises(UserError, match=message):
            published.Arguments(**options)


def test_a_size_that_was_not_published(checkouts):
    opened = published.open_checkout(published.REPOSITORIES["atconv"])
    with pytest.raises(UserError, match="has no network SiT-ATConv-S/2; it has SiT-ATConv-XS/8"):
        opened.network("S/2", 32)
