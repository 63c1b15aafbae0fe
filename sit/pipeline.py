"""SiT as a diffusers pipeline: class labels in, images out, with diffusers' habits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from typing import Any, Literal

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from sit.latents.pixels import PixelCodec
from sit.latents.vae import check_channels, decode, downsampling, load_vae
from sit.model import SiT
from sit.sampling.config import SamplerConfig
from sit.sampling.sampler import sample
from sit.transport.transport import Transport
from sit.utils.errors import UserError

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class _Interrupted(Exception):
    """Raised within a step to end the sampling there, as a callback asked."""

    def __init__(self, latents: torch.Tensor) -> None:
        super().__init__()
        self.latents = latents


class SiTPipeline(DiffusionPipeline):
    """Class-conditional image generation with a SiT, used as diffusers' ``DiTPipeline`` is.

    ``SiTPipeline.from_pretrained`` takes a checkpoint folder of a run, and ``save_pretrained`` and ``push_to_hub``
    write such a folder.

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
        self.register_modules(transformer=transformer, transport=transport)
        # diffusers would note the modules that define them; these names outlive a move of the code
        self.register_to_config(transformer=("sit", "SiT"), transport=("sit", "Transport"))
        self._register_vae(vae)
        self.register_to_config(vae_name=vae_name, id2label=id2label)
        self.labels: dict[str, int] = {}
        for label, names in sorted((id2label or {}).items(), key=lambda item: int(item[0])):
            for name in (names, *names.split(",")):
                self.labels.setdefault(name.strip(), int(label))

    def get_label_ids(self, label: str | Sequence[str]) -> list[int]:
        """The labels of class names.

        Raises:
            UserError: a name that no class has; the message lists some that there are.
        """
        names = [label] if isinstance(label, str) else list(label)
        for name in names:
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
        class_labels: int | str | Sequence[int | str] | torch.Tensor,
        guidance_scale: float = 4.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 250,
        *,
        height: int | None = None,
        width: int | None = None,
        latents: torch.Tensor | None = None,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[SiTPipeline, int, float | None, dict[str, Any]], dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **sampler_options: Any,
    ) -> ImagePipelineOutput | tuple:
        """Generate one image for each label.

        Args:
            class_labels: labels, or class names of :attr:`labels`; one or several.
            guidance_scale: classifier-free guidance; 1 means none. A network without a null class needs 1.
            generator: one for all images, or one for each (then image i depends on its own alone).
            num_inference_steps: steps of the sampler, as ``sample.py`` counts them; adaptive ODE solvers choose theirs.
            height, width: of the images in pixels; default those of the training.
            latents: (B, C, h, w) noise to start from, instead of drawing it.
            output_type: ``pil`` images; ``np`` (B, H, W, 3) or ``pt`` (B, 3, H, W) float32 in [0, 1]; or ``latent``,
                the scaled latents (B, C, h, w), for which no VAE is needed.
            return_dict: whether to return an :class:`ImagePipelineOutput` or a tuple.
            callback_on_step_end: called as ``callback(pipe, step, t, {"latents": …})`` after each step, with steps
                from 0 and the time t in [0, 1] that is reached (None under adaptive ODE solvers, which choose their
                steps). What it returns under ``latents`` takes their place, adaptive solvers excepted.
            callback_on_step_end_tensor_inputs: what the callback wants; only ``latents`` is there.
            **sampler_options: further fields of :class:`sit.sampling.config.SamplerConfig`, e.g. ``sampler="ode"``.

        Raises:
            UserError: unknown labels, options, output types, sizes, or a VAE that can't be had.
        """
        labels = self._label_tensor(class_labels)
        config = self._sampler_config(num_inference_steps, guidance_scale, sampler_options)
        if output_type not in OUTPUT_TYPES:
            raise UserError(f"`output_type={output_type}` is none of {', '.join(OUTPUT_TYPES)}")
        if unknown := sorted(set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)):
            raise UserError(f"callbacks can be given latents, not {', '.join(unknown)}")
        if isinstance(generator, list) and len(generator) != len(labels):
            raise UserError(f"{len(generator)} generators for {len(labels)} labels: give one for each, or one for all")

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
        bar = self.progress_bar(count()) if config.adaptive else self.progress_bar(total=num_inference_steps)
        with bar:

            def on_step(step: int, total: int | None, state: torch.Tensor, t: float | torch.Tensor) -> None:
                bar.update()
                if callback_on_step_end is not None:
                    self._call_back(callback_on_step_end, step - 1, None if config.adaptive else t, state, config)

            try:
                latents = sample(
                    self.transformer,
                    self.transport,
                    latents,
                    labels.to(device),
                    config,
                    step_noise=lambda step: draw(),
                    on_step=on_step,
                )
            except _Interrupted as interrupted:
                latents = interrupted.latents
        images = latents if output_type == "latent" else self._decode(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    # --- the parts of a call ---------------------------------------------------------------------------------------

    def _label_tensor(self, class_labels: int | str | Sequence[int | str] | torch.Tensor) -> torch.Tensor:
        """(B,) int64 labels, checked."""
        if isinstance(class_labels, torch.Tensor | np.ndarray):
            class_labels = class_labels.reshape(-1).tolist()
        entries = [class_labels] if isinstance(class_labels, int | str) else list(class_labels)
        labels = [self.get_label_ids(entry)[0] if isinstance(entry, str) else int(entry) for entry in entries]
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
        return SamplerConfig(steps=steps, cfg_scale=guidance_scale, **options)

    def _call_back(
        self,
        callback: Callable[..., dict[str, Any]],
        step: int,
        t: float | None,
        state: torch.Tensor,
        config: SamplerConfig,
    ) -> None:
        """Let a callback see the state after a step (from 0), and change it or end the sampling."""
        changed = callback(self, step, t, {"latents": state}).get("latents", state)
        if changed is not state:
            if config.adaptive:
                raise UserError(f"callbacks can't change latents under {config.resolved_method}; take a fixed-step one")
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
            self._register_vae(load_vae(self.config.vae_name, self._execution_device))
        return self.vae

    def _register_vae(self, vae: AutoencoderKL | None) -> None:
        self.register_modules(vae=vae)
        if isinstance(vae, PixelCodec):
            self.register_to_config(vae=("sit", "PixelCodec"))

    def _decode(self, latents: torch.Tensor, output_type: str) -> Any:
        images = decode(self._vae(), latents)
        if output_type == "pt":
            return images.permute(0, 3, 1, 2).float() / 255
        pixels = images.cpu().numpy()
        return [Image.fromarray(image) for image in pixels] if output_type == "pil" else pixels / np.float32(255)
