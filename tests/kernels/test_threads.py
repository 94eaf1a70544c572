"""The thread team: each item once, phases kept apart, and usable again after whatever happened."""

import os
import signal
import threading
import time
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pagellm.kernels.jit import entry_point
from pagellm.kernels.simd import atomic_add
from pagellm.kernels.threads import _ASLEEP, _MEMBER, ThreadTeam, barrier, new_counters, next_item, share_call

Ints = NDArray[np.int64]


@entry_point
def count_items(thread, mailbox, counters, phases, items, done):  # type: ignore[no-untyped-def]
    """Counts how often each item of each phase is done."""
    num_threads = share_call(thread, mailbox)
    for phase in range(phases):
        item = next_item(counters)
        while item < items:
            atomic_add(done, phase * items + item, 1)
            item = next_item(counters)
        barrier(counters, num_threads)


@entry_point
def rotate_values(thread, mailbox, counters, phases, values):  # type: ignore[no-untyped-def]
    """values[p + 1][i] = values[p][i + 1] + 1: right only if each phase sees the whole one before."""
    num_threads = share_call(thread, mailbox)
    items = values.shape[1]
    for phase in range(phases):
        item = next_item(counters)
        while item < items:
            values[phase + 1, item] = values[phase, (item + 1) % items] + 1
            item = next_item(counters)
        barrier(counters, num_threads)


def counts(team: ThreadTeam, phases: int = 3, items: int = 17) -> Ints:
    done = np.zeros(phases * items, np.int64)
    team.run(count_items, new_counters(), phases, items, done)
    return done


def assert_usable(team: ThreadTeam) -> None:
    assert (counts(team) == 1).all()


@pytest.fixture
def team() -> Any:
    team = ThreadTeam(3)
    yield team
    team.close()


def team_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("pagellm-kernel-")}


@pytest.mark.parametrize("num_threads", [1, 2, 3, 4, 5])
def test_every_item_of_every_phase_is_done_once(num_threads: int) -> None:
    team = ThreadTeam(num_threads)
    for items in (0, 1, 2, 1000):
        assert (counts(team, 20, items) == 1).all()
    team.close()


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_a_phase_begins_when_the_one_before_has_ended(num_threads: int) -> None:
    team, phases, items = ThreadTeam(num_threads), 100, 64
    values = np.zeros((phases + 1, items), np.int64)
    values[0] = np.arange(items)
    team.run(rotate_values, new_counters(), phases, values)
    np.testing.assert_array_equal(values[-1], (np.arange(items) + phases) % items + phases)
    team.close()


@entry_point
def note_members(thread, mailbox, counters, members):  # type: ignore[no-untyped-def]
    num_threads = share_call(thread, mailbox)
    members[thread] += num_threads
    barrier(counters, num_threads)


def test_each_member_is_called_once_with_its_index_and_the_arguments(team: ThreadTeam) -> None:
    members = np.zeros(3, np.int64)
    team.run(note_members, new_counters(), members)
    np.testing.assert_array_equal(members, [3, 3, 3])


def test_a_system_that_starts_no_more_threads_is_an_error_and_harms_nothing(
    team: ThreadTeam, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, before = threading.Thread.start, team_threads()

    def limited(thread: threading.Thread) -> None:
        if len(team_threads() - before) == 1:
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as context:
        context.setattr(threading.Thread, "start", limited)
        with pytest.raises(OSError, match="num_threads: the system starts 2 threads, expected 3"):
            counts(team)
    while team_threads() - before:
        time.sleep(0.001)
    assert_usable(team)


def test_one_team_serves_many_quick_jobs(team: ThreadTeam) -> None:
    done, counters = np.zeros(2 * 5, np.int64), new_counters()
    for _ in range(500):
        team.run(count_items, counters, 2, 5, done)
    assert (done == 500).all()


def test_idle_members_fall_asleep_and_wake_up_for_the_next_call(team: ThreadTeam) -> None:
    """Also where the call comes just as they fall asleep."""
    done, counters = np.zeros(2 * 5, np.int64), new_counters()
    team.run(count_items, counters, 2, 5, done)
    start = time.perf_counter()
    wait_until_asleep(team)
    until_asleep = min(time.perf_counter() - start, 0.05)  # longer where others use the cores
    for call in range(400):
        time.sleep(until_asleep * call / 200)
        team.run(count_items, counters, 2, 5, done)
    wait_until_asleep(team)
    team.run(count_items, counters, 2, 5, done)
    assert (done == 402).all()


def wait_until_asleep(team: ThreadTeam) -> None:
    assert team._mailbox is not None
    end = time.monotonic() + 60
    while (team._mailbox.reshape(-1, _MEMBER)[1:, _ASLEEP] == 0).any():
        assert time.monotonic() < end, "idle members stay awake"
        time.sleep(1e-4)


def test_callers_of_one_team_are_served_one_after_the_other(team: ThreadTeam) -> None:
    assert_usable(team)
    done, counters = np.zeros(2 * 5, np.int64), new_counters()

    def call() -> None:
        for _ in range(50):
            team.run(count_items, counters, 2, 5, done)

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert (done == 200).all()


def test_an_error_of_the_call_is_raised_and_the_team_goes_on(team: ThreadTeam) -> None:
    with pytest.raises(TypeError):
        team.run(count_items, "too few arguments")
    assert_usable(team)


def test_interrupts_of_the_caller_never_leave_a_member_alone_at_a_barrier(team: ThreadTeam) -> None:
    """Signals that come at any moment: every job that was begun is done by all members."""
    assert_usable(team)
    done, counters = np.zeros(2 * 5, np.int64), new_counters()
    interrupts = 0
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        for _ in range(300):
            try:
                signal.setitimer(signal.ITIMER_REAL, 50e-6)
                for _ in range(20):
                    team.run(count_items, counters, 2, 5, done)
            except KeyboardInterrupt:
                interrupts += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
    assert interrupts > 100
    assert (done == done[0]).all()
    assert_usable(team)


def test_a_closed_team_ends_its_threads_and_starts_new_ones_when_it_is_used_again() -> None:
    before = team_threads()
    team = ThreadTeam(3)
    assert team_threads() == before
    assert_usable(team)
    threads = team_threads() - before
    assert len(threads) == 2  # the caller is the third member
    team.close()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    assert_usable(team)
    team.close()


def test_closing_an_unused_team_or_one_twice_does_nothing() -> None:
    ThreadTeam(2).close()
    team = ThreadTeam(2)
    assert_usable(team)
    team.close()
    team.close()


def test_teams_do_not_disturb_each_other() -> None:
    teams = [ThreadTeam(2) for _ in range(3)]
    for _ in range(10):
        for team in teams:
            assert_usable(team)
    for team in teams:
        team.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the platform has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_team_works_on_in_a_forked_process(team: ThreadTeam) -> None:
    assert_usable(team)
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # a team that waits for threads that the fork did not copy never ends
        os._exit(0 if (counts(team) == 1).all() else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert_usable(team)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the platform has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_team_that_was_at_work_can_be_closed_in_a_forked_process(team: ThreadTeam) -> None:
    assert_usable(team)
    with team._lock:  # as while another thread runs something
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            team.close()
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert_usable(team)
