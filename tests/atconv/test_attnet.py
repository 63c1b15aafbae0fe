"""AttNet against the published table and layout, a plain NCHW restatement in float64, and what timm asks of a model."""

from __future__ import annotations

import copy
import functools

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models._features_fx import create_feature_extractor
from timm.optim import param_groups_weight_decay

import atconv.attnet  # noqa: F401 - registers the models
from atconv.attnet import AttNet, checkpoint_filter_fn

SMALL = {"depths": (1, 2, 1, 1), "dims": (8, 12, 16, 20), "num_classes": 5}


def small(name: str = "attnet_t2", **options) -> AttNet:
    """A small network of a registered size's kind, every weight and statistic of it random, in eval mode."""
    torch.manual_seed(0)
    model = timm.create_model(name, **(SMALL | options)).eval()
    for key, value in [*model.named_parameters(), *model.named_buffers()]:
        if value.is_floating_point():
            value.data.copy_(torch.rand_like(value) + 0.5 if "running_var" in key else torch.randn_like(value) * 0.3)
    return model


@functools.cache
def unmade(name: str) -> AttNet:
    """A registered size without memory, not to be changed."""
    with torch.device("meta"):
        return timm.create_model(name)


def published(model: AttNet) -> dict[str, torch.Tensor]:
    """A model's weights in the published layout: 1x1 convolutions instead of linear layers, but for two of them."""
    return {
        key: value[..., None, None] if value.ndim == 2 and key != "head.weight" and "kernel_gen" not in key else value
        for key, value in model.state_dict().items()
    }


