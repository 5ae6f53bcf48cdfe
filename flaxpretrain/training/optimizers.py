"""Optimizers as frozen values, and the optax transformation that they describe.

An update is `-rate * direction`; a value's `direction` includes its decoupled weight decay. What
acts on whole tensors acts per layer (`transforms.per_layer`). Gradients are clipped by their global
norm first, each optimizer group alone.
"""

import abc
import dataclasses
import math
import re
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import optax
from jaxtyping import Array, Float, PyTree
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from flaxpretrain.errors import UserError
from flaxpretrain.training.schedules import Schedule
from flaxpretrain.training.state import is_stacked, map_named, named_leaves
from flaxpretrain.training.transforms import (
    RateState,
    in_float32,
    input_axes,
    matching,
    per_layer,
    scale_by_adam,
    scale_by_depth,
    scale_by_rate,
    scale_by_stable_adam,
)


@dataclasses.dataclass(frozen=True)
class Optimizer(abc.ABC):
    """Numbers that every optimizer has.

    learning_rate: the peak; a schedule gives the factor.
    weight_decay: decoupled, multiplied by the learning rate.
    decay_exclude: regex of parameter names without weight decay.
    clip_norm: largest global norm of the gradients; None or 0 clips nothing.
    layerwise_decay: rate factor from layer to layer downwards (`transforms.scale_by_depth`);
        None for one rate. `layerwise_offset` 2 reproduces ELECTRA's exponent.
    embeddings: regex of parameter names at depth 0 of the layer-wise decay.
    """

    learning_rate: float
    _: dataclasses.KW_ONLY
    weight_decay: float = 0.01
    decay_exclude: str = "bias|norm"
    clip_norm: float | None = 1.0
    layerwise_decay: float | None = None
    layerwise_offset: int = 1
    embeddings: str = "embed"

    def __post_init__(self) -> None:
        """Raises UserError on numbers that cannot be."""
        for name in ("learning_rate", "weight_decay", "clip_norm"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise UserError(f"optimizer.{name} must not be negative; got {value}")
        for name in ("b1", "b2", "momentum", "beta"):
            value = getattr(self, name, None)
            if value is not None and not 0 <= value < 1:
                raise UserError(f"optimizer.{name} must lie in [0, 1); got {value}")
        if self.layerwise_decay is not None and not 0 < self.layerwise_decay <= 1:
            raise UserError(
                f"optimizer.layerwise_decay must lie in (0, 1]; got {self.layerwise_decay}"
            )
        for name in ("decay_exclude", "embeddings", "adapt_exclude", "adam"):
            try:
                re.compile(getattr(self, name, ""))
            except re.error as error:
                raise UserError(f"optimizer.{name} is no regular expression: {error}") from error

    @abc.abstractmethod
    def direction(self) -> optax.GradientTransformation:
        """Gradients to what minus the learning rate multiplies, weight decay included."""

    def decayed(self) -> Callable[[PyTree], PyTree]:
        """A mask of the parameters that weight decay touches."""
        return matching(self.decay_exclude, wanted=False)

    def _decay(self) -> optax.GradientTransformation:
        return optax.add_decayed_weights(self.weight_decay, mask=self.decayed())


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW(Optimizer):
    """`m / (sqrt(v) + eps) + weight_decay * p`, moments bias-corrected or, as in BERT, not.

    Reference: Loshchilov and Hutter 2019 (https://arxiv.org/abs/1711.05101); without bias
    correction google-research/bert optimization.py.
    """

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-6
    bias_correction: bool = True

    def direction(self) -> optax.GradientTransformation:
        """Adam, then decay."""
        adam = scale_by_adam(self.b1, self.b2, self.eps, self.bias_correction)
        return optax.chain(adam, self._decay())


@dataclasses.dataclass(frozen=True, kw_only=True)
class StableAdamW(Optimizer):
    """AdamW whose rate is divided per tensor by `max(1, rms(g / sqrt(v)))`; no clipping by norm.

    Reference: Wortsman et al. 2023, section 3.5 (https://arxiv.org/abs/2304.13013); as ModernBERT
    uses it, warner-benjamin/optimi optimi/stableadamw.py.
    """

    clip_norm: float | None = None
    weight_decay: float = 1e-5
    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-6

    def direction(self) -> optax.GradientTransformation:
        """Adam and decay, divided by the root mean square of the normalised gradient."""
        return scale_by_stable_adam(self.b1, self.b2, self.eps, self.weight_decay, self.decayed())


@dataclasses.dataclass(frozen=True, kw_only=True)
class RMSScaledAdamW(Optimizer):
    """AdamW times `max(rms(p), min_rms)` of each tensor; decay is not scaled.

    The original decays the parameter after its update, here before: a difference of second order
    in the rate, and none at its default weight decay of 0.

    Reference: PiotrNawrot/nanoT5 nanoT5/utils/copied_utils.py, AdamWScale.
    """

    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-6
    min_rms: float = 1e-3
    bias_correction: bool = True

    def direction(self) -> optax.GradientTransformation:
        """Adam, scaled by the parameter, then decay."""
        return optax.chain(
            scale_by_adam(self.b1, self.b2, self.eps, self.bias_correction),
            per_layer(optax.scale_by_param_block_rms(self.min_rms)),
            self._decay(),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LAMB(Optimizer):
    """AdamW's direction times `norm(p) / norm(direction)` of each tensor (1 where either is 0).

    Parameters named by `adapt_exclude` keep AdamW's direction, as in the authors' code.

    Reference: You et al. 2020, algorithm 2 (https://arxiv.org/abs/1904.00962);
    google-research/albert lamb_optimizer.py (which has no bias correction).
    """

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-6
    bias_correction: bool = True
    adapt_exclude: str = "bias|norm"

    def direction(self) -> optax.GradientTransformation:
        """Adam, decay, then the trust ratio."""
        ratio = per_layer(optax.scale_by_trust_ratio())
        return optax.chain(
            scale_by_adam(self.b1, self.b2, self.eps, self.bias_correction),
            self._decay(),
            optax.masked(ratio, matching(self.adapt_exclude, wanted=False)),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adafactor(Optimizer):
    """Adafactor with an external rate: factored second moments, clipped updates, no momentum.

    The decay of step t (from 1) is `1 - t ** -decay_rate`. Kernels are factored as matrices
    (attention's as D x HK) when both sides reach `min_factored`; the update's root mean square is
    clipped to `clip_update`, then multiplied by `max(rms(p), min_rms)` unless `scale_parameter` is
    False.

    Reference: Shazeer and Stern 2018, algorithms 4 and 6 (https://arxiv.org/abs/1804.04235);
    google-research/t5x t5x/adafactor.py for T5's values.
    """

    weight_decay: float = 0.0
    clip_norm: float | None = None
    decay_rate: float = 0.8
    clip_update: float = 1.0
    min_factored: int = 128
    scale_parameter: bool = True
    min_rms: float = 1e-3
    eps: float = 1e-30

    def direction(self) -> optax.GradientTransformation:
        """Factored scaling, clipping and parameter scale, all per layer; then decay."""
        factored = optax.scale_by_factored_rms(
            decay_rate=self.decay_rate, min_dim_size_to_factor=self.min_factored, epsilon=self.eps
        )
        clipped = optax.clip_by_block_rms(self.clip_update)
        scaled = optax.scale_by_param_block_rms(self.min_rms)
        steps = (factored, clipped, scaled) if self.scale_parameter else (factored, clipped)
        return optax.chain(per_layer(optax.chain(*steps), matrices=True), self._decay())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lion(Optimizer):
    """`sign(b1 m + (1 - b1) g) + weight_decay * p`.

    Reference: Chen et al. 2023, algorithm 2 (https://arxiv.org/abs/2302.06675).
    """

    weight_decay: float = 0.1
    b1: float = 0.9
    b2: float = 0.99

    def direction(self) -> optax.GradientTransformation:
        """The sign of the interpolated momentum, then decay."""
        return optax.chain(optax.scale_by_lion(b1=self.b1, b2=self.b2), self._decay())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Muon(Optimizer):
    """Orthogonalised momentum for the hidden layers' matrices, AdamW for all the rest.

    Each layer's kernel is one matrix (`transforms.input_axes`); its update is scaled by
    `consistent_rms * sqrt(max(inputs, outputs))` so that one rate and one decay serve both halves,
    or with None by `sqrt(max(1, outputs / inputs))`. Parameters named by `adam`, and vectors, go to
    AdamW at `adam_rate` times the rate.

    Reference: Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon/); Liu et al. 2025,
    section 2.2 (https://arxiv.org/abs/2502.16982) for the scale.
    """

    weight_decay: float = 0.1
    beta: float = 0.95
    newton_schulz_steps: int = 5
    consistent_rms: float | None = 0.2
    adam: str = "embed|head"
    adam_rate: float = 1.0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8

    def direction(self) -> optax.GradientTransformation:
        """Two partitions, then decay."""

        def dimensions(name: str, x: Array) -> MuonDimensionNumbers | None:
            first = 1 if is_stacked(name) else 0
            inputs = input_axes(name, x.ndim - first)
            if inputs == 0 or (self.adam and re.search(self.adam, name)):
                return None
            return MuonDimensionNumbers(
                tuple(range(first, first + inputs)), tuple(range(first + inputs, x.ndim))
            )

        def label(name: str, x: Array) -> str:
            return "adam" if dimensions(name, x) is None else "muon"

        def scaled(name: str, update: Array) -> Array:
            sides: Any = dimensions(name, update)
            inputs, outputs = (math.prod(update.shape[i] for i in axes) for axes in sides)
            if self.consistent_rms is None:
                return update * math.sqrt(max(1, outputs / inputs))
            return update * (self.consistent_rms * math.sqrt(max(inputs, outputs)))

        muon = optax.chain(
            scale_by_muon(
                ns_steps=self.newton_schulz_steps,
                beta=self.beta,
                eps=self.eps,
                weight_dimension_numbers=lambda tree: map_named(dimensions, tree),
            ),
            optax.stateless(lambda updates, _: map_named(scaled, updates)),
            self._decay(),
        )
        adam = optax.chain(
            scale_by_adam(self.b1, self.b2, self.eps),
            self._decay(),
            optax.scale(self.adam_rate),
        )
        return optax.partition({"muon": muon, "adam": adam}, lambda tree: map_named(label, tree))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SGD(Optimizer):
    """`m = g + momentum * m`, and decay decoupled as for the others."""

    weight_decay: float = 0.0
    momentum: float = 0.9
    nesterov: bool = False

    def direction(self) -> optax.GradientTransformation:
        """The momentum, then decay."""
        return optax.chain(optax.trace(self.momentum, self.nesterov), self._decay())


def make_optimizer(
    value: Optimizer | Mapping[str, Optimizer],
    schedule: Schedule,
    total_steps: int,
    params_abstract: PyTree,
    groups: Mapping[str, str] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The transformation of a run's gradients into updates.

    `groups` maps regexes of parameter names to group names, the first match counting; each group
    is an optimizer of its own with its own clipping, given by one value for all or one by group.

    Raises:
        UserError: a parameter in no group, or values that do not fit the groups.
    """
    if not groups:
        if not isinstance(value, Optimizer):
            raise UserError(
                f"optimizer: values for the groups {', '.join(value)}, but the objective has none"
            )
        return in_float32(_single(value, schedule, total_steps))
    names = list(dict.fromkeys(groups.values()))
    values = dict.fromkeys(names, value) if isinstance(value, Optimizer) else dict(value)
    if set(values) != set(names):
        raise UserError(
            f"optimizer: expected one value for each group {', '.join(names)}; "
            f"got {', '.join(values)}"
        )

    def group_of(name: str, _: Array | jax.ShapeDtypeStruct) -> str:
        for pattern, group in groups.items():
            if re.search(pattern, name):
                return group
        raise UserError(
            f"optimizer: parameter {name} is in none of the groups {', '.join(names)}: add a regex "
            "to the objective's groups"
        )

    transforms: dict[Hashable, optax.GradientTransformation] = {
        name: _single(values[name], schedule, total_steps) for name in names
    }
    return in_float32(optax.partition(transforms, map_named(group_of, params_abstract)))


def _single(value: Optimizer, schedule: Schedule, total_steps: int) -> optax.GradientTransformation:
    steps = [optax.clip_by_global_norm(value.clip_norm)] if value.clip_norm else []
    steps.append(value.direction())
    if value.layerwise_decay is not None:
        steps.append(
            scale_by_depth(value.layerwise_decay, value.layerwise_offset, value.embeddings)
        )
    steps.append(scale_by_rate(value.learning_rate, schedule, total_steps))
    return optax.chain(*steps)


def _rate_states(opt_state: PyTree) -> list[RateState]:
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, RateState))
    return [leaf for leaf in leaves if isinstance(leaf, RateState)]


def learning_rate(opt_state: PyTree) -> Float[Array, ""]:
    """The rate of the next update, whatever wraps the optimizer's state.

    With several groups it is the first group's, by name; `learning_rates` has all.
    """
    return _rate_states(opt_state)[0].learning_rate


def learning_rates(opt_state: PyTree) -> dict[str, Float[Array, ""]]:
    """The rate of every group's next update; of a run without groups, under the name ""."""
    if len(_rate_states(opt_state)) == 1:
        return {"": learning_rate(opt_state)}
    return {
        name.split("inner_states/")[1].split("/")[0]: leaf
        for name, leaf in named_leaves(opt_state).items()
        if name.endswith("/learning_rate")
    }
