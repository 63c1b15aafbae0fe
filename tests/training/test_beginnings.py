"""A run that begins with another's weights, trains a part of them, or is distilled: by the numbers in its folder."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

from sit.checkpoint.donor import Donor, read_donor, take
from sit.checkpoint.info import CheckpointInfo
from sit.checkpoint.load import load_for_sampling
from sit.checkpoint.save import save_checkpoint
from sit.model import SiT, sincos_table
from sit.sampling.config import SamplerConfig
from sit.sampling.sampler import generate
from sit.training import trainer
from sit.training.cli import parse_train_arguments
from sit.training.config import TrainConfig
from sit.training.distill import distill
from sit.training.frozen import freeze
from sit.training.objective import TransportObjective, at_step
from sit.training.run_folder import read_metrics
from sit.training.trainer import train
from sit.transport.transport import Transport
from sit.utils.errors import UserError

SIDE, BATCH = 8, 4


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Eight gray images of noise in two classes."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number in range(8):
        place = root / f"class{number % 2}" / f"{number}.png"
        place.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, size=(SIDE, SIDE), dtype=np.uint8)).save(place)
    return root


@pytest.fixture(scope="module")
def begin(images, tmp_path_factory):
    """A function that trains on these images and gives the run's folder."""
    base = TrainConfig(
        data=str(images), image_size=SIDE, vae="none:channels=1", model="SiT-XS/2", steps=1, batch_size=BATCH,
        learning_rate=0.0, betas=(0.6, 0.8), log_every=1, preview_every=0, checkpoint_every=1, keep_last=0, trackers=(),
        cpu_threads=1,
    )  # fmt: skip

    def begin(folder: Path | None = None, **changes) -> Path:
        folder = tmp_path_factory.mktemp("run") / "a" if folder is None else folder
        AcceleratorState._reset_state(reset_partial_state=True)
        try:
            train(dataclasses.replace(base, **{"output_dir": str(folder)} | changes))
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
        return folder

    return begin


def awake(model: SiT, seed: int = 0) -> SiT:
    """With random weights everywhere: a fresh network predicts zero."""
    source = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.05, generator=source)
    return model.eval()


XS = dict(hidden_size=128, depth=6, num_heads=4, in_channels=1, input_size=SIDE, num_classes=2, learn_sigma=False)


@pytest.fixture(scope="module")
def donor(tmp_path_factory) -> Path:
    """A checkpoint of attention on the images' classes, as XS/2, its weights random everywhere."""
    return saved(tmp_path_factory.mktemp("donor") / "step-0000007", awake(SiT(**XS)), ["class0", "class1"])


def saved(folder: Path, model: SiT, names: list[str]) -> Path:
    info = CheckpointInfo(7, 70, (SIDE, SIDE), len(names), names, "", model.config.mixer)
    return save_checkpoint(folder, model=model, transport=Transport(), vae_source=None, info=info)


def weights(run: Path, step: int = 1) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{step:07d}" / "transformer" / "diffusion_pytorch_model.safetensors")


def raw(run: Path, step: int = 1) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{step:07d}" / "training" / "model.safetensors")


def samples(checkpoint: Path, side: int = SIDE) -> torch.Tensor:
    loaded = load_for_sampling(checkpoint)
    made = generate(
        loaded.model, loaded.transport, torch.arange(2), torch.tensor([0, 1]), seed=3, device="cpu", batch_size=2,
        config=SamplerConfig(steps=3, cfg_scale=1.5), latent_shape=(1, side, side),
    )  # fmt: skip
    return torch.cat([latents for _, latents in made])


# ---------------------------------------------------------------- beginning with a donor


@pytest.fixture(scope="module")
def begun(begin, donor) -> Path:
    """A run of the donor's architecture, one step that moves nothing."""
    return begin(init_from=str(donor), mixer="attention")


def test_the_same_architecture_samples_as_the_donor(begun, donor):
    assert torch.equal(samples(begun), samples(donor))
    assert samples(donor).std() > 0.1


