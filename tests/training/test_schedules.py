"""Every schedule against its formula in plain Python."""

import math

import jax
import numpy as np
import pytest

from flaxpretrain.errors import UserError
from flaxpretrain.training.schedules import (
    Constant,
    Cosine,
    InverseSquareRoot,
    Polynomial,
    Stage,
    Stages,
    Triangle,
    WarmupLinear,
    WarmupStableDecay,
    WarmupTimesDecay,
)

TOTAL = 200


def bert(step):
    return step / 20 if step < 20 else 1 - step / TOTAL


def electra(step):
    return min(1, step / 20) * (1 - step / TOTAL)


def lamb(step):
    x = step / TOTAL
    return x / 0.284 if x < 0.284 else math.sqrt(1 - x)


def roberta(step):
    return step / 24 if step < 24 else 1 - (step - 24) / (TOTAL - 24)


def mosaic(step):
    return step / 12 if step < 12 else 0.02 + 0.98 * (1 - (step - 12) / (TOTAL - 12))


def t5(step):
    return (1 / math.sqrt(max(step, 50))) / (1 / math.sqrt(50))


def fairseq_inverse_sqrt(step):
    return step / 50 if step < 50 else math.sqrt(50) * step**-0.5


def gpt2(step):
    if step < 10:
        return step / 10
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - 10) / (TOTAL - 10)))


def stable(step):
    if step < 30:
        return step / 30
    start = TOTAL - 40
    return 1.0 if step < start else 0.5 + 0.5 * (1 - math.sqrt((step - start) / 40))


def cramming(step):
    x = step / TOTAL
    return min(0.25 + x * 0.75 / 0.75, 1 / 0.25 - x / 0.25)


def two_phases(step):
    def phase(step, total, share):
        x = step / total
        return x / share if x < share else math.sqrt(1 - x)

    if step < 150:
        return phase(step, 150, 0.2843)
    return (4 / 6) * phase(step - 150, 50, 0.128)


LAMB_PHASES = Stages(
    stages=(
        Stage(schedule=Polynomial(warmup_share=0.2843), steps=150),
        Stage(schedule=Polynomial(warmup_share=0.128), scale=4 / 6),
    )
)

CASES = {
    "bert": (WarmupLinear(warmup_steps=20), bert),
    "electra": (WarmupTimesDecay(warmup_share=0.1), electra),
    "lamb": (Polynomial(power=0.5, warmup_share=0.284), lamb),
    "roberta": (WarmupLinear(warmup_steps=24, shifted=True), roberta),
    "mosaicbert": (WarmupLinear(warmup_share=0.06, end=0.02, shifted=True), mosaic),
    "t5": (InverseSquareRoot(warmup_steps=50), t5),
    "fairseq": (InverseSquareRoot(warmup_steps=50, ramp=True), fairseq_inverse_sqrt),
    "gpt2": (Cosine(warmup_steps=10, floor=0.1), gpt2),
    "stable": (WarmupStableDecay(warmup_steps=30, decay_share=0.2, end=0.5), stable),
    "cramming": (Triangle(base=0.25, fall=0.25), cramming),
    "constant": (Constant(warmup_steps=8), lambda step: min(1, step / 8)),
    "no warm-up": (WarmupLinear(), lambda step: 1 - step / TOTAL),
    "two phases": (LAMB_PHASES, two_phases),
}


@pytest.mark.parametrize("name", CASES)
def test_a_schedule_is_its_formula(name):
    schedule, formula = CASES[name]
    expected = [formula(step) for step in range(TOTAL)]
    picture = np.asarray(schedule.factor(np.arange(TOTAL), TOTAL))
    np.testing.assert_allclose(picture, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_traced_steps_and_totals_give_the_same_float32(name):
    schedule, _ = CASES[name]
    traced = jax.jit(schedule.factor)
    for step in (0, 7, 160):
        value = traced(np.int32(step), np.int32(TOTAL))
        assert value.dtype == np.float32
        np.testing.assert_allclose(value, schedule.factor(step, TOTAL), rtol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_beyond_the_last_step_nothing_turns_negative_or_grows(name):
    schedule, _ = CASES[name]
    beyond = np.asarray(schedule.factor(np.array([TOTAL, TOTAL + 1, 10 * TOTAL]), TOTAL))
    assert np.all(beyond >= 0) and np.all(np.diff(beyond) <= 0)


def test_electra_decays_while_it_warms_up_and_bert_does_not():
    assert WarmupTimesDecay(warmup_steps=100).factor(100, 200) == 0.5
    assert WarmupLinear(warmup_steps=100).factor(99, 200) == np.float32(0.99)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WarmupLinear(warmup_steps=1, warmup_share=0.1), "not both"),
        (lambda: Constant(warmup_steps=-1), "warmup_steps must not be negative"),
        (lambda: Cosine(floor=1.5), "floor must lie between 0 and 1"),
        (lambda: InverseSquareRoot(), "needs warmup_steps"),
        (lambda: WarmupStableDecay(), "decay_steps or decay_share"),
        (lambda: Triangle(fall=0.0), "fall must lie between"),
        (lambda: Polynomial(power=0.0), "power must be positive"),
        (lambda: Stages(stages=(Stage(schedule=Constant()),) * 2), "every stage but the last"),
    ],
)
def test_impossible_numbers_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()
