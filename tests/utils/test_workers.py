"""Work shared among threads that compute alone."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from torch import nn

from sit.utils.compile import compile_for_sampling
from sit.utils.workers import SMALL, computes_apart, run_apart


@pytest.fixture(params=(1, 2, 3))
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    assert torch.get_num_threads() == request.param
    told = []
    thread = threading.Thread(target=lambda: told.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    torch.set_num_threads(before)
    assert told == [request.param], "threads to come have the caller's number"
    assert not [one for one in threading.enumerate() if one.name == "sit-worker"], "no thread is left"


def test_results_are_in_order_and_each_job_has_one_thread(threads):
    meeting, seen = threading.Barrier(threads), []

    def job(number, tell):
        if number < threads:
            meeting.wait(20)  # so many run at a time
        tell(number, "first")
        tell(number, "second")
        return number, torch.get_num_threads(), threading.get_ident()

    def told(_, number, word):
        seen.append((number, word, threading.get_ident()))

    jobs = [lambda tell, number=number: job(number, tell) for number in range(1 if threads == 1 else 5)]
    found = run_apart(jobs, told)
    assert [(number, computing) for number, computing, _ in found] == [(number, 1) for number in range(len(jobs))]
    assert {ident for *_, ident in seen} == {threading.get_ident()}, "told where it was called"
    for number in range(len(jobs)):
        assert [word for which, word, _ in seen if which == number] == ["first", "second"]


def test_the_first_of_the_jobs_that_fail_is_raised(threads):
    later = threading.Event()

    def job(number, tell):
        if number == 1:
            later.wait(20 if threads > 1 else 0)
            time.sleep(0.1)  # the error of number 2 is known by then
            raise ValueError("one")
        if number == 2:
            later.set()
            raise KeyError("two")

    with pytest.raises(ValueError, match="one"):
        run_apart([lambda tell, number=number: job(number, tell) for number in range(3)])


def test_what_the_listener_raises_ends_all_jobs(threads):
    def job(tell):
        while True:
            tell()
            time.sleep(0.001)

    def told(number):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_apart([job] * 4, told)


@pytest.mark.parametrize("listens", (False, True))
def test_a_job_is_told_apart_by_its_number(threads, listens):
    told = []
    run_apart([lambda tell: tell("done")] * 3, (lambda *what: told.append(what)) if listens else None)
    assert sorted(told) == ([(number, "done") for number in range(3)] if listens else [])


@pytest.mark.parametrize("dtype", (torch.bfloat16, None))
@pytest.mark.parametrize("gradients", (False, True))
def test_jobs_compute_as_their_caller_does(threads, dtype, gradients):
    network = nn.Linear(4, 4)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None), torch.set_grad_enabled(gradients):
        found = run_apart([lambda tell: network(torch.ones(2, 4))] * 3)
    assert all(one.dtype == (dtype or torch.float32) and one.requires_grad == gradients for one in found)


def test_small_networks_on_cpus_compute_apart():
    network = nn.Linear(1000, 1000, bias=False)
    places = int(SMALL) // 1_000_000
    assert computes_apart(network, 1, places - 1) and not computes_apart(network, 1, places)
    assert not computes_apart(network, 1, 1, "cuda")
    network.compile()
    assert not computes_apart(network, 1, 1)
    another = nn.Linear(2, 2)
    compile_for_sampling(another)
    assert not computes_apart(another, 1, 1)
    around = nn.Sequential(nn.Linear(2, 2))
    around[0].compile()
    assert not computes_apart(around, 1, 1), "a compiled part of it"
