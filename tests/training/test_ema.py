"""The moving average against diffusers' own, whole and in pieces."""

from __future__ import annotations

import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import nn

from sit.training import ema
from sit.training.posthoc_ema import PowerAverage, decay_at, gamma_of


def made(*, transposed: bool = False) -> list[nn.Parameter]:
    source = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=source) for shape in ((5,), (7, 9), (1,), (3, 4, 5), ())]
    weights[1] = weights[1].T if transposed else weights[1]
    return [nn.Parameter(weight) for weight in weights]


@pytest.mark.parametrize("piece", (1, 7, 63, 2**16))
@pytest.mark.parametrize("transposed", (False, True))
def test_in_pieces_it_is_diffusers_to_the_bit(piece, transposed, monkeypatch):
    monkeypatch.setattr(ema, "PIECE", piece)
    parameters, source = made(transposed=transposed), torch.Generator().manual_seed(1)
    ours, theirs = ema.moving_average(parameters, 0.99, warmup=True), EMAModel(parameters, decay=0.99, foreach=True)
    for _ in range(5):
        for parameter in parameters:
            parameter.data += torch.randn(parameter.shape, generator=source)
        ours.step(parameters)
        theirs.step(parameters)
        assert all(map(torch.equal, ours.shadow_params, theirs.shadow_params))
    assert (ours.optimization_step, ours.cur_decay_value) == (theirs.optimization_step, theirs.cur_decay_value)


def test_no_copy_of_all_weights_lies_between(monkeypatch):
    """What is made at a time is no larger than a piece."""
    monkeypatch.setattr(ema, "PIECE", 16)
    parameters, largest = made(), 0
    average = ema.moving_average(parameters, 0.99, warmup=False)

    class Watched(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            found = function(*args, **(kwargs or {}))
            if function is torch.ops.aten.sub.Tensor:
                largest = max(largest, found.numel())
            return found

    with Watched():
        average.step(parameters)
    assert largest == 16


def test_a_power_average_takes_the_same_way(monkeypatch):
    monkeypatch.setattr(ema, "PIECE", 4)
    parameters, source = made(), torch.Generator().manual_seed(1)
    average, expected = PowerAverage(parameters, 0.1), [parameter.detach().double() for parameter in parameters]
    for step in range(1, 5):
        for parameter in parameters:
            parameter.data += torch.randn(parameter.shape, generator=source)
        average.step(parameters)
        decay = decay_at(step, gamma_of(0.1))
        expected = [
            decay * was + (1 - decay) * now.detach().double() for was, now in zip(expected, parameters, strict=True)
        ]
    for found, wanted in zip(average.shadow_params, expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
