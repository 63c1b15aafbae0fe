"""The diffusers pipeline: a checkpoint folder in, images out, as README and docs show it."""

from __future__ import annotations

import json
import math
import re
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import DDIMScheduler, DiffusionPipeline
from PIL import Image

from sit import SiTPipeline
from sit.checkpoint.hub import model_card
from sit.checkpoint.info import CheckpointInfo
from sit.checkpoint.load import load_for_sampling
from sit.checkpoint.save import save_checkpoint
from sit.latents.vae import DIGITS_VAE, vae_fingerprint
from sit.model import SiT
from sit.transport.transport import Transport
from sit.utils.errors import UserError

ROOT = Path(__file__).parents[1]
NAMES = ["nought, zero", "one", "two", "three", "four"]


def make_checkpoint(folder: Path, vae=DIGITS_VAE, **options) -> Path:
    torch.manual_seed(0)
    settings = dict(input_size=8, patch_size=2, in_channels=4, hidden_size=32, depth=2, num_heads=2, num_classes=5)
    model = SiT(**settings | options)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.1)
    info = CheckpointInfo(image_size=(32, 32), classes=5, label_names=NAMES)
    known = dict(info=info, recipe="seed: 7\n", metrics={"loss": 0.25})
    return save_checkpoint(folder, model=model, transport=Transport(), vae_source=vae, **known)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("run") / "checkpoints" / "step-0000010")


@pytest.fixture
def pipe(folder):
    pipe = SiTPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def five_lines(document: Path) -> str:
    """The block of Python that uses the pipeline, from a document."""
    blocks = re.findall(r"```python\n(.*?)```", document.read_text(), flags=re.DOTALL)
    (block,) = [block for block in blocks if "SiTPipeline.from_pretrained" in block]
    assert len([line for line in block.splitlines() if line.strip()]) <= 5
    return block


def documents() -> list[str]:
    """Where the lines stand; the README may leave them to the document."""
    readme = "SiTPipeline.from_pretrained" in (ROOT / "README.md").read_text()
    return ["docs/checkpoints.md", *(["README.md"] if readme else [])]


@pytest.mark.parametrize("document", documents())
def test_the_five_lines_of_the_documents_run(document, folder, tmp_path, monkeypatch):
    code = five_lines(ROOT / document)
    place = tmp_path / re.search(r'from_pretrained\("([^"]+)"', code)[1]
    place.parent.mkdir(parents=True)
    place.symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "five lines", "exec"), {})
    (image,) = tmp_path.glob("*.png")
    assert Image.open(image).size == (32, 32)


def test_the_folder_is_read_as_it_was_written(folder, pipe):
    expected = load_for_sampling(folder).model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in pipe.transformer.state_dict().items())
    assert isinstance(pipe.transport, Transport)
    assert pipe.vae is not None and pipe.transformer.device == pipe.vae.device


def test_names_of_classes(folder, pipe):
    """A class's whole name goes before another's synonym, and what several classes are called chooses none of them."""
    names = {"0": "tabby, cat", "1": "dog", "2": "cat", "3": "bird, crane", "4": "lift, crane", "5": "x", "6": "x"}
    named = SiTPipeline(pipe.transformer, pipe.transport, pipe.vae, id2label=names)
    assert named.get_label_ids(["cat", "dog", "tabby", "tabby, cat", "lift"]) == [2, 1, 0, 0, 4]
    for name, labels in (("crane", "3, 4"), ("x", "5, 6")):
        with pytest.raises(UserError, match=f"'{name}' names several classes, {labels}: give the number"):
            named.get_label_ids(name)


