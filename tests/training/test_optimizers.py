"""Every optimizer, on stacked layers, against its formula in numpy on a list of layers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flaxpretrain.errors import UserError
from flaxpretrain.training.optimizers import (
    LAMB,
    SGD,
    Adafactor,
    AdamW,
    Lion,
    Muon,
    RMSScaledAdamW,
    StableAdamW,
    learning_rate,
    learning_rates,
    make_optimizer,
)
from flaxpretrain.training.schedules import Constant, WarmupLinear
from flaxpretrain.training.state import map_named, named_leaves
from tests.tolerances import OPTIMIZER_FLOAT32, ORTHOGONALISED_FLOAT32
from tests.training.toys import LAYERS, random_tree, unstacked

RATE, STEPS = 0.02, 4


def run(value, stacked: bool, steps: int = STEPS) -> dict[str, np.ndarray]:
    """Parameters after some steps, by name, layers apart."""
    arrange = (lambda tree: tree) if stacked else unstacked
    params = arrange(random_tree(0))
    optimizer = make_optimizer(value, Constant(), steps, params)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for step in range(steps):
        updates, state = update(arrange(gradient(step)), state, params, value=jnp.float32(1))
        params = optax.apply_updates(params, updates)
    apart = unstacked(params) if stacked else params
    return {name: np.asarray(leaf) for name, leaf in named_leaves(apart).items()}


def one_update(value, params, grads, groups=None):
    """Updates and state after one step at full rate."""
    optimizer = make_optimizer(value, Constant(), 1, params, groups)
    return jax.jit(lambda p, g: optimizer.update(g, optimizer.init(p), p))(params, grads)


def gradient(step: int) -> dict:
    return random_tree(100 + step, scale=0.1 * (step + 1))


def by_formula(formula) -> dict[str, np.ndarray]:
    """The same run with `formula(name, p, gradients so far) -> direction` in float64."""
    params = {
        name: np.asarray(leaf, np.float64)
        for name, leaf in named_leaves(unstacked(random_tree(0))).items()
    }
    history: dict[str, list[np.ndarray]] = {name: [] for name in params}
    for step in range(STEPS):
        grads = named_leaves(unstacked(gradient(step)))
        for name in params:
            history[name].append(np.asarray(grads[name], np.float64))
            params[name] = params[name] - RATE * formula(name, params[name], history[name])
    return params


def excluded(name: str) -> bool:
    return "bias" in name or "norm" in name


def moments(gradients, b1, b2):
    m = v = np.zeros_like(gradients[0])
    for g in gradients:
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
    return m, v


def adam(gradients, b1=0.9, b2=0.999, eps=1e-6, bias_correction=True):
    m, v = moments(gradients, b1, b2)
    if bias_correction:
        m, v = m / (1 - b1 ** len(gradients)), v / (1 - b2 ** len(gradients))
    return m / (np.sqrt(v) + eps)


def rms(x):
    return np.sqrt(np.mean(x * x))


def adamw(name, p, gradients):
    return adam(gradients) + (0 if excluded(name) else 0.01 * p)


def bert(name, p, gradients):
    return adam(gradients, bias_correction=False) + (0 if excluded(name) else 0.01 * p)


def stable(name, p, gradients):
    _, v = moments(gradients, 0.9, 0.98)
    v = v / (1 - 0.98 ** len(gradients))
    size = rms(gradients[-1] / np.maximum(np.sqrt(v), 1e-6))
    direction = adam(gradients, 0.9, 0.98) + (0 if excluded(name) else 0.1 * p)
    return direction / max(1, size)


def rms_scaled(name, p, gradients):
    return adam(gradients) * max(rms(p), 1e-3)


def lamb(name, p, gradients):
    direction = adamw(name, p, gradients)
    if excluded(name):
        return direction
    return direction * np.linalg.norm(p) / np.linalg.norm(direction)


def matrix(name, x):
    """One layer's kernel as a matrix, inputs first."""
    if x.ndim < 2 or excluded(name):
        return x.reshape(-1)
    return x.reshape(-1, x.shape[-1]) if "out" in name else x.reshape(x.shape[0], -1)


def adafactor(name, p, gradients):
    shape = matrix(name, p).shape
    factored = len(shape) == 2
    rows = columns = full = 0.0
    for t, g in enumerate(gradients, 1):
        squares, decay = matrix(name, g) ** 2 + 1e-30, 1 - t**-0.8
        if factored:
            rows = decay * rows + (1 - decay) * squares.mean(1)
            columns = decay * columns + (1 - decay) * squares.mean(0)
        else:
            full = decay * full + (1 - decay) * squares
    second = np.outer(rows, columns) / np.mean(rows) if factored else full
    update = matrix(name, gradients[-1]) / np.sqrt(second)
    update = update / max(1, rms(update))
    return (update * max(rms(p), 1e-3)).reshape(p.shape)


