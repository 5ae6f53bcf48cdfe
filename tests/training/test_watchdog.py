"""A process that hangs ends with code 124 and says where; a busy one is left alone."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from flaxpretrain import config, program
from flaxpretrain.errors import UserError

ROOT = Path(__file__).parents[2]

SCRIPT = """
import sys, time
from flaxpretrain import config
from flaxpretrain.training.goodput import Ledger
from flaxpretrain.training.watchdog import Watchdog

def deep_in_a_collective():
    time.sleep(60)

def leave(code, reason):
    print("told the others:", code, reason, flush=True)

ledger = Ledger()
deadlines = config.Watchdog(startup_seconds=0.3, step_seconds=0.3, save_seconds=0.3)
with Watchdog(deadlines, ledger, leave):
    for _ in range(10):  # each of them in time, though not all together
        for activity in ("startup", "steps", "checkpoint"):
            ledger.enter(activity)
            time.sleep(0.02)
    ledger.enter("prepare")  # no deadline
    time.sleep(0.5)
    ledger.enter(sys.argv[1])
    if sys.argv[1] != "finish":
        deep_in_a_collective()
print("ended in peace")
"""


def run(activity):
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, activity], capture_output=True, text=True, cwd=ROOT
    )
    return done, time.monotonic() - begun


@pytest.mark.parametrize(
    ("activity", "field"), [("steps", "step_seconds"), ("checkpoint", "save_seconds")]
)
def test_a_hang_ends_with_the_stacks_of_all_threads(activity, field):
    done, seconds = run(activity)
    assert done.returncode == program.EXIT_WATCHDOG, done.stderr
    assert "in deep_in_a_collective" in done.stderr
    assert f"hangs: {activity} for 0 s, watchdog.{field} allows 0.3" in done.stderr
    assert done.stdout.startswith("told the others: 124 hangs")
    assert seconds < 50


def test_activities_in_time_and_those_without_a_deadline_end_in_peace():
    done, _ = run("finish")
    assert (done.returncode, done.stdout, done.stderr) == (0, "ended in peace\n", "")


def test_a_deadline_must_be_positive():
    with pytest.raises(UserError, match=r"watchdog\.step_seconds must be positive; got 0"):
        config.Watchdog(step_seconds=0)