def test_save_pretrained_and_back(folder, pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "saved")
    for place in (folder, tmp_path / "saved"):
        index = json.loads((place / "model_index.json").read_text())
        assert index["_class_name"] == ["pipeline", "SiTPipeline"]
        assert index["transformer"] == ["sit", "SiT"] and index["transport"] == ["sit", "Transport"]
        assert index["vae"] == ["diffusers", "AutoencoderKL"]
        assert index["id2label"]["3"] == "three"
    again = SiTPipeline.from_pretrained(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    assert again.get_label_ids(["zero", "four"]) == [0, 4]
    first, second = (
        p([1, 2], generator=seeded(1, 2), num_inference_steps=4, output_type="np").images for p in (pipe, again)
    )
    assert np.array_equal(first, second)
    loaded = load_for_sampling(tmp_path / "saved")
    assert loaded.info.label_names == NAMES and loaded.vae_source == str(tmp_path / "saved" / "vae")


@pytest.mark.parametrize("on_the_hub", ["This card has been automatically generated.", "A card that somebody wrote"])
def test_push_to_hub_uploads_such_a_folder(pipe, monkeypatch, on_the_hub):
    uploaded = {}

    def upload(folder_path, repo_id, **_):
        uploaded[repo_id] = sorted(str(p.relative_to(folder_path)) for p in Path(folder_path).rglob("*.json"))
        uploaded["card"] = (Path(folder_path) / "README.md").read_text()

    class Repository:
        repo_id = "me/sit"

    class Card:
        def save(self, path) -> None:
            Path(path).write_text(on_the_hub)

    monkeypatch.setattr("diffusers.utils.hub_utils.create_repo", lambda *_, **__: Repository)
    monkeypatch.setattr("diffusers.utils.hub_utils.upload_folder", upload)
    monkeypatch.setattr("diffusers.utils.hub_utils.load_or_create_model_card", lambda *_, **__: Card())
    monkeypatch.setattr("diffusers.utils.hub_utils.populate_model_card", lambda card: card)
    pipe.push_to_hub("me/sit")
    expected = ["model_index.json", "transformer/config.json", "transport/transport_config.json", "vae/config.json"]
    assert uploaded["me/sit"] == expected
    if "generated" in on_the_hub:
        assert "SiTPipeline.from_pretrained" in uploaded["card"] and "generated" not in uploaded["card"]
    else:
        assert uploaded["card"] == on_the_hub


def test_the_model_card_says_what_it_is_and_runs(folder, pipe, tmp_path, monkeypatch):
    """It has data, metrics and license; a saved pipeline keeps it; its lines make an image."""
    card = (folder / "README.md").read_text()
    parameters = sum(parameter.numel() for parameter in pipe.transformer.parameters())
    facts = ("one, two", f"{parameters / 1e6:.4g} M", "32 x 32 pixels", "velocity", "loss | 0.25", "seed: 7", "MIT")
    assert [fact for fact in facts if fact not in card] == []
    (folder / "README.md").write_text(card + "edited")  # which is no damage
    again = SiTPipeline.from_pretrained(folder)
    (folder / "README.md").write_text(card)
    again.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "README.md").read_text() == card + "edited"
    code = re.search(r"```python\n(.*?)```", card, flags=re.DOTALL)[1]
    assert len([line for line in code.splitlines() if line]) <= 5
    monkeypatch.chdir(tmp_path)
    code = code.replace("PATH OR NAME OF THIS FOLDER", str(folder)).replace("steps=250", "steps=2")
    exec(compile(code, "card", "exec"), {})
    assert Image.open(tmp_path / "sample.png").size == (32, 32)


def test_labels_of_numpy(pipe):
    assert pipe._label_tensor([np.int64(0), [np.arange(2)], np.int32(1)]).tolist() == [0, 0, 1, 1]


def test_labels_are_whole_numbers_of_any_kind(pipe):
    assert pipe._label_tensor([1.0, np.float32(2), torch.tensor(0.0), True]).tolist() == [1, 2, 0, 1]
    for wrong in (2.9, np.float64(0.5), torch.tensor([1.0, 1.5]), [[0], [math.nan]], math.inf, None, [1, None]):
        with pytest.raises(UserError, match="class_labels has (2.9|0.5|1.5|nan|inf|None), which is no class"):
            pipe._label_tensor(wrong)


def test_the_card_of_a_network_without_a_null_class_guides_by_nothing():
    network = SiT(8, patch_size=2, hidden_size=32, depth=1, num_heads=2, num_classes=2, null_class=False)
    card = model_card(network, Transport(), CheckpointInfo(1, 1, (32, 32), 2), metrics={})
    assert "pipe([0], guidance_scale=1, num_inference_steps=250).images" in card


