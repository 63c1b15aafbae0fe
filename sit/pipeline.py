"""SiT as a diffusers pipeline: class labels in, images out, with diffusers' habits."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, Literal, get_type_hints

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from sit.checkpoint.find import is_run, resolve
from sit.checkpoint.hub import CARD, PIPELINE_CLASS, model_card, write_loader
from sit.checkpoint.info import CheckpointInfo, read_info
from sit.checkpoint.integrity import INDEX, write_json
from sit.latents.pixels import PixelCodec
from sit.latents.vae import check_channels, decode, downsampling, load_vae
from sit.model import SiT
from sit.sampling.config import SamplerConfig
from sit.sampling.sampler import SAMPLERS, guided_model
from sit.transport.transport import Transport
from sit.utils.errors import UserError
from sit.utils.reading import read_json, typed

OUTPUT_TYPES = ("pil", "np", "pt", "latent")

SCHEDULER = (
    "a SiT's pipeline samples by its own methods, and not by diffusers' schedulers: choose them in the call, e.g. "
    "`sampler='ode'` and `method='heun2'`"
)

Labels = int | str | torch.Tensor | np.ndarray | Sequence["Labels"]
"""One label or class name, or several, nested in any way."""

Callback = Callable[["SiTPipeline", int, float | None, dict[str, Any]], dict[str, Any] | None]
"""``callback_on_step_end`` of the call."""


def _flattened(labels: Labels) -> Iterator[int | str]:
    """The labels one by one, numbers as int and names as str.

    Raises:
        UserError: a number that is none of a class, such as 2.9, or something else.
    """
    if isinstance(labels, torch.Tensor | np.ndarray | np.generic):
        labels = labels.tolist()
    if isinstance(labels, str):
        yield labels
    elif isinstance(labels, int | float) and float(labels).is_integer():
        yield int(labels)
    elif isinstance(labels, Iterable):
        for entry in labels:
            yield from _flattened(entry)
    else:
        raise UserError(f"class_labels has {labels!r}, which is no class: give whole numbers, or names of classes")


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values, NumPy's numbers among them as Python's."""
    return {name: value.item() if isinstance(value, np.generic) else value for name, value in values.items()}


def _check_types(**values: Any) -> None:
    """Raise UserError unless these arguments of the call are of the types that it has them of."""
    hints = get_type_hints(SiTPipeline.__call__)
    typed(_plain(values), {name: hints[name] for name in values}, "the pipeline's call")


class _Interrupted(Exception):
    """Raised within a step to end the sampling there, as a callback asked."""

    def __init__(self, latents: torch.Tensor) -> None:
        super().__init__()
        self.latents = latents


def _labels_by_name(id2label: Mapping[str, str]) -> tuple[dict[str, int], dict[str, list[int]]]:
    """The label of each whole name, and of each synonym that is none; and the labels of what several classes have."""
    whole: dict[str, list[int]] = {}
    synonyms: dict[str, list[int]] = {}
    ordered = sorted((int(label), names.strip()) for label, names in id2label.items())
    for label, names in ordered:
        whole.setdefault(names, []).append(label)
    for label, names in ordered:
        for name in dict.fromkeys(part.strip() for part in names.split(",")):
            if name not in whole:
                synonyms.setdefault(name, []).append(label)
    every = whole | synonyms
    return (
        {name: labels[0] for name, labels in every.items() if len(labels) == 1},
        {name: labels for name, labels in every.items() if len(labels) > 1},
    )


