"""SIGTERM: caught inside, given back afterwards; a second one is not caught."""

import itertools
import os
import signal
import threading

import pytest

from jaxnr.training.preemption import preemption_notice


@pytest.fixture
def outer():
    """What SIGTERM did before: here, it is counted."""
    came = []
    before = signal.signal(signal.SIGTERM, lambda *_: came.append(1))
    yield came
    signal.signal(signal.SIGTERM, before)


def test_the_first_sigterm_is_noticed_and_the_second_does_what_it_did_before(outer):
    with preemption_notice() as preemption_came:
        assert not preemption_came()
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption_came()
        assert preemption_came()
        assert outer == []
        os.kill(os.getpid(), signal.SIGTERM)
        assert outer == [1]
    os.kill(os.getpid(), signal.SIGTERM)
    assert outer == [1, 1]


def test_the_handler_is_given_back_after_an_error(outer):
    with pytest.raises(ZeroDivisionError), preemption_notice():
        raise ZeroDivisionError
    os.kill(os.getpid(), signal.SIGTERM)
    assert outer == [1]


def test_outside_the_main_thread_nothing_is_caught(outer):
    def inside():
        with preemption_notice() as preemption_came:
            os.kill(os.getpid(), signal.SIGTERM)
            noticed.append(preemption_came())

    noticed = []
    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert noticed == [False]
    assert outer == [1]


def test_of_several_processes_steps_are_counted_through_all_stages(monkeypatch):
    """jax stops at a step that is later than any that was asked about, also where a stage has just ended."""
    asked = []
    monkeypatch.setattr("jax.distributed.is_initialized", lambda: True)
    monkeypatch.setattr(
        "jax.experimental.multihost_utils.reached_preemption_sync_point", lambda step: asked.append(step) or step > 3
    )
    monkeypatch.setattr("jaxnr.training.preemption._STEPS", itertools.count(1))
    with preemption_notice() as preemption_came:
        assert [preemption_came() for _ in range(2)] == [False, False]
    with preemption_notice() as preemption_came:
        assert [preemption_came() for _ in range(2)] == [False, True]
    assert asked == [1, 2, 3, 4]
