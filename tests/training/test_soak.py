"""A run that is killed thirty times ends as one that never was."""

import json
import random
import time

import pytest

from flaxpretrain.training.metrics import read_events
from tests.training.processes import ended, losses, reached, started, wait_for, write_recipe

KILLS = 30
EVERY = 8
"""Steps between two saves."""

SETTINGS = ("steps=1200", f"checkpoints.every_steps={EVERY}", "checkpoints.keep_last=2")


def saving(workdir):
    """Whether a save is under way: Orbax writes under another name, and renames."""
    folder = workdir / "checkpoints"
    return folder.exists() and any("orbax-checkpoint-tmp" in p.name for p in folder.iterdir())


def newest(workdir):
    steps = (int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdigit())
    return max(steps, default=0)


def lives(workdir):
    """Starts and restarts so far."""
    rows = read_events(workdir / "events.jsonl")
    return [row for row in rows if row["event"] in ("start", "restart")]


def last_step(workdir):
    """The last in the log of a killed run, whose last line may be half a line."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
    return max(json.loads(line)["step"] for line in lines if line.endswith("\n"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_thirty_kills_leave_the_curve_as_it_is_bit_for_bit(tmp_path):
    recipe, generator = write_recipe(tmp_path), random.Random(0)
    workdir, whole = tmp_path / "w", tmp_path / "whole"
    with started(recipe, whole, 1, *SETTINGS) as processes:
        assert ended(processes)[0] == [0]
    in_a_save, offsets = 0, set()
    for number in range(KILLS):
        restored = newest(workdir)
        with started(recipe, workdir, 1, *SETTINGS) as processes:
            wait_for(lambda n=number: len(lives(workdir)) > n, processes)
            # Spread over the save interval; every third one waits for a save to begin.
            wait_for(reached(workdir, restored + generator.randint(1, 2 * EVERY)), processes)
            if number % 3 == 0:
                wait_for(lambda: saving(workdir), processes)
            else:
                time.sleep(generator.uniform(0, 0.02))
            processes[0].kill()
            processes[0].wait()
        in_a_save += saving(workdir)
        offsets.add(last_step(workdir) % EVERY)
    with started(recipe, workdir, 1, *SETTINGS) as processes:
        codes, outputs = ended(processes)
    assert codes == [0], outputs
    assert losses(workdir) == losses(whole)
    assert sorted(losses(workdir)) == list(range(1, 1201))
    restarts = len(lives(workdir)) - 1
    print(f"{restarts} restarts, {in_a_save} in a save, at {len(offsets)} of {EVERY} offsets")
    assert restarts == KILLS
    assert in_a_save >= KILLS // 6 and len(offsets) >= EVERY // 2
