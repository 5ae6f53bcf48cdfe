"""Texts as token ids: generated, scored, and their next tokens."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from flaxpretrain.errors import UserError
from flaxpretrain.generation.beams import beam_search
from flaxpretrain.generation.rules import Rules, rules_of
from flaxpretrain.generation.search import Found, Prompts, network_of, search
from flaxpretrain.generation.strategies import Beam, Greedy, Strategy
from flaxpretrain.models.functional import cast, model_of

_ROWS = 32
_STEP = 16
"""Rows and tokens are padded to a multiple of this, so that few shapes are compiled."""

Ids = Sequence[int]


class Text(NamedTuple):
    """New tokens, without the one that ended them; whether one did; and beam search's score."""

    ids: tuple[int, ...]
    ended: bool
    score: float | None


class Likelihood(NamedTuple):
    """Of a continuation: its log likelihood in nats, its tokens, and how many are the likeliest."""

    nats: float
    tokens: int
    right: int


class Generator:
    """A decoder or encoder-decoder ready to generate, on one device.

    A function is compiled for every strategy and shape; rows are padded to multiples of 16 tokens.
    What a prompt gets does not depend on the others given with it, but for the order of float sums.
    """

    def __init__(
        self, config: Any, params: PyTree, rules: Rules | None = None, *, compute: str = "float32"
    ) -> None:
        """Raises UserError for a network that generates nothing, or rules that do not fit it."""
        if "lm" not in getattr(config, "heads", ()):
            raise UserError(
                "the model has no language modelling head to generate with (heads: "
                f"{list(getattr(config, 'heads', ()))}); a masked language model is what "
                "tools/fill_mask.py shows"
            )
        self.config = config
        self.rules = rules_of(config) if rules is None else rules
        self.rules.check_fits(config.vocab_size)
        self.has_encoder = hasattr(config, "decoder_start_token_id")
        if self.has_encoder and self.rules.start is None:
            raise UserError("the model's configuration has no decoder_start_token_id")
        self._model = model_of(config.build)
        self._params = cast(jax.tree.map(jnp.asarray, params), jnp.dtype(compute))
        static = ("strategy", "rules", "max_new_tokens", "count")
        self._search = jax.jit(self._make_search(), static_argnames=static)
        self._next = jax.jit(self._make_next())
        self._likelihood = jax.jit(self._make_likelihood())

    def generate(
        self,
        prompts: Sequence[Ids],
        strategy: Strategy | None = None,
        *,
        max_new_tokens: int,
        count: int = 1,
        seed: int = 0,
        rules: Rules | None = None,
    ) -> list[list[Text]]:
        """`count` texts for every prompt, by default greedily.

        A prompt is what a decoder goes on from, or the source that an encoder reads, special tokens
        included. Draws depend on the seed, the prompt's number and the text's.

        Raises:
            UserError: an empty prompt, more tokens than the model has positions for, or more texts
                than the strategy finds.
        """
        strategy, rules = strategy or Greedy(), rules or self.rules
        self._check(prompts, strategy, max_new_tokens, count)
        rules.check_fits(self.config.vocab_size)

        def run(part: Prompts, first: int) -> Found:
            numbers = jnp.arange(len(part.ids), dtype=jnp.uint32) + first
            options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "count": count}
            key = jax.random.key(seed)
            return self._search(
                self._params, part, key, numbers, strategy=strategy, rules=rules, **options
            )

        texts = []
        for found in self._in_parts(prompts, run):
            for ids, length, score in zip(*found, strict=True):
                kept = tuple(ids[:length].tolist())
                ended = bool(kept) and kept[-1] in rules.eos
                scored = float(score) if isinstance(strategy, Beam) else None
                texts.append(Text(kept[:-1] if ended else kept, ended, scored))
        return [texts[i : i + count] for i in range(0, len(prompts) * count, count)]

    def next_tokens(
        self, prompts: Sequence[Ids], top_k: int
    ) -> list[tuple[Int[np.ndarray, "k"], Float[np.ndarray, "k"]]]:
        """The `top_k` likeliest next tokens of every prompt and their probabilities.

        Those of an encoder-decoder are the first of its target. Raises UserError as `generate`
        does, and for a `top_k` that cannot be.
        """
        if not 1 <= top_k <= self.config.vocab_size:
            raise UserError(f"--top-k must lie in 1 to {self.config.vocab_size}; got {top_k}")
        self._check(prompts, Greedy(), 1, 1)
        found = self._in_parts(prompts, lambda part, first: (self._next(self._params, part),))
        shares = [row[0] for part in found for row in zip(*part, strict=True)][: len(prompts)]
        best = [np.argsort(-row, kind="stable")[:top_k] for row in shares]
        return [(ids, row[ids]) for ids, row in zip(best, shares, strict=True)]

    def likelihoods(self, prompts: Sequence[Ids], continuations: Sequence[Ids]) -> list[Likelihood]:
        """How likely each continuation is after its prompt, all tokens of it given in turn.

        The target of an encoder-decoder is such a continuation of its source.

        Raises:
            UserError: an empty prompt or continuation, or more tokens than there are positions for.
        """
        if not all(map(len, continuations)):
            raise UserError("a continuation to score has no tokens")
        longest = max(map(len, continuations), default=1)
        self._check(prompts, Greedy(), longest, 1)
        found = []
        for first in range(0, len(prompts), _ROWS):
            some = continuations[first : first + _ROWS]
            batch = self._given(prompts[first : first + _ROWS], some)
            nats, right = jax.device_get(self._likelihood(self._params, batch))
            found += [
                Likelihood(float(nats[i]), len(ids), int(right[i])) for i, ids in enumerate(some)
            ]
        return found

    def _check(
        self, prompts: Sequence[Ids], strategy: Strategy, new_tokens: int, count: int
    ) -> None:
        if new_tokens < 1 or count < 1:
            name = "--max-new-tokens" if new_tokens < 1 else "--count"
            raise UserError(f"{name} must be 1 or more; got {min(new_tokens, count)}")
        if isinstance(strategy, Beam):
            strategy.check_fits(self.config.vocab_size)
            if count > strategy.size:
                raise UserError(
                    f"--count {count}: a beam of {strategy.size} finds {strategy.size} texts at "
                    "most; take a larger --beams"
                )
        elif isinstance(strategy, Greedy) and count > 1:
            raise UserError(
                f"--count {count}: the likeliest token makes the same text every time; add "
                "--temperature, --top-k, --top-p or --beams"
            )
        if not all(map(len, prompts)):
            raise UserError("an empty prompt: give at least one token to go on from")
        positions = self.config.max_length
        if positions is None:
            return
        longest = max(map(len, prompts), default=0)
        needed = new_tokens if self.has_encoder else longest + new_tokens
        if max(needed, longest) > positions:
            raise UserError(
                f"a prompt of {longest} tokens and {new_tokens} new ones do not fit the model, "
                f"which has positions for {positions}: shorten the prompt or --max-new-tokens"
            )

    def _in_parts(
        self, prompts: Sequence[Ids], run: Callable[[Prompts, int], Any]
    ) -> list[tuple[np.ndarray, ...]]:
        """Results for at most 32 prompts at a time, each padded to the shape of the first."""
        if not prompts:
            return []
        rows = min(_ROWS, len(prompts))
        length = _up(max(map(len, prompts)))
        found = []
        for first in range(0, len(prompts), rows):
            part = list(prompts[first : first + rows])
            # Copies of a prompt fill the last part: they end no later than it does.
            part += part[-1:] * (rows - len(part))
            found.append(jax.device_get(run(self._framed(part, length), first)))
        return found

    def _framed(self, prompts: Sequence[Ids], length: int) -> Prompts:
        if not self.has_encoder:
            return Prompts(*_rows(prompts, length, self.rules.pad, left=True))
        start = jnp.full((len(prompts), 1), self.rules.start or 0, jnp.int32)
        source = _rows(prompts, length, self.rules.pad)
        return Prompts(start, jnp.ones_like(start), *source)

    def _given(self, prompts: Sequence[Ids], continuations: Sequence[Ids]) -> dict[str, Array]:
        """Decoder inputs, their labels and which of these count; sources of encoder-decoders."""
        batch: dict[str, Array] = {}
        if self.has_encoder:
            source = _rows(prompts, _up(max(map(len, prompts))), self.rules.pad)
            batch |= {"source_ids": source[0], "source_segment_ids": source[1]}
            begun: Sequence[Ids] = [[int(self.rules.start or 0)]] * len(prompts)
        else:
            begun = prompts
        whole = [[*a, *b] for a, b in zip(begun, continuations, strict=True)]
        length = _up(max(map(len, whole)))
        ids, segments = _rows(whole, length, self.rules.pad)
        places = np.arange(1, length + 1)[None]
        first = np.array([[len(row)] for row in begun])
        last = np.array([[len(row)] for row in whole])
        labels = jnp.concatenate([ids[:, 1:], ids[:, :1]], axis=1)
        counts = jnp.asarray((places >= first) & (places < last))
        return batch | {"ids": ids, "segment_ids": segments, "labels": labels, "counts": counts}

    def _make_search(self) -> Callable[..., Found]:
        model, vocab_size = self._model, self.config.vocab_size

        def run(
            params: PyTree,
            prompts: Prompts,
            key: Array,
            numbers: Array,
            *,
            strategy: Strategy,
            rules: Rules,
            max_new_tokens: int,
            count: int,
        ) -> Found:
            with jax.default_matmul_precision("highest"):
                network = network_of(model.bind(params), vocab_size)
                how: dict[str, Any] = {"rules": rules, "max_new_tokens": max_new_tokens}
                if isinstance(strategy, Beam):
                    found = beam_search(network, prompts, strategy=strategy, **how)
                    best = np.arange(len(prompts.ids) * strategy.size)
                    best = best.reshape(-1, strategy.size)[:, :count].reshape(-1)
                    return Found(*(array[best] for array in found))
                folded = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, numbers)
                keys = jax.vmap(functools.partial(jax.random.split, num=count))(folded)
                return search(network, prompts, keys.reshape(-1), strategy=strategy, **how)

        return run

    def _make_next(self) -> Callable[..., Array]:
        model, vocab_size = self._model, self.config.vocab_size

        def shares(params: PyTree, prompts: Prompts) -> Float[Array, "B V"]:
            with jax.default_matmul_precision("highest"):
                logits, _ = network_of(model.bind(params), vocab_size).start(prompts, 0)
                return jax.nn.softmax(logits, axis=-1)

        return shares

    def _make_likelihood(self) -> Callable[..., tuple[Array, Array]]:
        model, vocab_size, has_encoder = self._model, self.config.vocab_size, self.has_encoder

        def likelihood(
            params: PyTree, batch: dict[str, Array]
        ) -> tuple[Float[Array, "B"], Int[Array, "B"]]:
            with jax.default_matmul_precision("highest"):
                module: Any = model.bind(params)
                ids, segments, counts = batch["ids"], batch["segment_ids"], batch["counts"]
                if has_encoder:
                    source = batch["source_segment_ids"]
                    encoded = module.encode(module.embed(batch["source_ids"], source), source)
                    hidden = module.embed_decoder(ids, segments)
                    hidden = module.decode(hidden, segments, encoded, source)
                else:
                    hidden = module.decode_causally(module.embed(ids, segments), segments)
                scores = jax.nn.log_softmax(module.logits(hidden)[..., :vocab_size], axis=-1)
                labels = batch["labels"][..., None]
                chosen = jnp.take_along_axis(scores, labels, axis=-1)[..., 0]
                return _totals(chosen, chosen >= jnp.max(scores, axis=-1), counts)

        return likelihood


def _totals(
    chosen: Float[Array, "B L"], right: Bool[Array, "B L"], counts: Bool[Array, "B L"]
) -> tuple[Float[Array, "B"], Int[Array, "B"]]:
    nats = jnp.sum(jnp.where(counts, chosen, 0.0), axis=1)
    return nats, jnp.sum((right & counts).astype(jnp.int32), axis=1)


def _up(length: int) -> int:
    return -(-length // _STEP) * _STEP


def _rows(
    texts: Sequence[Ids], length: int, pad: int, *, left: bool = False
) -> tuple[Int[Array, "B L"], Int[Array, "B L"]]:
    """Ids and segments of texts, padded on the right or on the left."""
    ids = np.full((len(texts), length), pad, np.int32)
    segments = np.zeros((len(texts), length), np.int32)
    for row, text in enumerate(texts):
        where = slice(length - len(text), length) if left else slice(0, len(text))
        ids[row, where], segments[row, where] = text, 1
    return jnp.asarray(ids), jnp.asarray(segments)
