"""One run of a study from whatever of it is there to its JSON: training, then evaluation. All its processes call it."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator

from sit.checkpoint.find import find_checkpoints
from sit.checkpoint.integrity import is_complete
from sit.study import record
from sit.study.config import Study
from sit.study.evaluation import evaluate_run
from sit.study.holding import holding
from sit.study.runs import Run
from sit.training.heldout import HeldOutLoss
from sit.training.non_finite import Diverged
from sit.training.trainer import train
from sit.utils.device import process_state
from sit.utils.errors import UserError
from sit.utils.signals import TRAINING, handled


def do(run: Run, study: Study) -> None:
    """Do what is missing of a run, and leave its JSON, and its grid of samples if it is evaluated.

    A training that diverges is a result: its JSON says so, nothing of it is evaluated, and it is not made again.

    Raises:
        InUse: another program is at it.
        UserError: it was begun with other settings, there are not as many processes as the study says, or as the
            training and the evaluation.
        SystemExit: a signal asked for the end; what was done is kept and the status is
            :data:`~sit.utils.signals.TRAINING`'s.
    """
    state = process_state()
    if study.processes > 1 and state.num_processes != study.processes:
        raise UserError(
            f"`study={study.path}`: processes: {study.processes}, and this is a program of {state.num_processes}: give "
            "`jobs` of at least 1, which launches them, or the command of `print_commands`"
        )
    with contextlib.ExitStack() as held:
        if state.is_main_process:
            held.enter_context(holding(run, study))
        found = record.read(run, study)
        if record.is_finished(run, study, found):
            return
        if found is None:
            record.check_begun(run, study)
            failed = None
            try:
                if not is_trained(run, study):
                    train(run.config)
            except Diverged as error:
                failed = str(error)
            found = record.describe_training(run, study, state.device, failed)
            if state.is_main_process:
                record.write(run.json(study), found)
            if failed:
                state.print(f"{run.name} diverged, and is kept as such in {run.json(study)}: {failed}")
                return
        if steps := run.steps_to_evaluate(study):
            with ending_by_signals():
                evaluation = evaluate_run(run, study, steps, state.device, found["evaluation"])
            if state.is_main_process:
                record.write(run.json(study), found | {"evaluation": evaluation})
                shutil.rmtree(run.work(study) / "evaluation", ignore_errors=True)


def is_trained(run: Run, study: Study) -> bool:
    """Whether the training has come to its last step, and measured the held-out loss there, as far as it is finite."""
    folder = run.training(study)
    if not (folder / "config.yaml").is_file():
        return False
    if run.config.heldout != "none" and not HeldOutLoss.path(folder, run.config.steps).is_file():
        return False
    return any(step == run.config.steps and is_complete(place) for step, place in find_checkpoints(folder))


@contextlib.contextmanager
def ending_by_signals() -> Iterator[None]:
    """Within the block, the signals that ask a training to save itself end the program: evaluations keep each chunk."""

    def end(number: int, frame: object) -> None:
        raise SystemExit(TRAINING[number])

    with handled(TRAINING, end):
        yield
