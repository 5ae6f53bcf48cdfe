"""Attention within segments: one function in front of several backends."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, Key

from flaxpretrain.errors import UserError
from flaxpretrain.models.functional import ATTENTION_CONTEXT, executing, execution
from flaxpretrain.models.layers import (
    Initializer,
    add_bias,
    padded,
    truncated_normal,
    zeros,
)
from flaxpretrain.models.memory import Kept
from flaxpretrain.models.partition import (
    context_size,
    divides,
    flat,
    on_each_device,
    undivided,
    whole_rows,
)
from flaxpretrain.models.plain_attention import cpu_attention, may_attend, xla_attention
from flaxpretrain.models.quantization import einsum, matmul
from flaxpretrain.models.row_attention import LANES, row_attention, side_by_side, takes
from flaxpretrain.models.splash import splash_attention


def cudnn_attention(
    query: Float[Array, "B L H K"],
    key: Float[Array, "B S H K"],
    value: Float[Array, "B S H K"],
    segment_ids: Int[Array, "B L"],
    key_segment_ids: Int[Array, "B S"],
    *,
    causal: bool = False,
    window: int | None = None,
) -> Float[Array, "B L H K"]:
    """The flash kernel of NVIDIA's cuDNN; raises UserError for numbers of other than 16 bits."""
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        raise UserError(
            f"attention: 'cudnn' computes in bfloat16, not {query.dtype}; "
            "set precision.compute to bfloat16 or attention to xla"
        )
    length = query.shape[1]
    # Its backward pass with a mask takes even lengths only.
    query, key, value = (padded(x, 1, 2) for x in (query, key, value))
    segment_ids, key_segment_ids = (padded(ids, 1, 2, -1) for ids in (segment_ids, key_segment_ids))
    # It skips what a causal mask or a causal window rules out; other windows go into the mask.
    apart = window if not causal else None
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=may_attend(segment_ids, key_segment_ids, window=apart),
        is_causal=causal,
        local_window_size=(window, 0) if causal and window is not None else None,
        scale=1.0,
        implementation="cudnn",
    )[:, :length]


@dataclasses.dataclass(frozen=True)
class Backend:
    """A way to compute attention.

    layout: order in which it takes and returns query, key and value, in einsum letters.
    flash: a kernel without dropout, additive bias and prefix, and one that XLA cannot partition:
        it runs on each device's own rows and heads.
    joined: query, key and value are best made as one array [B, L, H * K] each, side by side, and
        given back as such, by plain matrix products.
    """

    function: Callable[..., Array]
    layout: str
    flash: bool = True
    joined: bool = False


