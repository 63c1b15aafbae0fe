"""Recipes, overrides and the mistakes in them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from sit.model import create_model
from sit.training.cli import parse_train_arguments
from sit.training.config import TrainConfig, check_heeded, check_needed, fixed_fields, idle_eps
from sit.training.recipes import (
    check_same_run,
    from_mapping,
    known_recipes,
    load_recipe,
    load_run_settings,
    run_settings,
)
from sit.training.start import find_start
from sit.transport.transport import Transport
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


@pytest.mark.parametrize("written, meant", [("on", "on"), ("off", "off"), ("'on'", "on"), ("auto", "auto")])
def test_a_bare_on_or_off_in_a_recipe_is_no_boolean(tmp_path, written, meant):
    """YAML 1.1 reads it as one; elsewhere a boolean stays one, and is refused where none is meant."""
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"positional_embedding: {written}\nflip: on\n")
    config = load_recipe(str(recipe))
    assert (config.positional_embedding, config.flip) == (meant, True)
    recipe.write_text("interpolant: on\n")
    with pytest.raises(UserError, match="interpolant: True is not linear or gvp or vp"):
        load_recipe(str(recipe))


def test_a_resumed_run_has_its_own_config(tmp_path):
    (tmp_path / "config.yaml").write_text(TrainConfig(steps=3, mixer="atconv").to_yaml())
    config = parse_train_arguments(["--resume", str(tmp_path), "--steps", "5"]).config
    assert (config.mixer, config.steps, config.resume) == ("atconv", 5, str(tmp_path))
    check_same_run(config, tmp_path)
    with pytest.raises(UserError, match="`mixer=attention` can't continue the run .* begun with atconv"):
        check_same_run(dataclasses.replace(config, mixer="attention"), tmp_path)


FIXED = dict(
    data="a/folder",
    image_size=64,
    flip=True,
    vae="a/vae",
    model="SiT-S/4",
    mixer="atconv",
    positional_embedding="on",
    block="modern",
    learn_sigma=True,
    class_dropout=0.2,
    interpolant="gvp",
    prediction="noise",
    loss_weight="likelihood",
    time_distribution="logit-normal",
    train_eps=0.01,
    batch_size=128,
    optimizer="muon",
    betas=(0.8, 0.95),
    weight_decay=0.1,
    ema_decay=0.99,
    ema_warmup=False,
    posthoc_ema=(0.05, 0.1),
    seed=1,
    seed_weights=2,
    seed_order=2,
    seed_noise=2,
    heldout="auto",
    meanflow_share=0.5,
    meanflow_omega=2.0,
    meanflow_kappa=0.5,
    meanflow_weight_power=0.75,
    meanflow_weight_floor=0.01,
    init_from="a/run",
    freeze=("x_embedder.*",),
    train_only=("blocks.*",),
    distill_from="a/run",
    distill_steps=10,
    distill_weight=0.5,
    repa="an/encoder",
    repa_weight=0.25,
    repa_block=4,
    repa_projector="conv",
    repa_spatial_norm=0.6,
    repa_until=5,
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
    project="mine",
    log_every=5,
    eval_every=5,
    eval_samples=9,
    eval_reference="digits:heldout",
    heldout_every=10,
    heldout_images=100,
    preview_every=0,
    preview_steps=9,
    preview_cfg_scale=2.0,
    checkpoint_every=7,
    posthoc_ema_every=10,
    keep_last=0,
    keep_every=70,
    repa_images="elsewhere",
)
"""The settings that may be another when a run goes on."""


BESIDE = dict(distill_from="another/run", distill_steps=5)
"""settings that can't be without each other"""


@pytest.mark.parametrize("name", FIXED)
def test_what_a_run_keeps_to_its_end(tmp_path, name):
    begun = TrainConfig(**BESIDE if name in BESIDE else {}, repa="an/encoder" if name.startswith("repa_") else None)
    (tmp_path / "config.yaml").write_text(begun.to_yaml())
    with pytest.raises(UserError, match=f"`{name}=.*` can't continue the run .* begun with "):
        check_same_run(dataclasses.replace(begun, **{name: FIXED[name]}), tmp_path)


def test_a_run_of_an_earlier_version_without_alignment_goes_on(tmp_path):
    """Its settings say 8, the default then."""
    (tmp_path / "config.yaml").write_text(TrainConfig(repa_block=8).to_yaml())
    check_same_run(TrainConfig(), tmp_path)
    (tmp_path / "config.yaml").write_text(TrainConfig(repa_block=8, repa="an/encoder").to_yaml())
    with pytest.raises(UserError, match="`repa_block=None` can't continue"):
        check_same_run(TrainConfig(repa="an/encoder"), tmp_path)


