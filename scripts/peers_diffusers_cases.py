"""diffusers' own test mixins on SiT's networks and pipeline: ``peers_diffusers.py`` runs this file with pytest.

It needs a checkout of diffusers in DIFFUSERS_CHECKOUT, of which ``tests/`` alone is used; diffusers itself is the
installed one.
"""

from __future__ import annotations

import os
import re
import sys
import unittest
from importlib import import_module
from types import ModuleType
from unittest.mock import MagicMock

import torch

sys.path.insert(0, os.environ["DIFFUSERS_CHECKOUT"])

# ruff: noqa: I001 - the checkout's tests are no package of ours
from diffusers import AutoencoderKL
from tests.models.testing_utils import (
    BaseModelTesterConfig,
    LayerwiseCastingTesterMixin,
    MemoryTesterMixin,
    ModelTesterMixin,
    TrainingTesterMixin,
)
from tests.pipelines.pipeline_params import (
    CLASS_CONDITIONED_IMAGE_GENERATION_BATCH_PARAMS,
    CLASS_CONDITIONED_IMAGE_GENERATION_PARAMS,
)
from tests.testing_utils import torch_device

from sit import SiT, SiTPipeline, Transport


def import_with_stand_ins(name: str) -> ModuleType:
    """Import a module of the tests, with empty classes for names that the installed diffusers lacks.

    A checkout of another version, or the packages that diffusers takes if they are there, name classes that only the
    tests of other pipelines need.
    """
    while True:
        try:
            return import_module(name)
        except ImportError as error:
            missing = re.match(r"cannot import name '(\w+)' from 'diffusers", error.msg)
            if missing is None:
                raise
            setattr(sys.modules[str(error.name)], missing[1], type(missing[1], (), {}))


for other in ("transformers.test_models_transformer_flux", "unets.test_models_unet_2d_condition"):
    sys.modules[f"tests.models.{other}"] = MagicMock()  # made for adapters of other networks, and needs more packages
PipelineTesterMixin = import_with_stand_ins("tests.pipelines.test_pipelines_common").PipelineTesterMixin
SIZES = dict(input_size=8, patch_size=2, in_channels=4, hidden_size=32, depth=2, num_heads=2, num_classes=8)


class Config(BaseModelTesterConfig):
    """What the mixins ask about a network: here with attention."""

    model_class = SiT
    main_input_name = "hidden_states"
    input_shape = output_shape = (4, 8, 8)
    mixer = "attention"

    def get_init_dict(self) -> dict:
        return SIZES | {"mixer": self.mixer}

    def get_dummy_inputs(self, batch_size: int = 4) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        inputs = {
            "hidden_states": torch.randn(batch_size, *self.input_shape, generator=generator),
            "timestep": torch.rand(batch_size, generator=generator),  # SiT's times are from 0 to 1
            "class_labels": torch.randint(8, (batch_size,), generator=generator),
        }
        return {name: tensor.to(torch_device) for name, tensor in inputs.items()}


class ATConvConfig(Config):
    mixer = "atconv"


class Training(TrainingTesterMixin):
    def test_gradient_checkpointing_is_applied(self):
        super().test_gradient_checkpointing_is_applied(expected_set={"SiT"})


class TestModelAttention(Config, ModelTesterMixin):
    pass


class TestModelATConv(ATConvConfig, ModelTesterMixin):
    pass


class TestMemoryAttention(Config, MemoryTesterMixin):
    pass


class TestMemoryATConv(ATConvConfig, MemoryTesterMixin):
    pass


class TestTrainingAttention(Config, Training):
    pass


class TestTrainingATConv(ATConvConfig, Training):
    pass


class Pipeline(PipelineTesterMixin):
    pipeline_class = SiTPipeline
    params = CLASS_CONDITIONED_IMAGE_GENERATION_PARAMS | {"guidance_scale", "height", "width"}
    batch_params = CLASS_CONDITIONED_IMAGE_GENERATION_BATCH_PARAMS
    test_layerwise_casting = True
    test_group_offloading = True
    mixer = "attention"

    def get_dummy_components(self):
        torch.manual_seed(0)
        transformer = SiT(**SIZES | {"mixer": self.mixer})
        vae = AutoencoderKL()
        return {"transformer": transformer.eval(), "transport": Transport(), "vae": vae.eval()}

    def get_dummy_inputs(self, device, seed=0):
        generator = torch.Generator(device=device).manual_seed(seed)
        return {"class_labels": [1], "generator": generator, "num_inference_steps": 2, "output_type": "np"}

    def test_save_load_optional_components(self):
        """Without the VAE, which is the optional one, there are latents to compare and no images."""
        inputs = self.get_dummy_inputs
        self.get_dummy_inputs = lambda *arguments: inputs(*arguments) | {"output_type": "latent"}
        super().test_save_load_optional_components()


class TestPipelineAttention(Pipeline, unittest.TestCase):
    pass


class TestPipelineATConv(Pipeline, unittest.TestCase):
    mixer = "atconv"


if torch_device == "cpu":  # MemoryTesterMixin skips itself without an accelerator; this part of it needs none

    class TestLayerwiseCastingAttention(Config, LayerwiseCastingTesterMixin):
        pass

    class TestLayerwiseCastingATConv(ATConvConfig, LayerwiseCastingTesterMixin):
        pass
