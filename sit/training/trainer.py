"""The training loop, through Accelerate: one process on a CPU or a cluster's worth of GPUs."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from diffusers.training_utils import EMAModel
from tqdm import tqdm

from sit.checkpoint.find import find_checkpoints, newest_checkpoint, resolve
from sit.checkpoint.info import CheckpointInfo, read_info
from sit.checkpoint.save import save_checkpoint
from sit.latents.datasets import Batch
from sit.latents.vae import decode
from sit.mixers import parse_mixers
from sit.model import MODELS, SiT, check_model_name, create_model
from sit.sampling.config import SamplerConfig
from sit.sampling.sampler import generate
from sit.training.config import TrainConfig
from sit.training.data import open_training_data
from sit.training.distributed import check_settings, compile_for_training, is_ddp, set_up_fsdp2
from sit.training.ema import averaged_parameters, ema_weights
from sit.training.loader import training_batches
from sit.training.recipes import check_same_run, run_folder
from sit.training.repa import attach_projector, check_block, cosine_similarity, load_encoder
from sit.training.run_folder import (
    JsonLinesTracker,
    check_trackers,
    clear_leftovers,
    clear_start,
    new_run_folder,
    prune_checkpoints,
    set_aside_later,
)
from sit.training.schedule import learning_rate_at
from sit.training.state import TrainingState
from sit.training.stop_signal import REQUEUE_EXIT, StopSignal
from sit.transport.transport import Transport
from sit.utils import random as randomness
from sit.utils.compile import should_compile
from sit.utils.device import process_state
from sit.utils.errors import UserError
from sit.utils.files import atomic_write, refuse_used
from sit.utils.image_grid import labeled_grid, save_png
from sit.utils.precision import allow_tf32

PREVIEW_ROWS = 4


def train(config: TrainConfig) -> tuple[Path, bool]:
    """Train, from scratch or from a checkpoint; returns the run's folder, and whether this is the main process.

    Every process of the launch calls this. What the network is shown depends on the config's seed and the number of
    images seen alone, not on the number of processes.

    Raises:
        UserError: settings that can't work, data that can't be read, or an output folder that is taken.
        SystemExit: a signal asked for the end; the state is saved and the status is :data:`REQUEUE_EXIT`.
    """
    trainer = Trainer(config)
    return trainer.run(), trainer.accelerator.is_main_process


class Trainer:
    """One training run: :meth:`run` is its table of contents."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config

    def run(self) -> Path:
        self.set_up_processes()
        self.find_start()
        self.open_data()
        self.build_network()
        self.set_up_run_folder()
        self.take_up_state()
        with StopSignal() as stop:
            self.loop(stop)
        self.accelerator.end_training()
        return self.folder

    # ------------------------------------------------------------------ before the first step

    def set_up_processes(self) -> None:
        config = self.config
        process_state()  # else Accelerate connects processes on CPUs only where ACCELERATE_USE_CPU is set
        self.accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            gradient_accumulation_steps=config.gradient_accumulation,
            step_scheduler_with_optimizer=False,
        )
        check_settings(self.accelerator)
        self.device = self.accelerator.device
        allow_tf32(self.device, config.tf32)
        if self.device.type == "cpu":
            # `accelerate launch` starts processes with one thread each
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
            torch.set_num_threads(config.cpu_threads or max(1, cores // self.accelerator.num_processes))
        parts = self.accelerator.num_processes * config.gradient_accumulation
        if config.batch_size % parts:
            raise UserError(
                f"--batch-size {config.batch_size} can't be divided among {self.accelerator.num_processes} processes "
                f"x {config.gradient_accumulation} micro-batches: make it a multiple of {parts}"
            )

    def open_data(self) -> None:
        with self.accelerator.main_process_first():  # it may have to be downloaded
            self.opened = open_training_data(self.config, self.device, progress=self.accelerator.is_main_process)
        self.data = self.opened.data
        self.latent_shape = self.data.latent_shape

    def build_network(self) -> None:
        config = self.config
        self.transport = Transport(
            interpolant=config.interpolant,
            prediction=config.prediction,
            loss_weight=config.loss_weight,
            train_eps=config.train_eps,
            sample_eps=config.sample_eps,
        )
        torch.manual_seed(randomness.key(config.seed, "initial weights"))
        channels, *size = self.latent_shape
        network = create_model(
            config.model,
            mixer=config.mixer,
            input_size=tuple(size),
            in_channels=channels,
            num_classes=len(self.data.classes),
            class_dropout=config.class_dropout,
            learn_sigma=config.learn_sigma,
        )
        if config.repa is not None:
            self.encoder = load_encoder(config.repa, network.grid, self.device)
            torch.manual_seed(randomness.key(config.seed, "initial projector"))
            attach_projector(network, config.repa_block, self.encoder.width)
        if config.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        set_up_fsdp2(self.accelerator, network)
        if should_compile(config.compile, self.device, self.accelerator.print):
            compile_for_training(network, is_ddp(self.accelerator))
        optimizer = torch.optim.AdamW(
            network.parameters(),
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.model, self.optimizer = self.accelerator.prepare(network, optimizer)
        self.network: SiT = self.accelerator.unwrap_model(self.model)
        ema = EMAModel(averaged_parameters(self.network), decay=config.ema_decay, foreach=True)
        self.state = TrainingState(self.network, self.optimizer.optimizer, ema, self.accelerator.scaler)

    def begun_folder(self) -> Path | None:
        """The folder of the run to continue; None for a new run."""
        config = self.config
        if config.resume == "auto":
            folder = Path(config.output_dir)
            return folder if (folder / "config.yaml").is_file() else None
        return None if config.resume is None else run_folder(config.resume)

    def find_start(self) -> None:
        """Where to go on: ``self.checkpoint`` (None from scratch) and ``self.step``, the steps already done.

        What can be wrong without the data being read is found here, before that takes its time.
        """
        config = self.config
        parse_mixers(config.mixer)
        check_model_name(config.model)
        check_trackers(config.trackers)
        if config.repa is not None:
            check_block(config.repa_block, MODELS[config.model]["depth"])
        if config.resume == "auto" and config.output_dir is None:
            raise UserError("--resume auto needs --output-dir, the run to continue if it has begun")
        if (folder := self.begun_folder()) is not None:
            check_same_run(config, folder)
        elif config.output_dir is not None:
            clear_start(config.output_dir)
            refuse_used(config.output_dir, "--output-dir")
        self.step, self.checkpoint = 0, None
        if config.resume == "auto":
            self.checkpoint = newest_checkpoint(config.output_dir, resumable=True)
        elif config.resume is not None:
            self.checkpoint = resolve(config.resume)
            if not (self.checkpoint / "training").is_dir():
                raise UserError(f"--resume {self.checkpoint}: it has no training/ to resume from")
        if self.checkpoint is not None:
            self.step = read_info(self.checkpoint).step

    def set_up_run_folder(self) -> None:
        config = self.config
        made = [None]
        if self.accelerator.is_main_process:
            made = [self._make_run_folder()]
            clear_leftovers(made[0])
            if self.checkpoint is not None and (aside := set_aside_later(made[0], self.checkpoint)):
                self.accelerator.print(f"the checkpoints beyond {self.checkpoint} are set aside in {aside}")
        if self.accelerator.num_processes > 1:
            torch.distributed.broadcast_object_list(made)
        self.folder = made[0]
        rows = JsonLinesTracker(self.folder / "metrics.jsonl", self.step)
        self.accelerator.log_with = [*config.trackers, rows]
        self.accelerator.project_configuration = ProjectConfiguration(logging_dir=str(self.folder / "logs"))
        self.accelerator.init_trackers("sit", init_kwargs={"tensorboard": {"purge_step": self.step + 1}})

    def _make_run_folder(self) -> Path:
        config = self.config
        label = f"{config.model}-{config.mixer}".replace("/", "-").replace(",", "+").replace(":", "-")
        folder = self.begun_folder()
        if folder is None:
            folder = new_run_folder(config.output_dir, label)
        with atomic_write(folder / "config.yaml") as temporary:  # first: it makes the folder a run that --resume knows
            temporary.write_text(dataclasses.replace(config, resume=None, output_dir=str(folder)).to_yaml())
        if not (folder / "vae").is_dir():
            self.opened.save_vae(folder / "vae")
        return folder

    def take_up_state(self) -> None:
        if self.checkpoint is not None:
            self.state.load(self.checkpoint)
            self.accelerator.print(f"continuing from {self.checkpoint} after {self.step} steps")

    def batches(self) -> Iterator[Batch]:
        config, accelerator = self.config, self.accelerator
        return training_batches(
            self.data,
            seed=config.seed,
            global_batch=config.batch_size,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            accumulation=config.gradient_accumulation,
            start_images=self.step * config.batch_size,
            workers=config.workers,
        )

    # ------------------------------------------------------------------ the loop

    def loop(self, stop: StopSignal) -> None:
        config = self.config
        parameters, averaged = list(self.network.parameters()), averaged_parameters(self.network)
        batches = self.batches()
        losses: list[torch.Tensor] = []
        similarities: list[torch.Tensor] = []
        skipped = 0
        since, steps_since = time.perf_counter(), 0
        bar = tqdm(
            total=config.steps,
            initial=self.step,
            desc="train",
            unit="step",
            dynamic_ncols=True,
            mininterval=0.1 if sys.stderr.isatty() else 10,
            disable=not self.accelerator.is_main_process,
        )
        self.model.train()
        while self.step < config.steps:
            # one optimizer step
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate_at(self.step, config)
            micro = [self.forward_backward(next(batches)) for _ in range(config.gradient_accumulation)]
            loss, indices, similarity = (torch.cat(parts) for parts in zip(*micro, strict=True))
            norm = self.gradient_norm(parameters)
            if math.isfinite(norm):
                skipped = 0
                losses.append(loss)
                similarities.append(similarity)
                self.optimizer.step()
                self.state.ema.step(averaged)
            else:
                skipped = self.report_non_finite(loss, indices, norm, skipped)
                if self.accelerator.scaler is not None:
                    self.accelerator.scaler.update()  # optimizer.step() does it otherwise
            self.optimizer.zero_grad()
            self.step += 1
            steps_since += 1

            # what is written from time to time
            last = self.step == config.steps
            if losses and (self.step % config.log_every == 0 or last):
                mean = self.accelerator.reduce(torch.cat(losses).mean(), "mean").item()
                pace = steps_since / (time.perf_counter() - since)
                bar.set_postfix(loss=f"{mean:.4f}", refresh=False)
                row = {
                    "loss": mean,
                    "gradient_norm": norm,
                    "learning_rate": self.optimizer.param_groups[0]["lr"],
                    "images_seen": self.step * config.batch_size,
                    "steps_per_second": pace,
                    "images_per_second": pace * config.batch_size,
                }
                if config.repa is not None:
                    row["alignment"] = self.accelerator.reduce(torch.cat(similarities).mean(), "mean").item()
                self.accelerator.log(row, step=self.step)
                losses.clear()
                similarities.clear()
                since, steps_since = time.perf_counter(), 0
            bar.update()
            if config.preview_every and (self.step % config.preview_every == 0 or last):
                self.preview()
            stopped = self.asked_to_stop(stop)
            if self.step % config.checkpoint_every == 0 or last or stopped:
                self.checkpoint_now()
            if stopped and not last:
                bar.close()
                self.accelerator.end_training()
                self.accelerator.print(f"stopped by a signal after step {self.step}; --resume {self.folder} goes on")
                raise SystemExit(REQUEUE_EXIT)
        bar.close()

    def forward_backward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of one micro-batch: its per-image losses (b,), detached, the images' indices (b,), and the cosine
        similarities (b,) of the alignment, which are part of the losses; (0,) without it."""
        batch = {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}
        start, end = self.transport.train_interval()
        t = start + (end - start) * batch["t_uniform"]
        labels = torch.where(batch["drop"] < self.config.class_dropout, len(self.data.classes), batch["labels"])
        with self.accelerator.accumulate(self.model):
            if self.config.repa is None:
                loss = self.transport.loss(self.model, batch["latents"], t, batch["noise"], y=labels)
                similarity = loss.new_empty(0)
            else:
                loss, similarity = self.aligned_loss(batch, t, labels)
            self.accelerator.backward(loss.mean())
        return loss.detach(), batch["indices"], similarity.detach()

    def aligned_loss(self, batch: Batch, t: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss (b,) with the alignment's part in it, and the cosine similarity (b,) that the latter is of."""
        projected = None

        def network(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            nonlocal projected
            out, projected = self.model(x, t, y, project=True)
            return out

        loss = self.transport.loss(network, batch["latents"], t, batch["noise"], y=labels)
        with self.accelerator.autocast():
            features = self.encoder.features(batch["images"])
        similarity = cosine_similarity(projected, features)
        return loss - self.config.repa_weight * similarity, similarity

    def gradient_norm(self, parameters: list[torch.nn.Parameter]) -> float:
        """The norm of the whole gradient, which is clipped if the config says so."""
        self.accelerator.unscale_gradients(self.optimizer)
        limit = self.config.max_grad_norm
        if limit is not None:
            norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
        else:
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if hasattr(norm, "full_tensor"):
            norm = norm.full_tensor()
        return norm.item()

    def report_non_finite(self, loss: torch.Tensor, indices: torch.Tensor, norm: float, skipped: int) -> int:
        """Warn of a skipped step; the number of them in a row, given the number ``skipped`` before it.

        A gradient that overflows under the loss scale of float16, while every loss is finite, is how that scale finds
        its size, and does not count. A scale below 1 amplifies nothing, so what is not finite then does.

        Raises:
            UserError: there were too many in a row.
        """
        loss, indices = self.accelerator.gather((loss, indices))
        bad = indices[~loss.isfinite()].tolist()
        scale = 0.0 if self.accelerator.scaler is None else self.accelerator.scaler.get_scale()
        if scale >= 1 and not bad:
            if self.accelerator.is_main_process:
                tqdm.write(f"step {self.step + 1}: gradient overflow at the loss scale {scale:g}; the step is skipped")
            return skipped
        skipped += 1
        values = sorted({str(value) for value in loss[~loss.isfinite()].tolist()})
        what = f"gradient norm {norm} of images {indices.tolist()}"
        if bad:
            what = f"loss {', '.join(values)} at images {bad}"
        message = f"step {self.step + 1}: {what}; the step is skipped ({skipped} in a row)"
        if skipped >= self.config.non_finite_limit:
            raise UserError(f"{message}: stopped, as --non-finite-limit is {self.config.non_finite_limit}")
        if self.accelerator.is_main_process:
            tqdm.write(f"warning: {message}")
        return skipped

    def asked_to_stop(self, stop: StopSignal) -> bool:
        """Whether any process got the signal; all of them agree."""
        if self.accelerator.num_processes == 1:
            return stop.received
        flag = torch.tensor(int(stop.received), device=self.device)
        return bool(self.accelerator.reduce(flag, "sum"))

    # ------------------------------------------------------------------ previews and checkpoints

    def preview(self) -> None:
        """Sample a grid with the averaged weights, the same noise each time: a column a class, up to ten classes."""
        config, classes = self.config, len(self.data.classes)
        columns = min(classes, 10)
        count = columns * PREVIEW_ROWS
        shown = [round(i * (classes - 1) / max(1, columns - 1)) for i in range(columns)]
        labels = torch.tensor(shown * PREVIEW_ROWS)
        scale = config.preview_cfg_scale if config.class_dropout else 1.0
        sampler = SamplerConfig(steps=config.preview_steps, cfg_scale=scale)
        self.model.eval()
        with ema_weights(self.network, self.state.ema), torch.no_grad(), self.accelerator.autocast():
            latents = torch.cat(
                [
                    part
                    for _, part in generate(
                        self.network,
                        self.transport,
                        torch.arange(count),
                        labels,
                        seed=config.seed,
                        config=sampler,
                        latent_shape=self.latent_shape,
                        device=self.device,
                        batch_size=count,
                    )
                ]
            )
        self.model.train()
        if self.accelerator.is_main_process:
            images = decode(self.opened.vae, latents).cpu().numpy()
            names = [self.data.classes[label] for label in labels.tolist()]
            save_png(labeled_grid(images, names, columns), self.folder / "samples" / f"step-{self.step:07d}.png")

    def checkpoint_now(self) -> None:
        config = self.config
        averaged, raw, optimizer = self.state.gather()
        if self.accelerator.is_main_process:
            folder = self.folder / "checkpoints" / f"step-{self.step:07d}"
            info = CheckpointInfo(
                step=self.step,
                images_seen=self.step * config.batch_size,
                image_size=(config.image_size, config.image_size),
                classes=len(self.data.classes),
                label_names=list(self.data.classes),
                data=config.data,
                mixer=config.mixer,
            )
            save_checkpoint(
                folder,
                model=self.network,
                weights=averaged,
                transport=self.transport,
                vae_source=self.folder / "vae" if (self.folder / "vae").is_dir() else config.vae,
                info=info,
                training_state=lambda inside: self.state.save(inside, raw, optimizer),
            )
            prune_checkpoints(find_checkpoints(self.folder), config.keep_last, config.keep_every)
        self.accelerator.wait_for_everyone()
