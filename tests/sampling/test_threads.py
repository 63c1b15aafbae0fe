"""Samples of small networks on a CPU: the same to the bit with one thread and with two, and what happens on the way."""

from __future__ import annotations

import multiprocessing
import threading

import pytest
import torch
from accelerate import cpu_offload

from sit import SiTPipeline
from sit.checkpoint.load import load_for_sampling
from sit.model import SiT
from sit.sampling import sampler
from sit.sampling.config import SamplerConfig
from sit.sampling.images import balanced_labels, sample_images
from sit.sampling.sampler import generate, sample
from sit.utils import workers
from sit.utils.errors import UserError
from sit.utils.workers import computes_apart

CONFIGS = {
    "sde": SamplerConfig(steps=4, cfg_scale=1.5),
    "ode": SamplerConfig("ode", 3, "heun2"),
    "adaptive": SamplerConfig("ode", atol=1e-2, rtol=1e-2),
}


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return load_for_sampling(checkpoint, device=torch.device("cpu"))


@pytest.fixture
def with_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
    left = [*threading.enumerate(), *multiprocessing.active_children()]
    assert not [one for one in left if one.name == "sit-worker"], "no thread and no process is left"


@pytest.fixture(params=("threads", "forks"))
def crew(request, monkeypatch):
    """What the groups are shared among."""
    monkeypatch.setattr(workers, "can_fork", lambda: request.param == "forks")
    return request.param


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_same_images_with_any_number_of_workers(loaded, with_threads, monkeypatch, kind, crew):
    count, used, apart = 5 if kind == "adaptive" else 40, [], sampler.run_apart
    monkeypatch.setattr(
        sampler, "run_apart", lambda jobs, *rest, **how: used.append(len(jobs)) or apart(jobs, *rest, **how)
    )
    made = []
    for threads in (1, 2):
        with_threads(threads)
        labels, told = balanced_labels(range(count), range(10)), []
        options = dict(seed=3, config=CONFIGS[kind], batch_size=33, on_step=lambda *step, told=told: told.append(step))
        batches = list(sample_images(loaded, torch.arange(count), labels, **options))
        made.append((torch.cat([batch.images for batch in batches]), sorted((s[0], float(s[3])) for s in told)))
    assert used == [min(count, 3 if kind != "adaptive" else count)], "two threads share the groups of the first batch"
    assert torch.equal(made[0][0], made[1][0])
    assert made[0][1] == made[1][1], "steps are told as often, at the same times"


def test_the_same_latents_of_one_batch_of_noise(loaded, with_threads):
    """What --reverse calls too, with guidance, in groups of 16 rows; and near to what the whole batch at once gives."""
    noise, labels = torch.randn(20, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(20) % 10
    config, found = SamplerConfig("ode", 3, "euler", cfg_scale=2.0), []
    for threads in (1, 2):
        with_threads(threads)
        found.append(sample(loaded.model, loaded.transport, noise, labels, config))
    assert torch.equal(*found) and not found[0].requires_grad
    whole = sample(
        lambda x, t, y: loaded.model(x, t, y), loaded.transport, noise, labels, SamplerConfig("ode", 3, "euler")
    )
    torch.testing.assert_close(
        sample(loaded.model, loaded.transport, noise, labels, SamplerConfig("ode", 3, "euler")),
        whole,
        rtol=0,
        atol=1e-5,
    )


def test_the_pipeline_computes_in_the_same_groups(loaded, checkpoint, with_threads):
    pipe = SiTPipeline.from_pretrained(checkpoint)
    pipe.set_progress_bar_config(disable=True)
    noise, labels = torch.randn(20, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(20) % 10
    options = dict(latents=noise, output_type="latent", sampler="ode", method="euler")
    found = [sample(loaded.model, loaded.transport, noise, labels, SamplerConfig("ode", 3, "euler", cfg_scale=2.0))]
    rows = set()
    pipe.transformer.register_forward_pre_hook(lambda module, inputs: rows.add(len(inputs[0])))
    for threads in (1, 2):
        with_threads(threads)
        found.append(pipe(labels.numpy(), guidance_scale=2.0, num_inference_steps=3, **options).images)
    assert torch.equal(found[1], found[2]) and torch.equal(found[0], found[1])
    assert rows == {2 * 16, 2 * 4}, "with and without the label"


def test_layers_whose_weights_come_as_they_are_called_are_no_work_for_threads():
    network = SiT(8, patch_size=2, hidden_size=32, depth=1, num_heads=2, num_classes=10)
    assert computes_apart(network, 4, 16)
    network.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert not computes_apart(network, 4, 16)
    network = SiT(8, patch_size=2, hidden_size=32, depth=1, num_heads=2, num_classes=10)
    cpu_offload(network, torch.device("cpu"))
    assert not computes_apart(network, 4, 16)


def test_the_first_sample_is_told_apart(loaded, with_threads, crew):
    with_threads(2)
    first, options = [], dict(seed=0, latent_shape=(4, 8, 8), device="cpu", batch_size=64)
    config = SamplerConfig("ode", 4, "euler")
    made = generate(
        loaded.model, loaded.transport, torch.arange(40), torch.arange(40) % 10, config=config, **options,
        on_first=lambda step, total, x, t: first.append((step, x[0].clone())),
    )  # fmt: skip
    latents = torch.cat([part for _, part in made])
    assert [step for step, _ in first] == [1, 2, 3, 4] and torch.equal(first[-1][1], latents[0])


def test_mistakes_on_the_way_are_told_as_with_one_thread(loaded, with_threads, monkeypatch, crew):
    config = SamplerConfig("ode", method="dopri5", atol=1e-12, rtol=1e-12)
    monkeypatch.setattr("sit.sampling.ode.MOST_EVALUATIONS", 8)
    said = []
    for threads in (1, 2):
        with_threads(threads)
        with pytest.raises(UserError) as told:
            list(sample_images(loaded, torch.arange(3), torch.arange(3), seed=0, config=config))
        said.append(str(told.value))
    assert said[0] == said[1] and "`method=dopri5` doesn't come to the end" in said[0]

    def interrupt(*step):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(
            sample_images(
                loaded, torch.arange(40), torch.arange(40) % 10, seed=0, config=CONFIGS["sde"], on_step=interrupt
            )
        )