def restated(weights: dict[str, torch.Tensor], x: torch.Tensor, depths: tuple[int, ...]) -> torch.Tensor:
    """The published network, channels first, in plain operations, from weights in the published layout."""

    def conv(key, x, **options):
        return F.conv2d(x, weights[f"{key}.weight"], weights.get(f"{key}.bias"), **options)

    def conv_norm(key, x):
        x = conv(f"{key}.0", x, stride=2, padding=1)
        mean, var, gain, bias = (
            weights[f"{key}.1.{name}"][:, None, None] for name in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / torch.sqrt(var + 1e-5) * gain + bias

    def layer_norm(key, x):
        x = x - x.mean(1, keepdim=True)
        x = x / torch.sqrt(x.square().mean(1, keepdim=True) + 1e-6)
        return x * weights[f"{key}.weight"][:, None, None] + weights[f"{key}.bias"][:, None, None]

    def atconv(key, x):
        b, c, h, w = x.shape
        pooled = F.adaptive_avg_pool1d(conv(f"{key}.kernel_proj", x).flatten(2), 9)
        kernels = F.linear(F.gelu(pooled), weights[f"{key}.kernel_gen.weight"], weights[f"{key}.kernel_gen.bias"])
        share = torch.sigmoid(weights[f"{key}.difference_control"])[:, None]
        kernels = kernels - share * kernels.mean(2, keepdim=True)
        values = conv(f"{key}.x_proj", x)
        patches = F.unfold(values, 3, padding=1).view(b, c, 9, h * w)
        return conv(f"{key}.proj", (patches * kernels[..., None]).sum(2).view(b, c, h, w))

    def gated(key, x):
        gate, value = conv(f"{key}.fc1", x).chunk(2, 1)
        x = F.gelu(conv(f"{key}.dwconv", gate, padding=1, groups=gate.shape[1])) * value
        if f"{key}.norm_layer.weight" in weights:
            x = x / torch.sqrt(x.square().mean(1, keepdim=True) + 1e-6)
            x = x * weights[f"{key}.norm_layer.weight"][:, None, None]
        return conv(f"{key}.fc2", x)

    for stage, depth in enumerate(depths):
        if stage == 0:
            x = conv_norm("downsample_layers.0.2", F.gelu(conv_norm("downsample_layers.0.0", x)))
        else:
            x = conv_norm(f"downsample_layers.{stage}", x)
        for block in range(depth):
            key = f"stages.{stage}.{block}"
            for number, branch, name in ((1, atconv, "token_mixer"), (2, gated, "channel_mixer")):
                scale = weights.get(f"{key}.layer_scale_{number}.gamma", torch.ones(1).double())[:, None, None]
                x = x + scale * branch(f"{key}.{name}", layer_norm(f"{key}.norm_{number}", x))
    x = F.layer_norm(x.mean((2, 3)), x.shape[1:2], weights["norm.weight"], weights["norm.bias"], 1e-5)
    return F.linear(x, weights["head.weight"], weights["head.bias"])


@pytest.mark.parametrize(
    "name, millions",
    [
        ("attnet_xxs", 2.854),
        ("attnet_xs", 5.555),
        ("attnet_s", 7.681),
        ("attnet_t1", 13.715),
        ("attnet_t2", 27.011),
        ("attnet_t3", 49.176),
        ("attnet_t4", 87.320),
    ],
)
def test_parameter_counts_are_the_published_ones(name, millions):
    assert round(sum(p.numel() for p in unmade(name).parameters()) / 1e6, 3) == millions


def test_keys_are_the_published_ones():
    tiny, full = (unmade(name).state_dict() for name in ("attnet_xxs", "attnet_t1"))
    block = {f"token_mixer.{layer}.{kind}" for layer in ("kernel_proj", "kernel_gen", "x_proj", "proj")
             for kind in ("weight", "bias")}  # fmt: skip
    block |= {f"channel_mixer.{layer}.{kind}" for layer in ("fc1", "dwconv", "fc2") for kind in ("weight", "bias")}
    block |= {"token_mixer.difference_control", "norm_1.weight", "norm_1.bias", "norm_2.weight", "norm_2.bias"}
    richer = block | {"channel_mixer.norm_layer.weight", "layer_scale_1.gamma", "layer_scale_2.gamma"}
    for state, depths, names in ((tiny, (2, 2, 4, 2), block), (full, (2, 3, 12, 3), richer)):
        expected = {f"stages.{i}.{j}.{name}" for i, depth in enumerate(depths) for j in range(depth) for name in names}
        for conv in ("downsample_layers.0.0", "downsample_layers.0.2", *(f"downsample_layers.{i}" for i in (1, 2, 3))):
            norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
            expected |= {f"{conv}.0.weight", *(f"{conv}.1.{name}" for name in norm)}
        expected |= {"norm.weight", "norm.bias", "head.weight", "head.bias"}
        assert set(state) == expected


@pytest.mark.parametrize("name", ["attnet_xxs", "attnet_t2"])
def test_forward_is_the_plain_restatement(name):
    """For a size without and one with inner norm and layer scale, on a grid that is not square; 3 x 4 at the end."""
    model = small(name).double()
    x = torch.randn(2, 3, 76, 120, dtype=torch.float64)
    expected = restated(published(model), x, SMALL["depths"])
    torch.testing.assert_close(model(x), expected)
    assert expected.std() > 0.1


def test_torch_fx_traces_it():
    network, images = small(), torch.randn(2, 3, 96, 96)
    extractor = create_feature_extractor(network, {"downsample_layers.1": "second", "head": "logits"})
    seen = []
    network.downsample_layers[1].register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        found = extractor(images)
        torch.testing.assert_close(found["logits"], network(images))
    torch.testing.assert_close(found["second"], seen[-1])


def test_vmap_gives_each_images_own_result():
    network, images = small().eval(), torch.randn(3, 3, 96, 96)
    with torch.no_grad():
        mapped = torch.func.vmap(lambda image: network(image[None])[0])(images)
        torch.testing.assert_close(mapped, network(images), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("error::UserWarning")
def test_autocast_stays_near_float32_without_a_warning():
    model, x = small(), torch.randn(2, 3, 96, 96)
    expected = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(x)
    assert half.dtype == torch.bfloat16
    assert (half - expected).norm() < 0.05 * expected.norm()


def test_copies_load_the_published_layout_too():
    model = small()
    weights, copied = published(model), copy.deepcopy(model)
    copied.reset_classifier(2)
    del model
    weights["head.weight"], weights["head.bias"] = torch.zeros(2, 20), torch.ones(2)
    copied.load_state_dict(weights)
    torch.testing.assert_close(copied(torch.randn(1, 3, 96, 96)), torch.ones(1, 2))


def test_working_at_the_published_resolution():
    """224 pixels end in a grid of 7 x 7, pooled to nine taps; and the least image that ends in nine tokens works."""
    model = small("attnet_xxs")
    features = model.forward_features(torch.randn(1, 3, 224, 224))
    assert features.shape == (1, 20, 7, 7)
    assert model(torch.randn(1, *model.pretrained_cfg["min_input_size"])).shape == (1, 5)


def test_too_small_images_are_refused():
    with pytest.raises(ValueError, match="images of 64 x 64 pixels leave stage 3 a grid of 2 x 2, fewer tokens than"):
        small()(torch.randn(1, 3, 64, 64))
    assert small(stem_stride=2)(torch.randn(1, 3, 64, 64)).shape == (1, 5)
    assert small(kernel_size=1)(torch.randn(1, 3, 32, 32)).shape == (1, 5)
    assert small(routing=False)(torch.randn(1, 3, 32, 32)).shape == (1, 5)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"stem_stride": 3}, "`stem_stride` must be 4, 2 or 1"),
        ({"dims": (8, 8)}, "must be of one length"),
        ({"global_pool": "catavgmax"}, "`global_pool` must be"),
        ({"kernel_size": 4}, "`kernel_size` must be an odd number"),
        ({"kernel_size": "3"}, "`kernel_size` must be an odd number, not '3'"),
    ],
)
def test_impossible_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("attnet_xxs", **(SMALL | options))


