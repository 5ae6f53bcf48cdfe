"""Learning-rate schedules: factor of the peak rate as a function of the step.

A schedule is a frozen value; `factor(step, total_steps)` works on Python numbers, on arrays (for a
picture) and on traced values. `step` counts from 0: it is the number of updates made so far, so a
schedule that warms up from 0 makes its first update with rate 0, as BERT and ELECTRA do. Steps
beyond `total_steps` get the value at `total_steps`.
"""

import abc
import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from flaxpretrain.errors import UserError

Factor = Float[Array, "..."]


def _number(value: Any) -> Factor:
    return jnp.asarray(value).astype(jnp.float32)


def _share(name: str, value: float | None) -> None:
    if value is not None and not 0 <= value <= 1:
        raise UserError(f"schedule.{name} must lie between 0 and 1; got {value}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule(abc.ABC):
    """Factor of the peak learning rate at each step."""

    @abc.abstractmethod
    def factor(self, step: Any, total_steps: Any) -> Factor:
        """The factor for the update made after `step` updates of a run of `total_steps`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Warmup(Schedule):
    """A schedule that begins with a warm-up, given in steps or as a share of all steps."""

    warmup_steps: int | None = None
    warmup_share: float | None = None

    def __post_init__(self) -> None:
        """Raises UserError on a warm-up given twice, or not possible."""
        if self.warmup_steps is not None and self.warmup_share is not None:
            raise UserError("schedule: give warmup_steps or warmup_share, not both")
        if self.warmup_steps is not None and self.warmup_steps < 0:
            raise UserError(f"schedule.warmup_steps must not be negative; got {self.warmup_steps}")
        _share("warmup_share", self.warmup_share)

    def _steps(self, step: Any, total_steps: Any) -> tuple[Factor, Factor, Factor]:
        """Step (at most total), total and length of the warm-up, as float32."""
        total = jnp.maximum(_number(total_steps), 1.0)
        warmup = _number(self.warmup_steps or 0)
        if self.warmup_share is not None:
            warmup = self.warmup_share * total
        return jnp.clip(_number(step), 0.0, total), total, warmup


def _rise(step: Factor, warmup: Factor) -> Factor:
    """`min(1, step / warmup)`, and 1 without warm-up."""
    return jnp.where(warmup > 0, jnp.minimum(step / jnp.maximum(warmup, 1e-9), 1.0), 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constant(Warmup):
    """`min(1, step / warmup)`, then 1."""

    def factor(self, step: Any, total_steps: Any) -> Factor:
        """The factor for the update made after `step` updates."""
        step, _, warmup = self._steps(step, total_steps)
        return _rise(step, warmup)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Polynomial(Warmup):
    """Linear warm-up, then `end + (1 - end) * (1 - progress) ** power`.

    Unshifted (default): progress = step / total, so the rate falls at once from 1 to
    `(1 - warmup / total) ** power` where the warm-up ends. Shifted: progress counts from the end of
    the warm-up, as in fairseq's polynomial_decay and Composer's LinearWithWarmupScheduler.

    Reference: LAMB with power 0.5, NVIDIA/DeepLearningExamples
    PyTorch/LanguageModeling/BERT/schedulers.py, PolyWarmUpScheduler (unshifted).
    """

    power: float = 0.5
    end: float = 0.0
    shifted: bool = False

    def __post_init__(self) -> None:
        """Raises UserError on impossible numbers."""
        super().__post_init__()
        _share("end", self.end)
        if self.power <= 0:
            raise UserError(f"schedule.power must be positive; got {self.power}")

    def factor(self, step: Any, total_steps: Any) -> Factor:
        """The factor for the update made after `step` updates."""
        step, total, warmup = self._steps(step, total_steps)
        start = warmup if self.shifted else jnp.zeros_like(warmup)
        progress = (step - start) / jnp.maximum(total - start, 1.0)
        left = jnp.clip(1.0 - progress, 0.0, 1.0) ** self.power
        decayed = self.end + (1.0 - self.end) * left
        return jnp.where(step < warmup, _rise(step, warmup), decayed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WarmupLinear(Polynomial):
    """BERT's: `step / warmup`, then `1 - step / total` not shifted by the warm-up.

    Reference: google-research/bert optimization.py, create_optimizer.
    """

    power: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class WarmupTimesDecay(Warmup):
    """ELECTRA's: `min(1, step / warmup) * (1 - step / total) ** power`; decays while it warms up.

    With both a share and a number of steps the original takes the larger one; here one is given.

    Reference: google-research/electra model/optimization.py, create_optimizer.
    """

    power: float = 1.0

    def __post_init__(self) -> None:
        """Raises UserError on impossible numbers."""
        super().__post_init__()
        if self.power <= 0:
            raise UserError(f"schedule.power must be positive; got {self.power}")

    def factor(self, step: Any, total_steps: Any) -> Factor:
        """The factor for the update made after `step` updates."""
        step, total, warmup = self._steps(step, total_steps)
        return _rise(step, warmup) * (1.0 - step / total) ** self.power


@dataclasses.dataclass(frozen=True, kw_only=True)
class InverseSquareRoot(Warmup):
    """T5's `1 / sqrt(max(step, warmup))`, normalised to 1 at the end of the warm-up.

    The factor is `sqrt(warmup / max(step, warmup))`, so T5's rate is this schedule with
    warmup_steps 10,000 and a peak learning rate of 1 / sqrt(10,000) = 0.01. T5 keeps the peak
    during the warm-up; `ramp` rises linearly instead, as fairseq's inverse_sqrt does. The factor
    does not depend on `total_steps` and goes on falling beyond it.

    Reference: Raffel et al. 2020, section 3.1.2 (https://arxiv.org/abs/1910.10683).
    """

    ramp: bool = False

    def __post_init__(self) -> None:
        """Raises UserError unless there is a warm-up."""
        super().__post_init__()
        if not (self.warmup_steps or self.warmup_share):
            raise UserError("schedule: InverseSquareRoot needs warmup_steps or warmup_share")

    def factor(self, step: Any, total_steps: Any) -> Factor:
        """The factor for the update made after `step` updates."""
        _, _, warmup = self._steps(step, total_steps)
        step = _number(step)
        decayed = jnp.sqrt(warmup / jnp.maximum(step, warmup))
        return decayed * _rise(step, warmup) if self.ramp else decayed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cosine(Warmup):
    """Linear warm-up, then half a cosine from 1 down to `floor` at the last step.

    After the warm-up: `floor + (1 - floor) * (1 + cos(pi * progress)) / 2`, progress from the end
    of the warm-up. Reference: karpathy/nanoGPT train.py, get_lr (floor 0.1).
    """

    floor: float = 0.1

    def __post_init__(self) -> None:
        """Raises UserError on impossible numbers."""
        super().__post_init__()
        _share("floor", self.floor)

    def factor(self, step: Any, total_steps: Any) -> Factor:
        """The factor for the update made after `step` updates."""
        step, total, warmup = self._steps(step, total_steps)
        progress = jnp.clip((step - warmup) / jnp.maximum(total - warmup, 1.0), 0.0, 1.0)
        decayed = self.floor + (1.0 - self.floor) * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        return jnp.where(step < warmup, _rise(step, warmup), decayed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WarmupStableDecay(Warmup):
    """Warm-up, constant, and at the end `end + (1 - end) * (1 - sqrt(progress))`.

    `decay_steps` or `decay_share` (of all steps) is the length of the last part.

    Reference: Hägele et al. 2024, section 3 (https://arxiv.org/abs/2405.18392), 1-sqrt cooldown;
    ModernBERT's OneMinusSqrtScheduler.
    """

    decay_steps: int | None = None
    decay_share: float | None = None
    end: float = 0.0

    def __post_init__(self) -> None:
        """Raises UserError on impossible numbers."""
        super().__post_init__()
        _share("decay_share", self.decay_share)
        _share("end", self.end)
        if (self.decay_steps is None) == (self.decay_share is None):
            raise UserError("schedule: WarmupStableDecay needs either decay_steps or decay_share")
        if self.decay_steps is not None and self.decay_steps < 0:
            raise UserError(f"schedule.decay_steps must not be negative; got {self.decay_steps}")

    def factor(self, step: Any, total_steps: Any) -> Factor:
        """The factor for the update made after `step` updates."""
        step, total, warmup = self._steps(step, total_steps)
        length = _number(self.decay_steps or 0)
        if self.decay_share is not None:
            length = self.decay_share * total
        progress = jnp.clip((step - (total - length)) / jnp.maximum(length, 1e-9), 0.0, 1.0)
        decayed = self.end + (1.0 - self.end) * (1.0 - jnp.sqrt(progress))
        return jnp.minimum(_rise(step, warmup), decayed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Triangle(Schedule):
    """A triangle: `min(base + x (1 - base) / (1 - fall), (1 - x) / fall)` with x = step / total.

    The rate rises from `base` to 1 during the first `1 - fall` of the run, then falls to 0. Made
    for a wall-clock budget: give the phases in seconds, which become steps once, before the first
    one. (The original reads the clock at every step, so no two of its runs have the same rates.)

    Reference: Geiping and Goldstein 2023 (https://arxiv.org/abs/2212.14034);
    JonasGeiping/cramming cramming/backend/optimizers/schedulers.py, get_budget_triangle with the
    values of budget-triangle2.
    """

    base: float = 0.25
    fall: float = 0.25

    def __post_init__(self) -> None:
        """Raises UserError on impossible numbers."""
        _share("base", self.base)
        if not 0 < self.fall < 1:
            raise UserError(f"schedule.fall must lie between 0 and 1; got {self.fall}")

    def factor(self, step: Any, total_steps: Any) -> Factor:
        """The factor for the update made after `step` updates."""
        total = jnp.maximum(_number(total_steps), 1.0)
        x = jnp.clip(_number(step) / total, 0.0, 1.0)
        rising = self.base + x * ((1.0 - self.base) / (1.0 - self.fall))
        return jnp.minimum(rising, (1.0 - x) / self.fall)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One schedule of several in a row: for `steps` steps (None: the rest), times `scale`."""

    schedule: Schedule
    steps: int | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        """Raises UserError on impossible numbers."""
        if self.steps is not None and self.steps <= 0:
            raise UserError(f"schedule stage: steps must be positive; got {self.steps}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stages(Schedule):
    """Schedules in a row, each with its own step 0 and its own total, as in BERT's two phases.

    Only the last stage may leave `steps` open. Reference: NVIDIA/DeepLearningExamples
    PyTorch/LanguageModeling/BERT, LAMB: rate 6e-3 for phase 1, 4e-3 for phase 2, each warming up.
    """

    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        """Raises UserError on an open stage that is not the last."""
        if not self.stages or any(stage.steps is None for stage in self.stages[:-1]):
            raise UserError("schedule.stages: every stage but the last needs its number of steps")

    def factor(self, step: Any, total_steps: Any) -> Factor:
        """The factor for the update made after `step` updates."""
        step, start = _number(step), 0.0
        factor = jnp.zeros_like(step)
        for index, stage in enumerate(self.stages):
            last = index == len(self.stages) - 1
            steps = _number(total_steps) - start if stage.steps is None else _number(stage.steps)
            value = stage.scale * stage.schedule.factor(jnp.maximum(step - start, 0.0), steps)
            inside = step >= start if last else (step >= start) & (step < start + steps)
            factor = jnp.where(inside, value, factor)
            start = start + (stage.steps or 0)
        return factor
