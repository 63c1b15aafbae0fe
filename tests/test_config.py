"""Recipes, overrides and the mistakes in them."""

from __future__ import annotations

import dataclasses

import pytest
import yaml

from sit.config import TrainConfig, check_same_run, from_mapping, known_recipes, load_recipe, parse_train_arguments
from sit.errors import UserError


def test_every_recipe_loads_and_survives_a_round_trip():
    assert "digits" in known_recipes()
    for name in known_recipes():
        config = load_recipe(name)
        assert from_mapping(yaml.safe_load(config.to_yaml()), name) == config


def test_command_line_over_recipe_over_defaults(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("steps: 7\nbetas: [0.8, 0.95]\nbatch_size: 6\n")
    parsed = parse_train_arguments(["--recipe", str(recipe), "--batch-size=4", "--mixer", "attention,atconv"])
    expected = dict(steps=7, betas=(0.8, 0.95), batch_size=4, mixer="attention,atconv")
    assert parsed.config == dataclasses.replace(TrainConfig(), **expected)
    assert parse_train_arguments([]).config == load_recipe("digits")
    recipe.write_text("base: digits\nsteps: 3")
    assert load_recipe(str(recipe)) == dataclasses.replace(load_recipe("digits"), steps=3)


def test_a_resumed_run_has_its_own_config(tmp_path):
    (tmp_path / "config.yaml").write_text(TrainConfig(steps=3, mixer="atconv").to_yaml())
    config = parse_train_arguments(["--resume", str(tmp_path), "--steps", "5"]).config
    assert (config.mixer, config.steps, config.resume) == ("atconv", 5, str(tmp_path))
    check_same_run(config, tmp_path)
    with pytest.raises(UserError, match="--mixer attention can't continue the run .* begun with atconv"):
        check_same_run(dataclasses.replace(config, mixer="attention"), tmp_path)


@pytest.mark.parametrize(
    "content, words",
    [
        ("stesp: 5", "unknown setting 'stesp'"),
        ("steps: many", "steps: 'many' is not an instance of int"),
        ("interpolant: cubic", "interpolant: 'cubic' is not any of"),
        ("steps: 0", "--steps must be at least 1"),
        ("cpu_threads: 0", "--cpu-threads must be at least 1, not 0"),
        ("cpu_threads: -2", "--cpu-threads must be at least 1, not -2"),
        ("class_dropout: 1.5", r"--class-dropout must be in \[0, 1\)"),
        ("betas: [1.5, 0.9]", r"--betas must be two numbers in \[0, 1\), not 1.5 0.9"),
        ("learning_rate: -1.0", "--learning-rate must be a number of at least 0, not -1.0"),
        ("final_learning_rate: .nan", "--final-learning-rate must be a number of at least 0, not nan"),
        ("preview_steps: 1", "--preview-steps 1 leaves the SDE no step before its last one"),
        ("preview_cfg_scale: -1.5", "--preview-cfg-scale must be a number of at least 0, not -1.5"),
        ("gradient_accumulation: 3\nbatch_size: 8", "--batch-size 8 can't be divided"),
        ("- a", "must be a mapping"),
        ("a: [", "not readable YAML"),
    ],
)
def test_mistakes_in_a_recipe(tmp_path, content, words):
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=words):
        load_recipe(str(path))


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--recipe", "imaginary"], "--recipe imaginary: neither a file nor a recipe; the recipes are .*digits"),
        (["--gpus", "0"], "--gpus must be at least 1"),
        (["--images-per-second", "-1"], "--images-per-second must be positive"),
        (["--resume", "/nowhere"], "--resume /nowhere: neither a run's folder"),
        (["--recipe", "digits", "--resume", "/nowhere"], "exclude each other"),
    ],
)
def test_mistakes_on_the_command_line(arguments, words):
    with pytest.raises(UserError, match=words):
        parse_train_arguments(arguments)
