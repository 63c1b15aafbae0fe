"""The order of training: everything that is drawn for the j-th image ever seen is keyed by (seed, j).

Which image it is (a permutation of the data for every epoch), whether it is flipped, its sample of the VAE's
posterior, t, the noise x0 and the draw for label dropout depend on the seed and j alone. So a run that starts again
at ``images_seen = j`` continues exactly where it stopped, on any number of processes (EDM2's ``InfiniteSampler``, with
the rank left out). The order and the flips may have a seed of their own. Workers hand over whole micro-batches, ready
for the device.
"""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import multiprocessing.util
import os
import signal
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from sit.latents.datasets import Batch, TrainingData
from sit.utils.errors import UserError
from sit.utils.random import generator, key

SIGNALS_OF_THE_MAIN_PROCESS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class EpochPermutation:
    """Position j in training → index of an image: every epoch is a permutation keyed by (seed, epoch)."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed
        self._permutation = functools.lru_cache(maxsize=2)(self._draw)  # a batch may straddle two epochs

    def _draw(self, epoch: int) -> np.ndarray:
        order = torch.randperm(self.count, generator=generator(self.seed, "order", epoch))
        return order.to(torch.int32).numpy()

    def __getstate__(self) -> tuple[int, int]:
        return self.count, self.seed

    def __setstate__(self, state: tuple[int, int]) -> None:
        self.__init__(*state)

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """positions (b,) int64 → indices (b,) int64."""
        epochs, places = np.divmod(positions, self.count)
        indices = np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            indices[here] = self._permutation(int(epoch))[places[here]]
        return indices


def draw(seed: int, positions: np.ndarray, normal: torch.Tensor, seed_order: int | None = None) -> torch.Tensor:
    """The random numbers of the images at ``positions`` (b,).

    Fills ``normal`` (b, 2, c, h, w) float32 with the posterior's noise and x0, standard normal, and returns (b, 3)
    float32 in [0, 1): the draws for the flip, t and label dropout. The flip's is that of ``seed_order``, if given.
    """
    uniform = torch.empty(len(positions), 3)
    source, shape = torch.Generator(), normal.shape[1:]
    for position, three, pair in zip(positions.tolist(), uniform.unbind(), normal.unbind(), strict=True):
        source.manual_seed(key(seed, "train", position))
        torch.rand(3, generator=source, out=three)
        torch.randn(shape, generator=source, out=pair)
        if seed_order is not None and seed_order != seed:
            source.manual_seed(key(seed_order, "train", position))
            torch.rand(1, generator=source, out=three[:1])
    return uniform


class MicroBatches(torch.utils.data.Dataset):
    """Micro-batch number k of one rank as an item, made whole by one worker of a DataLoader.

    With ``slots`` > 0 the two large tensors, latents and noise, don't travel with the item: they are written into slot
    k mod ``slots`` of shared memory, which is allocated once, and the item has ``in_slot``, their names. Fresh shared
    memory for every batch would cost as much as all the rest, in page faults.

    Args:
        data, seed, global_batch, seed_order, rank, world, accumulation: as for :func:`training_batches`.
        start: number of the first image.
        slots: micro-batches that the shared memory holds; 0 for none.

    Raises:
        UserError: the batch can't be divided so.
    """

    def __init__(
        self,
        data: TrainingData,
        seed: int,
        global_batch: int,
        *,
        seed_order: int | None = None,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
        accumulation: int = 1,
        slots: int = 0,
    ) -> None:
        parts = world * accumulation
        if global_batch < 1 or global_batch % parts:
            raise UserError(
                f"`batch_size={global_batch}` must be a multiple of {parts}: "
                f"{world} processes × {accumulation} accumulated micro-batches"
            )
        self.data, self.seed, self.start, self.accumulation = data, seed, start, accumulation
        self.global_batch, self.size, self.offset = global_batch, global_batch // parts, rank * global_batch // world
        self.seed_order = seed if seed_order is None else seed_order
        self.order = EpochPermutation(len(data.labels), self.seed_order)
        self.shape = (self.size, 2, *data.latent_shape)
        self.slots = torch.empty(slots, *self.shape).share_memory_() if slots else None

    def __getitem__(self, number: int) -> dict[str, Any]:
        step, part = divmod(number, self.accumulation)
        first = self.start + step * self.global_batch + self.offset + part * self.size
        positions = np.arange(first, first + self.size, dtype=np.int64)
        indices = self.order(positions)
        normal = torch.empty(self.shape) if self.slots is None else self.slots[number % len(self.slots)]
        uniform = draw(self.seed, positions, normal, self.seed_order)
        flipped = (uniform[:, 0] < 0.5).numpy() & self.data.flip
        sample = normal[:, 0]  # latents take the place of their noise: a slot has no memory to spare
        fetched = self.data.fetch(indices, flipped, sample, out=sample)
        names = ("latents" if "latents" in fetched else "posterior_noise", "noise")
        sample.copy_(fetched.pop(names[0]))  # nothing to do where it was written there
        return fetched | {
            **(self.copies(names, normal) if self.slots is None else {"in_slot": names}),
            "labels": torch.from_numpy(self.data.labels[indices]),
            "t_uniform": uniform[:, 1].clone(),
            "drop": uniform[:, 2].clone(),
            "indices": torch.from_numpy(indices),
            "positions": torch.from_numpy(positions),
        }

    def copies(self, names: Sequence[str], halves: torch.Tensor) -> Batch:
        """The two halves of (b, 2, c, h, w) as contiguous tensors of their own, pinned if there is a GPU."""
        shape = (2, self.size, *self.data.latent_shape)
        copied = torch.empty(shape, pin_memory=torch.cuda.is_available()).copy_(halves.transpose(0, 1))
        return dict(zip(names, copied, strict=True))

    def whole(self, number: int, item: dict[str, Any]) -> Batch:
        """Item ``number`` with what it left in its slot."""
        names = item.pop("in_slot", None)
        return item if names is None else item | self.copies(names, self.slots[number % len(self.slots)])


def leave_signals_to_the_main_process(closing: Any, _worker: int) -> None:
    """A scheduler signals all processes; workers must outlive the checkpoint that the main one writes then.

    ``closing`` is a shared byte: once it is set, SIGTERM ends a worker again, as multiprocessing expects.
    """

    def handle(number: int, _frame: object) -> None:
        if closing.value and number == signal.SIGTERM:
            os._exit(0)

    for number in SIGNALS_OF_THE_MAIN_PROCESS:
        signal.signal(number, handle)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS_OF_THE_MAIN_PROCESS)


def training_batches(
    data: TrainingData,
    seed: int,
    global_batch: int,
    *,
    seed_order: int | None = None,
    rank: int = 0,
    world: int = 1,
    accumulation: int = 1,
    start_images: int = 0,
    workers: int = 0,
    prefetch: int = 4,
) -> Iterator[Batch]:
    """Micro-batches of one rank, without end, from the image number ``start_images`` on.

    Step s is of the images start_images + s·global_batch … of the order; rank r takes the r-th of ``world`` equal
    slices, and cuts it into ``accumulation`` micro-batches of b = global_batch / (world · accumulation).

    Args:
        data: latents in memory or cached, or images to encode.
        seed: keys all draws.
        seed_order: keys the order and the flips instead.
        global_batch: images of a step, on all ranks together.
        rank, world: number of this process, and how many there are.
        accumulation: micro-batches of a step on each rank.
        start_images: images seen before.
        workers: processes that prepare micro-batches; 0 does it in this one. What comes out is the same.
        prefetch: micro-batches each worker keeps ready.

    Yields:
        ``latents`` (b, c, h, w) float32, one posterior sample, scaled; ``labels`` (b,) int64; ``t_uniform`` (b,)
        float32 in [0, 1); ``noise`` (b, c, h, w) float32, x0; ``drop`` (b,) float32 in [0, 1), below the dropout
        probability where the label is to be dropped; ``indices`` (b,) int64 into the data; ``positions``
        (b,) int64, j of the j-th image ever seen. On the CPU (pinned if
        there is a GPU), but ``latents`` of :class:`~sit.latents.datasets.PixelData` on its VAE's device.

    Raises:
        UserError: the batch can't be divided so, or an image can't be read.
    """
    closing = multiprocessing.RawValue("b", 0)
    # item k is asked for while item k − workers · prefetch is at hand but not yet copied: one slot more than that
    slots = workers * prefetch + 1 if workers else 0
    micro_batches = MicroBatches(
        data,
        seed,
        global_batch,
        seed_order=seed_order,
        start=start_images,
        rank=rank,
        world=world,
        accumulation=accumulation,
        slots=slots,
    )
    loader = torch.utils.data.DataLoader(
        micro_batches,
        batch_size=None,
        sampler=itertools.count(),
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=functools.partial(leave_signals_to_the_main_process, closing),
        generator=torch.Generator(),  # else it would draw its workers' seed from the global stream
    )
    # at exit multiprocessing ends its workers by SIGTERM, after running the finalizers of priority 0 and above
    finalizer = multiprocessing.util.Finalize(None, set_byte, args=(closing,), exitpriority=10)
    return _finished(loader, finalizer)


def set_byte(shared: Any) -> None:
    shared.value = 1


def _finished(loader: torch.utils.data.DataLoader, finalizer: Any) -> Iterator[Batch]:
    micro_batches: MicroBatches = loader.dataset
    try:
        # workers inherit the mask: a signal that comes before they have their handlers waits until they do
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS_OF_THE_MAIN_PROCESS)
        try:
            batches = iter(loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for number, item in enumerate(batches):
            yield micro_batches.data.finish(micro_batches.whole(number, item))
    finally:
        finalizer()  # before the loader's iterator goes, and its workers with it