def test_another_mixer_leaves_all_shared_tensors_equal_and_the_rest_afresh(begin, begun, donor):
    given = load_file(donor / "transformer" / "diffusion_pytorch_model.safetensors")
    own = weights(begin(init_from=str(donor), mixer="atconv", positional_embedding="on"))
    fresh = weights(begin(mixer="atconv", positional_embedding="on"))
    shared = {name for name in own if name in given and own[name].shape == given[name].shape}
    assert {name.split(".")[2] for name in own.keys() - shared} == {"attn"} and len(own.keys() - shared) == 6 * 7
    assert all(torch.equal(own[name], given[name]) for name in shared)
    assert all(torch.equal(own[name], fresh[name]) for name in own.keys() - shared)
    assert not torch.equal(own["blocks.0.mlp.fc1.weight"], fresh["blocks.0.mlp.fc1.weight"])


def test_one_line_says_what_was_taken(donor):
    network = SiT(**XS | dict(mixer="atconv", num_classes=3), seed=0)
    said = str(take(network, read_donor(donor), ["class1", "else", "class0"], {"prediction": "noise"}))
    assert "\n" not in said
    total = len(network.state_dict())
    assert said.startswith(f"{total - 6 * 7 - 1} of {total} tensors taken; y_embedder.embedding_table.weight: 3 of 4 r")
    assert "afresh: blocks.*.attn (42)" in said and "not used of it: blocks.*.attn (12)" in said
    assert "note: it was trained with prediction velocity, not noise" in said


def rows_of(network: SiT, donor: Donor, classes: list[str]) -> torch.Tensor:
    take(network, donor, classes, {})
    return network.y_embedder.embedding_table.weight.detach().clone()


def test_rows_of_classes_go_by_name_else_by_number(donor):
    named = read_donor(donor)
    table = named.state["y_embedder.embedding_table.weight"]
    fresh = SiT(**XS | dict(num_classes=3), seed=0).y_embedder.embedding_table.weight.detach()
    found = rows_of(SiT(**XS | dict(num_classes=3), seed=0), named, ["class1", "else", "class0"])
    assert torch.equal(found, torch.stack([table[1], fresh[1], table[0], table[2]]))
    unnamed = dataclasses.replace(named, label_names=[])
    assert torch.equal(rows_of(SiT(**XS, seed=0), unnamed, ["a", "b"]), table), "as many: by number"
    found = rows_of(SiT(**XS | dict(num_classes=3), seed=0), unnamed, ["a", "b", "c"])
    assert torch.equal(found, torch.stack([*fresh[:3], table[2]])), "another number: no class alone means the same"
    found = rows_of(SiT(**XS | dict(null_class=False), seed=0), unnamed, ["a", "b"])
    assert torch.equal(found, table[:2])
    others = rows_of(SiT(**XS, seed=0), named, ["cat", "dog"])
    assert torch.equal(others[:2], SiT(**XS, seed=0).y_embedder.embedding_table.weight.detach()[:2])


def test_a_name_of_several_classes_matches_none_unless_all_names_are_the_same(donor):
    named = read_donor(donor)
    table = torch.randn(4, 128, generator=torch.Generator().manual_seed(0))
    state = named.state | {"y_embedder.embedding_table.weight": table}
    names = ["crane", "heron", "crane"]
    named = dataclasses.replace(named, state=state, label_names=names, config=named.config | {"num_classes": 3})
    network = SiT(**XS | dict(num_classes=3), seed=0)
    fresh = network.y_embedder.embedding_table.weight.detach().clone()
    assert torch.equal(rows_of(network, named, names), table), "by number"
    network = SiT(**XS | dict(num_classes=3), seed=0)
    found = rows_of(network, named, ["crane", "crane", "heron"])
    assert torch.equal(found, torch.stack([*fresh[:2], table[1], table[3]]))
    network = SiT(**XS | dict(num_classes=3), seed=0)
    found = rows_of(network, named, ["heron", "crane", "stork"])
    assert torch.equal(found, torch.stack([table[1], *fresh[1:3], table[3]]))
    network, other = (
        SiT(**XS | dict(num_classes=3), seed=0),
        dataclasses.replace(named, label_names=["crane", "a", "b"]),
    )
    found = rows_of(network, other, ["crane", "crane", "a"])
    assert torch.equal(found, torch.stack([*fresh[:2], table[1], table[3]]))


