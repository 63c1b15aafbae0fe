"""FD-DINOv2's features: the class token of DINOv2 as its hub code computes it, on small networks of its layout."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from sit.metrics.features import dinov2_extractor, resample_as_hub
from sit.utils.errors import UserError

CPU = torch.device("cpu")
NAME = "vit_small_patch14_dinov2.lvd142m"


def cubic(x: np.ndarray) -> np.ndarray:
    """Keys' kernel with a = −3/4, by its definition."""
    x = np.abs(x)
    near = 1.25 * x**3 - 2.25 * x**2 + 1
    far = -0.75 * x**3 + 3.75 * x**2 - 6 * x + 3
    return np.where(x <= 1, near, np.where(x < 2, far, 0))


def bicubic_as_hub(grid: np.ndarray, side: int) -> np.ndarray:
    """(n, n, C) to (side, side, C): output i lies at (i + ½) n / (side + 0.1) − ½; the border's entries repeat."""
    old = len(grid)
    weights = np.zeros((side, old))
    for i in range(side):
        at = (i + 0.5) * old / (side + 0.1) - 0.5
        for tap in range(int(np.floor(at)) - 1, int(np.floor(at)) + 3):
            weights[i, min(max(tap, 0), old - 1)] += cubic(np.array(at - tap))
    return np.einsum("ia,jb,abc->ijc", weights, weights, grid)


@pytest.mark.parametrize("old, side", [(37, 16), (37, 11), (5, 9)])
def test_the_table_is_resampled_by_the_hubs_formula(old, side):
    table = torch.randn(1, 1 + old**2, 3, generator=torch.Generator().manual_seed(0))
    ours = resample_as_hub(table, side)
    expected = bicubic_as_hub(table[0, 1:].double().reshape(old, old, 3).numpy(), side)
    assert torch.equal(ours[:, 0], table[:, 0])
    np.testing.assert_allclose(ours[0, 1:].reshape(side, side, 3).numpy(), expected, atol=1e-5)
    assert resample_as_hub(table, old) is table


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of the small network with random weights, its table of 37 × 37 positions as it was trained."""
    torch.manual_seed(0)
    network = timm.create_model(NAME, num_classes=0, global_pool="token").eval()
    network.pos_embed.data.normal_()  # so that positions decide
    for block in network.blocks:
        for scale in (block.ls1, block.ls2):
            scale.gamma.data.fill_(0.5)
    path = tmp_path_factory.mktemp("dinov2") / "small.safetensors"
    save_file(network.state_dict(), path)
    return network, path


def test_the_class_token_is_the_hubs(weights):
    """Against timm's network, given positions by the formula above, on images that PIL resized."""
    network, path = weights
    images = np.random.default_rng(0).integers(0, 256, size=(2, 64, 64, 3), dtype=np.uint8)
    given = torch.from_numpy(images).permute(0, 3, 1, 2)
    found = dinov2_extractor(CPU, str(path), model=NAME)(given)["features"]

    grid = network.pos_embed[0, 1:].detach().double().reshape(37, 37, -1).numpy()
    positions = torch.from_numpy(bicubic_as_hub(grid, 16)).float().flatten(0, 1)[None]
    plain = timm.create_model(NAME, img_size=224, num_classes=0, global_pool="token").eval()
    plain.load_state_dict(network.state_dict() | {"pos_embed": torch.cat([network.pos_embed[:, :1], positions], dim=1)})
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))

    def tokens(inputs: torch.Tensor) -> np.ndarray:
        with torch.no_grad():
            return plain.forward_features((inputs - mean) / std)[:, 0].numpy()

    resized = F.interpolate(given.float(), size=(224, 224), mode="bicubic", antialias=True).clamp(0, 255) / 255
    np.testing.assert_allclose(found, tokens(resized), atol=1e-4)
    by_pil = [np.array(Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC)) for image in images]
    inputs = torch.from_numpy(np.stack(by_pil)).permute(0, 3, 1, 2).float() / 255
    spread = np.abs(found[0] - found[1]).mean()
    assert np.abs(found - tokens(inputs)).mean() < 0.05 * spread  # PIL rounds to whole numbers


def test_weights_that_can_not_be_had(tmp_path):
    with pytest.raises(UserError, match="`dinov2_weights=.*none`: no such file"):
        dinov2_extractor(CPU, str(tmp_path / "none"))
    (tmp_path / "bad").write_bytes(b"x")
    with pytest.raises(UserError, match="the DINOv2 weights can't be had"):
        dinov2_extractor(CPU, str(tmp_path / "bad"), model=NAME)
