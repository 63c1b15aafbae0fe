"""Work shared among forked processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import traceback
from multiprocessing.context import ForkProcess

import pytest
import torch
from torch import nn
from tqdm import tqdm

from sit.utils import workers
from sit.utils.errors import UserError
from sit.utils.forks import can_fork
from sit.utils.signals import PLAIN, ended_by_signals
from sit.utils.workers import run_apart

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks on this system")


@pytest.fixture
def two(monkeypatch):
    """Two processes at a time, though the tests' own process has other threads."""
    monkeypatch.setattr(workers, "can_fork", lambda: True)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)
    assert not [one for one in multiprocessing.active_children() if one.name == "sit-worker"], "no process is left"


def test_results_are_in_order_and_from_processes_of_one_thread(two):
    told = []

    def job(number, tell):
        tell("first", torch.full((2,), float(number)))
        time.sleep(0.05)  # so that the other has its turn
        tell("second", None)
        return number, os.getpid(), torch.get_num_threads()

    found = run_apart(
        [lambda tell, number=number: job(number, tell) for number in range(5)],
        lambda *what: told.append(what),
        forks=True,
    )
    assert [(number, computing) for number, _, computing in found] == [(number, 1) for number in range(5)]
    processes = {process for _, process, _ in found}
    assert len(processes) == 2 and os.getpid() not in processes
    for number in range(5):
        first, second = [what for which, *what in told if which == number]
        assert first[0] == "first" and first[1].tolist() == [number, number] and second == ["second", None]


@pytest.mark.parametrize("dtype", (torch.bfloat16, None))
def test_jobs_compute_as_their_caller_does(two, dtype):
    network = nn.Linear(4, 4)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None), torch.no_grad():
        expected = network(torch.ones(2, 4))
        found = run_apart([lambda tell: network(torch.ones(2, 4))] * 3, forks=True)
    assert all(torch.equal(one, expected) and one.dtype == expected.dtype for one in found)


class Odd(Exception):
    """An error that can't be sent: made again of its message alone it fails."""

    def __init__(self, one: int, other: int) -> None:
        super().__init__(f"{one} and {other}")


@pytest.mark.parametrize(
    ("raised", "expected", "words"),
    [
        (UserError("`steps` is wrong"), UserError, "^`steps` is wrong$"),
        (Odd(1, 2), RuntimeError, "Odd: 1 and 2"),
    ],
)
def test_the_first_of_the_jobs_that_fail_is_raised(two, raised, expected, words):
    def job(number, tell):
        time.sleep(0.1 * (number == 1))  # the error of number 2 is known by then
        if number:
            raise KeyError("two") if number == 2 else raised

    with pytest.raises(expected, match=words):
        run_apart([lambda tell, number=number: job(number, tell) for number in range(3)], forks=True)


def test_threads_do_it_where_the_system_has_no_room_for_processes(two, monkeypatch):
    """The second of two forks is refused."""
    begun, start = [], ForkProcess.start

    def refused(process):
        begun.append(process)
        if len(begun) == 2:
            raise BlockingIOError("resource temporarily unavailable")
        start(process)

    monkeypatch.setattr(ForkProcess, "start", refused)
    assert run_apart([lambda tell: os.getpid()] * 3, forks=True) == [os.getpid()] * 3
    assert not begun[0].is_alive()


def test_what_the_listener_raises_ends_all_processes(two):
    def job(tell):
        while True:
            tell()
            time.sleep(0.001)

    def told(number):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_apart([job] * 4, told, forks=True)


def test_a_process_that_is_killed_is_told(two):
    def job(tell):
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(RuntimeError, match="ended with status -9, as if killed for want of memory"):
        run_apart([job] * 2, forks=True)


def test_a_process_that_is_killed_while_it_draws_lets_others_draw(two):
    lock = tqdm.get_lock().mp_lock

    def job(tell):
        with tqdm.get_lock():
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(RuntimeError, match="status -9"):
        run_apart([job] * 2, forks=True)
    assert lock.acquire(timeout=1)
    lock.release()


def test_processes_end_with_the_one_that_waits_for_them(tmp_path):
    """It is killed, and can't end them itself."""

    def waits():
        torch.set_num_threads(2)

        def job(tell):
            (tmp_path / str(os.getpid())).touch()
            while True:
                tell()
                time.sleep(0.01)

        run_apart([job] * 2, forks=True)

    caller = fork(waits)
    while len(list(tmp_path.iterdir())) < 2:
        time.sleep(0.01)
    os.kill(caller, signal.SIGKILL)
    os.waitpid(caller, 0)
    computing = [int(place.name) for place in tmp_path.iterdir()]
    for _ in range(1000):
        if not any(map(running, computing)):
            break
        time.sleep(0.01)
    left = list(filter(running, computing))
    for process in left:
        os.kill(process, signal.SIGKILL)
    assert not left


def fork(does) -> int:
    """A fork of the tests' process, which has none of its other threads, and ends with 0 if ``does`` returns."""
    process = os.fork()
    if not process:
        status = 1
        try:
            does()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return process


def test_what_forks_are_safe_beside(monkeypatch):
    def looks():
        tqdm.monitor = None  # another test's, which is no thread of this fork
        assert can_fork()
        with tqdm(total=1, file=open(os.devnull, "w"), disable=False) as bar, ended_by_signals(PLAIN, ""):
            assert bar.monitor is not None and threading.active_count() == 3 and can_fork()
        going_on = threading.Event()
        thread = threading.Thread(target=going_on.wait, daemon=True)
        thread.start()
        assert not can_fork()
        going_on.set()
        thread.join()
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        assert not can_fork()
        monkeypatch.undo()
        multiprocessing.current_process()._config["daemon"] = True
        assert not can_fork()

    assert os.waitstatus_to_exitcode(os.waitpid(fork(looks), 0)[1]) == 0
    monkeypatch.setattr("sys.platform", "darwin")
    assert not can_fork()


def running(process: int) -> bool:
    """Whether it is there, and not only its status waits to be read."""
    try:
        with open(f"/proc/{process}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
