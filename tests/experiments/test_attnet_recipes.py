"""AttNet's published recipes as argument files of timm's train.py: names that it has, values that timm takes."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import timm
import torch
import yaml
from timm.data import Mixup, create_transform
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs

from atconv.attnet import SIZES

FILES = sorted((Path(__file__).parents[2] / "experiments" / "attnet").glob("*.yaml"))
RECIPES = {path.stem: yaml.safe_load(path.read_text()) for path in FILES}
DEFAULTS = {
    "model": "resnet50", "device_modules": None, "batch_size": 128, "workers": 4, "pin_mem": False, "amp": False,
    "seed": 42, "opt": "sgd", "opt_eps": None, "lr": None, "weight_decay": 2e-5, "epochs": 300, "sched": "cosine",
    "warmup_epochs": 5, "warmup_lr": 1e-5, "min_lr": 0, "drop_path": None, "smoothing": 0.1, "mixup": 0.0,
    "cutmix": 0.0, "color_jitter": 0.4, "reprob": 0.0, "aa": None, "aug_repeats": 0, "train_interpolation": "random",
}  # fmt: skip
"""arguments of timm 1.0.31's train.py that the recipes set, with its own defaults"""
REST = {"momentum": 0.9, "opt_betas": None, "layer_decay": None, "cooldown_epochs": 0, "sched_on_updates": False}
"""others, which timm's functions read"""
STRONG = {"attnet_t2", "attnet_t3", "attnet_t4"}


def test_there_is_one_for_each_size():
    assert set(RECIPES) == set(SIZES) and all(recipe["model"] == name for name, recipe in RECIPES.items())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_names_and_the_whole_batch(path):
    recipe = RECIPES[path.stem]
    assert set(recipe) <= set(DEFAULTS) and recipe["device_modules"] == ["atconv.attnet"]
    for name, value in recipe.items():
        kind = type(DEFAULTS[name])
        assert DEFAULTS[name] is None or type(value) in (kind, float), f"{name}: YAML reads {value!r}"
    ((gpus, images),) = re.findall(r"(\d+) GPUs of (\d+) images", path.read_text())
    (whole,) = re.findall(r"for the (\d+) images", path.read_text())
    assert int(images) == recipe["batch_size"] and int(gpus) * int(images) == int(whole) == 4096


@pytest.mark.parametrize("name", RECIPES)
def test_timm_takes_the_values(name):
    recipe = RECIPES[name]
    arguments = Namespace(**(DEFAULTS | REST | recipe))
    with torch.device("meta"):
        model = timm.create_model(name, depths=(1, 1, 1, 2), drop_path_rate=arguments.drop_path)
    last = model.stages[-1][-1].drop_path
    assert getattr(last, "drop_prob", 0.0) == pytest.approx(recipe["drop_path"])
    optimizer = create_optimizer_v2(torch.nn.Linear(2, 2), **optimizer_kwargs(cfg=arguments))
    assert isinstance(optimizer, torch.optim.AdamW)
    assert sorted(group["weight_decay"] for group in optimizer.param_groups) == [0, recipe["weight_decay"]]
    scheduler, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(arguments))
    rates = []
    for epoch in (0, 5, 299):
        scheduler.step(epoch)
        rates.append(optimizer.param_groups[0]["lr"])
    assert epochs == 300 and rates == pytest.approx([1e-6, 4e-3, 1e-6], rel=0.2)
    transform = create_transform(
        (3, 224, 224), is_training=True, auto_augment=arguments.aa, color_jitter=arguments.color_jitter,
        re_prob=arguments.reprob, interpolation=arguments.train_interpolation, separate=True,
    )  # fmt: skip
    assert len(transform) == 3
    assert Mixup(arguments.mixup, arguments.cutmix, label_smoothing=arguments.smoothing).mixup_enabled
    assert ("aa" in recipe) == (name not in ("attnet_xxs", "attnet_xs"))
    assert (recipe["reprob"] == 0.25 and recipe["mixup"] == 0.8) == (name in STRONG)


@pytest.mark.skipif("TIMM_CHECKOUT" not in os.environ, reason="TIMM_CHECKOUT names no checkout of timm")
def test_timms_own_parser_reads_them(monkeypatch):
    script = Path(os.environ["TIMM_CHECKOUT"]) / "train.py"
    spec = importlib.util.spec_from_file_location("timm_train", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    known = vars(module.parser.parse_args([]))
    assert {name: known[name] for name in DEFAULTS} == DEFAULTS
    for path in FILES:
        monkeypatch.setattr(sys, "argv", ["train.py", "-c", str(path)])
        arguments, _ = module._parse_args()
        assert set(RECIPES[path.stem]) <= set(known)
        assert {name: vars(arguments)[name] for name in RECIPES[path.stem]} == RECIPES[path.stem]
