"""Small networks on a CPU: work shared among workers that compute alone, instead of each operation among all threads.

An operation of a small network takes microseconds, and the threads that share it wait for one another longer; where
another program holds a core they wait for it at every operation. Groups of work that each have one computing thread
take what the cores give, and round alike whatever the number of threads. The workers are threads, or forked processes
(:mod:`sit.utils.forks`) where threads would wait for the interpreter's lock between operations.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeAlias, TypeVar

import torch
from torch import nn

from sit.utils.compile import is_compiled
from sit.utils.forks import Forks, can_fork

SMALL = 4e9
"""multiply-accumulates of one evaluation below which a network is small: some 0.1 s of one core"""

HOOKS = ("_hf_hook", "_diffusers_hook")
"""attributes of a layer that Accelerate or diffusers does something around"""

Result = TypeVar("Result")
Tell: TypeAlias = Callable[..., None]
"""What a job calls with whatever its caller is to be told."""


class _Cancelled(BaseException):
    """Ends a job whose result nobody waits for any more."""


def computes_apart(network: nn.Module, rows: int, places: int, device: torch.device | str = "cpu") -> bool:
    """Whether a network's work is to be shared in groups: on a CPU, if it is small.

    Compiled networks are left as they are, and sharded ones, which wait for other processes, and those whose weights
    are put in place for each call of a layer, as offloading and casting layer by layer do.

    Args:
        network: the network.
        rows: images that it computes at a time.
        places: tokens or pixels of an image, with each of which a weight is multiplied at most.
        device: where it computes.
    """
    parameters = list(network.parameters())
    if torch.device(device).type != "cpu" or any(hasattr(parameter, "full_tensor") for parameter in parameters):
        return False
    if any(is_compiled(part) or any(hasattr(part, hook) for hook in HOOKS) for part in network.modules()):
        return False
    return rows * places * sum(parameter.numel() for parameter in parameters) < SMALL


def run_apart(
    jobs: Sequence[Callable[[Tell], Result]], told: Callable[..., None] | None = None, *, forks: bool = False
) -> list[Result]:
    """The results of ``jobs``, in their order, each computed by one thread.

    As many run at a time as the calling thread has computing threads (``torch.get_num_threads()``). They compute under
    its autocast and gradient mode.

    Args:
        jobs: each is called as ``job(tell)``.
        told: called in the calling thread with a job's number and what it tells, as it comes: in order within a job,
            and mixed among jobs. It must not change tensors that it is given.
        forks: let processes do it where they can be forked, as jobs of many short operations need: in threads those
            wait for the interpreter's lock. What the jobs tell and find is then sent, and what else they change is
            lost.

    Raises:
        BaseException: what ``told`` raises, or the job that is first in order of those that raise; all workers have
            ended by then.
        RuntimeError: a process was killed.
    """
    threads = torch.get_num_threads()
    if threads == 1 or len(jobs) <= 1:
        with one_thread():
            return [job(_nothing if told is None else partial(told, number)) for number, job in enumerate(jobs)]
    crew = _at_work(jobs, told is not None, min(threads, len(jobs)), forks)
    try:
        return _results(crew.said(), len(jobs), told or _nothing)
    finally:
        crew.end()
        torch.set_num_threads(threads)  # what threads to come begin with, which the workers have set to one


def _at_work(jobs: Sequence[Callable[[Tell], Any]], listens: bool, count: int, forks: bool) -> _Threads | Forks:
    """A crew that has begun: of processes if they are wanted and can be had."""
    inherited = _inherited()
    if forks and can_fork():
        processes = Forks(jobs, listens)
        try:
            processes.start(count, inherited)
            return processes
        except OSError:
            processes.end()
    threads = _Threads(jobs, listens)
    threads.start(count, inherited)
    return threads


def _results(said: Iterator[tuple[str, int, Any]], count: int, told: Callable[..., None]) -> list[Any]:
    """The results among what is said, once they are there.

    Raises:
        BaseException: what ``told`` raises, or the first job that failed.
    """
    found: dict[int, Any] = {}
    failed: BaseException | None = None
    last = count - 1
    while len(found) <= last:
        kind, number, what = next(said)
        if number > last:
            continue
        if kind == "told":
            told(number, *what)
        elif kind == "result":
            found[number] = what
        else:
            failed, last = what, number - 1  # jobs before it may fail too, and come first
            found = {earlier: result for earlier, result in found.items() if earlier < number}
    if failed is not None:
        raise failed
    return [found[number] for number in range(count)]


def _nothing(*_: Any) -> None:
    pass


@contextlib.contextmanager
def one_thread(wanted: bool = True) -> Iterator[None]:
    """Within the block, torch computes with one thread, if that is ``wanted``."""
    before = torch.get_num_threads()
    if before == 1 or not wanted:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _inherited() -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """What makes, in another thread, the context in which this one computes; torch keeps it for each thread."""
    gradients, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    autocast, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    def context() -> contextlib.AbstractContextManager[Any]:
        held = contextlib.ExitStack()
        held.enter_context(torch.inference_mode(inference))
        held.enter_context(torch.set_grad_enabled(gradients))
        held.enter_context(torch.autocast("cpu", dtype=dtype, enabled=autocast))
        return held

    return context


class _Threads:
    """Threads that take jobs in turn, and put what they tell and find into a queue.

    Attributes:
        ended: whether nobody waits for results any more.
    """

    def __init__(self, jobs: Sequence[Callable[[Tell], Any]], listens: bool) -> None:
        self.jobs, self.listens = jobs, listens
        self.ended = False
        self.numbers = iter(range(len(jobs)))
        self.lock = threading.Lock()
        self.queue: queue.SimpleQueue[tuple[str, int, Any]] = queue.SimpleQueue()
        self.threads: list[threading.Thread] = []

    def start(self, count: int, inherited: Callable[[], contextlib.AbstractContextManager[Any]]) -> None:
        for _ in range(count):
            thread = threading.Thread(target=self._work, args=(inherited,), name="sit-worker", daemon=True)
            thread.start()
            self.threads.append(thread)

    def _work(self, inherited: Callable[[], contextlib.AbstractContextManager[Any]]) -> None:
        torch.set_num_threads(1)  # of this thread: the number is each thread's own
        while (number := self._next()) is not None:
            try:
                with inherited():
                    result = self.jobs[number](partial(self._tell, number))
                self.queue.put(("result", number, result))
            except _Cancelled:
                return
            except BaseException as error:
                self.queue.put(("error", number, error))

    def _next(self) -> int | None:
        with self.lock:
            return None if self.ended else next(self.numbers, None)

    def _tell(self, number: int, *what: Any) -> None:
        if self.ended:
            raise _Cancelled
        if self.listens:
            self.queue.put(("told", number, what))

    def said(self) -> Iterator[tuple[str, int, Any]]:
        """What comes from the threads: (``told``, ``result`` or ``error``; the job's number; what)."""
        while True:
            yield self.queue.get()

    def end(self) -> None:
        """Wait for the threads, which end when they next tell something."""
        self.ended = True
        for thread in self.threads:
            thread.join()
