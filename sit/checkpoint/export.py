"""Weights in the published layouts: keys and shapes changed, values never."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch

from sit.checkpoint.published import ACTIVATIONS, CONVOLUTIONS
from sit.mixers import parse_mixers
from sit.model import SiT
from sit.utils.errors import UserError


def to_layout(
    state: Mapping[str, torch.Tensor], config: Mapping[str, Any], layout: Literal["published", "repa"]
) -> dict[str, torch.Tensor]:
    """Our weights in a published layout, in the published order of keys, values untouched.

    Args:
        state: weights by our keys.
        config: our network's configuration.
        layout: ``published`` for SiT, and ATConv's SiT variant and hybrid; ``repa`` for its REPA variant.

    Raises:
        UserError: the network's time, block or a mixer is not of the layout, whose code would misread or refuse the
            weights.
    """
    reverse = bool(config.get("time_reversed", False))
    if reverse != (layout == "repa"):
        other = "repa" if reverse else "published"
        raise UserError(f"this network has the time direction of `layout={other}`; {layout} code would misread it")
    if (block := config.get("block", "published")) != "published":
        raise UserError(f"`layout={layout}` has the published block alone, not a {block} one; keep it in our layout")
    if config.get("average_velocity", False):
        raise UserError(
            f"`layout={layout}` knows no average velocity, which this network predicts; keep it in our layout"
        )
    if config.get("positional_grid") is not None:
        raise UserError(
            f"`layout={layout}` lays the positional table over the network's own grid, and this one's is over "
            f"{' x '.join(map(str, config['positional_grid']))}; keep it in our layout"
        )
    _refuse_other_mixers(config["mixer"], layout)
    with torch.device("meta"):
        order = list(SiT.from_config(dict(config)).state_dict())
    converted = {}
    for name in order:
        head, is_mixer, tail = name.partition(".attn.")
        module, _, kind = tail.partition(".")
        convolutional = is_mixer and f"{head}.attn.x_proj.weight" in state
        if layout == "repa" and convolutional and module in CONVOLUTIONS and kind == "weight":
            converted[name] = state[name][:, :, None, None].contiguous()
        else:
            converted[name] = state[name].contiguous()
    return converted


def _refuse_other_mixers(pattern: str, layout: Literal["published", "repa"]) -> None:
    """Raise UserError unless the layout's code has all mixers of the pattern.

    What it has are attention and ATConv with one activation. Reading tells their other options from keys and shapes,
    except ATConv's ``backend``, which changes no result.
    """
    activation = ACTIVATIONS[layout]
    for spec in parse_mixers(pattern):
        options = {"activation": "gelu_tanh", "scope": "image", "rope": False} | spec.options  # the defaults
        made = (spec.name, options["activation"], options["scope"])
        known = not options["rope"] if spec.name == "attention" else made == ("atconv", activation, "image")
        if not known:
            raise UserError(
                f"`layout={layout}` has only attention without rope, and atconv with activation {activation} and a "
                f"kernel an image; its code would misread this network's mixer {spec}; keep it in our layout"
            )
