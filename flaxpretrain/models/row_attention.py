"""Attention of whole rows at once on TPUs: a Pallas kernel that reads what the projection writes.

Rows of pretraining are short: all scores of a few heads fit the memory of the core, so no running
maximum is needed and the backward pass finds query, key and value saved and nothing else. Query,
key and value lie side by side in one array, in blocks of 128 lanes that hold as many heads as fit:
nothing is transposed, sliced or padded around the kernel, and where a head is smaller than the
matrix unit, no memory is spent on the rest.

Scores are held transposed, keys before queries: the softmax then adds up whole registers instead of
lanes, and only arrays of 128 columns are ever transposed.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from flaxpretrain.models.blocks import blocks
from flaxpretrain.models.layers import padded

LANES = 128
"""Width of a register of every TPU, and of a block of heads."""

LONGEST_ROW = 1024
"""Tokens of the longest row whose scores the core holds; splash attention takes longer ones."""

_NEVER = -1e30


def takes(heads: int, size: int, *lengths: int) -> bool:
    """Whether the kernel has a form for so many heads of so many numbers, and these lengths."""
    return LANES % size == 0 and heads * size % LANES == 0 and max(lengths) <= LONGEST_ROW


def side_by_side(parts: Sequence[Float[Array, "*d E"]]) -> Float[Array, "*d nE"]:
    """Several arrays as one: each block of 128 columns of the first, then the second's, ..."""
    split = [part.reshape(*part.shape[:-1], -1, LANES) for part in parts]
    return jnp.stack(split, axis=-2).reshape(*parts[0].shape[:-1], -1)


