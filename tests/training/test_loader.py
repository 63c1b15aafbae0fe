"""The training order: what image j is shown with depends on (seed, j) alone."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from processes import Forked
from scipy import stats
from tiny_data import latent_data

from sit.data.dataset import ImageData
from sit.data.factory import open_images
from sit.data.reading import BadImage
from sit.latents.datasets import LatentData, PixelData, encode_in_memory
from sit.latents.vae import encode_images, load_vae, sample_posterior
from sit.training.loader import EpochPermutation, draw, training_batches
from sit.utils.errors import UserError


def take(data, count: int, **options) -> list[dict[str, torch.Tensor]]:
    return list(itertools.islice(training_batches(data, **({"seed": 3, "global_batch": 12} | options)), count))


def joined(batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_every_epoch_is_another_permutation():
    shown = joined(take(latent_data(), 50))["indices"].reshape(12, 50)  # 600 images are 12 epochs of 50
    assert all(sorted(epoch) == list(range(50)) for epoch in shown.tolist())
    assert len({tuple(epoch) for epoch in shown.tolist()}) == 12
    assert not torch.equal(shown[0], joined(take(latent_data(), 5, seed=4))["indices"][:50])


def test_contents_against_the_formula():
    data = latent_data()
    batch = take(data, 1)[0]
    normal = torch.empty(12, 2, 2, 4, 4)
    uniform = draw(3, np.arange(12), normal)
    indices = EpochPermutation(50, 3)(np.arange(12))
    side = (uniform[:, 0] < 0.5).long()
    mean, std = data.moments[indices, side].float().unbind(1)
    expected = (mean + std * normal[:, 0] - 0.1) * 0.5
    assert torch.allclose(batch["latents"], expected, atol=1e-6) and batch["latents"].dtype == torch.float32
    assert torch.equal(batch["labels"], torch.from_numpy(indices % 7)) and batch["labels"].dtype == torch.int64
    assert torch.equal(batch["noise"], normal[:, 1])
    assert torch.equal(batch["t_uniform"], uniform[:, 1]) and torch.equal(batch["drop"], uniform[:, 2])


def test_draws_have_their_distributions_and_are_independent():
    normal = torch.empty(4000, 2, 1, 4, 4)
    uniform = draw(0, np.arange(4000), normal)
    for column in uniform.T:
        assert stats.kstest(column.numpy(), "uniform").pvalue > 1e-3
    assert stats.kstest(normal.flatten().numpy(), "norm").pvalue > 1e-3
    rows = torch.cat([uniform, normal.flatten(1)], dim=1)
    correlation = torch.corrcoef(rows.T) - torch.eye(rows.shape[1])
    assert correlation.abs().max() < 0.08
    assert torch.corrcoef(torch.stack([normal[1:].flatten(), normal[:-1].flatten()]))[0, 1].abs() < 0.02


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (1, 3), (2, 1), (3, 2)])
def test_any_division_shows_the_same_images(workers, world, accumulation):
    whole = take(latent_data(), 6)
    ranks = [
        take(latent_data(), 6 * accumulation, rank=rank, world=world, accumulation=accumulation, workers=workers)
        for rank in range(world)
    ]
    for step in range(6):
        parts = [batch for rank in ranks for batch in rank[step * accumulation : (step + 1) * accumulation]]
        assert_same(joined(parts), whole[step])


@pytest.mark.parametrize("start", [12 * 3, 12 * 20, 17])
def test_starting_anywhere_goes_on_as_if_never_stopped(start):
    everything = joined(take(latent_data(), 30))
    later = joined(take(latent_data(), 5, start_images=start, workers=1))
    assert_same(later, {name: values[start : start + 60] for name, values in everything.items()})


def test_order_and_noise_have_seeds_of_their_own():
    """The order's seed decides which images come and which are flipped; the other one all else, and is left alone."""
    data, alike = latent_data(), latent_data()
    data.moments[:] = torch.arange(50, dtype=torch.float16)[:, None, None, None, None, None]
    data.moments[:, 1] *= -1  # a flipped image shows itself by its sign
    data.moments[:, :, 1] = 0
    alike.moments[:] = 1
    base, order, noise = ({}, {"seed_order": 4}, {"seed": 4, "seed_order": 3})
    of_images = [joined(take(data, 9, **seeds)) for seeds in (base, order, noise)]
    latents = [batch["latents"] for batch in of_images]
    assert torch.equal(latents[0], latents[2]) and not torch.equal(latents[0].abs(), latents[1].abs())
    flips = [batch["latents"][:, 0, 0, 0] < -0.05 for batch in of_images]  # a zero stands for −0.1 / 2
    assert torch.equal(flips[0], flips[2]) and not torch.equal(flips[0], flips[1])
    assert [torch.equal(batch["indices"], of_images[0]["indices"]) for batch in of_images] == [True, False, True]
    of_noise = [joined(take(alike, 9, **seeds)) for seeds in (base, order, noise)]
    for name in ("latents", "t_uniform", "noise", "drop"):
        assert torch.equal(of_noise[0][name], of_noise[1][name]), name
        assert not torch.equal(of_noise[0][name], of_noise[2][name]), name
    assert_same(joined(take(data, 9, seed=4)), joined(take(data, 9, seed=4, seed_order=4)))


def test_the_global_random_state_is_left_alone():
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    take(latent_data(), 2, workers=1)
    assert torch.equal(before, torch.random.get_rng_state())


