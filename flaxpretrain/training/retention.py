"""Which checkpoints stay: a pure function of what they say about themselves."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from flaxpretrain import config


@dataclasses.dataclass(frozen=True)
class Info:
    """What a checkpoint says about itself."""

    step: int
    metadata: Mapping[str, Any]
    metrics: Mapping[str, float]
    temporary: bool
    checksums: Mapping[str, int]
    key_type: str | None
    """Name of the random number generator of the state's key; None: parameters only."""

    @property
    def params_only(self) -> bool:
        """Whether it holds parameters and nothing else."""
        return self.key_type is None


def kept(infos: Sequence[Info], policy: config.Checkpoints) -> set[int]:
    """The steps to keep: the newest, the last regular ones, every so many-th, and the best.

    A temporary checkpoint (saved by the clock) stays until a newer one is complete.
    """
    ordered = sorted(infos, key=lambda info: info.step)
    if not ordered:
        return set()
    steps = {ordered[-1].step}
    steps |= {info.step for info in [i for i in ordered if not i.temporary][-policy.keep_last :]}
    if policy.keep_every is not None:
        steps |= {info.step for info in ordered if info.step % policy.keep_every == 0}
    if policy.best is not None:
        figures = [
            (value, info.step)
            for info in ordered
            if (value := info.metrics.get(policy.best)) is not None and math.isfinite(value)
        ]
        steps |= {step for _, step in sorted(figures)[: policy.keep_best]}
    return steps
