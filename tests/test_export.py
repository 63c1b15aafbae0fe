"""AttNet and a step of SiT as programs: torch.export with an open batch, torch.fx, and ONNX where its packages are."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import timm
import torch
from timm.models import get_notrace_functions, get_notrace_modules
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import atconv.attnet  # noqa: F401 - registers the models
from sit.model import SiT

ONNX = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
BATCH = torch.export.Dim("batch")


def shaken(model: torch.nn.Module) -> torch.nn.Module:
    """A model with random weights everywhere, so that no branch is zero, in evaluation mode."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


@pytest.fixture(scope="module")
def attnet() -> torch.nn.Module:
    return shaken(timm.create_model("attnet_t2", depths=(1, 1), dims=(8, 12), mlp_ratios=(4, 4), num_classes=5))


@pytest.fixture(scope="module")
def sit() -> torch.nn.Module:
    return shaken(SiT(8, hidden_size=16, depth=2, num_heads=2, num_classes=10, mixer="attention,atconv"))


def images(count: int, height: int = 24, width: int = 40) -> tuple[torch.Tensor]:
    return (torch.randn(count, 3, height, width),)


def states(count: int) -> tuple[torch.Tensor, ...]:
    """Latents, times and labels."""
    return torch.randn(count, 4, 8, 8), torch.rand(count), torch.randint(0, 11, (count,))


def test_attnet_is_exported_with_open_batch_and_sides():
    attnet = shaken(timm.create_model("attnet_t2", depths=(1,), dims=(8,), mlp_ratios=(4,), num_classes=5))
    sides = {0: BATCH, 2: 8 * torch.export.Dim("rows", min=2), 3: 8 * torch.export.Dim("columns", min=2)}
    program = torch.export.export(attnet, images(3), dynamic_shapes=(sides,))
    module = program.module()
    for shape in ((1, 24, 40), (5, 24, 40), (2, 32, 56)):
        (x,) = images(*shape)
        torch.testing.assert_close(module(x), attnet(x))
    convolutions = [node for node in program.graph.nodes if node.target is torch.ops.aten.conv2d.default]
    assert len(convolutions) == 3, "the stem and the gated MLP; an image's own kernels are no convolution"


def test_a_step_of_sit_is_exported_with_an_open_batch(sit):
    module = torch.export.export(sit, states(3), dynamic_shapes=({0: BATCH},) * 3).module()
    for count in (1, 4):
        inputs = states(count)
        torch.testing.assert_close(module(*inputs), sit(*inputs))


@pytest.mark.filterwarnings("ignore:NOTE. The nodes obtained by tracing")
def test_fx_traces_attnet_as_timm_does(attnet):
    """ATConv is one node, so the graph works at other sizes too, and still refuses too few tokens."""
    options = {"leaf_modules": get_notrace_modules(), "autowrap_functions": get_notrace_functions(),
               "param_shapes_constant": True}  # fmt: skip
    names = get_graph_node_names(attnet, tracer_kwargs=options)
    assert "stages.0.0.token_mixer" in names[1] and "stages.0.0.token_mixer.x_proj" not in names[1]
    train, evaluation = ([nodes[-1]] for nodes in names)
    traced = create_feature_extractor(
        attnet, train_return_nodes=train, eval_return_nodes=evaluation, tracer_kwargs=options
    ).eval()
    for shape in ((2, 24, 40), (1, 32, 24)):
        (x,) = images(*shape)
        (found,) = traced(x).values()
        torch.testing.assert_close(found, attnet(x))
    with pytest.raises(ValueError, match="taps"):
        traced(*images(1, 8, 8))


@pytest.mark.skipif(bool(ONNX), reason=f"not installed: {', '.join(ONNX)} (the extra `onnx`)")
@pytest.mark.parametrize("name, inputs", [("attnet", images), ("sit", states)])
def test_onnx_runtime_gives_the_same(name, inputs, request, tmp_path):
    """A file made by PyTorch's exporter at one batch size, run by ONNX Runtime at others."""
    import onnxruntime

    model, example = request.getfixturevalue(name), inputs(3)
    shapes = ({0: BATCH},) * len(example)
    torch.onnx.export(model, example, dynamo=True, dynamic_shapes=shapes).save(str(tmp_path / "model.onnx"))
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    places = [place.name for place in session.get_inputs()]
    for count in (1, 4):
        values = inputs(count)
        (found,) = session.run(None, {place: value.numpy() for place, value in zip(places, values, strict=True)})
        torch.testing.assert_close(torch.from_numpy(found), model(*values), rtol=1e-4, atol=1e-4)