@pytest.mark.parametrize("own, given", [(False, True), (True, False)])
def test_the_prediction_is_taken_whichever_has_learn_sigma(own, given, tmp_path):
    model = awake(SiT(**XS | dict(learn_sigma=given)))
    network = SiT(**XS | dict(learn_sigma=own), seed=0).eval()
    taken = take(network, read_donor(saved(tmp_path / "x", model, ["a", "b"])), ["a", "b"], {})
    assert taken.part == {f"final_layer.linear.{kind}": "the prediction" for kind in ("weight", "bias")}
    x, t, y = torch.randn(2, 1, 8, 8), torch.rand(2), torch.tensor([0, 2])
    torch.testing.assert_close(network(x, t, y), model(x, t, y), rtol=1e-5, atol=1e-6)


def test_another_image_size_keeps_the_donors_coordinates(begin, donor, images, tmp_path):
    """The table is the formula at where the new tokens' centers lie on the donor's grid; at every size, and resumed."""
    run = begin(init_from=str(donor), mixer="attention", image_size=16)
    centers = (torch.arange(8) + 0.5) / 2 - 0.5  # 8 tokens on a side for 4
    torch.testing.assert_close(weights(run)["pos_embed"], sincos_table(128, centers, centers))
    for side in (8, 12, 16):
        assert torch.equal(samples(run, side), samples(donor, side)), side
    on = begin(run, init_from=str(donor), mixer="attention", image_size=16, resume="auto", steps=2)
    assert torch.equal(samples(on, 12), samples(donor, 12))


def test_a_donor_of_reversed_time(begin, tmp_path):
    """REPA's: the network inherits its time, and says so when it goes on."""
    model = awake(SiT(**XS | dict(time_reversed=True)))
    donor = saved(tmp_path / "repa", model, ["class0", "class1"])
    run = begin(init_from=str(donor), mixer="attention")
    assert torch.equal(samples(run), samples(donor))
    begin(run, init_from=str(donor), mixer="attention", resume="auto", steps=2)
    assert json.loads((run / "checkpoints/step-0000002/transformer/config.json").read_text())["time_reversed"]


def test_a_published_file(begin, donor, tmp_path):
    """A bare state dict in half precision; its attention heads can't be told, and need not be."""
    state = {name: tensor.half() for name, tensor in read_donor(donor).state.items()}
    torch.save({f"module.{name}": tensor for name, tensor in state.items()}, tmp_path / "bare.pt")
    own = weights(begin(init_from=str(tmp_path / "bare.pt"), mixer="attention"))
    assert all(torch.equal(tensor, state[name].float()) for name, tensor in own.items())


def test_a_run_goes_on_without_its_donor_and_refuses_another(begin, donor, tmp_path):
    copy = shutil.copytree(donor, tmp_path / "step-0000007")
    options = dict(init_from=str(copy), mixer="attention", learning_rate=1e-3)
    run, whole = begin(**options), begin(**options, steps=2)
    assert json.loads((run / "identity.json").read_text())["donor"]
    shutil.rmtree(copy)
    begin(run, **options, resume="auto", steps=2)
    assert all(torch.equal(tensor, raw(whole, 2)[name]) for name, tensor in raw(run, 2).items())
    with pytest.raises(UserError, match="`init_from=else` can't continue the run"):
        begin(run, **options | dict(init_from="else"), resume="auto", steps=3)
    shutil.rmtree(run / "checkpoints")  # as if it had been killed before the first: the donor is read again
    saved(copy, awake(SiT(**XS), seed=1), ["class0", "class1"])
    with pytest.raises(UserError, match="`init_from=.*` holds other weights than the run .* was begun with"):
        begin(run, **options, resume="auto", steps=2)


