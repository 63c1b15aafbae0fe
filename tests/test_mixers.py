"""The mixer slot: registry, patterns, entry points, and attention against its formula."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from sit.errors import UserError
from sit.mixers import (
    MixerSpec,
    build_mixer,
    known_mixers,
    needs_positional_embedding,
    parse_mixers,
    register_mixer,
    registry,
)


def test_patterns():
    assert parse_mixers("attention") == [MixerSpec("attention")]
    specs = parse_mixers("attention, atconv:kernel_size=5:inhibition=false")
    assert specs == [MixerSpec("attention"), MixerSpec("atconv", {"kernel_size": 5, "inhibition": False})]
    assert ",".join(map(str, specs)) == "attention,atconv:kernel_size=5:inhibition=false"
    assert needs_positional_embedding(specs) and not needs_positional_embedding(specs[1:])


@pytest.mark.parametrize(
    "pattern, words",
    [
        ("mamba", "unknown mixer 'mamba'; known mixers: .*atconv, attention, depthwise"),
        ("attention,", "unknown mixer ''"),
        ("atconv:5", "'5' is not option=value"),
        ("atconv:size=5", "no option 'size'; its options are .*kernel_size"),
    ],
)
def test_bad_patterns(pattern, words):
    with pytest.raises(UserError, match=words):
        parse_mixers(pattern)


def test_values_that_a_mixer_refuses_are_named():
    with pytest.raises(UserError, match="'attention' with 10 channels and 3 heads"):
        build_mixer(MixerSpec("attention"), 10, 3)


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
    program = (
        "import torch\n"
        "from sit.errors import UserError\n"
        "from sit.model import SiT\n"
        "m = SiT(input_size=4, patch_size=1, hidden_size=8, depth=2, num_heads=2, num_classes=2, mixer='shift:by=2')\n"
        "print([b.attn.by for b in m.blocks], m.config.positional_embedding)\n"
        "try:\n"
        "    SiT(mixer='broken')\n"
        "except UserError as error:\n"
        "    print(error)\n"
    )
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{program}"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert out[0] == "[2, 2] False"
    assert out[1].startswith("mixer 'broken' of stranger:Missing can't be loaded")


def test_attention_is_softmax_of_scaled_products():
    torch.manual_seed(0)
    mixer = build_mixer(MixerSpec("attention"), 12, 3).double()
    x = torch.randn(2, 6, 12).double()
    q, k, v = (x @ mixer.qkv.weight.T + mixer.qkv.bias).chunk(3, dim=-1)
    heads = []
    for h in range(3):
        part = slice(4 * h, 4 * h + 4)
        scores = torch.exp(q[..., part] @ k[..., part].transpose(1, 2) / 2)
        heads.append(scores / scores.sum(-1, keepdim=True) @ v[..., part])
    expected = torch.cat(heads, -1) @ mixer.proj.weight.T + mixer.proj.bias
    torch.testing.assert_close(mixer(x, (2, 3)), expected)
