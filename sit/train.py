"""``python -m sit.train`` and ``sit-train``, which are ``python train.py`` from any folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sit.utils.signals import TRAINING, ended_by_signals

if TYPE_CHECKING:
    import torch

    from sit.metrics.few_samples import FewSamples
    from sit.training.config import TrainConfig


def main() -> None:
    """The command, from its first line on."""
    with ended_by_signals(TRAINING, "the checkpoints are as they were; start again with --resume auto to go on"):
        from sit.training.cli import main as command  # takes a moment, in which signals may come

        command(evaluation_of_run)


def evaluation_of_run(config: TrainConfig, device: torch.device) -> FewSamples:
    """What ``--eval-every`` evaluates a run by: metrics, of which training knows nothing."""
    from sit.metrics.few_samples import FewSamples
    from sit.sampling.config import SamplerConfig

    sampler = SamplerConfig(steps=config.preview_steps, cfg_scale=config.preview_guidance).resolve(config.averages)
    reference = config.eval_reference or "digits"
    options = dict(seed=config.seed, image_size=config.image_size, device=device)
    return FewSamples(reference, config.eval_samples, sampler, **options)


if __name__ == "__main__":
    main()