BACKENDS: dict[str, Backend] = {
    "xla": Backend(xla_attention, "BHLK", flash=False),
    "cpu": Backend(cpu_attention, "BHLK", flash=False, joined=True),
    "splash": Backend(splash_attention, "BHLK"),
    "rows": Backend(splash_attention, "BHLK"),
    "cudnn": Backend(cudnn_attention, "BLHK"),
}
"""By name. `cpu` is `xla` where there is a bias or a prefix, `rows` is `row_attention` where that
has a form for the shapes, else splash."""


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Traces attention inside the block with this backend; raises UserError for an unknown one.

    A backend is never guessed from the machine: a program may be compiled for another one.
    """
    with executing(dataclasses.replace(execution(), attention=name)):
        yield


def chosen_backend(*, plain: bool = True) -> tuple[str, Backend]:
    """The backend of the surrounding `executing` block; raises UserError for an unknown one.

    Attention that is not `plain` (see `is_plain`) is always XLA's.
    """
    name = execution().attention
    if name not in BACKENDS:
        raise UserError(f"attention: expected one of {', '.join(BACKENDS)}; got {name!r}")
    if not plain:
        name = "xla"
    return name, BACKENDS[name]


def is_plain(causal: bool, window: int | None, prefix: Array | None, bias: Array | None) -> bool:
    """Whether flash kernels can do it: there is no bias, no prefix, and no place counts in a part.

    Splash takes neither bias nor prefix, and cuDNN's gradient of a bias depends on its release.
    T5's attention to its own row is of that kind, its attention from decoder to encoder is not.
    Where a row lies in parts over `context`, a kernel does not know the place of its first token.
    """
    in_parts = context_size() > 1 and (causal or window is not None)
    return prefix is None and bias is None and not in_parts


def refuse_dropout(name: str, rate: float, keys: Key[Array, "B"] | None) -> None:
    """Raises UserError where dropout is asked of a backend that has none."""
    if keys is not None and rate > 0.0:
        raise UserError(
            f"attention: {name!r} attention has no dropout; set it to 0.0 in the model "
            f"(got {rate}; attention_probs_dropout_prob, attn_pdrop, attention_dropout or "
            "dropout_rate) or set attention to xla"
        )


def attend(
    query: Float[Array, "B ..."],
    key: Float[Array, "B ..."],
    value: Float[Array, "B ..."],
    segment_ids: Int[Array, "B L"],
    key_segment_ids: Int[Array, "B S"] | None = None,
    *,
    causal: bool = False,
    window: int | None = None,
    prefix: Bool[Array, "B S"] | None = None,
    bias: Float[Array, "#B H L S"] | None = None,
    rate: float = 0.0,
    keys: Key[Array, "B"] | None = None,
) -> Float[Array, "B ..."]:
    """Each token's mean of the values of its own segment, weighted by a softmax.

    Arrays are in the layout of the backend that `chosen_backend` names, `plain` by `is_plain`; the
    query is already scaled.

    Args:
        query: of L tokens.
        key: of S tokens: the same ones, or those of another row.
        value: of the same tokens as `key`.
        segment_ids: of the L tokens.
        key_segment_ids: of the S tokens; None where they are the same ones.
        causal: leaves out the tokens at later places.
        window: leaves out the tokens more places away than this, before and after.
        prefix: tokens that all of their segment see, whatever `causal` says.
        bias: is added to the scores, in float32; `positions.relative_bias` makes T5's.
        rate: of dropout on the weights.
        keys: of dropout; None for none.

    Raises:
        UserError: dropout is asked of a backend that has none.
    """
    name, chosen = chosen_backend(plain=is_plain(causal, window, prefix, bias))
    if key_segment_ids is None:
        key_segment_ids = segment_ids
    key, value = (whole_rows(x, chosen.layout.index("L")) for x in (key, value))
    function = functools.partial(chosen.function, causal=causal, window=window)
    if not chosen.flash:
        function = functools.partial(function, prefix=prefix, bias=bias, rate=rate, keys=keys)
    else:
        refuse_dropout(name, rate, keys)
        heads, length = (query.shape[chosen.layout.index(letter)] for letter in "HL")
        function = on_each_device(function, chosen.layout, heads, length)
    context = function(query, key, value, segment_ids, key_segment_ids)
    return checkpoint_name(context, ATTENTION_CONTEXT)


class Heads(nnx.Module):
    """A projection to heads: kernel [D, H, K]."""

    def __init__(
        self,
        width: int,
        heads: int,
        size: int,
        rngs: nnx.Rngs,
        *,
        stddev: float,
        bias: bool = True,
        initial: Initializer = truncated_normal,
    ):
        self.kernel = initial(rngs, (width, heads, size), stddev)
        self.bias = zeros((heads, size)) if bias else None

    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B H L K"]:
        """This projection alone; several at once are faster by `project`."""
        width, heads, size = self.kernel[...].shape
        y = x.reshape(-1, width) @ self.kernel[...].reshape(width, heads * size)
        if self.bias is not None:
            y = y + self.bias[...].reshape(1, -1)
        return jnp.moveaxis(y.reshape(*x.shape[:2], heads, size), 1, 2)


class Merge(nnx.Module):
    """A projection from heads: kernel [H, K, D]."""

    def __init__(
        self,
        heads: int,
        size: int,
        width: int,
        rngs: nnx.Rngs,
        *,
        stddev: float,
        bias: bool = True,
        initial: Initializer = truncated_normal,
    ):
        self.kernel = initial(rngs, (heads, size, width), stddev)
        self.bias = zeros((width,)) if bias else None

    def __call__(self, context: Float[Array, "B ..."], layout: str) -> Float[Array, "B L D"]:
        """The heads joined and projected; in layout `BLH` they already are one axis."""
        kernel = self.kernel[...]
        if layout == "BLH":
            rows = context.reshape(-1, context.shape[-1])
            y = matmul(rows, kernel.reshape(rows.shape[-1], -1)).reshape(*context.shape[:2], -1)
        else:
            y = einsum(f"{layout},HKD->BLD", context, kernel)
        if self.bias is None:
            return y
        return add_bias(flat(y), self.bias[...]).reshape(y.shape)


def project(
    heads: Sequence[Heads], scales: Sequence[Any], x: Float[Array, "B L D"], layout: str
) -> Float[Array, "n ..."]:
    """Several projections, each scaled, by one matrix product straight in the given layout."""
    kernels, biases = _scaled(heads, scales)
    y = einsum(f"BLD,nDHK->n{layout}", x, jnp.stack(kernels))
    if not biases:
        return y
    without = [i + 1 for i, letter in enumerate(layout) if letter in "BL"]
    return y + jnp.expand_dims(jnp.stack(biases), without)


def project_side_by_side(
    heads: Sequence[Heads], scales: Sequence[Any], x: Float[Array, "B L D"]
) -> Float[Array, "B L nE"]:
    """Several projections, each scaled, as `row_attention` takes them: one plain matrix product."""
    return _one_product(heads, scales, x, side_by_side)


def project_joined(
    heads: Sequence[Heads], scales: Sequence[Any], x: Float[Array, "B L D"]
) -> list[Float[Array, "B H L K"]]:
    """Several projections, each scaled, by one plain matrix product, whose parts are then turned.

    XLA:CPU turns the result of a product over heads number by number, and that of a plain one by
    whole heads.
    """
    y = _one_product(heads, scales, x, functools.partial(jnp.concatenate, axis=-1))
    shape = (*x.shape[:2], *heads[0].kernel[...].shape[1:])
    return [jnp.moveaxis(part.reshape(shape), 1, 2) for part in jnp.split(y, len(heads), axis=-1)]


def _one_product(
    heads: Sequence[Heads],
    scales: Sequence[Any],
    x: Float[Array, "B L D"],
    join: Callable[[list[Array]], Array],
) -> Float[Array, "B L nE"]:
    """Several projections, each scaled, by one plain product with what `join` makes of them."""
    kernels, biases = _scaled(heads, scales)
    kernel = join([kernel.reshape(len(kernel), -1) for kernel in kernels])
    y = matmul(flat(x), kernel)
    if biases:
        y = add_bias(y, join([bias.reshape(-1) for bias in biases]))
    return y.reshape(*x.shape[:2], -1)


def _scaled(heads: Sequence[Heads], scales: Sequence[Any]) -> tuple[list[Array], list[Array]]:
    """Kernels and biases of projections whose results are to be multiplied."""
    pairs = [
        (part, jnp.asarray(scale, part.kernel[...].dtype))
        for part, scale in zip(heads, scales, strict=True)
    ]
    kernels = [part.kernel[...] * scale for part, scale in pairs]
    return kernels, [part.bias[...] * scale for part, scale in pairs if part.bias is not None]


class Attention(nnx.Module):
    """Multi-head attention of a row to itself, or to another one.

    Reference: https://arxiv.org/abs/1706.03762, section 3.2.2.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        rngs: nnx.Rngs,
        *,
        stddev: float,
        dropout_rate: float,
        causal: bool = False,
        size: int | None = None,
        scaled: bool = True,
        bias: bool = True,
        query_stddev: float | None = None,
        out_stddev: float | None = None,
        initial: Initializer = truncated_normal,
    ):
        """A head has `size` numbers, by default `width / heads`; `bias` is of the projections."""
        size = size or width // heads
        how: dict[str, Any] = {"bias": bias, "initial": initial}
        self.query = Heads(width, heads, size, rngs, stddev=query_stddev or stddev, **how)
        self.key = Heads(width, heads, size, rngs, stddev=stddev, **how)
        self.value = Heads(width, heads, size, rngs, stddev=stddev, **how)
        self.out = Merge(heads, size, width, rngs, stddev=out_stddev or stddev, **how)
        self.scale = size**-0.5 if scaled else 1.0
        self.dropout_rate = dropout_rate
        self.causal = causal

    def __call__(
        self,
        x: Float[Array, "B L D"],
        segment_ids: Int[Array, "B L"],
        keys: Key[Array, "B"] | None = None,
        *,
        source: Float[Array, "B S D"] | None = None,
        source_segment_ids: Int[Array, "B S"] | None = None,
        window: int | None = None,
        prefix: Bool[Array, "B L"] | None = None,
        score_bias: Float[Array, "#B H L S"] | None = None,
        scale: Any = 1.0,
    ) -> Float[Array, "B L D"]:
        """The attended and projected rows; dropout on the attention weights only.

        Keys and values are of `source` where one is given. `score_bias` is added to the scores,
        which `scale` multiplies beforehand; for the others see `attend`.
        """
        plain = is_plain(self.causal, window, prefix, score_bias)
        name, backend = chosen_backend(plain=plain)
        layout = backend.layout
        scale = self.scale * scale
        heads, size = self.query.kernel[...].shape[1:]
        lengths = (x.shape[1], x.shape[1] if source is None else source.shape[1])
        # Where the mesh divides heads, but not the kernel's blocks of them, splash takes them.
        in_blocks = context_size() == 1 and (divides(heads * size // LANES) or not divides(heads))
        if name == "rows" and in_blocks and takes(heads, size, *lengths):
            refuse_dropout(name, self.dropout_rate, keys)
            return self._by_rows(x, segment_ids, source, source_segment_ids, window, scale)
        joined = backend.joined and undivided()
        made = project_joined if joined else functools.partial(project, layout=layout)
        if source is None:
            query, key, value = made((self.query, self.key, self.value), (scale, 1.0, 1.0), x)
        else:
            (query,) = made((self.query,), (scale,), x)
            key, value = made((self.key, self.value), (1.0, 1.0), source)
        context = attend(
            query,
            key,
            value,
            segment_ids,
            source_segment_ids,
            causal=self.causal,
            window=window,
            prefix=prefix,
            bias=score_bias,
            rate=self.dropout_rate,
            keys=keys,
        )
        if joined:
            return self.out(jnp.moveaxis(context, 1, 2).reshape(*x.shape[:2], -1), "BLH")
        return self.out(context, layout)

    def _by_rows(
        self,
        x: Array,
        segment_ids: Array,
        source: Array | None,
        source_segment_ids: Array | None,
        window: int | None,
        scale: Any,
    ) -> Array:
        """What the call returns, by the kernel for whole rows."""
        if source is None:
            parts = (self.query, self.key, self.value)
            packed = (project_side_by_side(parts, (scale, 1.0, 1.0), x),)
        else:
            packed = (
                project_side_by_side((self.query,), (scale,), x),
                project_side_by_side((self.key, self.value), (1.0, 1.0), source),
            )
        heads, size = self.query.kernel[...].shape[1:]
        key_ids = segment_ids if source_segment_ids is None else source_segment_ids

        def attended(*arguments: Array) -> Array:
            *packed, ids, key_ids = arguments
            return row_attention(packed, ids, key_ids, size=size, causal=self.causal, window=window)

        blocks = heads * size // LANES
        mapped = on_each_device(attended, "BLH", blocks, x.shape[1], arrays=len(packed))
        context = mapped(*packed, segment_ids, key_ids)
        return self.out(checkpoint_name(context, ATTENTION_CONTEXT), "BLH")

    def keep(self, source: Float[Array, "B S D"]) -> Kept:
        """Keys and values of an encoder's tokens, for `recall`."""
        return Kept(self.key(source), self.value(source))

    def recall(
        self,
        x: Float[Array, "B L D"],
        segment_ids: Int[Array, "B L"],
        kept: Kept,
        kept_segment_ids: Int[Array, "R S"],
        place: Int[Array, ""] | None = None,
        *,
        score_bias: Float[Array, "1 H L S"] | None = None,
        scale: Any = 1.0,
    ) -> tuple[Float[Array, "B L D"], Kept]:
        """As when called, for tokens from slot `place` on of rows that keep those before.

        Without a place, `kept` is a whole source, which rows side by side may share; with one,
        several tokens at once are the first of their rows. Always in plain XLA.
        """
        query = self.query(x) * jnp.asarray(self.scale * scale, x.dtype)
        if place is not None:
            kept = kept.written(self.key(x), self.value(x), place)
        rows, length = kept.key.shape[0], x.shape[1]
        if rows != len(x):
            by_source = jnp.moveaxis(query, 2, 1).reshape(rows, -1, *kept.key.shape[1::2])
            query, segment_ids = jnp.moveaxis(by_source, 1, 2), segment_ids.reshape(rows, -1)
        context = xla_attention(
            query,
            kept.key,
            kept.value,
            segment_ids,
            kept_segment_ids,
            causal=place is not None and length > 1,
            bias=score_bias,
        )
        joined = jnp.moveaxis(context, 1, 2).reshape(len(x), length, *kept.key.shape[1::2])
        return self.out(joined, "BLHK"), kept
