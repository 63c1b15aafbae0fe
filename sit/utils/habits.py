"""What other programs call our flags: the published SiT and its relatives, diffusers' scripts, timm's train.py,
torch-fidelity, clean-fid and EDM2's evaluation.

A flag that is not known is told with ours, where one of these programs has it. docs/compatibility.md has the same list.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Meant:
    """What does the work here.

    Attributes:
        flags: ours, without hyphens before them, with a value where it takes one.
        note: what to heed. Without flags it is the whole answer.
    """

    flags: tuple[str, ...] = ()
    note: str = ""


def _is(*flags: str, note: str = "") -> Meant:
    return Meant(flags, note)


_NO_EPOCHS = "in optimizer steps: epochs × images / batch size"
_LAUNCH = Meant((), "`accelerate launch` starts the processes")

SIT = {
    "num-sampling-steps": (_is("steps"),),
    "path-type": (_is("interpolant"),),
    "data-path": (_is("data"),),
    "results-dir": (_is("output-dir", note="the run's own folder"),),
    "global-batch-size": (_is("batch-size", note="over all processes together"),),
    "per-proc-batch-size": (_is("batch-size"),),
    "num-fid-samples": (_is("num-samples"),),
    "sample-dir": (_is("out"), _is("save")),
    "epochs": (_is("steps", note=_NO_EPOCHS),),
    "ckpt-every": (_is("checkpoint-every"),),
    "sample-every": (_is("preview-every"),),
    "global-seed": (_is("seed"),),
    "num-workers": (_is("workers"),),
    "sampling-method": (_is("method"),),
    "mode": (_is("sampler"),),
    "ema": (_is("ema-decay"), _is("weights ema")),
    "wandb": (_is("trackers wandb"),),
    "tf32": (_is("precision tf32"),),
    "class-dropout-prob": (_is("class-dropout"),),
    "enc-type": (_is("repa"),),
    "proj-coeff": (_is("repa-weight"),),
    "encoder-depth": (_is("repa-block"),),
    "guidance-low": (_is("cfg-interval"),),
    "guidance-high": (_is("cfg-interval"),),
    "ref-batch": (_is("reference"),),
}
"""train.py, sample.py and sample_ddp.py of SiT and DiT, and REPA's"""

DIFFUSERS = {
    "pretrained-model-name-or-path": (_is("ckpt"), _is("init-from")),
    "pretrained-vae-model-name-or-path": (_is("vae"),),
    "train-data-dir": (_is("data"),),
    "dataset-name": (_is("data datasets:NAME"),),
    "train-batch-size": (_is("batch-size", note="over all processes and accumulated micro-batches together"),),
    "eval-batch-size": (_is("batch-size"),),
    "max-train-steps": (_is("steps"),),
    "num-train-epochs": (_is("steps", note=_NO_EPOCHS),),
    "num-epochs": (_is("steps", note=_NO_EPOCHS),),
    "num-inference-steps": (_is("steps"),),
    "guidance-scale": (_is("cfg-scale"),),
    "output-dir": (_is("out"), _is("save")),
    "resolution": (_is("image-size"),),
    "random-flip": (_is("flip"),),
    "resume-from-checkpoint": (_is("resume"),),
    "checkpointing-steps": (_is("checkpoint-every"),),
    "checkpoints-total-limit": (_is("keep-last"),),
    "gradient-accumulation-steps": (_is("gradient-accumulation"),),
    "lr-warmup-steps": (_is("warmup-steps"),),
    "lr-scheduler": (_is("final-learning-rate", note="given, a cosine goes down to it; not given, it is constant"),),
    "adam-beta1": (_is("betas"),),
    "adam-beta2": (_is("betas"),),
    "adam-weight-decay": (_is("weight-decay"),),
    "use-ema": (_is("ema-decay", note="the average is always kept"),),
    "ema-max-decay": (_is("ema-decay"),),
    "dataloader-num-workers": (_is("workers"),),
    "report-to": (_is("trackers"),),
    "logger": (_is("trackers"),),
    "tracker-project-name": (_is("project"),),
    "validation-steps": (_is("preview-every"),),
    "save-images-epochs": (_is("preview-every"),),
    "proportion-empty-prompts": (_is("class-dropout"),),
    "allow-tf32": (_is("tf32"), _is("precision tf32")),
    "local-rank": (_LAUNCH,),
}
"""diffusers' training examples; their underscores are read as hyphens"""

TIMM = {
    "lr": (_is("learning-rate"),),
    "b": (_is("batch-size"),),
    "j": (_is("workers"),),
    "amp": (_is("mixed-precision bf16"), _is("precision bfloat16")),
    "amp-dtype": (_is("mixed-precision"), _is("precision")),
    "clip-grad": (_is("max-grad-norm"),),
    "clip-mode": (_is("max-grad-norm", note="by the norm"),),
    "opt": (_is("optimizer"),),
    "opt-betas": (_is("betas"),),
    "sched": (_is("final-learning-rate", note="given, a cosine goes down to it; not given, it is constant"),),
    "warmup-epochs": (_is("warmup-steps", note="in optimizer steps"),),
    "min-lr": (_is("final-learning-rate"),),
    "model-ema-decay": (_is("ema-decay"),),
    "model-ema": (_is("ema-decay", note="the average is always kept"),),
    "grad-accum-steps": (_is("gradient-accumulation"),),
    "grad-checkpointing": (_is("gradient-checkpointing"),),
    "torchcompile": (_is("compile"),),
    "data-dir": (_is("data"),),
    "dataset": (_is("data"),),
    "img-size": (_is("image-size"),),
    "input-size": (_is("image-size"),),
    "hflip": (_is("flip"),),
    "output": (_is("output-dir"), _is("out"), _is("save")),
    "experiment": (_is("output-dir"),),
    "initial-checkpoint": (_is("init-from"),),
    "pretrained": (_is("init-from", note="a checkpoint or its name"),),
    "pretrained-path": (_is("init-from"),),
    "checkpoint-hist": (_is("keep-last"),),
    "log-interval": (_is("log-every"),),
    "recovery-interval": (_is("checkpoint-every"),),
    "log-wandb": (_is("trackers wandb"),),
    "wandb-project": (_is("project"),),
    "channels-last": (Meant((), "tokens have no channel layout to choose"),),
}
"""timm's train.py"""

_ALL = Meant((), "all numbers that can be had are always made")

EVALUATORS = {
    "input1": (_is("samples"),),
    "input2": (_is("reference"),),
    "fdir1": (_is("samples"),),
    "fdir2": (_is("reference"),),
    "images": (_is("samples"),),
    "ref": (_is("reference"),),
    "isc": (_ALL,),
    "fid": (_ALL,),
    "kid": (_ALL,),
    "prc": (_ALL,),
    "metrics": (_is("features", note="what distances are on; all numbers are always made"),),
    "feature-extractor": (_is("features"),),
}
"""torch-fidelity's fidelity, clean-fid's scripts and EDM2's calculate_metrics.py"""

OURS = {
    "out": (_is("output-dir"), _is("save")),
    "ckpt": (_is("resume"),),
}
"""names that another of our commands has"""

PROGRAMS = {"SiT, DiT, REPA": SIT, "diffusers": DIFFUSERS, "timm": TIMM, "evaluators": EVALUATORS}
HABITS = {name: meanings for table in (EVALUATORS, OURS, TIMM, DIFFUSERS, SIT) for name, meanings in table.items()}
"""all of them; where two programs share a name, SiT's meaning comes first"""