@pytest.mark.parametrize(
    "name, value, need",
    [
        ("posthoc_ema_every", 100, {"posthoc_ema": (0.1,)}), ("repa_weight", 2.0, {"repa": "an/encoder"}),
        ("repa_block", 2, {"repa": "an/encoder"}), ("repa_projector", "conv", {"repa": "an/encoder"}),
        ("distill_weight", 3.0, {"distill_from": "a", "distill_steps": 5}), ("eval_samples", 9, {"eval_every": 5}),
        ("eval_reference", "digits", {"eval_every": 5}),
    ],
)  # fmt: skip
def test_a_setting_of_what_is_off_is_refused_for_a_new_run(name, value, need, tmp_path):
    config = TrainConfig(**{name: value})
    with pytest.raises(UserError, match=f"`{name}={value}` plays no part without `{next(iter(need))}`"):
        find_start(config)
    check_needed(dataclasses.replace(config, **need))
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    find_start(dataclasses.replace(config, resume="auto", output_dir=str(tmp_path)))  # begun by an earlier version


def test_what_is_switched_off_takes_what_belongs_to_it_along(tmp_path):
    """The recipe's own settings of it; what the user gives besides is still refused."""
    assert load_recipe("atconv-repa-imagenet256").repa_block is not None
    config = parse_train_arguments(["--recipe", "atconv-repa-imagenet256", "--repa", "None"]).config
    assert config.repa is None and config.repa_block is None
    check_needed(config)
    Path(tmp_path / "mine.yaml").write_text("base: imagenet256-400k\npreview_every: 0\neval_every: 0\n")
    config = load_recipe(str(tmp_path / "mine.yaml"))
    assert (config.preview_steps, config.preview_cfg_scale) == (25, 1.5)
    check_needed(config)
    for flags in (
        "--repa-block 3", "--preview-every 0 --preview-steps 50", "--project x --trackers", "--heldout-images 9",
        "--keep-last 0 --keep-every 500", "--class-dropout 0 --preview-cfg-scale 3",
    ):  # fmt: skip
        with pytest.raises(UserError, match="plays no part without"):
            parse_train_arguments(flags.split())
    off = TrainConfig(preview_every=0, preview_steps=50, heldout_images=9)
    check_needed(off)  # a program may leave settings of what it switches off


@pytest.mark.parametrize("name", ["data", "vae", "output_dir", "init_from", "repa", "model"])
def test_an_empty_value_is_no_current_folder(name):
    """As ``--data "$DATA"`` gives it where the variable is not set."""
    with pytest.raises(UserError, match=f"`{name}` is empty: give a value, or leave it out"):
        TrainConfig(**{name: ""})


def test_none_is_not_given():
    assert parse_train_arguments(["--resume", "None", "--init-from", "None"]).config.resume is None
    assert parse_train_arguments(["--resume=None"]).config.resume is None


@pytest.mark.parametrize("changes", [dict(loss_weight="velocity"), dict(prediction="noise", train_eps=0.7)])
def test_an_objective_that_is_none_is_told_before_the_data_is_read(changes):
    with pytest.raises(UserError):
        find_start(TrainConfig(data="nowhere", **changes))


def test_words_that_yaml_reads_as_booleans(tmp_path):
    (tmp_path / "a.yaml").write_text("mixed_precision: no\npositional_embedding: off\ncompile: no\n")
    config = load_recipe(str(tmp_path / "a.yaml"))
    assert (config.mixed_precision, config.positional_embedding, config.compile) == ("no", "off", False)


@pytest.mark.parametrize("name", ["train_eps", "sample_eps"])
def test_an_eps_without_a_part_is_refused_where_users_set_it(name, tmp_path, monkeypatch):
    """By a flag, a recipe or a program; where the objective takes it, it stays."""
    monkeypatch.chdir(tmp_path)
    told = f"`{name}=0.05` plays no part with `prediction=velocity` and `interpolant=gvp`"
    flag, config = f"--{name.replace('_', '-')}", TrainConfig(**{name: 0.05}, interpolant="gvp")
    Path("mine.yaml").write_text(f"{name}: 0.05\ninterpolant: gvp\nprediction: velocity\n")
    for arguments in (["--recipe", "mine.yaml"], [flag, "0.05", "--interpolant", "gvp"]):
        with pytest.raises(UserError, match=told):
            find_start(parse_train_arguments(arguments).config)
    with pytest.raises(UserError, match=told):
        find_start(config)  # as `train` begins
    for heeded in (dict(interpolant="vp"), dict(prediction="score"), dict(prediction="noise"), {name: 0.0}):
        find_start(dataclasses.replace(config, **heeded))


