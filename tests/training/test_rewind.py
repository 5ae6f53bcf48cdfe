"""After a spike a run goes on from an earlier state, behind the bad batches: the same each time."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxpretrain.config import Checkpoints
from flaxpretrain.data.store import open_dataset
from flaxpretrain.errors import UserError
from flaxpretrain.objectives.masked_lm import MaskedLM
from flaxpretrain.training import loop
from flaxpretrain.training.checkpoints import Checkpoints as Opened
from flaxpretrain.training.checkpoints import restore_params
from flaxpretrain.training.guard import Guard
from flaxpretrain.training.loop import NotFinite, train
from flaxpretrain.training.metrics import read_events, read_metrics
from flaxpretrain.training.rewind import (
    LossSpike,
    Rewind,
    SpikeDetector,
    checkpoint_before,
)
from flaxpretrain.training.session import open_pipeline, resolve_phases
from tests import toys


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return str(toys.dataset(tmp_path_factory.mktemp("data") / "toy"))


# What a spike is.


def first_spike(losses, detector):
    for step, loss in enumerate(losses, 1):
        try:
            detector.see(step, loss)
        except LossSpike as spike:
            return step, spike.first_step
    return None


RULE = Rewind(window=8, patience=3)
CALM = [2.0, 2.1, 1.9, 2.0, 2.05, 1.95, 2.0, 2.1]


@pytest.mark.parametrize(
    ("after", "found"),
    [
        ([5.0, 5.0, 5.0], (11, 9)),
        ([5.0, 5.0, 2.0, 5.0, 5.0], None),  # not three in a row
        ([float("nan"), 5.0, float("inf")], (11, 9)),
        ([2.2] * 20, None),  # within six deviations
    ],
)
def test_a_spike_is_a_loss_that_stays_high(after, found):
    assert first_spike(CALM + after, SpikeDetector(RULE, {})) == found


def test_no_loss_is_high_before_the_window_is_full():
    assert first_spike([2.0] * 7 + [50.0] * 3, SpikeDetector(RULE, {})) is None


def test_a_detector_goes_on_from_what_a_checkpoint_kept():
    one, losses = SpikeDetector(RULE, {}), [*CALM, 5.0, 5.0]
    assert first_spike(losses, one) is None
    with pytest.raises(LossSpike) as spike:
        SpikeDetector(RULE, one.state()).see(11, 5.0)
    assert spike.value.first_step == 9


@pytest.mark.parametrize(
    ("first", "margin", "chosen"), [(50, 0, 40), (50, 10, 30), (50, 45, 10), (10, 0, None)]
)
def test_the_checkpoint_lies_before_the_spike_by_the_margin_where_one_does(first, margin, chosen):
    assert checkpoint_before([10, 20, 30, 40, 60], first, margin) == chosen


@pytest.mark.parametrize("change", [{"patience": 0}, {"margin_steps": -1}, {"spike_factor": 0.0}])
def test_impossible_rules_are_refused(change):
    with pytest.raises(UserError, match=r"rewind\."):
        Rewind(**change)


# What it does.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Poisoned(MaskedLM):
    """Masked LM whose loss is not a number for batches with a row of one of these noise keys."""

    keys: tuple[int, ...] = ()

    def loss(self, model, params, batch, key):
        sums = super().loss(model, params, batch, key)
        bad = jnp.any(jnp.isin(batch["noise_key"][:, 0], jnp.array(self.keys, jnp.uint32)))
        total = sums["masked_lm"].total * jnp.where(bad, jnp.nan, 1.0)
        return sums | {"masked_lm": sums["masked_lm"]._replace(total=total)}


RULES = Rewind(window=1, spike_factor=1e9, patience=2, margin_steps=0, skip_steps=2)


def poisoned(data, *steps, of=15, rewind=RULES, guard=None):
    """A run saved every third step, in which the batches of some steps are bad."""
    run = toys.packed_run(data, steps=of)
    dataset = open_dataset(Path(data))
    pipeline = open_pipeline(run, dataset, resolve_phases(run, dataset))
    keys = tuple(int(pipeline.batch(step - 1)["noise_key"][0, 0]) for step in steps)
    return dataclasses.replace(
        run,
        guard=guard,
        rewind=rewind,
        objective=Poisoned(masking=run.objective.masking, keys=keys),
        checkpoints=Checkpoints(every_steps=3, keep_last=20),
    )


def losses(workdir):
    return {
        row["step"]: row["loss"] for row in read_metrics(workdir / "metrics.jsonl") if "loss" in row
    }


def rewinds(workdir):
    rows = [row for row in read_events(workdir / "events.jsonl") if row["event"] == "rewind"]
    return [{k: row[k] for k in ("from", "first", "to", "resumed")} for row in rows]


@pytest.fixture(scope="module")
def rewound(data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("rewound") / "w"
    assert train(poisoned(data, 4, 5, 11), workdir, quiet=True) == 0
    return workdir


def test_the_weights_go_back_and_the_bad_batches_are_skipped(rewound):
    # What step 4 came to is known once step 5 has begun.
    done = rewinds(rewound)
    assert done == [
        {"from": 5, "first": 4, "to": 3, "resumed": 7},
        {"from": 12, "first": 11, "to": 9, "resumed": 14},
    ]
    got = losses(rewound)
    assert got[4] is None and got[11] is None
    assert sorted(set(range(1, 16)) - set(got)) == [5, 6, 7, 12, 13, 14]
    checkpoints = rewound / "checkpoints"
    old, _, _ = Opened(checkpoints).restore_params(step=3)
    new, _, _ = Opened(checkpoints).restore_params(step=7)
    jax.tree.map(np.testing.assert_array_equal, old, new)
    last, metadata, step = restore_params(checkpoints)
    assert step == 15 and metadata["rewinds"] == done
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(last))


@pytest.mark.parametrize("saved", [False, True])
def test_a_run_killed_while_it_goes_back_does_the_same_when_it_goes_on(
    data, rewound, tmp_path, monkeypatch, saved
):
    workdir = tmp_path / "w"

    def killed(*arguments, **facts):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if saved:
            record = loop.Events.record
            patch.setattr(
                loop.Events,
                "record",
                lambda self, event, *a, **k: (
                    killed() if event == "rewind" else record(self, event, *a, **k)
                ),
            )
        else:
            patch.setattr(loop, "go_back", killed)
        with pytest.raises(KeyboardInterrupt):
            train(poisoned(data, 4, 5, 11), workdir, quiet=True)
    assert train(poisoned(data, 4, 5, 11), workdir, quiet=True) == 0
    assert losses(workdir) == losses(rewound)
    _, metadata, _ = restore_params(workdir / "checkpoints")
    assert metadata["rewinds"] == rewinds(rewound)


def test_rewinds_are_bounded(data, tmp_path):
    rewind = dataclasses.replace(RULES, max_rewinds=1)
    with pytest.raises(NotFinite, match="step 11: the loss is nan"):
        train(poisoned(data, 4, 11, rewind=rewind), tmp_path / "w", quiet=True)
    assert [done["first"] for done in rewinds(tmp_path / "w")] == [4]


def test_the_guard_skips_one_bad_batch_and_the_run_goes_back_where_it_stays_bad(data, tmp_path):
    run = poisoned(data, 4, 9, 10, 11, 12, guard=Guard())
    assert train(run, tmp_path / "w", quiet=True) == 0
    got = losses(tmp_path / "w")
    assert [step for step, loss in got.items() if loss is None] == [4, 9, 10]
    assert rewinds(tmp_path / "w") == [{"from": 11, "first": 9, "to": 6, "resumed": 13}]
