"""The training loop, through Accelerate: one process on a CPU or a cluster's worth of GPUs."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from torch import nn
from tqdm import tqdm

from sit.checkpoint.donor import Donor, inherited_by, read_donor, take
from sit.checkpoint.find import find_checkpoints
from sit.latents.datasets import Batch, TrainingData
from sit.model import MODELS, SiT, create_model
from sit.training.checkpoints import prune_checkpoints, set_aside_later, write_checkpoint
from sit.training.config import TrainConfig
from sit.training.data import Opened, open_training_data
from sit.training.distill import distill
from sit.training.distributed import compile_for_training, is_ddp, set_up_fsdp2, set_up_processes
from sit.training.ema import averaged_parameters, moving_average, trained_parameters
from sit.training.evaluation import MakeEvaluation, evaluation_is_due, evaluation_of, log_evaluation
from sit.training.frozen import freeze
from sit.training.heldout import heldout_is_due, make_heldout_loss
from sit.training.identity import Identity, keep_identity
from sit.training.loader import training_batches
from sit.training.meanflow import SET_ASIDE, make_meanflow
from sit.training.non_finite import NonFinitePolicy
from sit.training.objective import Objective, TransportObjective, at_step
from sit.training.optimization import gradient_norm, make_optimizer
from sit.training.posthoc_ema import PowerAverage, keep_lineage, snapshot_is_due, write_snapshot
from sit.training.preview import save_preview
from sit.training.repa import align
from sit.training.rows import Rows
from sit.training.run_folder import JsonLinesTracker, make_run_folder
from sit.training.schedule import learning_rate_at
from sit.training.start import Start, held_start
from sit.training.state import TrainingState
from sit.training.step_checks import Updated, make_step_checks
from sit.training.stop_signal import StopSignal
from sit.training.trackers import start_trackers
from sit.transport.transport import Transport
from sit.utils.compile import should_compile
from sit.utils.errors import UserError
from sit.utils.fingerprint import state_fingerprint


def train(config: TrainConfig, make_evaluation: MakeEvaluation | None = None) -> tuple[Path, bool]:
    """Train, from scratch or from a checkpoint; returns the run's folder, and whether this is the main process.

    ``make_evaluation`` makes what ``eval_every`` evaluates by; without that setting it is not asked for.

    Every process of the launch calls this. What is drawn at random depends on the config's seed and the number of
    images seen alone, not on the number of processes.

    Raises:
        UserError: settings that can't work, data that can't be read, or an output folder that is taken.
        SystemExit: a signal asked for the end; the state is saved and the status is that of
            :data:`sit.utils.signals.TRAINING`.
    """
    # Processes, and where to start: what is wrong is told before the data takes its time.
    accelerator = set_up_processes(config)
    with held_start(config, accelerator.is_main_process) as start:
        return run(config, start, accelerator, make_evaluation), accelerator.is_main_process


def run(
    config: TrainConfig, start: Start, accelerator: Accelerator, make_evaluation: MakeEvaluation | None = None
) -> Path:
    """All phases from the data to the last checkpoint; returns the run's folder."""
    # What it begins with, and the data.
    donor = None if config.init_from is None or start.checkpoint is not None else read_donor(config.init_from)
    with accelerator.main_process_first():  # it may have to be downloaded
        opened = open_training_data(config, accelerator.device, progress=accelerator.is_main_process)
    data = opened.data

    # Network, objective and optimizer.
    transport = Transport(**config.transport_options())
    network = make_network(config, data, donor, start)
    if donor is not None:
        taken = take(network, donor, data.classes, config.transport_options(), config.vae)
        accelerator.print(f"begun with {donor.place}: {taken}")
    begun_with = None if donor is None else state_fingerprint(donor.state)
    del donor  # as large as the network
    objective = make_objective(config, data, transport, network, accelerator, first_step=start.step + 1)
    freeze(network, config.freeze, config.train_only)
    heldout = make_heldout_loss(opened.heldout, transport, accelerator)
    evaluation = evaluation_of(config, make_evaluation, accelerator)
    prepare_forward(config, network, accelerator)
    model, optimizer = accelerator.prepare(network, make_optimizer(network, config))
    network = accelerator.unwrap_model(model)
    parameters, averaged = trained_parameters(network), averaged_parameters(network)
    ema = moving_average(averaged, config.ema_decay, config.ema_warmup)
    averages = {sigma: PowerAverage(averaged, sigma) for sigma in config.posthoc_ema}
    state = TrainingState(network, optimizer.optimizer, ema, accelerator.scaler, averages)

    # The run's folder, and what a checkpoint in it holds.
    folder = open_folder(config, start, opened, accelerator, lambda: Identity.of(config, opened, objective, begun_with))
    if start.checkpoint is not None:
        state.load(start.checkpoint)
        accelerator.print(f"continuing from {start.checkpoint} after {start.step} steps")
        if (
            heldout is not None
            and heldout_is_due(config, start.step)
            and not heldout.path(folder, start.step).is_file()
        ):
            heldout.measure(start.step, folder, network, ema)  # a signal came before

    # The loop.
    rows = Rows(accelerator, start.step, config.batch_size)
    non_finite = NonFinitePolicy(accelerator, config.non_finite_limit)
    checks = make_step_checks(
        accelerator, Updated(optimizer, ema, averaged), rows, non_finite, every=min(config.log_every, config.steps)
    )
    bar = progress_bar(config, start, accelerator)
    batches = training_batches(
        data,
        seed=config.seed_of("noise"),
        seed_order=config.seed_of("order"),
        global_batch=config.batch_size,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        accumulation=config.gradient_accumulation,
        start_images=start.step * config.batch_size,
        workers=config.workers,
    )
    model.train()
    with StopSignal() as stop, contextlib.closing(bar), contextlib.closing(batches):
        for step in range(start.step + 1, config.steps + 1):
            # Set the learning rate.
            rate = learning_rate_at(step - 1, config)
            for group in optimizer.param_groups:
                group["lr"] = rate

            # Accumulate gradients.
            objective = at_step(objective, step)  # what has come to its end goes, a teacher with it
            micro_batches = itertools.islice(batches, config.gradient_accumulation)
            values, indices = accumulate_gradients(model, objective, micro_batches, accelerator)
            accelerator.unscale_gradients(optimizer)
            norm = gradient_norm(parameters, config.max_grad_norm)

            # Update the weights and their average, unless the gradient is not finite.
            checks.update(step, norm, values, indices)
            for average in averages.values():  # after a skipped step too: their time is the step
                average.step(averaged)
            optimizer.zero_grad()

            # Log. A GPU is waited for here, and where a checkpoint is written, not at each step.
            last = step == config.steps
            row_due = step % config.log_every == 0 or last
            if row_due:
                last_norm = checks.read()
                if rows:
                    mean = rows.write(step, gradient_norm=last_norm, learning_rate=rate)
                    bar.set_postfix(loss=f"{mean:.4f}", refresh=False)
            bar.update()

            # Measure the held-out loss, evaluate and sample a preview, unless a signal came, which won't wait for them.
            heldout_due, evaluation_due = heldout_is_due(config, step), evaluation_is_due(config, step)
            measured = heldout is None or not heldout_due
            if heldout is not None and heldout_due and not stop.received_anywhere(accelerator):
                heldout.measure(step, folder, network, ema)
                measured = True
            if evaluation and evaluation_due and not stop.received_anywhere(accelerator):
                log_evaluation(
                    evaluation, step, folder=folder, config=config, opened=opened,
                    network=network, ema=ema, transport=transport, accelerator=accelerator,
                )  # fmt: skip
            preview_due = config.preview_every and (step % config.preview_every == 0 or last)
            if preview_due and not stop.received_anywhere(accelerator):
                save_preview(
                    folder, config, opened, step=step, stop=stop,
                    network=network, ema=ema, transport=transport, accelerator=accelerator,
                )  # fmt: skip

            # Write a snapshot of the averages, a checkpoint, which names the snapshots, and end if a signal came.
            checkpoint_due = step % config.checkpoint_every == 0 or last
            due = heldout_due or evaluation_due or preview_due or checkpoint_due
            asked = due or stop.is_asked_at(step, accelerator)
            stopped = stop.received_anywhere(accelerator) if asked else 0
            if snapshot_is_due(step, config):
                write_snapshot(folder, step, state, accelerator)
            if checkpoint_due or stopped:
                checks.read()
                write_checkpoint(
                    folder,
                    step,
                    config,
                    opened=opened,
                    state=state,
                    transport=transport,
                    accelerator=accelerator,
                )
            if stopped and not (last and measured):  # gone on with, the last step is measured, and nothing else
                bar.close()
                accelerator.end_training()
                accelerator.print(f"stopped by a signal after step {step}; resume {folder} to go on")
                raise SystemExit(stopped)
    bar.close()
    accelerator.end_training()
    non_finite.check_end(config.steps - start.step)
    return folder


