"""docs/published-runs.md tells what the recipes do: every setting that one writes, with its value."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from sit.training.recipes import RECIPES, load_recipe

PAGE = (Path(__file__).parents[2] / "docs" / "published-runs.md").read_text()
PARTS = re.split(r"^## ", PAGE, flags=re.M)[1:]
SECTIONS = {name: part for part in PARTS for name in re.findall(r"--recipe ([\w-]+)", part)}


def told(section: str) -> dict[str, object]:
    """The settings in the last column of a section's table, as YAML reads them."""
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    spans = [span for row in rows for span in re.findall(r"`(\w+: [^`]+)`", row[-1])]
    found = [yaml.safe_load(span) for span in spans]
    assert len({name for one in found for name in one}) == len(found), "each once"
    return {name: value for one in found for name, value in one.items()}


def test_every_recipe_of_a_published_file_has_its_table():
    assert SECTIONS.keys() == {"sit-xl2-400k", "atconv-ffhq512", "atconv-repa-imagenet256"}


@pytest.mark.parametrize("name", SECTIONS)
def test_the_table_is_the_recipe(name):
    written = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    assert told(SECTIONS[name]) == written
    config = load_recipe(name)
    for setting, value in written.items():
        assert getattr(config, setting) == (tuple(value) if isinstance(value, list) else value), setting


def test_what_the_published_scripts_have_in_common():
    """AdamW at 1e-4 without decay, and an average of 0.9999 without a warm-up: read off their code, by hand."""
    for name in SECTIONS:
        config = load_recipe(name)
        assert (config.learning_rate, config.weight_decay, config.betas) == (1e-4, 0.0, (0.9, 0.999))
        assert (config.ema_decay, config.ema_warmup, config.steps) == (0.9999, False, 400_000)
        assert (config.warmup_steps, config.final_learning_rate, config.interpolant) == (0, None, "linear")
        assert (config.prediction, config.time_distribution) == ("velocity", "uniform")
    sit, ffhq, repa = (load_recipe(name) for name in SECTIONS)
    assert (sit.mixed_precision, sit.tf32, sit.batch_size, sit.max_grad_norm) == ("no", True, 256, None)
    assert (ffhq.mixed_precision, ffhq.class_dropout, ffhq.batch_size, ffhq.image_size) == ("bf16", 0.0, 128, 512)
    assert (repa.repa_weight, repa.repa_block, repa.max_grad_norm, repa.flip) == (0.5, 8, 1.0, False)
