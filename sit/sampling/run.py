"""What sample.py does: from a checkpoint to images on disk."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm

from sit.checkpoint.load import Loaded, load_for_sampling
from sit.latents.vae import decode, downsampling
from sit.sampling.arguments import Arguments
from sit.sampling.config import OnStep, height_and_width
from sit.sampling.images import (
    ImageBatch,
    balanced_labels,
    check_finite,
    labels_named,
    latent_shape_for,
    uniform_labels,
)
from sit.sampling.inversion import invert
from sit.sampling.sampler import generate
from sit.sampling.writer import writing_samples
from sit.utils.compile import WORTH_IT, compile_for_sampling, should_compile
from sit.utils.device import pick_device, process_state
from sit.utils.errors import UserError
from sit.utils.lock import locked
from sit.utils.precision import for_sampling


def sample(arguments: Arguments) -> None:
    """Sample images from a checkpoint into a new folder, and print where they are.

    All processes of a launch sample, and the main one writes; an image is the same however many there are.
    """
    state = process_state()
    loaded = load(arguments, state)
    arguments = replace(arguments, sampler=arguments.sampler.resolve(loaded.transport.averages))
    folder = output_folder(arguments)
    if arguments.inverts:
        if (file := invert(arguments, loaded, folder, state)) is not None:
            print(f"noise:   {file}")
        return
    labels = labels_in_turn(arguments, loaded)
    count = arguments.num_samples or 4 * len(labels)
    if arguments.label_order == "balanced":
        wanted = balanced_labels(range(count), labels)
    else:
        wanted = uniform_labels(range(count), labels, arguments.seed)
    shape = latent_shape_for(loaded, height_and_width(arguments.image_size))
    compile_if_worth_it(arguments, loaded, count, state)
    factor = downsampling(loaded.vae)
    size = shape[1] * factor, shape[2] * factor
    keep = arguments.num_samples is not None

    with contextlib.ExitStack() as stack:
        writer = None
        if state.is_main_process:
            stack.enter_context(locked(folder, "out", beside=True))
            writer = stack.enter_context(writing_samples(folder, count, size, keep))
        bar = stack.enter_context(progress_bar(count, state))
        made = made_here(arguments, loaded, wanted, shape, bar)
        for batch in made if state.num_processes == 1 else in_order(made, count, arguments.batch_size, state):
            if writer is not None:
                writer.add(batch)
                bar.update(writer.done - bar.n)
        if writer is not None:
            writer.save_grid(loaded.info.label_names, columns=min(len(labels), 10), weights=loaded.weights_name)

    state.print(f"weights: {loaded.weights_name}")
    state.print(f"grid:    {folder / 'grid.png'}")
    if keep:
        state.print(f"samples: {folder / 'samples.npz'} and {count} PNGs")


def output_folder(arguments: Arguments) -> Path:
    """The folder that ``out`` names, or one under ``samples/`` by the date, what is done, the seed and the average."""
    if arguments.out is not None:
        return Path(arguments.out)
    done = "likelihood-" if arguments.likelihood else "reverse-" if arguments.reverse else ""
    average = f"-ema{arguments.ema:g}" if arguments.ema is not None else ""
    return Path("samples") / f"{time.strftime('%Y%m%d-%H%M%S')}-{done}seed{arguments.seed}{average}"


def made_here(
    arguments: Arguments, loaded: Loaded, wanted: torch.Tensor, shape: tuple[int, int, int], bar: tqdm
) -> Iterator[ImageBatch]:
    """The images that this process makes: of every round of batches, one for each process, its own.

    Args:
        arguments: the command line.
        loaded: the checkpoint.
        wanted: (n,) int64, the labels of all images.
        shape: (c, h, w) of the latents.
        bar: what shows the progress.

    Raises:
        NotFinite: a sample is NaN or infinite.
    """
    state, count = process_state(), len(wanted)
    indices = torch.arange(count)
    mine = indices[(indices // arguments.batch_size) % state.num_processes == state.process_index]
    generated = generate(
        loaded.model,
        loaded.transport,
        mine,
        wanted[mine],
        seed=arguments.seed,
        config=arguments.sampler,
        latent_shape=shape,
        guide=loaded.guide_network,
        device=loaded.device,
        batch_size=arguments.batch_size,
        on_step=advancing(bar, count, state.num_processes),
    )

    def decoded(batch: tuple[torch.Tensor, torch.Tensor]) -> ImageBatch:
        done, latents = batch
        check_finite(loaded, latents, done, wanted[done], seed=arguments.seed, config=arguments.sampler)
        return ImageBatch(done, wanted[done], decode(loaded.vae, latents).cpu())

    return map(decoded, generated)


def in_order(made: Iterator[ImageBatch], count: int, batch_size: int, state: PartialState) -> Iterator[ImageBatch]:
    """The batches of all processes on each of them, in the order of the images' numbers.

    Raises:
        UserError: one of the processes met it.
    """
    for _ in range(math.ceil(count / (batch_size * state.num_processes))):
        mine: list[ImageBatch | str | None] = []
        try:
            mine.append(next(made, None))
        except UserError as error:
            mine.append(str(error))  # the others wait for this process, and are told
        for batch in gather_object(mine):
            if isinstance(batch, str):
                raise UserError(batch)
            if batch is not None:
                yield batch


def load(arguments: Arguments, state: PartialState) -> Loaded:
    """The checkpoint on its device, in its precision."""
    device = pick_device(arguments.device) if arguments.device else state.device
    return load_for_sampling(
        arguments.ckpt,
        ema=arguments.ema,
        guide=arguments.guide,
        vae=arguments.vae,
        device=device,
        dtype=for_sampling(arguments.precision, device),
        image_size=height_and_width(arguments.image_size),
        **vars(arguments.published),
    )


def labels_in_turn(arguments: Arguments, loaded: Loaded) -> list[int]:
    """The classes asked for; without any, all of them, or the first ten for a grid alone."""
    every = range(loaded.model.config["num_classes"])
    named = labels_named(arguments.labels, loaded.info.label_names, len(every))
    return named or list(every if arguments.num_samples else every[:10])


def compile_if_worth_it(arguments: Arguments, loaded: Loaded, count: int, state: PartialState) -> None:
    """Compile the network as ``compile`` says; None compiles it if it is evaluated often enough."""
    evaluations = math.ceil(count / state.num_processes / arguments.batch_size) * arguments.sampler.steps
    if should_compile(arguments.compile, loaded.device, state.print, evaluations >= WORTH_IT):
        for one in (loaded, *([loaded.guide] if loaded.guide else [])):
            compile_for_sampling(one.model)


def progress_bar(count: int, state: PartialState) -> tqdm:
    """A bar that counts images, shown by the main process."""
    quiet = not state.is_main_process
    return tqdm(total=count, desc="sample", unit="image", unit_scale=True, dynamic_ncols=True, disable=quiet)


def advancing(bar: tqdm, count: int, processes: int) -> OnStep:
    """Adds a step's share of the images made together to a bar of ``count``; adaptive solvers tell no total.

    The other processes are taken to be as far as this one.
    """

    def on_step(step: int, total: int | None, latents: torch.Tensor, t: float | torch.Tensor) -> None:
        if total is not None:
            bar.update(min(processes * len(latents) / total, count - bar.n))

    return on_step