def test_the_card_of_a_network_of_average_velocities_takes_one_step(tmp_path):
    network = SiT(8, patch_size=2, hidden_size=32, depth=1, num_heads=2, num_classes=2, average_velocity=True)
    transport = Transport(prediction="average-velocity")
    card = model_card(network, transport, CheckpointInfo(1, 1, (32, 32), 2), metrics={})
    assert "pipe([0], num_inference_steps=1).images" in card


def test_guidance_that_is_inside_is_not_changed_on_the_way(folder):
    network = SiT(8, patch_size=2, hidden_size=32, depth=1, num_heads=2, num_classes=2, average_velocity=True)
    pipe = SiTPipeline(network, Transport(prediction="average-velocity"), None)
    pipe.set_progress_bar_config(disable=True)

    def change(pipe, *_):
        pipe._guidance_scale = 2.0

    with pytest.raises(UserError, match="guidance is part of what MeanFlow trains"):
        pipe([0], num_inference_steps=2, output_type="latent", callback_on_step_end=change)


def test_a_run_is_taken_for_its_newest_complete_checkpoint(folder, tmp_path):
    run = folder.parents[1]
    later = make_checkpoint(run / "checkpoints" / "step-0000020", depth=3)
    assert SiTPipeline.from_pretrained(run).transformer.config.depth == 3
    (later / "transport" / "transport_config.json").unlink()
    assert SiTPipeline.from_pretrained(run).transformer.config.depth == 2
    with pytest.raises(UserError, match="transport_config.json is missing"):
        SiTPipeline.from_pretrained(later)
    shutil.rmtree(later)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="no checkpoint yet"):
        SiTPipeline.from_pretrained(tmp_path)