class SiTPipeline(DiffusionPipeline):
    """Class-conditional image generation with a SiT, used as diffusers' ``DiTPipeline`` is.

    ``SiTPipeline.from_pretrained`` takes a run or one of its checkpoints, and ``save_pretrained`` and ``push_to_hub``
    write a folder like these, with a model card and what ``DiffusionPipeline.from_pretrained`` finds the class by.

    Args:
        transformer: the network.
        transport: what it was trained to predict, and along which path.
        vae: the decoder, or a :class:`~sit.latents.pixels.PixelCodec`; None loads ``vae_name`` when the first image is
            decoded.
        vae_name: a VAE on the Hub or in a local folder.
        id2label: class names by label; a name may list synonyms, separated by commas.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        transformer: SiT,
        transport: Transport,
        vae: AutoencoderKL | None = None,
        vae_name: str | None = None,
        id2label: dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, transport=transport, vae=vae)
        self.register_to_config(vae_name=vae_name, id2label=id2label)
        self._card: str | None = None
        self.labels, self._shared = _labels_by_name(id2label or {})

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **options: Any) -> SiTPipeline:
        """As diffusers' own; a run's folder is taken for its newest complete checkpoint.

        Raises:
            UserError: a run or checkpoint that is not complete, a weights file, or a ``scheduler``.
        """
        if "scheduler" in options:
            raise UserError(SCHEDULER)
        source = Path(pretrained_model_name_or_path)
        if source.is_file() or (source.is_dir() and (is_run(source) or (source / INDEX).exists())):
            source = resolve(source)
        if source.is_file():
            raise UserError(f"{source} is a single file; make a folder of it: python -m sit.checkpoint convert")
        pipe = super().from_pretrained(str(source) if source.is_dir() else pretrained_model_name_or_path, **options)
        if (source / CARD).is_file():
            pipe._card = (source / CARD).read_text(errors="replace")
        elif (source / INDEX).is_file():
            pipe._card = model_card(pipe.transformer, pipe.transport, read_info(source), metrics={})
        return pipe

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike) -> dict[str, Any]:
        """A configuration, which this class takes for its own: the folder's loader is for ``DiffusionPipeline``."""
        config = super()._dict_from_json_file(json_file)
        return config | {"_class_name": cls.__name__} if "_class_name" in config else config

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **options: Any) -> None:
        """Write ``model_index.json``, the module that it names, and the model card, as ``save_pretrained`` ends."""
        # diffusers would note the modules that define them; these names outlive a move of the code
        self.register_to_config(transformer=("sit", "SiT"), transport=("sit", "Transport"))
        if isinstance(self.vae, PixelCodec):
            self.register_to_config(vae=("sit", "PixelCodec"))
        super().save_config(save_directory, push_to_hub=push_to_hub, **options)
        index = Path(save_directory) / self.config_name
        write_json(index, read_json(index) | {"_class_name": PIPELINE_CLASS})
        write_loader(index.parent)
        (index.parent / CARD).write_text(self._model_card())

    def _model_card(self) -> str:
        if self._card is not None:
            return self._card
        names = [name for _, name in sorted((self.config.id2label or {}).items(), key=lambda item: int(item[0]))]
        return model_card(self.transformer, self.transport, CheckpointInfo(label_names=names), metrics={})

    def _upload_folder(self, working_dir: str | os.PathLike, repo_id: str, **options: Any) -> Any:
        """diffusers' upload, with our card in the place of an empty one; one that the repository has is kept."""
        card = Path(working_dir) / CARD
        if not card.is_file() or "automatically generated" in card.read_text(errors="replace"):
            card.write_text(self._model_card())
        return super()._upload_folder(working_dir, repo_id, **options)

    @property
    def scheduler(self) -> Transport:
        """What diffusers' pipelines call so: here the transport, with which diffusers' loop runs too."""
        return self.transport

    @scheduler.setter
    def scheduler(self, _: object) -> None:
        raise UserError(SCHEDULER)

    def get_label_ids(self, label: str | Sequence[str]) -> list[int]:
        """The labels of class names.

        Raises:
            UserError: a name that no class has, or several; the message lists some that there are.
        """
        names = [label] if isinstance(label, str) else list(label)
        for name in names:
            if name in self._shared:
                several = ", ".join(map(str, self._shared[name]))
                raise UserError(f"{name!r} names several classes, {several}: give the number of the one that is meant")
            if name not in self.labels:
                known = ", ".join(list(self.labels)[:20]) or "none: this checkpoint names no classes"
                raise UserError(f"no class is named {name!r}; the names are {known}")
        return [self.labels[name] for name in names]

    @property
    def guidance_scale(self) -> float:
        """The guidance of the call that is running (for callbacks)."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """The steps of the call that is running (for callbacks)."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Set by a callback (``pipe._interrupt = True``) to end the sampling after its step."""
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Labels,
        guidance_scale: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 250,
        *,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        latents: torch.Tensor | None = None,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **sampler_options: Any,
    ) -> ImagePipelineOutput | tuple:
        """Generate one image for each label, or ``num_images_per_prompt``.

        Args:
            class_labels: labels, or class names of :attr:`labels`; one or several, nested in any way.
            guidance_scale: classifier-free guidance; 1 means none. A network without a null class needs 1. None is 4,
                as DiT's pipeline has it, or 1 for a network of average velocities, which has its guidance inside.
            generator: one for all images, or one for each (then image i depends on its own alone).
            num_inference_steps: steps of the sampler, as ``sample.py`` counts them; adaptive ODE solvers choose theirs.
            num_images_per_prompt: images of each label, which stand beside each other.
            height, width: of the images in pixels; default those of the training.
            latents: (B, C, h, w) noise to start from, instead of drawing it.
            output_type: ``pil`` images; ``np`` (B, H, W, 3) or ``pt`` (B, 3, H, W) float32 in [0, 1]; or ``latent``,
                the scaled latents (B, C, h, w), for which no VAE is needed.
            return_dict: whether to return an :class:`ImagePipelineOutput` or a tuple.
            callback_on_step_end: called as ``callback(pipe, step, t, {"latents": …})`` after each step, with steps
                from 0 and the time t in [0, 1] that is reached (None under adaptive ODE solvers, which choose their
                steps). What it returns under ``latents`` takes their place, adaptive solvers excepted; it may return
                None. ``pipe._guidance_scale = …`` changes the guidance of the steps to come.
            callback_on_step_end_tensor_inputs: what the callback wants; only ``latents`` is there.
            **sampler_options: further fields of :class:`sit.sampling.config.SamplerConfig`, e.g. ``sampler="ode"``.

        Raises:
            UserError: unknown labels, options, output types, sizes, an argument of another type, or a VAE that can't be
                had.
        """
        _check_types(
            generator=generator, num_inference_steps=num_inference_steps, num_images_per_prompt=num_images_per_prompt,
            height=height, width=width, latents=latents, guidance_scale=guidance_scale,
        )  # fmt: skip
        if num_images_per_prompt < 1:
            raise UserError(f"`num_images_per_prompt` must be at least 1, not {num_images_per_prompt}")
        labels = self._label_tensor(class_labels).repeat_interleave(num_images_per_prompt)
        if guidance_scale is None:
            guidance_scale = 1.0 if self.transport.averages else 4.0
        config = self._sampler_config(num_inference_steps, guidance_scale, sampler_options)
        if output_type not in OUTPUT_TYPES:
            raise UserError(f"`output_type={output_type}` is none of {', '.join(OUTPUT_TYPES)}")
        if unknown := sorted(set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)):
            raise UserError(f"callbacks can be given latents, not {', '.join(unknown)}")
        if isinstance(generator, list) and len(generator) != len(labels):
            raise UserError(f"{len(generator)} generators for {len(labels)} images: give one for each, or one for all")

        if output_type != "latent":
            vae, channels = self._vae(), self.transformer.config.in_channels
            check_channels(vae, self.config.vae_name or "vae/", channels, "the transformer")
        shape = (len(labels), self.transformer.config.in_channels, *self._latent_size(height, width))
        device = self._execution_device
        draw = lambda: randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)  # noqa: E731
        if latents is None:
            latents = draw()
        elif tuple(latents.shape) != shape:
            raise UserError(f"latents of shape {tuple(latents.shape)} where {shape} is needed")

        latents = latents.to(device, torch.float32, copy=True)
        self._guidance_scale, self._num_timesteps, self._interrupt = guidance_scale, num_inference_steps, False
        guided = guided_model(self.transformer, labels.to(device), config, latents)
        bar = self.progress_bar(count()) if config.adaptive else self.progress_bar(total=num_inference_steps)
        with bar:

            def on_step(step: int, total: int | None, state: torch.Tensor, t: float | torch.Tensor) -> None:
                bar.update()
                if callback_on_step_end is not None:
                    self._call_back(callback_on_step_end, step - 1, None if config.adaptive else t, state, config)
                    guided.set_scale(self._guidance_scale)

            sampler = SAMPLERS[config.sampler]
            try:
                latents = sampler(
                    guided, self.transport, latents, config, step_noise=lambda step: draw(), on_step=on_step
                )
            except _Interrupted as interrupted:
                latents = interrupted.latents
        images = latents if output_type == "latent" else self._decode(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    # --- the parts of a call ---------------------------------------------------------------------------------------

    def _label_tensor(self, class_labels: Labels) -> torch.Tensor:
        """(B,) int64 labels, checked."""
        entries = list(_flattened(class_labels))
        labels = [self.get_label_ids(entry)[0] if isinstance(entry, str) else entry for entry in entries]
        classes = self.transformer.config.num_classes
        for label in labels:
            if not 0 <= label < classes:
                raise UserError(f"label {label} is out of range: this network has the classes 0 to {classes - 1}")
        if not labels:
            raise UserError("class_labels is empty: give one label for each image")
        return torch.tensor(labels, dtype=torch.int64)

    def _sampler_config(self, steps: int, guidance_scale: float, options: dict[str, Any]) -> SamplerConfig:
        known = {name for name in SamplerConfig.__dataclass_fields__ if name not in ("steps", "cfg_scale")}
        if unknown := sorted(set(options) - known):
            raise UserError(f"no option {', '.join(unknown)}; the sampler's options are {', '.join(sorted(known))}")
        options = typed(_plain(options), get_type_hints(SamplerConfig), "the pipeline's call")
        config = SamplerConfig(steps=int(steps), cfg_scale=float(guidance_scale), **options)
        return config.resolve(self.transport.averages)

    def _call_back(
        self,
        callback: Callback,
        step: int,
        t: float | None,
        state: torch.Tensor,
        config: SamplerConfig,
    ) -> None:
        """Let a callback see the state after a step (from 0), and change it or end the sampling."""
        changed = (callback(self, step, t, {"latents": state}) or {}).get("latents", state)
        if changed is not state:
            if config.adaptive:
                raise UserError(f"callbacks can't change latents under {config.resolved_method}; take a fixed-step one")
            if not isinstance(changed, torch.Tensor) or changed.shape != state.shape:
                shape = tuple(getattr(changed, "shape", ()))
                raise UserError(f"the callback returned latents of shape {shape}, and they are {tuple(state.shape)}")
            state.copy_(changed)  # in place: the solver goes on from this very tensor
        if self._interrupt:
            raise _Interrupted(state)

    def _latent_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        trained = tuple(self.transformer.config.input_size)
        if height is None and width is None:
            return trained
        factor = downsampling(self._vae())
        size = (height or trained[0] * factor, width or trained[1] * factor)
        unit = factor * self.transformer.config.patch_size
        if any(side < unit or side % unit for side in size):
            raise UserError(f"height and width must be multiples of {unit} (VAE × patches), not {size[0]} x {size[1]}")
        return size[0] // factor, size[1] // factor

    def _vae(self) -> AutoencoderKL:
        """The VAE, fetched by its name if it is not here yet."""
        if self.vae is None:
            if self.config.vae_name is None:
                raise UserError("this pipeline has no VAE: pass vae=… to from_pretrained, or use output_type='latent'")
            self.register_modules(vae=load_vae(self.config.vae_name, self._execution_device))
        return self.vae

    def _decode(self, latents: torch.Tensor, output_type: str) -> Any:
        images = decode(self._vae(), latents)
        if output_type == "pt":
            return images.permute(0, 3, 1, 2).float() / 255
        pixels = images.cpu().numpy()
        return [Image.fromarray(image) for image in pixels] if output_type == "pil" else pixels / np.float32(255)