@pytest.mark.parametrize("stem_stride", [4, 2, 1])
def test_features_only(stem_stride):
    model = timm.create_model("attnet_xxs", features_only=True, stem_stride=stem_stride, **SMALL)
    assert model.feature_info.channels() == [8, 12, 16, 20]
    assert model.feature_info.reduction() == [stem_stride * 2**i for i in range(4)]
    side = 24 * stem_stride
    shapes = [tuple(feature.shape) for feature in model(torch.randn(1, 3, side, side))]
    assert shapes == [(1, 8, 24, 24), (1, 12, 12, 12), (1, 16, 6, 6), (1, 20, 3, 3)]


@pytest.mark.parametrize("feature_cls", ["hook", "fx"])
def test_features_by_timms_other_ways_say_that_they_are_channels_last(feature_cls):
    model = timm.create_model("attnet_xxs", features_only=True, feature_cls=feature_cls, out_indices=(1, 3), **SMALL)
    shapes = [tuple(feature.shape) for feature in model(torch.randn(1, 3, 96, 128))]
    assert shapes == [(1, 12, 16, 12), (1, 3, 4, 20)] and model.output_fmt == "NHWC"


def test_ways_to_features_that_find_no_stage_are_refused():
    with pytest.raises(ValueError, match="`feature_cls=list` is not for AttNet: leave it out, or take hook or fx"):
        timm.create_model("attnet_xxs", features_only=True, feature_cls="list", **SMALL)


def test_features_of_chosen_stages_are_those_of_the_whole_network():
    whole = small()
    x = torch.randn(1, 3, 96, 96)
    final, stages = whole.forward_intermediates(x)
    torch.testing.assert_close(final, whole.forward_features(x))
    torch.testing.assert_close(stages[3], final)
    (last,) = whole.forward_intermediates(x, indices=1, output_fmt="NHWC", intermediates_only=True)
    torch.testing.assert_close(last.permute(0, 3, 1, 2), final)
    some = timm.create_model("attnet_t2", features_only=True, out_indices=(0, 2), **SMALL).eval()
    found = some.model.load_state_dict(whole.state_dict(), strict=False)
    assert not found.missing_keys and all(key.startswith(("stages.3", "downsample_layers.3", "norm", "head"))
                                          for key in found.unexpected_keys)  # fmt: skip
    # the grid of the last stage would be 1 x 1, but it is not asked for
    for feature, expected in zip(some(x), (stages[0], stages[2]), strict=True):
        torch.testing.assert_close(feature, expected)
    assert [feature.shape[2] for feature in some(torch.randn(1, 3, 48, 48))] == [12, 3]


def test_classifier_and_pooling():
    model = small(in_chans=1)
    x = torch.randn(2, 1, 96, 96)
    assert model.get_classifier() is model.head and model(x).shape == (2, 5)
    model.reset_classifier(7)
    assert model.num_classes == 7 and model(x).shape == (2, 7)
    assert model.forward_head(model.forward_features(x), pre_logits=True).shape == (2, 20)
    model.reset_classifier(0, "")
    assert isinstance(model.get_classifier(), torch.nn.Identity) and model(x).shape == (2, 20, 3, 3)
    # an affine norm does not commute with the mean, but the places' answers must be those of the head on each place
    dense = small(global_pool="")
    maps, features = dense(torch.randn(1, 3, 96, 96)), dense.forward_features(torch.zeros(1, 3, 96, 96))
    assert maps.shape == (1, 5, 3, 3)
    dense_zero = dense.forward_head(features)[0, :, 1, 2]
    torch.testing.assert_close(dense_zero, dense.head(dense.norm(features[0, :, 1, 2])))


def test_drop_rates_reach_their_layers():
    model = timm.create_model("attnet_t2", drop_path_rate=0.4, drop_rate=0.25, **SMALL)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4]) and model.head_drop.p == 0.25
    assert unmade("attnet_t3").stages[3][-1].drop_path.drop_prob == pytest.approx(0.4)


def test_initial_weights_are_the_published_kind():
    torch.manual_seed(0)
    model = timm.create_model("attnet_xs")
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            assert (parameter == 1e-6).all(), name
        elif name.endswith(("bias", "difference_control")):
            assert (parameter == 0).all(), name
        elif parameter.ndim == 1:
            assert (parameter == 1).all(), name
        elif parameter.numel() > 3000:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name