def test_diffusers_finds_the_class_in_a_saved_folder(folder, pipe, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    pipe.save_pretrained(tmp_path / "saved")
    for place in (folder, tmp_path / "saved"):
        found = DiffusionPipeline.from_pretrained(place, trust_remote_code=True)
        assert type(found) is SiTPipeline and isinstance(found.transport, Transport)
        with pytest.raises(ValueError, match="trust_remote_code"):
            DiffusionPipeline.from_pretrained(place)


SHARDS = dict(max_shard_size="40KB")


@pytest.mark.parametrize("options", [dict(variant="fp16"), SHARDS, SHARDS | dict(variant="fp16")])
def test_variants_and_shards_are_read_everywhere(pipe, tmp_path, options):
    place, weights = tmp_path / "saved", "diffusion_pytorch_model.safetensors"
    pipe.save_pretrained(place, **options)
    files = sorted((place / "transformer").glob("*.safetensors"))
    assert weights not in [file.name for file in files] and ("variant" in options or len(files) > 1)
    variant = {name: value for name, value in options.items() if name == "variant"}
    expected = pipe.transformer.state_dict()
    again = SiTPipeline.from_pretrained(place, **variant).transformer.state_dict()
    assert all(torch.equal(again[name], value) for name, value in expected.items())
    for named in (place, files[0]):
        loaded = load_for_sampling(named)
        assert all(torch.equal(loaded.model.state_dict()[name], value) for name, value in expected.items())
        assert vae_fingerprint(loaded.vae) == vae_fingerprint(pipe.vae)
    taken = make_checkpoint(tmp_path / "other", vae=place / "vae")
    assert vae_fingerprint(SiTPipeline.from_pretrained(taken).vae) == vae_fingerprint(pipe.vae)
    shutil.copy(files[0], place / "transformer" / weights)
    with pytest.raises(UserError, match="stands beside"):
        load_for_sampling(files[0])


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_an_ode_step_by_step(pipe, guidance):
    """Euler's method over v_null + s·(v_class − v_null), written out."""
    steps, labels = 5, torch.tensor([2, 4])
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    options = dict(sampler="ode", method="euler", cfg_channels=0)
    out = pipe(labels, guidance, num_inference_steps=steps, latents=noise, output_type="latent", **options).images
    x, model = noise.clone(), pipe.transformer
    with torch.no_grad():
        for step in range(steps):
            t = torch.full((2,), step / steps)
            named = model(x, t, labels)
            null = model(x, t, torch.full((2,), 5))
            x = x + (null + guidance * (named - null)) / steps
    torch.testing.assert_close(out, x, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", ["sde euler", "sde heun", "ode midpoint"])
def test_each_image_follows_its_own_generator(pipe, method):
    sampler, method = method.split()
    options = dict(num_inference_steps=4, output_type="latent", sampler=sampler, method=method)
    together = pipe([1, 3, 2], generator=seeded(5, 6, 7), **options).images
    alone = pipe([3], generator=seeded(6), **options).images
    torch.testing.assert_close(together[1:2], alone, atol=1e-5, rtol=1e-5)
    one = pipe([1, 1], generator=torch.Generator().manual_seed(5), **options).images
    same = pipe([1, 1], generator=torch.Generator().manual_seed(5), **options).images
    assert torch.equal(one, same) and not torch.equal(one[0], one[1])


def test_output_types_agree(pipe):
    def call(output_type):
        return pipe(["zero", "three"], generator=seeded(1, 2), num_inference_steps=3, output_type=output_type)

    array, tensor, images = (call(kind).images for kind in ("np", "pt", "pil"))
    assert array.shape == (2, 32, 32, 3) and array.dtype == np.float32 and 0 <= array.min() < array.max() <= 1
    assert np.array_equal(tensor.permute(0, 2, 3, 1).numpy(), array)
    assert all(
        np.array_equal(np.asarray(p), (a * 255).round().astype(np.uint8)) for p, a in zip(images, array, strict=True)
    )
    assert call("latent").images.shape == (2, 4, 8, 8)
    assert isinstance(pipe(1, num_inference_steps=2, return_dict=False)[0][0], Image.Image)


@pytest.mark.parametrize(
    "options, ends",
    [
        (dict(), 1.0),
        (dict(last_step="none"), 1.0),
        (dict(method="heun", last_step_size=0.1), 1.0),
        (dict(sampler="ode", method="euler"), 1.0),
        (dict(sampler="ode", method="rk4"), 1.0),
    ],
)
def test_callbacks_see_and_change_every_step(pipe, options, ends):
    options = options | dict(num_inference_steps=6, output_type="latent", guidance_scale=2.0)
    seen = []

    def note(pipe, step, t, tensors):
        seen.append((step, t, tensors["latents"].clone()))
        assert pipe.num_timesteps == 6 and pipe.guidance_scale == 2.0
        return {}

    plain = pipe([1], generator=seeded(1), callback_on_step_end=note, **options).images
    assert [step for step, _, _ in seen] == list(range(6))
    times = [t for _, t, _ in seen]
    assert all(early < late for early, late in pairwise(times)) and times[-1] == pytest.approx(ends, abs=2e-3)
    assert torch.equal(seen[-1][2], plain)

    def replace(pipe, step, t, tensors):
        return {"latents": other[step]}

    # with every state replaced, by that of another run, the end is that run's
    seen, first = [], plain
    second = pipe([1], generator=seeded(2), callback_on_step_end=note, **options).images
    other = [latents for _, _, latents in seen]
    changed = pipe([1], generator=seeded(1), callback_on_step_end=replace, **options).images
    assert torch.equal(changed, second) and not torch.equal(first, second)

    # a change in the middle is what the solver goes on from
    def once(pipe, step, t, tensors):
        return {"latents": other[2]} if step == 2 else {}

    branched = pipe([1], generator=seeded(1), callback_on_step_end=once, **options).images
    if options.get("sampler") == "ode":
        torch.testing.assert_close(branched, second)
    assert not torch.equal(branched, plain)


def test_adaptive_solvers_show_their_steps_only(pipe):
    seen = []

    def note(pipe, step, t, tensors):
        seen.append((step, t))
        return tensors

    options = dict(num_inference_steps=6, output_type="latent", sampler="ode", generator=seeded(1))
    pipe([1], callback_on_step_end=note, **options)
    assert [step for step, _ in seen] == list(range(len(seen))) and all(t is None for _, t in seen)
    with pytest.raises(UserError, match="dopri5"):
        pipe([1], callback_on_step_end=lambda *_: {"latents": torch.zeros(1, 4, 8, 8)}, **options)


def test_a_callback_can_end_the_sampling(pipe):
    states = []

    def stop(pipe, step, t, tensors):
        states.append(tensors["latents"].clone())
        pipe._interrupt = step == 2
        return tensors

    out = pipe([1], num_inference_steps=9, output_type="latent", callback_on_step_end=stop).images
    assert len(states) == 3 and torch.equal(out, states[-1])


def test_a_progress_bar_counts_the_steps(folder, capsys):
    pipe = SiTPipeline.from_pretrained(folder)
    pipe([1], num_inference_steps=7)
    assert "7/7" in capsys.readouterr().err


def test_a_vae_that_is_not_in_the_folder_is_fetched_by_name(tmp_path):
    folder = make_checkpoint(tmp_path / "c", vae=None)
    pipe = SiTPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.vae is None
    assert pipe([1], num_inference_steps=2, output_type="latent").images.shape == (1, 4, 8, 8)
    with pytest.raises(UserError, match="no VAE"):
        pipe([1], num_inference_steps=2)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"vae_name": str(DIGITS_VAE)}))
    (folder / "sit.json").unlink()  # which has the checksums of the folder as it was
    pipe = SiTPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    assert pipe([1], num_inference_steps=2).images[0].size == (32, 32)
    assert pipe.vae is not None


