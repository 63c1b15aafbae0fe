"""Time and peak memory of one sampling step of SiT-XL/2 with random weights, on the CPU.

Each case runs in a process of its own, as the peak is the process's: ``python benchmarks/xl_step.py``. The step is one
Euler step of the ODE for one image at 256x256 (a latent of 4x32x32), without guidance: one evaluation of the network.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time

import torch

from sit.model import create_model, sincos_table
from sit.sampling.config import SamplerConfig
from sit.sampling.sampler import sample
from sit.transport.transport import Transport

CASES = [(mixer, dtype) for mixer in ("attention", "atconv") for dtype in ("float32", "bfloat16")]


def peak_gib() -> float:
    """The process's largest resident set so far, in GiB (Linux counts in KiB, macOS in bytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30


def random_network(mixer: str, dtype: torch.dtype) -> torch.nn.Module:
    """SiT-XL/2 made on the meta device and filled in ``dtype``, so that no second copy is ever in memory."""
    with torch.device("meta"):
        model = create_model("SiT-XL/2", mixer=mixer)
    model = torch.nn.Module.to(model, dtype).to_empty(device="cpu").eval().requires_grad_(False)
    source = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.normal_(std=0.02, generator=source)
    if model.config.positional_embedding:
        model.pos_embed.copy_(sincos_table(model.config.hidden_size, *(torch.arange(side) for side in model.grid)))
    return model


@torch.no_grad()
def measure(mixer: str, dtype: str) -> dict[str, object]:
    """Build the network and take one step; seconds and GiB."""
    imports = peak_gib()
    model = random_network(mixer, getattr(torch, dtype))
    built = peak_gib()
    noise = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(1))
    config = SamplerConfig(sampler="ode", method="euler", steps=1)
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        latents = sample(model, Transport(), noise, torch.tensor([207]), config)
        seconds.append(time.perf_counter() - start)
    return dict(
        mixer=mixer,
        dtype=dtype,
        parameters=sum(p.numel() for p in model.parameters()),
        finite=bool(latents.isfinite().all()),
        imports_gib=round(imports, 2),
        built_gib=round(built, 2),
        peak_gib=round(peak_gib(), 2),
        first_step_s=round(seconds[0], 2),
        later_step_s=round(sorted(seconds[1:])[1], 2),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", nargs=2, metavar=("MIXER", "DTYPE"), help="one case in this process")
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(*options.case)))
        return
    threads = os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())
    print(f"SiT-XL/2, one image of 256x256, one step, CPU, {threads} threads, torch {torch.__version__}")
    print("| mixer | dtype | parameters | peak memory | of which imports | first step | later steps (median of 3) |")
    print("|---|---|---|---|---|---|---|")
    for case in CASES:
        result = subprocess.run([sys.executable, __file__, "--case", *case], capture_output=True, text=True, check=True)
        row = json.loads(result.stdout.splitlines()[-1])
        if not row["finite"]:
            raise SystemExit(f"{case}: the step is not finite")
        print(
            f"| {row['mixer']} | {row['dtype']} | {row['parameters']:,} | {row['peak_gib']:.2f} GiB "
            f"| {row['imports_gib']:.2f} GiB | {row['first_step_s']:.2f} s | {row['later_step_s']:.2f} s |",
            flush=True,
        )


if __name__ == "__main__":
    main()