def lion(name, p, gradients):
    m = np.zeros_like(p)
    for g in gradients[:-1]:
        m = 0.99 * m + 0.01 * g
    return np.sign(0.9 * m + 0.1 * gradients[-1]) + (0 if excluded(name) else 0.1 * p)


def muon(name, p, gradients):
    decay = 0 if excluded(name) else 0.1 * p
    if p.ndim < 2 or excluded(name) or "embed" in name or "head" in name:
        return adam(gradients, 0.9, 0.95, 1e-8) + decay
    t, mu = len(gradients), np.zeros_like(p)
    for g in gradients:
        mu = 0.95 * mu + 0.05 * g
    nesterov = 0.95 * mu / (1 - 0.95 ** (t + 1)) + 0.05 * gradients[-1] / (1 - 0.95**t)
    x = matrix(name, nesterov)
    x = x / np.linalg.norm(x)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (0.2 * np.sqrt(max(x.shape)) * x).reshape(p.shape) + decay


def sgd(name, p, gradients):
    m = np.zeros_like(p)
    for g in gradients:
        m = g + 0.9 * m
    return m


CASES = {
    "AdamW": (AdamW(RATE, clip_norm=None), adamw),
    "AdamW of BERT": (AdamW(RATE, clip_norm=None, bias_correction=False), bert),
    "StableAdamW": (StableAdamW(RATE, weight_decay=0.1), stable),
    "RMSScaledAdamW": (RMSScaledAdamW(RATE, clip_norm=None), rms_scaled),
    "LAMB": (LAMB(RATE, clip_norm=None), lamb),
    "Adafactor": (Adafactor(RATE, min_factored=1), adafactor),
    "Lion": (Lion(RATE, clip_norm=None), lion),
    "Muon": (Muon(RATE, clip_norm=None), muon),
    "SGD": (SGD(RATE, clip_norm=None), sgd),
}


@pytest.mark.parametrize("name", CASES)
def test_stacked_layers_follow_the_formula_each_alone(name):
    value, formula = CASES[name]
    tolerance = ORTHOGONALISED_FLOAT32 if name == "Muon" else OPTIMIZER_FLOAT32
    expected = by_formula(formula)
    start = named_leaves(unstacked(random_tree(0)))
    for leaf, array in run(value, stacked=True).items():
        way, right = array - start[leaf], expected[leaf] - start[leaf]
        scale = np.abs(right).max()
        np.testing.assert_allclose(way / scale, right / scale, atol=tolerance, err_msg=leaf)


@pytest.mark.parametrize("name", CASES)
def test_stacked_equals_a_list_of_layers(name):
    value, _ = CASES[name]
    stacked, listed = run(value, stacked=True), run(value, stacked=False)
    for leaf, array in stacked.items():
        np.testing.assert_allclose(array, listed[leaf], rtol=1e-5, atol=1e-5, err_msg=leaf)


def test_kernels_of_two_axes_are_muons_although_stacked():
    moved = run(Muon(RATE, weight_decay=0.0, clip_norm=None), stacked=True, steps=1)
    start = named_leaves(unstacked(random_tree(0)))
    update = (moved["layer_1/feed/kernel"] - np.asarray(start["layer_1/feed/kernel"])) / RATE
    values = np.linalg.svd(update / (0.2 * 4), compute_uv=False)  # 4 is sqrt(max(8, 16))
    assert values.min() > 0.6 and values.max() < 1.3


def test_clipping_is_by_the_norm_of_all_gradients():
    params, grads = random_tree(0), random_tree(1)
    updates, _ = one_update(SGD(1.0, clip_norm=0.5, momentum=0.0), params, grads)
    norm = np.sqrt(sum(np.sum(np.asarray(g) ** 2) for g in jax.tree.leaves(grads)))
    for name, update in named_leaves(updates).items():
        expected = -0.5 * np.asarray(named_leaves(grads)[name]) / norm
        np.testing.assert_allclose(update, expected, rtol=1e-5)