# ---------------------------------------------------------------- before the loop


def make_network(config: TrainConfig, data: TrainingData, donor: Donor | None, start: Start) -> SiT:
    """The network with its initial values, which depend on the config's seed of the weights alone.

    What it inherits of a donor's configuration, a run that goes on has from its checkpoint.
    """
    options = config.network_options(data.latent_shape, len(data.classes))
    if start.checkpoint is not None:
        options |= inherited_by(start.checkpoint)
    elif donor is not None:
        patch = MODELS[config.model]["patch_size"]
        options |= donor.inherited((data.latent_shape[1] // patch, data.latent_shape[2] // patch))
    return create_model(config.model, config.seed_of("weights"), **options)


def make_objective(
    config: TrainConfig,
    data: TrainingData,
    transport: Transport,
    network: SiT,
    accelerator: Accelerator,
    *,
    first_step: int,
) -> Objective:
    """What is minimized from ``first_step`` on; an objective with parameters of its own adds them to the network."""
    if config.averages:
        accelerator.print(SET_ASIDE)
        return make_meanflow(config, transport, null_label=len(data.classes))
    objective: Objective = TransportObjective(transport, config.class_dropout, null_label=len(data.classes))
    if config.distill_from is not None and first_step <= config.distill_steps:
        objective = distill(
            objective, network, config, transport=transport, classes=data.classes, vae=config.vae,
            device=accelerator.device, autocast=accelerator.autocast,
        )  # fmt: skip
    if config.repa is not None:
        objective = align(objective, network, config, device=accelerator.device, autocast=accelerator.autocast)
    return objective


def prepare_forward(config: TrainConfig, network: SiT, accelerator: Accelerator) -> None:
    """Set, in place, how the network computes; to be called before Accelerate prepares it."""
    if config.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    set_up_fsdp2(accelerator, network)
    can = config.distill_from is None and not config.averages
    if can and should_compile(config.compile, accelerator.device, accelerator.print):
        compile_for_training(network, is_ddp(accelerator))


def open_folder(
    config: TrainConfig, start: Start, opened: Opened, accelerator: Accelerator, identify: Callable[[], Identity]
) -> Path:
    """Make the run's folder, or get it ready to go on from ``start``; and start the trackers. On every process.

    ``identify`` tells what the run is trained on; the main process alone asks.

    Raises:
        UserError: on every process, if it can't be made, or the run was begun with something else.
    """
    shared: list[Path | UserError] = [Path()]
    if accelerator.is_main_process:
        try:
            identity = identify()
            shared = [
                make_run_folder(config, start.folder, opened.save_vae, lambda run: keep_identity(run, identity, config))
            ]
            if start.checkpoint is not None and (aside := set_aside_later(shared[0], start.checkpoint)):
                accelerator.print(f"the checkpoints beyond {start.checkpoint} are set aside in {aside}")
            if start.folder is not None and (aside := keep_lineage(shared[0], start.checkpoint)):
                beyond = start.checkpoint or "the beginning"
                accelerator.print(f"the snapshots beyond {beyond} are set aside in {aside}")
            kept = (config.keep_last, config.keep_every, config.checkpoint_every)
            prune_checkpoints(find_checkpoints(shared[0]), *kept)  # a kill left one more
        except UserError as error:
            shared = [error]
    if accelerator.num_processes > 1:
        torch.distributed.broadcast_object_list(shared)
    (folder,) = shared
    if isinstance(folder, UserError):
        raise folder
    accelerator.project_configuration = ProjectConfiguration(logging_dir=str(folder / "logs"))
    start_trackers(accelerator, config, folder, JsonLinesTracker(folder / "metrics.jsonl", start.step), start.step)
    return folder


def progress_bar(config: TrainConfig, start: Start, accelerator: Accelerator) -> tqdm:
    """The steps of the whole run, on the main process; seldom where nobody watches."""
    return tqdm(
        total=config.steps,
        initial=start.step,
        desc="train",
        unit="step",
        dynamic_ncols=True,
        mininterval=0.1 if sys.stderr.isatty() else 10,
        disable=not accelerator.is_main_process,
    )


# ---------------------------------------------------------------- in the loop


def accumulate_gradients(
    model: nn.Module, objective: Objective, micro_batches: Iterable[Batch], accelerator: Accelerator
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Add up the gradients of a step's micro-batches.

    Returns:
        By name, ``loss`` and the objective's metrics, detached, and the indices of the images; each (b,), b the
        images of this process.
    """
    parts, indices = [], []
    for batch in micro_batches:
        batch = {name: tensor.to(accelerator.device, non_blocking=True) for name, tensor in batch.items()}
        with accelerator.accumulate(model):
            loss, metrics = objective(model, batch)
            accelerator.backward(loss.mean())
        parts.append({"loss": loss.detach()} | {name: metric.detach() for name, metric in metrics.items()})
        indices.append(batch["indices"])
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}, torch.cat(indices)