@dataclasses.dataclass(frozen=True)
class _Form:
    """What is static of a call: numbers a head, scores held at once, and who may see whom."""

    size: int
    scores: int
    causal: bool
    window: int | None
    interpret: bool

    def blocks(self, length: int, keys: int) -> Iterator[tuple[slice, slice]]:
        """Queries to take at once, and the keys that any of them may see."""
        step = min(length, max(LANES, self.scores // keys // LANES * LANES))
        for start in range(0, length, step):
            stop = min(length, start + step)
            first, last = 0, keys
            if self.window is not None:
                first = min(max(0, start - self.window) // LANES * LANES, keys - LANES)
                last = min(keys, -(-(stop + self.window) // LANES) * LANES)
            if self.causal:
                last = min(last, stop)
            yield slice(start, stop), slice(first, max(last, first + LANES))

    def flops(self, length: int, keys: int, products: int) -> int:
        """Of so many products between queries and keys, over one block of heads."""
        pairs = sum((q.stop - q.start) * (k.stop - k.start) for q, k in self.blocks(length, keys))
        return 2 * LANES * products * pairs


def row_attention(
    packed: Sequence[Float[Array, "B ..."]],
    segment_ids: Int[Array, "B L"],
    key_segment_ids: Int[Array, "B S"],
    *,
    size: int,
    causal: bool = False,
    window: int | None = None,
    interpret: bool = False,
) -> Float[Array, "B L E"]:
    """Each token's mean of the values of its own segment, weighted by a softmax.

    Args:
        packed: query, key and value `side_by_side`, or the query [B, L, E] and then key and value
            side by side [B, S, 2E].
        segment_ids: of the L tokens that ask.
        key_segment_ids: of the S tokens that are asked.
        size: numbers a head.
        causal: leaves out the tokens at later places.
        window: leaves out the tokens more places away than this, before and after.
        interpret: runs the kernel without a TPU, slowly.
    """
    length = segment_ids.shape[1]
    form = _Form(size, blocks().scores, causal, window, interpret)
    whole = tuple(padded(x, 1, LANES) for x in packed)
    ids = (padded(ids, 1, LANES, -1) for ids in (segment_ids, key_segment_ids))
    return _attended(form, whole, *ids)[:, :length]  # pyright: ignore[reportIndexIssue]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attended(
    form: _Form, packed: tuple[Array, ...], segment_ids: Array, key_segment_ids: Array
) -> Array:
    rows, length = segment_ids.shape
    parts = 4 - len(packed)  # of the array that comes last: key and value, or the query too
    width = packed[-1].shape[-1] // parts
    out = jax.ShapeDtypeStruct((rows, length, width), packed[0].dtype)
    call = _call(form, "forward", 2, _forward, packed, (out,))
    return call(*packed, *_as_tiles(segment_ids, key_segment_ids))[0]


def _saving(
    form: _Form, packed: tuple[Array, ...], segment_ids: Array, key_segment_ids: Array
) -> tuple[Array, Any]:
    context = _attended(form, packed, segment_ids, key_segment_ids)
    return context, (packed, segment_ids, key_segment_ids)  # pyright: ignore[reportReturnType]


def _gradients(form: _Form, saved: Any, gradient: Array) -> tuple[Any, None, None]:
    packed, segment_ids, key_segment_ids = saved
    outs = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in packed)
    call = _call(form, "backward", 5, _backward, (*packed, gradient), outs)
    tiles = _as_tiles(segment_ids, key_segment_ids)
    return tuple(call(*packed, gradient, *tiles)), None, None


_attended.defvjp(_saving, _gradients)


def _as_tiles(segment_ids: Array, key_segment_ids: Array) -> tuple[Array, Array]:
    """Segments of the queries along lanes, those of the keys along sublanes."""
    return segment_ids[:, None, :], key_segment_ids[:, :, None]


def _call(
    form: _Form,
    direction: str,
    products: int,
    body: Any,
    arrays: tuple[Array, ...],
    outs: tuple[jax.ShapeDtypeStruct, ...],
) -> Any:
    """The kernel, run for each row and each block of heads."""
    # Imported here: Pallas takes a second to load, and only TPUs need it.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    forward = direction == "forward"
    packed = arrays if forward else arrays[:-1]
    (rows, length), keys = packed[0].shape[:2], packed[-1].shape[1]
    widths = (LANES, 2 * LANES) if len(packed) == 2 else (3 * LANES,)
    steps = packed[0].shape[-1] // widths[0]

    def block(places: int, width: int) -> Any:
        return pl.BlockSpec((None, places, width), lambda row, step: (row, 0, step))

    inputs = [block(x.shape[1], width) for x, width in zip(packed, widths, strict=True)]
    context = block(length, LANES)
    ids = [
        pl.BlockSpec((None, 1, length), lambda row, step: (row, 0, 0)),
        pl.BlockSpec((None, keys, 1), lambda row, step: (row, 0, 0)),
    ]
    moved = sum(x.size * x.dtype.itemsize for x in (*arrays, *outs))
    pairs = form.flops(length, keys, 1) // (2 * LANES)
    return pl.pallas_call(
        functools.partial(body, form, len(packed)),
        grid=(rows, steps),
        in_specs=[*inputs, *([] if forward else [context]), *ids],
        out_specs=[context] if forward else list(inputs),
        out_shape=list(outs),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        cost_estimate=pl.CostEstimate(
            flops=rows * steps * form.flops(length, keys, products),
            transcendentals=rows * steps * pairs * (LANES // form.size),
            bytes_accessed=moved,
        ),
        interpret=form.interpret,
        name=f"row_attention_{direction}_heads_of_{form.size}",
    )


def _opened(packed: Sequence[Any]) -> tuple[Array, Array, Array]:
    """Query, key and value of one block of heads."""
    parts = [ref[:, i : i + LANES] for ref in packed for i in range(0, ref.shape[-1], LANES)]
    query, key, value = parts
    return query, key, value


def _product(left: Array, right: Array, axes: tuple[int, int]) -> Array:
    """The matrix product over an axis of each, summed in float32."""
    return jax.lax.dot_general(
        left, right, (((axes[0],), (axes[1],)), ((), ())), preferred_element_type=jnp.float32
    )


def _one_head(x: Array, head: int, size: int) -> Array:
    """`x` with the numbers of the other heads zeroed: products over all lanes see this one."""
    lanes = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return jnp.where((lanes >= head * size) & (lanes < (head + 1) * size), x, jnp.zeros_like(x))


def _allowed(form: _Form, queries: slice, keys: slice, ids: Any, key_ids: Any) -> Array:
    """Which key may be seen by which query, [keys, queries]."""
    allowed = key_ids[keys, :] == ids[:, queries]
    if form.causal or form.window is not None:
        places = jax.lax.broadcasted_iota(jnp.int32, allowed.shape, 1) + queries.start
        before = places - (jax.lax.broadcasted_iota(jnp.int32, allowed.shape, 0) + keys.start)
        if form.causal:
            allowed &= before >= 0
        if form.window is not None:
            allowed &= jnp.abs(before) <= form.window
    return allowed


def _weights(query: Array, key: Array, allowed: Array) -> tuple[Array, Array]:
    """The softmax's exponentials [keys, queries], and what they sum to [1, queries]."""
    scores = jnp.where(allowed, _product(key, query, (1, 1)), _NEVER)
    weights = jnp.exp(scores - jnp.max(scores, axis=0, keepdims=True))
    return weights, jnp.sum(weights, axis=0, keepdims=True)


def _turned(x: Array) -> Array:
    """The transpose, by way of float32: numbers of 16 bits lie in pairs."""
    return x.astype(jnp.float32).T.astype(x.dtype)


def _forward(form: _Form, count: int, *refs: Any) -> None:
    packed, (ids, key_ids, out) = refs[:count], refs[count:]
    query, key, value = _opened(packed)
    turned = _turned(value)
    for queries, keys in form.blocks(query.shape[0], key.shape[0]):
        allowed = _allowed(form, queries, keys, ids, key_ids)
        contexts = []
        for head in range(LANES // form.size):
            asking = _one_head(query[queries], head, form.size)
            weights, total = _weights(asking, key[keys], allowed)
            mine = turned[head * form.size : (head + 1) * form.size, keys]
            contexts.append(_product(mine, weights.astype(value.dtype), (1, 0)) / total)
        out[queries, :] = jnp.concatenate(contexts).T.astype(out.dtype)


def _backward(form: _Form, count: int, *refs: Any) -> None:
    packed, (gradient, ids, key_ids) = refs[:count], refs[count : count + 3]
    outs = refs[count + 3 :]
    (query, key, value), toward = _opened(packed), gradient[...]
    keys_count, heads = key.shape[0], LANES // form.size
    turned_query, turned_key, turned_toward = (_turned(x) for x in (query, key, toward))
    query_gradients: list[Array] = []
    key_gradients = [jnp.zeros((form.size, keys_count), jnp.float32)] * heads
    value_gradients = list(key_gradients)
    for queries, keys in form.blocks(query.shape[0], keys_count):
        allowed = _allowed(form, queries, keys, ids, key_ids)
        around = ((0, 0), (keys.start, keys_count - keys.stop))
        mine = []
        for head in range(heads):
            rows = slice(head * form.size, (head + 1) * form.size)
            asking, aimed = (_one_head(x[queries], head, form.size) for x in (query, toward))
            weights, total = _weights(asking, key[keys], allowed)
            weights = weights / total
            along = _product(value[keys], aimed, (1, 1))
            along = weights * (along - jnp.sum(weights * along, axis=0, keepdims=True))
            weights, along = weights.astype(value.dtype), along.astype(value.dtype)
            mine.append(_product(turned_key[rows, keys], along, (1, 0)))
            for gradients, turned, by in (
                (key_gradients, turned_query, along),
                (value_gradients, turned_toward, weights),
            ):
                more = _product(turned[rows, queries], by, (1, 1))
                gradients[head] = gradients[head] + jnp.pad(more, around)
        query_gradients.append(jnp.concatenate(mine))
    found = (
        jnp.concatenate(query_gradients, axis=1),
        jnp.concatenate(key_gradients),
        jnp.concatenate(value_gradients),
    )
    places = [(ref, i) for ref in outs for i in range(0, ref.shape[-1], LANES)]
    for (ref, start), x in zip(places, found, strict=True):
        ref[:, start : start + LANES] = x.T.astype(ref.dtype)