def test_groups_are_clipped_each_alone_and_may_have_rates_of_their_own():
    params, grads = random_tree(0), random_tree(1)
    value = {"tables": SGD(1.0, clip_norm=0.5, momentum=0.0), "rest": SGD(3.0, clip_norm=2.0)}
    groups = {"^embeddings/": "tables", ".": "rest"}
    updates, state = one_update(value, params, grads, groups)
    tables = {"embeddings": updates["embeddings"]}
    rest = {name: tree for name, tree in updates.items() if name != "embeddings"}
    np.testing.assert_allclose(optax.tree.norm(tables), 0.5, rtol=1e-5)
    np.testing.assert_allclose(optax.tree.norm(rest), 6.0, rtol=1e-5)
    assert {n: float(r) for n, r in learning_rates(state).items()} == {"tables": 1, "rest": 3}


@pytest.mark.parametrize(("offset", "last_layer"), [(1, 1), (2, 2)])
def test_layerwise_decay_by_depth(offset, last_layer):
    """Offset 2 is ELECTRA's: its last layer has decay ** 2."""
    params = random_tree(0)
    ones = jax.tree.map(np.ones_like, params)
    value = SGD(1.0, clip_norm=None, momentum=0.0, layerwise_decay=0.5, layerwise_offset=offset)
    updates, _ = one_update(value, params, ones)
    factors = -np.asarray(updates["layers"]["feed"]["kernel"])[:, 0, 0]
    np.testing.assert_allclose(factors, [0.5 ** (last_layer + 2 - i) for i in range(LAYERS)])
    np.testing.assert_allclose(updates["embeddings"]["table"], -(0.5 ** (LAYERS + offset)))
    np.testing.assert_allclose(updates["head"]["kernel"], -1.0)


def test_the_logged_rate_is_the_next_updates():
    params = {"w": jnp.ones(3)}
    optimizer = make_optimizer(
        SGD(2.0, clip_norm=None, momentum=0.0), WarmupLinear(warmup_steps=4), 8, params
    )
    state = optimizer.init(params)
    for step in range(8):
        promised = learning_rate(state)
        updates, state = optimizer.update({"w": jnp.ones(3)}, state, params)
        np.testing.assert_allclose(updates["w"], -promised)
        assert promised == 2 * (step / 4 if step < 4 else 1 - step / 8)


def test_a_resumed_run_with_more_steps_uses_the_new_schedule_at_once():
    params = {"w": jnp.ones(3)}
    value = SGD(1.0, clip_norm=None, momentum=0.0)
    short = make_optimizer(value, WarmupLinear(), 2, params)
    _, state = short.update(params, short.init(params), params)
    longer = make_optimizer(value, WarmupLinear(), 10, params)
    updates, _ = longer.update(params, state, params)
    np.testing.assert_allclose(updates["w"], -0.9, rtol=1e-6)


def test_moments_are_float32_and_updates_have_the_parameters_type():
    params = {"w": jnp.ones((2, 3), jnp.bfloat16)}
    updates, state = one_update(AdamW(RATE), params, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
    types = {leaf.dtype for leaf in jax.tree.leaves(state) if leaf.ndim}
    assert types == {jnp.dtype(jnp.float32)}


def test_decay_spares_what_the_regex_names():
    params = random_tree(0)
    value = SGD(1.0, clip_norm=None, weight_decay=0.5, decay_exclude="bias|norm|embed")
    updates, _ = one_update(value, params, jax.tree.map(np.zeros_like, params))
    moved = map_named(lambda name, u: bool(np.any(np.asarray(u))), updates)
    assert {name for name, any_moved in named_leaves(moved).items() if any_moved} == {
        "layers/attention/query/kernel",
        "layers/attention/out/kernel",
        "layers/feed/kernel",
        "head/kernel",
    }


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdamW(-1.0), "learning_rate must not be negative"),
        (lambda: AdamW(1.0, b2=1.0), r"b2 must lie in \[0, 1\)"),
        (lambda: Lion(1.0, decay_exclude="("), "no regular expression"),
        (lambda: SGD(1.0, layerwise_decay=1.5), "layerwise_decay must lie in"),
        (
            lambda: make_optimizer(AdamW(1.0), Constant(), 1, random_tree(0), {"^head": "a"}),
            "parameter embeddings/table is in none of the groups a",
        ),
        (
            lambda: make_optimizer({"a": AdamW(1.0)}, Constant(), 1, {}, {".": "b"}),
            "one value for each group b; got a",
        ),
        (lambda: make_optimizer({"a": AdamW(1.0)}, Constant(), 1, {}), "objective has none"),
    ],
)
def test_mistakes_are_answered(make, message):
    with pytest.raises(UserError, match=message):
        make()
