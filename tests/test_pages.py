"""The pages that show how to use ATConv and AttNet elsewhere: their blocks run, and give what they say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
tomllib = pytest.importorskip("tomllib", reason="Python 3.11 has it")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)


@pytest.fixture(scope="module")
def names() -> dict:
    """What is defined after all blocks of the page on ATConv, one after another."""
    torch.manual_seed(0)
    found: dict = {}
    page = DOCS / "atconv-in-your-network.md"
    assert len(blocks(page)) == 5
    for block in blocks(page):
        exec(compile(block, str(page), "exec"), found)
    return found


def grouped(mixer, x: torch.Tensor) -> torch.Tensor:
    """The published order channels first, from a module's weights: project all, pool, one convolution per channel."""
    b, c, h, w = x.shape
    taps, side = mixer.kernel_size**2, mixer.kernel_size

    def project(layer, x):
        return F.conv2d(x, layer.weight[:, :, None, None], layer.bias)

    pooled = F.adaptive_avg_pool1d(project(mixer.kernel_proj, x).flatten(2), taps)
    activated = F.gelu(pooled, approximate="tanh" if mixer.activation == "gelu_tanh" else "none")
    kernels = F.linear(activated, mixer.kernel_gen.weight, mixer.kernel_gen.bias)
    kernels = kernels - mixer.difference_control.sigmoid()[:, None] * kernels.mean(2, keepdim=True)
    values = project(mixer.x_proj, x).reshape(1, b * c, h, w)
    out = F.conv2d(values, kernels.reshape(b * c, 1, side, side), padding=side // 2, groups=b * c)
    return project(mixer.proj, out.view(b, c, h, w))


def test_on_tokens_and_on_a_map(names):
    """The map is mixed as the published order does it; the tokens are that map's, row-major."""
    assert names["mixed"].shape == names["tokens"].shape
    maps = names["tokens"].transpose(1, 2).unflatten(2, (8, 12))
    torch.testing.assert_close(names["mixed"].transpose(1, 2).unflatten(2, (8, 12)), grouped(names["mixer"], maps))
    layer, x = names["layer"], torch.randn(2, 64, 9, 7)
    assert names["maps"].shape == (2, 64, 8, 12)
    torch.testing.assert_close(layer(x), grouped(layer.mixer, x))
    lying = x.to(memory_format=torch.channels_last)
    assert lying.flatten(2).transpose(1, 2).data_ptr() == lying.data_ptr(), "as the page says, nothing is moved"


def test_what_the_page_says_of_grids_and_dtypes(names):
    mixer = names["mixer"]
    assert mixer(torch.randn(1, 35, 64), (5, 7)).shape == (1, 35, 64)
    with pytest.raises(ValueError, match="taps"):
        mixer.check_grid((2, 4))
    mixer.check_grid((3, 3))
    with torch.autocast("cpu", torch.bfloat16):
        assert mixer(names["tokens"], (8, 12)).dtype == torch.bfloat16
        assert mixer.kernels(names["tokens"])[0].dtype == torch.float32


@pytest.mark.parametrize("name, answer, shape", [("vit", "logits", (2, 1000)), ("dit", "noise", (2, 4, 8, 8))])
def test_in_other_networks(names, name, answer, shape):
    """No attention is left, and every mixer gets gradients."""
    model = names[name]
    assert names[answer].shape == shape
    mixers = [module for module in model.modules() if isinstance(module, names["OnGrid"])]
    assert len(mixers) == {"vit": 12, "dit": 2}[name]
    assert not any("qkv" in key or "to_q" in key for key in model.state_dict())
    if name == "dit":  # adaLN-Zero gates begin at zero and let no gradient through
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
        out = model(torch.randn(2, 4, 8, 8), torch.tensor([1, 500]), torch.tensor([3, 7])).sample
    else:
        out = names[answer]
    out.square().sum().backward()
    assert all(one.mixer.kernel_proj.weight.grad.abs().sum() > 0 for one in mixers)


def test_exporting_as_the_page_does(names):
    torch.manual_seed(1)
    x = torch.randn(5, 64, 8, 12)
    torch.testing.assert_close(names["program"].module()(x), names["layer"](x))
    assert names["exported"].shape == x.shape


def test_attnet_as_a_backbone():
    (block,) = blocks(DOCS / "attnet-backbone.md")
    assert len([line for line in block.splitlines() if line.strip()]) <= 10
    found: dict = {}
    exec(compile(block, "attnet-backbone.md", "exec"), found)
    assert found["widths"] == [64, 128, 240] and found["backbone"].feature_info.reduction() == [8, 16, 32]
    assert [tuple(stage.shape[2:]) for stage in found["stages"]] == [(16, 20), (8, 10), (4, 5)]
    assert found["pyramid"].shape == (2, 64, 16, 20)
    two = found["timm"].create_model("attnet_xxs", features_only=True, out_indices=(0, 1))
    assert [tuple(stage.shape[2:]) for stage in two(torch.randn(1, 3, 17, 17))] == [(5, 5), (3, 3)]
    assert not any(".stages.2." in key or ".stages.3." in key for key, _ in two.named_parameters(prefix=""))
    with pytest.raises(ValueError, match="taps"):
        two(torch.randn(1, 3, 16, 16))


def cells(notebook: dict) -> list[str]:
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_runs_on_the_embedded_data(monkeypatch, tmp_path):
    """All its cells, in order, with fewer steps; what it keeps are real images and finite samples."""
    notebook = json.loads((DOCS / "digits.ipynb").read_text())
    assert notebook["nbformat"] == 4 and all(not cell.get("outputs") for cell in notebook["cells"])
    monkeypatch.chdir(tmp_path)
    shrunk = {"IMAGES": 40, "STEPS": 3, "BATCH": 8, "SAMPLING_STEPS": 2}
    found: dict = {}
    for number, code in enumerate(cells(notebook)):
        if number == 0:
            assert set(shrunk) == set(re.findall(r"^([A-Z_]+) = \d+", code, flags=re.MULTILINE))
            code = re.sub(r"^([A-Z_]+) = \d+", lambda line: f"{line[1]} = {shrunk[line[1]]}", code, flags=re.MULTILINE)
        exec(compile(code, f"cell {number}", "exec"), found)
    again = found["decode"](found["vae"], found["latents"][:8]).permute(0, 3, 1, 2)
    assert found["latents"].shape == (40, 4, 8, 8), "and they are the images', which the decoder gives back"
    assert (again.float() - found["images"][:8]).abs().mean() < 6
    assert len(found["losses"]) == 3 and found["samples"].isfinite().all()
    assert found["pictures"].shape == (10, 32, 32, 3) and found["pictures"].dtype == "uint8"
    assert found["kernels"].shape[1] == 9


def test_the_dockerfile_builds_what_the_project_is():
    """It can't be built here: what it copies is what a build needs, what it installs is there, what it runs exists."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    steps = [line.split(maxsplit=1) for line in text.splitlines() if line.strip() and not line.startswith("#")]
    kinds = [kind for kind, _ in steps]
    assert kinds[0] == "FROM" and set(kinds) <= {"FROM", "RUN", "COPY", "WORKDIR", "ENV", "CMD"}
    (version,) = re.findall(r"^python:([\d.]+)-slim$", steps[0][1])
    assert SpecifierSet(PROJECT["requires-python"]).contains(version)
    assert f"Programming Language :: Python :: {version}" in PROJECT["classifiers"]
    copied = {word.rstrip("/") for kind, words in steps if kind == "COPY" for word in words.split()[:-1]}
    needed = {"pyproject.toml", PROJECT["readme"], *PROJECT["license-files"], "sit", "atconv"}
    assert copied == needed and all((ROOT / name).exists() for name in copied)
    kept = {line[1:].rstrip("/") for line in (ROOT / ".dockerignore").read_text().split() if line.startswith("!")}
    assert kept == needed
    installs = re.findall(r'pip install [^&|]*"\.(?:\[([\w,-]+)\])?"', text)
    assert len(installs) == 1
    assert {extra for extra in installs[0].split(",") if extra} <= set(PROJECT["optional-dependencies"])
    (command,) = [json.loads(words) for kind, words in steps if kind == "CMD"]
    assert command[0] in PROJECT["scripts"] and command[1:] == ["--help"]
