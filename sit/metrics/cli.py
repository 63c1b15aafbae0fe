"""Evaluate samples against a reference: ``python eval_fid.py --ckpt RUN --reference digits``.

``accelerate launch eval_fid.py …`` uses all GPUs; ``eval_fid.py reference --data … --out stats.npz`` makes a reference.
"""

from __future__ import annotations

import sys

from sit.metrics.arguments import Arguments, ReferenceArguments
from sit.utils.cli import parse
from sit.utils.errors import entry_point
from sit.utils.program import program


@entry_point
def main() -> None:
    """Make a reference if the first word is ``reference``, else evaluate."""
    making_reference = sys.argv[1:2] == ["reference"]
    if making_reference:
        arguments = parse(ReferenceArguments, f"{program('eval_fid')} reference", sys.argv[2:])
    else:
        arguments = parse(Arguments, program("eval_fid"), description=__doc__)
    from sit.metrics.run import evaluate_samples, write_reference  # heavy imports come once the flags are parsed
    from sit.utils.device import leave_processes

    arguments.threads.use()
    try:
        (write_reference if making_reference else evaluate_samples)(arguments)
    finally:
        leave_processes()
