"""When the network is compiled, and that a compiled one samples the same."""

from __future__ import annotations

import pytest
import torch
from torch import _inductor as inductor

from sit.model import SiT
from sit.sampling.config import SamplerConfig
from sit.sampling.sampler import sample
from sit.training.distributed import compile_for_training
from sit.transport.transport import Transport
from sit.utils.compile import compile_for_sampling, obstacle, should_compile
from sit.utils.errors import UserError

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_the_flag_and_what_stands_in_its_way(monkeypatch):
    notices: list[str] = []
    monkeypatch.setattr("sit.utils.compile.obstacle", lambda device: None)
    assert not should_compile(None, CPU, notices.append) and should_compile(True, CPU, notices.append)
    assert should_compile(None, GPU, notices.append) and not should_compile(False, GPU, notices.append)
    assert not should_compile(None, GPU, notices.append, helps=False) and not notices
    monkeypatch.setattr("sit.utils.compile.obstacle", lambda device: "install g++")
    assert not should_compile(None, GPU, notices.append) and "install g++" in notices[0]
    with pytest.raises(UserError, match="`compile`: install g"):
        should_compile(True, CPU, notices.append)


def test_a_missing_compiler_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert "C++ compiler" in obstacle(CPU)
    (tmp_path / "mine").touch(0o755)
    monkeypatch.setenv("CXX", "mine")
    assert obstacle(CPU) is None


@pytest.mark.parametrize("ddp, checkpointing, cut", [(True, True, False), (True, False, True), (False, True, True)])
def test_graphs_with_checkpoints_are_not_cut_for_ddp(ddp, checkpointing, cut):
    model = SiT(8, patch_size=2, hidden_size=32, depth=1, num_heads=2, num_classes=10)
    if checkpointing:
        model.enable_gradient_checkpointing()
    with torch._dynamo.config.patch(optimize_ddp=True):
        compile_for_training(model, ddp)
        assert torch._dynamo.config.optimize_ddp is cut
    assert model._compiled_call_impl is not None


@pytest.mark.parametrize("mixer", ["attention", "neighborhood"])
def test_tables_are_constants_of_a_compiled_network(mixer):
    """The positional table of a grid that is not the trained one, and the neighborhoods' mask."""
    model = SiT(8, patch_size=1, hidden_size=32, depth=1, num_heads=2, num_classes=10, mixer=mixer).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.1)
    nodes = []

    def backend(graph, inputs):
        nodes.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    compiled = torch.compile(model.forward, fullgraph=True, dynamic=False, backend=backend)
    inputs = torch.randn(2, 4, 8, 12), torch.rand(2), torch.tensor([1, 2])
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs), model(*inputs))
    assert sum("sin" in name for name in nodes) == 1  # the embedding of the times
    assert not any("clamp" in name for name in nodes)


@pytest.mark.skipif(obstacle(CPU) is not None, reason="no C++ compiler")
def test_a_compiled_network_samples_the_same():
    torch.manual_seed(0)
    model = SiT(8, patch_size=2, hidden_size=32, depth=1, num_heads=2, num_classes=10, mixer="atconv").eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.1)
    noise, labels = torch.randn(3, 4, 8, 8), torch.tensor([0, 4, 9])
    # Heun's method holds two results of the network at a time, guidance shows it twice the images
    config = SamplerConfig(sampler="ode", method="heun2", steps=3, cfg_scale=1.5)
    plain = sample(model, Transport(), noise, labels, config)
    compile_for_sampling(model)
    with inductor.config.patch(
        {"cpp_wrapper": True, "cpp_cache_precompile_headers": False}
    ):  # one file for g++, not 20
        torch.testing.assert_close(sample(model, Transport(), noise, labels, config), plain, rtol=1e-4, atol=1e-4)