@pytest.mark.parametrize("interpolant", ["linear", "gvp", "vp"])
@pytest.mark.parametrize("prediction", ["velocity", "score", "noise", "average-velocity"])
def test_those_without_a_part_are_those_that_the_transport_does_not_take(interpolant, prediction):
    if (interpolant, prediction) == ("vp", "average-velocity"):
        return  # there is none
    eps = dict(train_eps=0.01, sample_eps=0.02)
    transport = Transport(interpolant, prediction, **eps)
    idle = idle_eps(eps | dict(interpolant=interpolant, prediction=prediction))
    assert idle == [name for name, value in eps.items() if getattr(transport, name) != value]


def test_a_run_that_was_begun_with_an_eps_without_a_part_goes_on(tmp_path):
    begun = TrainConfig(train_eps=0.05, sample_eps=0.05, output_dir=str(tmp_path))
    (tmp_path / "config.yaml").write_text(run_settings(begun))
    resumed = parse_train_arguments(["--resume", str(tmp_path)]).config
    assert (resumed.train_eps, resumed.sample_eps) == (None, None)
    check_heeded(resumed)
    check_same_run(resumed, tmp_path)
    scored = dataclasses.replace(begun, prediction="score")
    (tmp_path / "config.yaml").write_text(run_settings(scored))
    assert load_run_settings(tmp_path) == scored
    with pytest.raises(UserError, match="`train_eps=None` can't continue the run"):
        check_same_run(dataclasses.replace(scored, train_eps=None), tmp_path)


def test_a_share_is_the_same_from_a_recipe_and_from_the_command_line(tmp_path):
    (tmp_path / "mine.yaml").write_text("heldout: 0.1\n")
    written, typed = (["--recipe", str(tmp_path / "mine.yaml")], ["--heldout", "0.1"])
    shares = [parse_train_arguments(arguments).config for arguments in (written, typed)]
    assert [(config.heldout, config.heldout_share) for config in shares] == [("0.1", 0.1)] * 2
    assert from_mapping(yaml.safe_load(shares[0].to_yaml()), "it").heldout == "0.1"


def test_every_setting_is_one_of_the_two():
    default = dataclasses.asdict(TrainConfig())
    assert FIXED.keys() | FREE.keys() == default.keys() and not FIXED.keys() & FREE.keys()
    assert not [name for name, value in (FIXED | FREE).items() if value == default[name]]
    assert fixed_fields() == [name for name in default if name in FIXED]


def test_what_may_change_when_a_run_goes_on(tmp_path):
    begun = TrainConfig(heldout="auto", repa="an/encoder")  # without, there is nothing to measure or to read
    (tmp_path / "config.yaml").write_text(begun.to_yaml())
    check_same_run(dataclasses.replace(begun, **FREE), tmp_path)


def test_a_run_of_before_a_setting_was_there_has_its_default(tmp_path):
    written = yaml.safe_load(TrainConfig().to_yaml())
    for setting in ("time_distribution", "ema_warmup", "posthoc_ema", "posthoc_ema_every", "block", "optimizer"):
        del written[setting]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(written))
    check_same_run(TrainConfig(), tmp_path)
    with pytest.raises(UserError, match="`time_distribution=logit-normal` .* begun with uniform"):
        check_same_run(TrainConfig(time_distribution="logit-normal"), tmp_path)
    with pytest.raises(UserError, match="`ema_warmup=False` .* begun with True"):
        check_same_run(TrainConfig(ema_warmup=False), tmp_path)
    with pytest.raises(UserError, match="`block=modern` .* begun with published"):
        check_same_run(TrainConfig(block="modern"), tmp_path)
    with pytest.raises(UserError, match="`optimizer=muon` .* begun with adamw"):
        check_same_run(TrainConfig(optimizer="muon"), tmp_path)


def test_the_help_of_each_setting_is_shown(capsys):
    with pytest.raises(SystemExit):
        parse_train_arguments(["--help"])
    shown = capsys.readouterr().out
    for name in FIXED | FREE:
        assert f"--{name.replace('_', '-')}" in shown
    words = " ".join(shown.replace("│", " ").split())
    assert "flip each image left to right with probability 0.5 (default: False)" in words
    assert "how training draws t from its interval" in words and "optimizer steps of the whole run" in words


def test_what_is_shown_is_guided_where_there_is_a_null_label_alone():
    config = TrainConfig(preview_cfg_scale=4.0)
    assert config.preview_guidance == 4
    assert dataclasses.replace(config, class_dropout=0.0).preview_guidance == 1


