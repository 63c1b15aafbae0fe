"""Recipes, overrides and the mistakes in them."""

from __future__ import annotations

import dataclasses

import pytest
import yaml

from sit.training.cli import parse_train_arguments
from sit.training.config import TrainConfig
from sit.training.recipes import check_same_run, from_mapping, known_recipes, load_recipe
from sit.utils.errors import UserError


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


FIXED = dict(
    data="a/folder",
    image_size=64,
    flip=True,
    vae="a/vae",
    model="SiT-S/4",
    mixer="atconv",
    learn_sigma=True,
    class_dropout=0.2,
    interpolant="gvp",
    prediction="noise",
    loss_weight="likelihood",
    train_eps=0.01,
    batch_size=128,
    betas=(0.8, 0.95),
    weight_decay=0.1,
    ema_decay=0.99,
    seed=1,
    repa="an/encoder",
    repa_weight=0.25,
    repa_block=4,
)
"""The settings that a run keeps, each with a value that is not its default."""

FREE = dict(
    sample_eps=0.01,
    steps=2000,
    gradient_accumulation=2,
    learning_rate=2e-4,
    warmup_steps=10,
    final_learning_rate=1e-5,
    max_grad_norm=1.0,
    mixed_precision="bf16",
    tf32=False,
    compile=False,
    gradient_checkpointing=True,
    cpu_threads=1,
    workers=2,
    non_finite_limit=5,
    output_dir="elsewhere",
    resume="auto",
    trackers=(),
    log_every=5,
    preview_every=0,
    preview_steps=9,
    preview_cfg_scale=2.0,
    checkpoint_every=7,
    keep_last=0,
    keep_every=70,
)
"""The settings that may be another when a run goes on."""


@pytest.mark.parametrize("name", FIXED)
def test_what_a_run_keeps_to_its_end(tmp_path, name):
    (tmp_path / "config.yaml").write_text(TrainConfig().to_yaml())
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} .* can't continue the run .* begun with "):
        check_same_run(dataclasses.replace(TrainConfig(), **{name: FIXED[name]}), tmp_path)


def test_what_may_change_when_a_run_goes_on(tmp_path):
    default = dataclasses.asdict(TrainConfig())
    assert FIXED.keys() | FREE.keys() == default.keys() and not FIXED.keys() & FREE.keys()
    assert not [name for name, value in (FIXED | FREE).items() if value == default[name]]
    (tmp_path / "config.yaml").write_text(TrainConfig().to_yaml())
    check_same_run(dataclasses.replace(TrainConfig(), **FREE), tmp_path)


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
