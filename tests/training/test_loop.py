"""The loop as its users know it: resume, stops, refusals, skipped updates, phases."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from flaxpretrain import program
from flaxpretrain.config import Logging, Mesh, Phase, Seeds
from flaxpretrain.data.rows import Documents
from flaxpretrain.data.store import open_dataset
from flaxpretrain.errors import UserError
from flaxpretrain.objectives.masked_lm import MaskedLM
from flaxpretrain.training.checkpoints import Checkpoints as Opened
from flaxpretrain.training.evaluate import FixedNoise, FixedNoiseByEpoch
from flaxpretrain.training.guard import Guard
from flaxpretrain.training.loop import NotFinite, train
from flaxpretrain.training.metrics import read_events, read_metrics
from flaxpretrain.training.schedules import Constant, Schedule, WarmupLinear
from flaxpretrain.training.session import keep_tokenizer, note_of_warmup
from tests import toys
from tests.conftest import CACHE
from tests.tolerances import LOSS_REORDERED

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return str(toys.dataset(tmp_path_factory.mktemp("data") / "toy"))


toy = toys.packed_run


def losses(workdir):
    return {
        row["step"]: row["loss"] for row in read_metrics(workdir / "metrics.jsonl") if "loss" in row
    }


def start(workdir, data, *overrides, environment=None, extra=(), before=()):
    """The main program in a process of its own, on the recipe below."""
    recipe = workdir.parent / "toy_recipe.py"
    recipe.write_text(
        "from tests import toys\n"
        "from flaxpretrain.training.schedules import Constant\n"
        f"def recipe():\n    return toys.packed_run({data!r}, guard=None, schedule=Constant())\n"
    )
    sets = [text for o in overrides for text in ("--set", o)]
    return subprocess.Popen(
        [
            *before,
            sys.executable,
            "run_pretraining.py",
            str(recipe),
            "--workdir",
            str(workdir),
            *sets,
            *extra,
        ],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "XLA_FLAGS": "",
            "JAX_COMPILATION_CACHE_DIR": str(CACHE),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            **(environment or {}),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_step(workdir, step, process, seconds=240):
    """Waits until metrics.jsonl tells of a step."""
    metrics = workdir / "metrics.jsonl"
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if metrics.exists():
            lines = metrics.read_text().splitlines()
            if (
                lines
                and json.loads(lines[-1] if lines[-1].endswith("}") else lines[-2])["step"] >= step
            ):
                return
        if process.poll() is not None:
            pytest.fail(f"ended early with {process.returncode}: {process.communicate()[0]}")
        time.sleep(0.01)
    process.kill()
    pytest.fail(f"step {step} was not reached: {process.communicate()[0]}")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, data):
    """The losses of 300 steps in one go, in a process of its own."""
    workdir = tmp_path_factory.mktemp("uninterrupted") / "w"
    process = start(workdir, data, "steps=300", "checkpoints.every_steps=1000")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return losses(workdir)


def test_a_run_stopped_by_sigterm_saves_and_goes_on_bit_for_bit(tmp_path, data, uninterrupted):
    workdir = tmp_path / "w"
    process = start(workdir, data, "steps=300", "checkpoints.every_steps=1000")
    wait_for_step(workdir, 5, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == program.EXIT_PREEMPTED, output
    assert "saved; run the same command again" in output
    assert max(losses(workdir)) < 300
    process = start(workdir, data, "steps=300", "checkpoints.every_steps=1000")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert losses(workdir) == uninterrupted


def test_a_killed_run_loses_only_the_steps_since_its_last_save(tmp_path, data, uninterrupted):
    workdir = tmp_path / "w"
    process = start(workdir, data, "steps=300", "checkpoints.every_steps=20")
    wait_for_step(workdir, 90, process)
    process.kill()
    process.communicate()
    before = max(losses(workdir))
    process = start(workdir, data, "steps=300", "checkpoints.every_steps=20")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert before >= 90
    assert losses(workdir) == uninterrupted


def test_a_run_that_hangs_ends_with_its_stacks_is_started_again_and_given_up(tmp_path, data):
    late = "watchdog.startup_seconds=0.05"  # no start is so fast
    process = start(tmp_path / "w", data, late, extra=("--restarts", "1"))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == program.EXIT_WATCHDOG
    assert output.count("watchdog.startup_seconds allows 0.05") == 2
    assert "Current thread" in output and "most recent call first" in output
    assert "supervisor: exit code 124: it hung; again in 1 s, restart 1 of 1" in output
    assert "started 2 times, giving up" in output


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data):
    """A workdir of 12 steps on eight devices, and its losses."""
    workdir = tmp_path_factory.mktemp("trained") / "w"
    assert train(toy(data), workdir, quiet=True) == 0
    return workdir


def test_a_resumed_run_equals_an_uninterrupted_one_and_cuts_rows_past_the_restore(tmp_path, data):
    # A schedule of its own end, so that the first 8 of 12 steps are those of a run of 8.
    run, workdir = toy(data, schedule=_Fixed(12)), tmp_path / "w"
    train(dataclasses.replace(run, phases=(_phase(8),)), workdir, quiet=True)
    with open(workdir / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "loss": 99.0}\n{"step": 10, "lo')
    train(run, workdir, quiet=True)
    whole = tmp_path / "whole"
    train(run, whole, quiet=True)
    assert losses(workdir) == losses(whole)


def _phase(steps):
    return Phase(steps=steps, length=32, batch_size=8)


@dataclasses.dataclass(frozen=True)
class _Fixed(Schedule):
    """A schedule that ends at a step of its own."""

    end: int

    def factor(self, step, total_steps):
        del total_steps
        return 1.0 - jnp.asarray(step, jnp.float32) / self.end


def test_a_finished_run_run_again_changes_nothing(trained, data):
    before = (trained / "metrics.jsonl").read_text()
    assert train(toy(data), trained, quiet=True) == 0
    assert (trained / "metrics.jsonl").read_text() == before


def test_a_run_goes_on_on_another_mesh(tmp_path, data):
    run = toy(data, schedule=_Fixed(12))
    whole, workdir = tmp_path / "whole", tmp_path / "w"
    train(run, whole, quiet=True)
    train(dataclasses.replace(run, phases=(_phase(6),)), workdir, quiet=True)
    train(dataclasses.replace(run, mesh=Mesh(data=2, fsdp=2, tensor=2)), workdir, quiet=True)
    a, b = losses(whole), losses(workdir)
    np.testing.assert_allclose([a[s] for s in a], [b[s] for s in a], rtol=LOSS_REORDERED)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(optimizer=toys.AdamW(5e-3)), "optimizer.learning_rate: 0.001 -> 0.005"),
        (dict(seeds=Seeds(noise=1)), "seeds.noise: 0 -> 1"),
        (dict(model=toys.bert(hidden_act="relu")), 'model.hidden_act: "gelu" -> "relu"'),
    ],
)
def test_the_workdir_of_another_run_is_refused_with_the_difference(trained, data, change, message):
    with pytest.raises(UserError, match="holds checkpoints of another run") as error:
        train(toy(data, **change), trained, quiet=True)
    assert message in str(error.value)


def test_another_dataset_is_refused_at_resume(tmp_path, trained):
    other = str(toys.dataset(tmp_path / "other", seed=5))
    with pytest.raises(UserError, match="trained on another dataset"):
        train(toy(other), trained, quiet=True)


def test_a_phase_that_is_over_cannot_change_its_length(tmp_path, data):
    run = toy(data, phases=(_phase(4), _phase(4)))
    train(run, tmp_path / "w", quiet=True)
    with pytest.raises(UserError, match="past a phase of 4 steps that is now 6"):
        train(toy(data, phases=(_phase(6), _phase(4))), tmp_path / "w", quiet=True)


def test_a_vocabulary_that_does_not_fit_the_model_is_refused(tmp_path, data):
    run = toy(data, model=toys.bert(vocab_size=301))
    with pytest.raises(UserError, match=r"tokenizer of 300 tokens, but model.vocab_size is 301"):
        train(run, tmp_path / "w", quiet=True)


def test_the_tokenizer_is_kept_and_a_workdir_that_has_another_is_refused(tmp_path, data):
    names = {folder: tmp_path / folder for folder in ("one", "other", "workdir")}
    for folder, vocabulary in {"one": {"a": 0, "b": 1}, "other": {"a": 1, "b": 0}}.items():
        shutil.copytree(data, names[folder])
        tokenizer = names[folder] / "tokenizer"
        tokenizer.mkdir(exist_ok=True)
        Tokenizer(WordLevel(vocabulary, unk_token="a")).save(str(tokenizer / "tokenizer.json"))
    one, other = open_dataset(names["one"]), open_dataset(names["other"])
    workdir = names["workdir"]
    workdir.mkdir()
    keep_tokenizer(one, workdir, write=True)
    kept = (workdir / "tokenizer" / "tokenizer.json").read_bytes()
    assert kept == (one.folder / "tokenizer" / "tokenizer.json").read_bytes()
    keep_tokenizer(one, workdir, write=True)
    with pytest.raises(UserError, match=r"2 of 2 tokens have another id or none, such as"):
        keep_tokenizer(other, workdir, write=True)


def test_a_run_shorter_than_its_warmup_says_so(data):
    run = toy(data, schedule=WarmupLinear(warmup_steps=100))
    assert "warm-up of 100 steps in a run of 12: the learning rate never" in note_of_warmup(run, 12)
    assert note_of_warmup(run, 101) is None


def test_a_workdir_that_cannot_be_written_is_refused(tmp_path, data):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--workdir .* cannot be written"):
        train(toy(data), tmp_path / "file" / "w", quiet=True)


def test_a_disk_that_is_full_at_a_save_is_one_line_and_nothing_is_lost(tmp_path, data):
    workdir = tmp_path / "w"
    run = toy(data, steps=8, guard=None, schedule=Constant())
    train(dataclasses.replace(run, phases=(_phase(4),)), workdir, quiet=True)
    # A file of a checkpoint is larger than what may be written now: as if the disk were full.
    full = ["bash", "-c", 'ulimit -f 60 && exec "$@"', "bash"]
    process = start(workdir, data, "steps=8", before=full)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == program.EXIT_USER, output
    assert "the checkpoint of step 8 could not be written to" in output
    assert "File too large" in output and "Traceback" not in output
    assert Opened(workdir / "checkpoints").steps() == [4]
    assert train(run, workdir, quiet=True) == 0
    assert Opened(workdir / "checkpoints").latest() == 8


def test_a_checkpoint_folder_that_refuses_is_one_line(tmp_path, data):
    workdir = tmp_path / "w"
    workdir.mkdir()
    (workdir / "checkpoints").write_text("")
    with pytest.raises(UserError, match="checkpoints"):
        train(toy(data), workdir, quiet=True)
    assert (workdir / "checkpoints").read_text() == ""


def test_a_missing_dataset_is_named(tmp_path):
    with pytest.raises(UserError, match="no_such_dataset"):
        train(toy(str(tmp_path / "no_such_dataset")), tmp_path / "w", quiet=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fragile(MaskedLM):
    """Masked LM whose loss is not a number for the rows whose first token is below `limit`."""

    limit: int = 0

    def loss(self, model, params, batch, key):
        sums = super().loss(model, params, batch, key)
        bad = jnp.any((batch["input_ids"][:, 1] < self.limit) & (batch["segment_ids"][:, 1] > 0))
        factor = jnp.where(bad, jnp.nan, 1.0)
        return sums | {
            "masked_lm": sums["masked_lm"]._replace(total=sums["masked_lm"].total * factor)
        }


def test_a_step_without_a_finite_loss_is_skipped_and_reported(tmp_path, data, capsys):
    objective = Fragile(masking=toys.masked_lm().masking, limit=20)
    workdir = tmp_path / "w"
    assert train(toy(data, steps=16, objective=objective), workdir) == 0
    rows = read_metrics(workdir / "metrics.jsonl")
    skipped = [row["step"] for row in rows if row["skipped"]]
    assert 0 < len(skipped) < 16
    assert all((row["loss"] is None) == (row["step"] in skipped) for row in rows)
    assert rows[-1]["skipped_total"] == len(skipped)
    # The schedule counts updates, not steps.
    assert rows[-1]["learning_rate"] > 0
    reported = capsys.readouterr().err
    assert all(f"step {step}: update skipped" in reported for step in skipped)


def test_a_run_without_finite_losses_gives_up(tmp_path, data):
    objective = Fragile(masking=toys.masked_lm().masking, limit=300)
    with pytest.raises(NotFinite, match="for 3 steps in a row"):
        train(
            toy(data, objective=objective, guard=Guard(max_consecutive=3)),
            tmp_path / "w",
            quiet=True,
        )


def test_phases_of_other_lengths_and_batch_sizes_are_one_run(tmp_path, data):
    run = toy(
        data,
        phases=(
            Phase(steps=3, length=16, batch_size=16),
            Phase(steps=3, length=32, batch_size=8, microbatches=1),
            Phase(epochs=1, length=64, batch_size=8),
        ),
    )
    workdir = tmp_path / "w"
    train(run, workdir, quiet=True)
    rows = read_metrics(workdir / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert len(rows) > 6
    metadata = json.loads((workdir / "config.json").read_text())
    assert metadata["phases"][2]["epochs"] == 1


def test_a_phase_in_seconds_becomes_steps_once(tmp_path, data):
    run = toy(data, phases=(Phase(seconds=0.5, length=32, batch_size=8),))
    workdir = tmp_path / "w"
    train(run, workdir, quiet=True)
    steps = json.loads((workdir / "seconds.json").read_text())["phase_steps"]
    assert len(losses(workdir)) == steps[0] > 0
    train(run, workdir, quiet=True)
    assert len(losses(workdir)) == steps[0]


def test_evaluations_are_written_under_their_names_and_the_last_at_the_end(tmp_path, data):
    run = toy(
        data, steps=6, evaluations=(FixedNoise(batch_size=8, every_steps=4, name="held_out"),)
    )
    train(run, tmp_path / "w", quiet=True)
    rows = [r for r in read_metrics(tmp_path / "w" / "metrics.jsonl") if "held_out/masked_lm" in r]
    assert [row["step"] for row in rows] == [4, 6]


def test_evaluations_may_come_before_the_first_step_and_after_each_epoch(tmp_path, data):
    evaluation = FixedNoiseByEpoch(batch_size=8, name="held_out")
    phases = (Phase(epochs=2.5, length=32, batch_size=8),)
    run = toy(data, evaluations=(evaluation,), phases=phases)
    train(run, tmp_path / "w", quiet=True)
    rows = [r for r in read_metrics(tmp_path / "w" / "metrics.jsonl") if "held_out/masked_lm" in r]
    dataset = open_dataset(Path(data))
    epoch = -(-Documents().plan(dataset.split("train"), 32, 2).rows_per_epoch / 8 // 1)
    steps = [row["step"] for row in rows]
    assert steps[0] == 0 and len(steps) == 4 and abs(steps[1] - epoch) <= 1
    assert rows[-1]["held_out/masked_lm"] != rows[0]["held_out/masked_lm"]


def test_the_time_of_a_run_is_accounted_for(trained):
    last = read_metrics(trained / "metrics.jsonl")[-1]
    shares = {n: v for n, v in last.items() if n == "goodput" or n.startswith("time/")}
    assert sum(shares.values()) == pytest.approx(1.0)
    assert last["goodput"] > 0 and last["time/compile"] > 0 and last["time/checkpoint"] > 0
    seconds = json.loads((trained / "goodput.json").read_text())["seconds"]
    assert seconds["steps"] > 0 and seconds["lost_work"] == 0
    events = [row["event"] for row in read_events(trained / "events.jsonl")]
    assert events == ["start", "trained"]


def test_the_workdir_tells_how_to_repeat_the_run(trained):
    facts = json.loads((trained / "run.json").read_text())
    assert facts["devices"]["mesh"] == {"data": 8, "fsdp": 1, "tensor": 1}
    assert (
        facts["packages"]["jax"] and facts["dataset"]["identity"] and facts["seeds"]["order"] == 0
    )
    assert json.loads((trained / "config.json").read_text())["class"] == "flaxpretrain.config.Run"


def test_tensorboard_files_are_written(tmp_path, data):
    run = toy(data, steps=2, logging=Logging(every_steps=1, tensorboard=True))
    train(run, tmp_path / "w", quiet=True)
    assert list((tmp_path / "w" / "tensorboard").glob("events.out.tfevents*"))