def test_optimizers_decay_matrices_only():
    model = timm.create_model("attnet_t2", **SMALL)
    free, decayed = param_groups_weight_decay(model, 0.05, model.no_weight_decay())
    assert free["weight_decay"] == 0 and all(parameter.ndim == 1 for parameter in free["params"])
    assert all(parameter.ndim > 1 for parameter in decayed["params"])
    names = model.no_weight_decay()
    assert "stages.3.0.layer_scale_2.gamma" in names and "stages.0.0.token_mixer.difference_control" in names


def test_groups_run_from_the_stem_to_the_head():
    from timm.models import group_parameters

    model = timm.create_model("attnet_t2", **SMALL)
    group = group_parameters(model, model.group_matcher(), reverse=True)
    assert group["downsample_layers.0.2.1.bias"] == 0 and group["stages.0.0.norm_1.bias"] == 1
    assert group["downsample_layers.1.0.weight"] == group["stages.1.0.norm_1.bias"] == 2
    assert group["stages.1.1.norm_1.bias"] == 3 and group["stages.3.0.norm_1.bias"] == 5 < group["head.weight"]
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert coarse["stages.1.1.norm_1.bias"] == coarse["downsample_layers.1.0.weight"] == 2


def test_gradient_checkpointing_gives_the_same_gradients():
    model = small().train()
    x = torch.randn(2, 3, 96, 96)
    answers = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        torch.manual_seed(1)  # the same drop paths
        model.zero_grad()
        out = model(x)
        out.square().sum().backward()
        answers.append([out.detach(), *(p.grad.clone() for p in model.parameters())])
    for plain, recomputed in zip(*answers, strict=True):
        torch.testing.assert_close(recomputed, plain)
    calls = []
    model.stages[1][0].register_forward_pre_hook(lambda *_: calls.append(1))
    model(x).sum().backward()
    assert len(calls) == 2  # it is recomputed, and so not kept


@pytest.mark.parametrize("nesting", [None, "model", "state_dict", "state_dict_ema"])
@pytest.mark.parametrize("convolutions", [True, False])
def test_local_files_are_loaded(tmp_path, nesting, convolutions):
    model, x = small(), torch.randn(1, 3, 96, 96)
    weights = published(model) if convolutions else model.state_dict()
    assert weights["stages.0.0.channel_mixer.fc1.weight"].ndim == (4 if convolutions else 2)
    weights = {f"module.{key}": value for key, value in weights.items()}
    torch.save({nesting: weights, "epoch": 3} if nesting else weights, tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth"), "num_classes": 5}
    loaded = timm.create_model("attnet_t2", pretrained=True, pretrained_cfg_overlay=overlay, **SMALL).eval()
    torch.testing.assert_close(loaded(x), model(x))


def test_other_classes_channels_and_features_adapt_a_local_file(tmp_path):
    model = small()
    torch.save({"model": published(model)}, tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth"), "num_classes": 5}
    options = SMALL | {"pretrained": True, "pretrained_cfg_overlay": overlay}
    gray = timm.create_model("attnet_t2", **(options | {"num_classes": 2, "in_chans": 1})).eval()
    x = torch.randn(1, 1, 96, 96)
    torch.testing.assert_close(gray.forward_features(x), model.forward_features(x.expand(-1, 3, -1, -1)))
    features = timm.create_model("attnet_t2", features_only=True, **options).eval()
    torch.testing.assert_close(features(x.expand(-1, 3, -1, -1))[-1], model.forward_features(x.expand(-1, 3, -1, -1)))


def test_the_filter_prefers_averages_and_leaves_its_argument_alone():
    model = small()
    averaged = {f"_orig_mod.{key}": value for key, value in published(model).items()}
    checkpoint = {"state_dict": {}, "state_dict_ema": averaged, "epoch": 1}
    found = checkpoint_filter_fn(checkpoint, model)
    assert {key: value.shape for key, value in found.items()} == {
        key: value.shape for key, value in model.state_dict().items()
    }
    assert averaged["_orig_mod.stages.0.0.token_mixer.proj.weight"].ndim == 4


def test_plain_load_state_dict_accepts_the_published_layout():
    """And what has another shape is still refused."""
    model = small()
    weights = published(model)
    small().load_state_dict(weights)
    weights["stages.0.0.token_mixer.proj.weight"] = torch.zeros(8, 8, 3, 3)
    with pytest.raises(RuntimeError, match="size mismatch for stages.0.0.token_mixer.proj.weight"):
        model.load_state_dict(weights)


def test_no_weights_are_claimed():
    assert "attnet_t2" in timm.list_models("attnet*") and not timm.list_models("attnet*", pretrained=True)
    with pytest.raises(RuntimeError, match="No pretrained weights exist for attnet_t2"):
        timm.create_model("attnet_t2", pretrained=True)
