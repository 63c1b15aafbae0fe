"""SiT: Scalable Interpolant Transformers (arXiv 2401.08740) with a pluggable token-mixer slot."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from sit.version import __version__

# imported when first asked for, so that `import sit` stays light; diffusers finds pipeline components by these names,
# and looks for their base classes in the same library
_HOMES = {
    "PixelCodec": "sit.latents.pixels",
    "SiT": "sit.model",
    "Transport": "sit.transport.transport",
    "SiTPipeline": "sit.pipeline",
    "ModelMixin": "diffusers",
    "SchedulerMixin": "diffusers",
}

__all__ = ["PixelCodec", "SiT", "SiTPipeline", "Transport", "__version__"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
