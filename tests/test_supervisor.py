"""A supervised program is started again after what another start may mend, and never else."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flaxpretrain import supervisor

ROOT = Path(__file__).parent.parent

CHILD = """
import os, signal, sys
from pathlib import Path
count = Path(sys.argv[1])
codes = sys.argv[2].split(",")
n = len(count.read_text()) if count.exists() else 0
count.write_text("x" * (n + 1))
code = int(codes[min(n, len(codes) - 1)])
os.kill(os.getpid(), -code) if code < 0 else sys.exit(code)
"""


def supervised(tmp_path, codes, restarts, **clocks):
    count = tmp_path / "count"
    command = [sys.executable, "-c", CHILD, str(count), codes]
    code = supervisor.supervise(command, restarts, **{"sleep": lambda _: None} | clocks)
    return code, len(count.read_text())


@pytest.mark.parametrize(
    ("codes", "restarts", "expected"),
    [
        ("0", 3, (0, 1)),
        ("1,124,75,69,0", 9, (0, 5)),
        ("-9,-6,0", 9, (0, 3)),
        ("2", 9, (2, 1)),
        ("3", 9, (3, 1)),
        ("130", 9, (130, 1)),
        ("124,2", 9, (2, 2)),
        ("1", 2, (1, 3)),
        ("-9", 1, (137, 2)),
        ("75", 0, (75, 1)),
    ],
)
def test_restarts_are_bounded_and_only_for_what_may_mend(tmp_path, codes, restarts, expected):
    assert supervised(tmp_path, codes, restarts) == expected


def test_the_wait_doubles_and_is_short_again_after_a_long_life(tmp_path, capfd):
    waits, lives = [], iter([0, 1, 2, 3, 4, 5, 6, 2000, 2001, 2002])
    supervised(tmp_path, "1", 4, sleep=waits.append, clock=lambda: next(lives))
    assert waits == [1.0, 2.0, 4.0, 1.0]
    told = capfd.readouterr().err
    assert "supervisor: exit code 1: it crashed; again in 2 s, restart 2 of 4" in told
    assert "started 5 times, giving up" in told


PROGRAM = """
import sys, time
from flaxpretrain import supervisor
supervisor.take_over()
import signal
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
print("child", *sys.argv[1:], flush=True)
if "wait" in sys.argv:
    time.sleep(60)
sys.exit(124)
"""


def test_the_program_sees_its_own_arguments_but_not_the_flag(tmp_path):
    (tmp_path / "p.py").write_text(PROGRAM)
    command = [sys.executable, "p.py", "a b", "--restarts", "1", "--quiet", "--debug"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 124
    assert done.stdout == "child a b --quiet --debug\n" * 2
    command[4] = "-1"
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1


def test_a_stop_is_handed_on_and_ends_the_supervisor_too(tmp_path):
    (tmp_path / "p.py").write_text(PROGRAM)
    process = subprocess.Popen(
        [sys.executable, "p.py", "wait", "--restarts=5"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "child wait\n"
    begun = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 75
    assert process.stdout.read() == "" and time.monotonic() - begun < 25
    process.stdout.close()