@pytest.mark.parametrize("mixer", ["attention", "atconv"])
def test_other_sizes(tmp_path, mixer):
    pipe = SiTPipeline.from_pretrained(make_checkpoint(tmp_path / "c", mixer=mixer))
    pipe.set_progress_bar_config(disable=True)
    (image,) = pipe([1], num_inference_steps=2, height=40, width=64).images
    assert image.size == (64, 40)
    with pytest.raises(UserError, match="multiples of 8"):
        pipe([1], num_inference_steps=2, height=36)


def _offload_layers(pipe) -> None:
    for network in (pipe.transformer, pipe.vae):
        cpu_offload(network, "cpu")


def _offload_groups(pipe) -> None:
    for network in (pipe.transformer, pipe.vae):
        network.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")


@pytest.mark.parametrize("offload", [_offload_layers, _offload_groups])
def test_offloaded_networks_give_the_same_images(folder, offload):
    """As ``enable_sequential_cpu_offload`` and ``enable_group_offload`` do on an accelerator."""
    options = dict(guidance_scale=2.0, num_inference_steps=2, sampler="ode", output_type="np")
    plain = SiTPipeline.from_pretrained(folder)([1, 2], generator=seeded(0, 1), **options).images
    pipe = SiTPipeline.from_pretrained(folder)
    offload(pipe)
    assert np.array_equal(pipe([1, 2], generator=seeded(0, 1), **options).images, plain)


def test_half_precision(folder):
    pipe = SiTPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.transformer.dtype == torch.bfloat16
    half = pipe([1], generator=seeded(0), num_inference_steps=4, output_type="latent").images
    whole = SiTPipeline.from_pretrained(folder)
    whole.set_progress_bar_config(disable=True)
    full = whole([1], generator=seeded(0), num_inference_steps=4, output_type="latent").images
    assert half.dtype == torch.float32  # integrated in float32, whatever the network's dtype
    assert 0 < (half - full).norm() / full.norm() < 0.05


def test_nested_labels_and_several_images_of_each(pipe):
    """As many separate calls, each image by its own generator, give the same."""
    options = dict(num_inference_steps=3, output_type="latent")
    together = pipe([[1], ["three"]], generator=seeded(1, 2, 3, 4), num_images_per_prompt=2, **options).images
    for row, label in enumerate((1, 1, 3, 3)):
        alone = pipe([label], generator=seeded(row + 1), **options).images[0]
        torch.testing.assert_close(together[row], alone, atol=1e-5, rtol=1e-5)
    nested = pipe(torch.tensor([[1, 1], [3, 3]]), generator=seeded(1, 2, 3, 4), **options).images
    assert torch.equal(together, nested)


