"""Token mixers: the slot (:mod:`sit.mixers.registry`) and what this package puts into it, one mixer a module."""

from __future__ import annotations

from sit.mixers.attention import Attention
from sit.mixers.deformable import Deformable
from sit.mixers.depthwise import Depthwise
from sit.mixers.dico import DiCo
from sit.mixers.linear_attention import LinearAttention
from sit.mixers.neighborhood import Neighborhood
from sit.mixers.registry import (
    ENTRY_POINT_GROUP,
    MixerSpec,
    build_mixer,
    known_mixers,
    needs_positional_embedding,
    parse_mixers,
    register_mixer,
)

__all__ = [
    "ENTRY_POINT_GROUP",
    "Attention",
    "Deformable",
    "Depthwise",
    "DiCo",
    "LinearAttention",
    "MixerSpec",
    "Neighborhood",
    "build_mixer",
    "known_mixers",
    "needs_positional_embedding",
    "parse_mixers",
    "register_mixer",
]