def test_network_and_objective_get_the_settings():
    """Each is there under its own name, with its value; the network's sizes come from the data."""
    config = TrainConfig(
        **{k: v for k, v in FIXED.items() if k != "loss_weight"}, sample_eps=0.02, loss_weight="velocity"
    )
    network = create_model(config.model, **config.network_options((3, 16, 12), 7)).config
    assert (network.mixer, network.block, network.learn_sigma, network.patch_size) == ("atconv", "modern", True, 4)
    other = TrainConfig(class_dropout=0.0, learn_sigma=False).network_options((4, 8, 8), 10)
    assert (network.positional_embedding, other["positional_embedding"]) == (True, None)
    assert network.null_class and (other["null_class"], other["learn_sigma"]) == (False, False)
    assert (network.in_channels, tuple(network.input_size), network.num_classes) == (3, (16, 12), 7)
    transport = Transport(**config.transport_options()).config
    names = ("interpolant", "prediction", "loss_weight", "train_eps", "sample_eps", "time_distribution")
    assert [transport[name] for name in names] == ["gvp", "noise", "velocity", 0.01, 0.02, "logit-normal"]


def test_a_recipe_in_the_spelling_of_flags_and_in_the_published_capitals(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("learning-rate: 0.5\ninterpolant: GVP\nmixed-precision: bfloat16\ndata: Folder\ncompile: false\n")
    config = load_recipe(str(path))
    assert (config.learning_rate, config.interpolant, config.mixed_precision) == (0.5, "gvp", "bf16")
    assert (config.data, config.compile) == ("Folder", False)


@pytest.mark.parametrize(
    "content, words",
    [
        ("stesp: 5", "unknown setting 'stesp'"),
        ("steps: many", "steps: 'many' is not a whole number"),
        ("interpolant: cubic", "interpolant: 'cubic' is not linear or gvp or vp"),
        ("steps: 0", "`steps` must be at least 1"),
        ("cpu_threads: 0", "`cpu_threads` must be at least 1, not 0"),
        ("cpu_threads: -2", "`cpu_threads` must be at least 1, not -2"),
        ("class_dropout: 1.5", r"`class_dropout` must be in \[0, 1\)"),
        ("betas: [1.5, 0.9]", r"`betas` must be two numbers in \[0, 1\), not 1.5 0.9"),
        ("repa_weight: -0.5", "`repa_weight` must be a number of at least 0, not -0.5"),
        ("weight_decay: .inf", "`weight_decay` must be a number of at least 0, not inf"),
        ("repa_weight: .inf", "`repa_weight` must be a number of at least 0, not inf"),
        ("repa_block: 0", "`repa_block` must be at least 1, not 0"),
        ("learning_rate: -1.0", "`learning_rate` must be a number of at least 0, not -1.0"),
        ("final_learning_rate: .nan", "`final_learning_rate` must be a number of at least 0, not nan"),
        ("preview_steps: 1", "`preview_steps=1` leaves the SDE no step before its last one"),
        ("preview_cfg_scale: -1.5", "`preview_cfg_scale` must be a number of at least 0, not -1.5"),
        ("gradient_accumulation: 3\nbatch_size: 8", "`batch_size=8` can't be divided"),
        ("heldout: 0", "`heldout=0`: a share must be above 0 and below 1, or a folder's path as ./0"),
        ("heldout: 1.5", "`heldout=1.5`: a share must be above 0"),
        ("heldout: .nan", "`heldout=nan`: a share must be above 0"),
        ("heldout_every: 5", "`heldout_every=5` needs held-out images: give `heldout=auto`"),
        ("heldout_every: -1", "`heldout_every` must be at least 0, not -1"),
        ("heldout_images: 0", "`heldout_images` must be at least 1, not 0"),
        ("batch-size: 8\nbatch_size: 4", "batch_size is there twice"),
        ("posthoc_ema: [0.05, 0.3]", "`posthoc_ema` must be different relative lengths .* 0.2887, not 0.05 0.3"),
        ("posthoc_ema: [0.1, 0.1]", "`posthoc_ema` must be different relative lengths"),
        ("posthoc_ema_every: 0", "`posthoc_ema_every` must be at least 1, not 0"),
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
        (["--recipe", "imaginary"], "`recipe=imaginary`: neither a file nor a recipe; the recipes are .*digits"),
        (["--gpus", "0"], "`gpus` must be at least 1"),
        (["--images-per-second", "-1"], "`images_per_second` must be positive"),
        (["--gpus", "8"], "`gpus=8` plays no part without `dry_run`: give that too, or leave it out"),
        (["--images-per-second", "90"], "`images_per_second=90.0` plays no part without `dry_run`"),
        (["--resume", "/nowhere"], "`resume=/nowhere`: neither a run's folder"),
        (["--recipe", "digits", "--resume", "/nowhere"], "exclude each other"),
    ],
)
def test_mistakes_on_the_command_line(arguments, words):
    with pytest.raises(UserError, match=words):
        parse_train_arguments(arguments)
