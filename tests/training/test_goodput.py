"""The account of wall time: everything is booked once, also over restarts."""

import json

import pytest

from flaxpretrain.errors import UserError
from flaxpretrain.training.goodput import (
    CHECKPOINT,
    COMPILE,
    DATA_WAIT,
    GOODPUT,
    LOST,
    STARTUP,
    STEPS,
    STOPPED,
    Ledger,
)


class Clock:
    """A clock that goes when it is told to."""

    def __init__(self, time=1000.0):
        self.time = time

    def __call__(self):
        return self.time


def ledger(clock):
    return Ledger(clock, clock)


def spend(book, clock, **seconds):
    for activity, amount in seconds.items():
        book.enter(activity)
        clock.time += amount


def test_each_second_is_booked_once():
    clock = Clock()
    book = ledger(clock)
    clock.time += 2
    spend(book, clock, compile=3, steps=10, checkpoint=1)
    book.move(4, STEPS, DATA_WAIT)
    seconds = book.seconds()
    assert {n: s for n, s in seconds.items() if s} == {
        STARTUP: 2,
        COMPILE: 3,
        STEPS: 6,
        DATA_WAIT: 4,
        CHECKPOINT: 1,
    }
    figures = book.figures()
    assert figures["goodput"] == 6 / 16 and figures["time/data_wait"] == 4 / 16
    assert sum(figures.values()) == pytest.approx(1.0)
    assert book.line(0).startswith("goodput 37.5% of 16 s: data wait 25.0%, compile 18.8%")


def test_work_after_the_checkpoint_is_lost_and_time_between_processes_is_told(tmp_path):
    clock = Clock()
    first = ledger(clock)
    spend(first, clock, steps=100)
    saved = first.seconds()
    spend(first, clock, checkpoint=2, steps=30)
    first.write(tmp_path, 9, force=True)
    clock.time += 45  # killed, and started again
    second = ledger(clock)
    assert second.go_on(saved, 8, tmp_path) == 32
    spend(second, clock, steps=50)
    seconds = second.seconds()
    assert (seconds[STEPS], seconds[LOST], seconds[STOPPED]) == (150, 32, 45)
    assert sum(seconds.values()) == clock.time - 1000
    assert "2 restarts" in second.line(2)


def test_what_is_done_after_the_last_step_is_not_lost(tmp_path):
    clock = Clock()
    first = ledger(clock)
    spend(first, clock, steps=100)
    saved = first.seconds()
    spend(first, clock, checkpoint=2, finish=30)
    first.write(tmp_path, 8, force=True)
    second = ledger(clock)
    assert second.go_on(saved, 8, tmp_path) == 0
    assert second.seconds()["finish"] == 30


def test_a_killed_process_without_a_checkpoint_lost_all(tmp_path):
    clock = Clock()
    first = ledger(clock)
    spend(first, clock, steps=7)
    first.write(tmp_path, 9, force=True)
    assert ledger(clock).go_on({}, 0, tmp_path) == 7


def test_a_workdir_without_an_account_begins_one(tmp_path):
    assert ledger(Clock()).go_on({}, 0, tmp_path) == 0
    (tmp_path / GOODPUT).write_text("{half")
    assert ledger(Clock()).go_on({}, 0, tmp_path) == 0


def test_the_account_is_written_now_and_then(tmp_path):
    clock = Clock()
    book = ledger(clock)
    book.write(tmp_path, 1)
    assert not (tmp_path / GOODPUT).exists()
    spend(book, clock, steps=20)
    book.write(tmp_path, 1)
    assert json.loads((tmp_path / GOODPUT).read_text())["seconds"]["steps"] == 20
    with pytest.raises(UserError, match="cannot write"):
        book.write(tmp_path / "missing", 1, force=True)