def test_beginning_and_going_on_are_not_confused(begun):
    with pytest.raises(UserError, match="`init_from` begins a new run and `resume=.*` goes on"):
        parse_train_arguments(["--resume", str(begun), "--init_from", "x"])
    assert parse_train_arguments(["--resume", str(begun)]).config.init_from is not None
    assert parse_train_arguments(["--resume", "auto", "--output-dir", "x", "--init-from", "y"]).config.init_from == "y"


# ---------------------------------------------------------------- a part of the parameters


@pytest.fixture(scope="module")
def partly(begin, donor) -> Path:
    """Two steps at a rate of 0.1 of the mixers' parameters but for their last biases."""
    return begin(
        init_from=str(donor), mixer="attention", learning_rate=0.1, steps=2, ema_decay=0.5,
        train_only=("blocks.*.attn.*",), freeze=("*.proj.bias",), posthoc_ema=(0.1,),
    )  # fmt: skip


def is_trained(name: str) -> bool:
    return ".attn." in name and not name.endswith("proj.bias")


def test_what_is_frozen_stays_and_what_is_not_moves(partly, donor):
    given = read_donor(donor).state
    kept = load_file(partly / "checkpoints/step-0000002/training/posthoc-ema-0.1.safetensors")
    for found in (raw(partly, 2), weights(partly, 2), {name: kept.get(name, given[name]) for name in given}):
        assert {name for name in given if not torch.equal(found[name], given[name])} == set(filter(is_trained, given))


def test_the_optimizer_and_the_norm_know_the_trained_alone(partly, donor):
    """The first gradient is Adam's first moment over 1 − β₁; its norm, recomputed, is the one that was logged."""
    file = partly / "checkpoints/step-0000001/training/optimizer.pt"
    optimizer = torch.load(file, weights_only=True)["optimizer"]
    state, (group,) = optimizer["state"], optimizer["param_groups"]
    assert state.keys() == set(group["params"]) == set(filter(is_trained, read_donor(donor).state))
    gradient = torch.cat([moments["exp_avg"].double().flatten() / 0.4 for moments in state.values()])
    (row,) = (row for row in read_metrics(partly / "metrics.jsonl") if row["step"] == 1)
    assert row["gradient_norm"] == pytest.approx(gradient.norm().item(), rel=1e-5)


def test_a_part_resumes_as_if_it_had_not_stopped(partly, begin, donor, tmp_path):
    half = tmp_path / "half"
    shutil.copytree(partly, half)
    shutil.rmtree(half / "checkpoints/step-0000002")
    options = dict(
        init_from=str(donor), mixer="attention", learning_rate=0.1, ema_decay=0.5, posthoc_ema=(0.1,),
        train_only=("blocks.*.attn.*",), freeze=("*.proj.bias",), resume="auto",
    )  # fmt: skip
    begin(half, **options, steps=2)
    for kind in (raw, weights):
        assert all(torch.equal(tensor, kind(partly, 2)[name]) for name, tensor in kind(half, 2).items())
    with pytest.raises(UserError, match="`freeze=.*` can't continue"):
        begin(half, **options | dict(freeze=()), steps=3)


@pytest.mark.parametrize(
    "frozen, trained, words",
    [
        (("attn",), (), r"`freeze=attn`: no parameter has such a name; did you mean \*attn\*\?"),
        ((), ("blocks.0.mlp.fc1.wieght",), "`train_only=.*`: no parameter .* did you mean .*blocks.0.mlp.fc1.weight"),
        ((), ("zzz*",), r"`train_only=zzz\*`: no parameter has such a name; there are x_embedder.proj.weight"),
        (("*",), (), "`freeze` leave nothing of the network to train"),
        (("blocks.*",), ("blocks.*.mlp.*",), "`freeze` and `train_only` leave nothing"),
    ],
)
def test_patterns_that_are_wrong(frozen, trained, words):
    with pytest.raises(UserError, match=words):
        freeze(SiT(**XS), frozen, trained)


