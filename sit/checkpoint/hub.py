"""What a checkpoint's folder has for diffusers and the Hugging Face Hub: a loader of the pipeline, and a model card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sit.checkpoint.info import CheckpointInfo
from sit.model import SiT
from sit.transport.transport import Transport
from sit.version import __version__

LOADER = "pipeline.py"

PIPELINE_CLASS = ["pipeline", "SiTPipeline"]
"""the ``_class_name`` in ``model_index.json``: the class, and the module in the folder where diffusers looks for it"""

CARD = "README.md"


def write_loader(folder: Path) -> None:
    """Write the module by which ``DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`` finds the class.

    It holds no code of its own: the package has to be installed.
    """
    (folder / LOADER).write_text(
        '"""For DiffusionPipeline.from_pretrained(…, trust_remote_code=True); needs the package sit-atconv."""\n\n'
        "from sit import SiTPipeline\n\n"
        '__all__ = ["SiTPipeline"]\n'
    )


def model_card(
    model: SiT, transport: Transport, info: CheckpointInfo, *, recipe: str = "", metrics: Mapping[str, float]
) -> str:
    """A model card for the Hub: what it is, its data, recipe, metrics, license, and five lines of use.

    Args:
        model: the network.
        transport: what it was trained on.
        info: what is known of its training.
        recipe: the settings of the training as YAML; empty if unknown.
        metrics: by name, of the last step that has each.
    """
    config, millions = model.config, sum(parameter.numel() for parameter in model.parameters()) / 1e6
    height, width = info.image_size or (None, None)
    size = f"{height} x {width} pixels" if height else f"latents of {' x '.join(map(str, config['input_size']))}"
    names = ", ".join(info.label_names[:20]) + (", …" if len(info.label_names) > 20 else "")
    seen = f" after {info.step:,} steps ({info.images_seen:,} images seen)" if info.step else ""
    options = f"guidance_scale={1.5 if config['null_class'] else 1}, num_inference_steps=250"
    if transport.averages:  # has its guidance inside
        options = "num_inference_steps=1"
    path = ", ".join(
        f"{name.replace('_', ' ')} {transport.config[name]}" for name in ("interpolant", "prediction", "loss_weight")
    )
    rows = [f"| {name} | {value:.6g} |" for name, value in metrics.items()]
    parts = [
        "---",
        "library_name: diffusers",
        "pipeline_tag: unconditional-image-generation",
        "tags: [sit, class-conditional-image-generation]",
        "---",
        f"# SiT with the mixer {config['mixer']}" + (", modern block" if config["block"] == "modern" else ""),
        f"A Scalable Interpolant Transformer ([SiT](https://arxiv.org/abs/2401.08740)) that makes images of {size} by "
        f"class{seen}: {config['depth']} blocks of width {config['hidden_size']}, patches of {config['patch_size']}, "
        f"{millions:.4g} M parameters. Objective: {path}. Written by sit-atconv {__version__}.",
        "## Use",
        "```python\nfrom sit import SiTPipeline  # the package sit-atconv\n\n"
        'pipe = SiTPipeline.from_pretrained("PATH OR NAME OF THIS FOLDER")\n'
        f"images = pipe([0], {options}).images\n"
        'images[0].save("sample.png")\n```',
        "## Data",
        (f"Trained on `{info.data}`, " if info.data else "Trained on data that is not noted here, ")
        + f"{config['num_classes']} classes{f': {names}' if names else ''}.",
        "## Recipe",
        f"```yaml\n{recipe.rstrip()}\n```" if recipe else "Not noted here.",
        "## Metrics",
        "\n".join(["| metric | value |", "|---|---|", *rows]) if rows else "None noted here.",
        "## License",
        "The code of sit-atconv is under the MIT License. The license of the weights is for who publishes them to "
        "state here, within the terms of the data.",
    ]
    front, body = parts[:5], parts[5:]
    return "\n".join(front) + "\n\n" + "\n\n".join(body) + "\n"