def test_about_half_are_flipped_and_without_flip_none():
    data = latent_data()
    data.moments[:, 0], data.moments[:, 1] = 0, 1
    share = joined(take(data, 50))["latents"].mean(dim=(1, 2, 3)).gt(0.1).float().mean()
    assert 0.4 < share < 0.6
    data.flip = False
    assert joined(take(data, 20))["latents"].abs().max() == np.float32(0.05)  # |0 − 0.1| · 0.5


def test_batches_that_were_handed_over_are_never_written_again():
    batches = training_batches(latent_data(), 3, 12, workers=2, prefetch=2)
    kept = list(itertools.islice(batches, 40))  # many times round the shared slots
    copies = [{name: values.clone() for name, values in batch.items()} for batch in kept]
    for _ in itertools.islice(batches, 40):
        pass
    for batch, copy, plain in zip(kept, copies, take(latent_data(), 40), strict=True):
        assert_same(batch, copy)
        assert_same(batch, plain)


def test_a_batch_that_can_not_be_divided():
    for options in ({"global_batch": 10, "world": 4}, {"global_batch": 0}, {"accumulation": 5}):
        with pytest.raises(UserError, match="`batch_size="):
            take(latent_data(), 1, **options)


def test_encoding_while_training_shows_what_the_latents_in_memory_show():
    vae, images = load_vae("digits"), open_images("digits:heldout")
    memory = take(encode_in_memory(images, vae, flip=True, progress=False), 3)
    for workers in (0, 1):
        flying = take(PixelData(images, vae, flip=True), 3, workers=workers)
        for a, b in zip(memory, flying, strict=True):
            assert (a.pop("latents") - b.pop("latents")).abs().max() < 5e-3  # moments in memory are float16
            assert_same(a, b)
            a["latents"] = torch.zeros(1)
        memory = take(encode_in_memory(images, vae, flip=True, progress=False), 3)


def test_images_can_stay_beside_their_latents():
    vae, images = load_vae("digits"), open_images("digits:heldout")
    batch = take(PixelData(images, vae, flip=True, keep_images=True), 1, workers=1)[0]
    shown = [images[index][0] for index in batch["indices"].tolist()]
    flipped = [not torch.equal(a, b) for a, b in zip(batch["images"], shown, strict=True)]
    assert 0 < sum(flipped) < 12 and batch["images"].dtype == torch.uint8
    assert all(torch.equal(a, b.flip(-1) if f else b) for a, b, f in zip(batch["images"], shown, flipped, strict=True))


def test_flipped_moments_are_those_of_the_flipped_image():
    vae, images = load_vae("digits"), open_images("digits:heldout")
    data = encode_in_memory(images, vae, flip=True, progress=False)
    mean, std = encode_images(vae, images[5][0].flip(-1)[None])
    assert torch.allclose(data.moments[5, 1].float(), torch.cat([mean, std]), rtol=2e-3, atol=2e-3)
    noise = torch.randn(1, 4, 8, 8)
    kept, out = noise.clone(), torch.empty_like(noise)
    latents = data.fetch(np.array([5]), np.array([True]), noise)["latents"]
    assert torch.allclose(latents, sample_posterior(mean, std, noise, vae.config), atol=5e-3)
    assert torch.equal(noise, kept), "only `out` is written into"
    for place in (out, noise):
        assert data.fetch(np.array([5]), np.array([True]), noise, out=place)["latents"] is place
        assert torch.equal(place, latents)


class Simple:
    """Data that makes its latents anew, whatever ``out`` is offered."""

    def __init__(self, data: LatentData) -> None:
        self.data, self.labels, self.flip, self.latent_shape = data, data.labels, data.flip, data.latent_shape

    def fetch(self, indices: np.ndarray, flipped: np.ndarray, noise: torch.Tensor, out=None) -> dict[str, torch.Tensor]:
        mean, std = self.data.moments[indices, flipped.astype(int)].float().unbind(1)
        return {"latents": (mean + std * noise - 0.1) * 0.5}

    def finish(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return batch


@pytest.mark.parametrize("workers", [0, 1])
def test_data_need_not_write_into_the_memory_they_are_offered(workers):
    for own, plain in zip(take(Simple(latent_data()), 8, workers=workers), take(latent_data(), 8), strict=True):
        assert torch.allclose(own["latents"], plain["latents"], atol=1e-6)
        assert_same(own, plain | {"latents": own["latents"]})


def test_a_corrupt_image_is_named_through_the_workers(tmp_path):
    (tmp_path / "class").mkdir()
    (tmp_path / "class" / "broken.png").write_text("no image")
    data = PixelData(ImageData(open_images(str(tmp_path)).source, 32), load_vae("digits"))
    message = ""
    try:  # not pytest.raises: it keeps the traceback, and with it the loader, whose end then takes five seconds
        take(data, 1, workers=1)
    except BadImage as error:
        message = str(error)
    assert "broken.png" in message and "Traceback" not in message


SIGNALLED = """
import os, signal, itertools
from tiny_data import latent_data
from sit.training.loader import training_batches
os.setsid()
signal.signal(signal.SIGTERM, lambda *_: print("main saw it", flush=True))
batches = training_batches(latent_data(), 0, 12, workers=2)
next(batches)
os.killpg(0, signal.SIGTERM)
print(sum(len(batch["labels"]) for batch in itertools.islice(batches, 50)), flush=True)
"""


def test_workers_outlive_a_signal_to_the_whole_group_and_end_with_the_process(tmp_path):
    (tmp_path / "program.py").write_text(SIGNALLED)
    process = Forked(tmp_path / "program.py")
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert said.split() == ["main", "saw", "it", "600"], errors