# ---------------------------------------------------------------- distillation


def distilled(donor: Path, mixer: str = "atconv", **changes):
    network = awake(SiT(**XS | dict(mixer=mixer, positional_embedding=True)), seed=5)
    config = TrainConfig(distill_from=str(donor), distill_steps=3, distill_weight=0.25, **changes)
    objective = distill(
        TransportObjective(Transport(), 0.5, null_label=2), network, config, transport=Transport(),
        classes=["class0", "class1"], vae="none:channels=1", device=torch.device("cpu"),
        autocast=contextlib.nullcontext,
    )  # fmt: skip
    return network, objective


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    source = torch.Generator().manual_seed(0)
    normal = lambda: torch.randn(4, 1, SIDE, SIDE, generator=source)  # noqa: E731
    return {
        "latents": normal(), "labels": torch.tensor([0, 1, 1, 0]), "noise": normal(),
        "t_uniform": torch.rand(4, generator=source), "drop": torch.tensor([0.1, 0.9, 0.2, 0.8]),
    }  # fmt: skip


def inside(model: SiT, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The prediction, and each mixer's output, of a network that is evaluated block by block."""
    stream = model.x_embedder(x) + model.pos_embed
    c, outputs = model.t_embedder(t) + model.y_embedder(y), []
    for block in model.blocks:
        shift, scale, gate = block.adaLN_modulation(c).chunk(6, dim=1)[:3]
        outputs.append(block.attn(block.norm1(stream) * (1 + scale[:, None]) + shift[:, None], model.grid))
        stream = block(stream, c, model.grid)
    return model(x, t, y), outputs


@pytest.mark.parametrize("mixer, new", [("atconv", 6), ("attention,atconv", 3), ("attention", 0)])
def test_the_distance_to_the_teacher(mixer, new, donor, batch):
    """Against both networks evaluated by hand on x_t = t·x₁ + (1 − t)·x₀ and the labels that are left."""
    network, objective = distilled(donor, mixer)
    with torch.no_grad():
        loss, metrics = objective(network, batch)
    t, x1, x0 = batch["t_uniform"], batch["latents"], batch["noise"]
    x = t.view(-1, 1, 1, 1) * x1 + (1 - t.view(-1, 1, 1, 1)) * x0
    y = torch.tensor([2, 1, 2, 0])
    with torch.no_grad():
        (own, own_inside), (given, given_inside) = (inside(model, x, t, y) for model in (network, objective.teacher))
    prediction = ((own - given) ** 2).mean((1, 2, 3))
    plain = ((own - (x1 - x0)) ** 2).mean((1, 2, 3))
    torch.testing.assert_close(metrics["distillation"], prediction, rtol=1e-4, atol=1e-6)
    shares = torch.zeros(4)
    assert ("mixer_distillation" in metrics) == bool(new)
    if new:
        which = range(6) if mixer == "atconv" else (1, 3, 5)
        square = lambda values: (values**2).mean((1, 2))  # noqa: E731
        shares = sum(square(own_inside[n] - given_inside[n]) / square(given_inside[n]) for n in which) / new
        torch.testing.assert_close(metrics["mixer_distillation"], shares, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(loss, plain + 0.25 * (prediction + shares), rtol=1e-4, atol=1e-6)


def test_the_teacher_has_no_gradient_and_recomputed_activations_change_none(donor, batch):
    gradients = []
    for recompute in (False, True):
        network, objective = distilled(donor)
        if recompute:
            network.enable_gradient_checkpointing()
        objective(network, batch)[0].mean().backward()
        gradients.append({name: parameter.grad for name, parameter in network.named_parameters()})
        assert not objective.teacher.training and all(p.grad is None for p in objective.teacher.parameters())
        assert all(not block.attn._forward_hooks for block in (*network.blocks, *objective.teacher.blocks))
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_it_ends_after_its_steps(donor):
    _, objective = distilled(donor)
    assert at_step(objective, 3) is objective and at_step(objective, 4) is objective.base
    outer = dataclasses.make_dataclass("Outer", ["base"], frozen=True)(objective)
    assert at_step(outer, 3) is outer and at_step(outer, 4) == type(outer)(objective.base)


def test_a_distilled_run(begin, donor, monkeypatch):
    """Metrics for its steps alone; and it goes on after them without its teacher, whose memory is free then.

    That of the donor's weights is free from the first step on.
    """
    accumulate, fingerprint, kept, alive = trainer.accumulate_gradients, trainer.state_fingerprint, [], []

    def reading(state):
        kept.append(weakref.ref(next(iter(state.values()))))
        return fingerprint(state)

    def noting(model, objective, *rest):
        if len(kept) == 1:
            kept.append(weakref.ref(objective.teacher))
        gc.collect()
        alive.append([one() is not None for one in kept])
        return accumulate(model, objective, *rest)

    monkeypatch.setattr(trainer, "state_fingerprint", reading)
    monkeypatch.setattr(trainer, "accumulate_gradients", noting)
    options = dict(mixer="atconv", init_from=str(donor), distill_from=str(donor), distill_steps=1, learning_rate=1e-3)
    run = begin(**options, steps=2)
    assert alive == [[False, True], [False, False]]
    first, second = read_metrics(run / "metrics.jsonl")
    assert first["distillation"] > 0 and first["mixer_distillation"] > 0 and "distillation" not in second
    assert json.loads((run / "identity.json").read_text())["teacher"]


def test_weights_of_other_latents(begin, capsys):
    """Their pixels are scaled otherwise: a note to who begins with them, and no teacher."""
    first = begin()
    others = dict(vae="none:channels=1:shift=0.25:scale=2.0")
    capsys.readouterr()
    begin(init_from=str(first))
    assert "latents" not in capsys.readouterr().out
    begin(init_from=str(first), **others)
    assert "note: its latents are shift and scale 0.0 and 2.0, not 0.25 and 2.0" in capsys.readouterr().out
    teaching = dict(distill_from=str(first), distill_steps=1)
    begin(**teaching)
    with pytest.raises(UserError, match=r"`distill_from=.*` can't teach this network: its latents are .*`vae=none:"):
        begin(**teaching, **others)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(in_channels=2), "channels 1, not 2"),
        (dict(num_classes=3), "classes 2, not 3"),
        (dict(null_class=False), None),
    ],
)
def test_teachers_that_cant_teach(changes, words, donor, tmp_path):
    network = SiT(**XS | changes)
    config = TrainConfig(distill_from=str(donor), distill_steps=1)
    call = lambda names=(), transport=None: distill(  # noqa: E731
        TransportObjective(Transport(), 0.0, null_label=2), network, config, transport=transport or Transport(),
        classes=names, vae="none:channels=1", device=torch.device("cpu"), autocast=contextlib.nullcontext,
    )  # fmt: skip
    if words:
        with pytest.raises(UserError, match=words):
            call()
        return
    call(["class0", "class1"])
    with pytest.raises(UserError, match="its classes have other names"):
        call(["class1", "class0"])
    with pytest.raises(UserError, match="interpolant linear, not gvp"):
        call(transport=Transport(interpolant="gvp"))


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(distill_from="x"), "`distill_from` and `distill_steps`.* belong together"),
        (dict(distill_steps=3), "belong together"),
        (dict(distill_from="x", distill_steps=3, compile=True), "`compile` and `distill_from` exclude each other"),
    ],
)
def test_settings_that_dont_go_together(changes, words):
    with pytest.raises(UserError, match=words):
        TrainConfig(**changes)