def test_a_callback_may_return_nothing_and_change_the_guidance(pipe):
    """Euler's method with guidance 3, and after the second step none, written out."""

    def unguided(pipe, step, t, tensors):
        if step == 1:
            pipe._guidance_scale = 1.0

    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    options = dict(sampler="ode", method="euler", cfg_channels=0, output_type="latent", num_inference_steps=4)
    out = pipe([2], 3.0, latents=noise, callback_on_step_end=unguided, **options).images
    x = noise.clone()
    with torch.no_grad():
        for step in range(4):
            t = torch.full((1,), step / 4)
            named, null = (pipe.transformer(x, t, torch.tensor([label])) for label in (2, 5))
            x = x + (null + (3 if step < 2 else 1) * (named - null)) / 4
    torch.testing.assert_close(out, x, atol=1e-4, rtol=1e-4)


def test_the_transport_is_a_scheduler_of_eulers_method(pipe):
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    labels = torch.tensor([1, 3])
    options = dict(sampler="ode", method="euler", output_type="latent", num_inference_steps=5, guidance_scale=1)
    scheduler, x = pipe.scheduler, noise
    with pytest.raises(UserError, match="call set_timesteps"):
        scheduler.step(x, 0.0, x)
    scheduler.set_timesteps(5)
    for t in scheduler.timesteps:
        with torch.no_grad():
            out = pipe.transformer(hidden_states=x, timestep=t, class_labels=labels).sample
        x = scheduler.step(out, t, x).prev_sample
    torch.testing.assert_close(x, pipe(labels, latents=noise, **options).images, atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match="is none of"):
        scheduler.step(out, 0.33, x)
    with pytest.raises(UserError, match="at least 1"):
        scheduler.set_timesteps(0)


def test_other_schedulers_are_refused(folder, pipe):
    with pytest.raises(UserError, match="`method='heun2'`"):
        pipe.scheduler = DDIMScheduler()
    with pytest.raises(UserError, match="`method='heun2'`"):
        SiTPipeline.from_pretrained(folder, scheduler=DDIMScheduler())


def test_mistakes_are_named(pipe):
    for match, arguments, options in (
        ("out of range", [[5]], {}),
        ("out of range", [[-1]], {}),
        ("'dog'", ["dog"], {}),
        ("is empty", [[]], {}),
        ("`output_type=jpg`", [[1]], dict(output_type="jpg")),
        ("2 generators for 1 images", [[1]], dict(generator=seeded(1, 2))),
        ("shape", [[1]], dict(latents=torch.zeros(1, 4, 4, 4))),
        ("no option guidance", [[1]], dict(guidance=3)),
        ("`num_images_per_prompt`", [[1]], dict(num_images_per_prompt=0)),
        ("not noise", [[1]], dict(callback_on_step_end_tensor_inputs=["noise"])),
        ("num_inference_steps: 2.5 is not a whole number", [[1]], dict(num_inference_steps=2.5)),
        ("guidance_scale: '4' is not a number or null", [[1]], dict(guidance_scale="4")),
        ("num_images_per_prompt: True is not a whole number", [[1]], dict(num_images_per_prompt=True)),
        ("height: 32.5 is not a whole number or null", [[1]], dict(height=32.5)),
        ("generator: 7 is not .*Generator", [[1]], dict(generator=7)),
        ("latents: array.* is not Tensor", [[1]], dict(latents=np.zeros((1, 4, 8, 8)))),
        ("atol: 'fine' is not a number", [[1]], dict(atol="fine")),
        ("cfg_interval: 0.5 is not a list", [[1]], dict(cfg_interval=0.5)),
        (
            "latents of shape .1, 4, 1, 8., and they are .1, 4, 8, 8.",
            [[1]],
            dict(num_inference_steps=2, callback_on_step_end=lambda *_: {"latents": torch.zeros(1, 4, 1, 8)}),
        ),
    ):
        with pytest.raises(UserError, match=match):
            pipe(*arguments, **options)
    numbers = dict(num_inference_steps=np.int64(2), guidance_scale=np.float32(1), num_images_per_prompt=np.uint8(2))
    assert len(pipe([np.int32(1)], **numbers).images) == 2, "NumPy's numbers are numbers"


def test_guidance_needs_a_null_class(tmp_path):
    pipe = SiTPipeline.from_pretrained(make_checkpoint(tmp_path / "c", null_class=False))
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(UserError, match="null class"):
        pipe([1], num_inference_steps=2)
    assert pipe([1], guidance_scale=1, num_inference_steps=2).images
