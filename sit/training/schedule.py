"""The learning rate over the steps of a run."""

from __future__ import annotations

import math

from sit.training.config import TrainConfig


def learning_rate_at(step: int, config: TrainConfig) -> float:
    """The learning rate of optimizer step ``step``, counted from 0.

    It rises linearly over the warm-up, and then stays or falls by half a cosine to its final value.
    """
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.final_learning_rate is None:
        return warm * config.learning_rate
    done = min(1.0, max(0, step - config.warmup_steps) / max(1, config.steps - config.warmup_steps))
    cosine = 0.5 * (1 + math.cos(math.pi * done))
    return warm * (config.final_learning_rate + (config.learning_rate - config.final_learning_rate) * cosine)
