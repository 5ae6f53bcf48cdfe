"""What a masked language model puts where a sentence says [MASK]."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree
from rich.console import Console
from rich.text import Text

from flaxpretrain.conversion.check import locally
from flaxpretrain.conversion.finish import session_part
from flaxpretrain.data import tokenizers
from flaxpretrain.errors import UserError
from flaxpretrain.models.functional import model_of

MASKS = ("[MASK]", "<mask>")
"""Spellings that stand for the mask token of any tokenizer."""

_ROWS = 32
_LENGTH_STEP = 32
_BAR = 24


class Guess(NamedTuple):
    """A token for a mask: as text, its id, and its probability among all tokens."""

    token: str
    id: int
    probability: float


@dataclasses.dataclass(frozen=True)
class Filled:
    """A text and the guesses for each of its masks, the likeliest first."""

    text: str
    masks: tuple[tuple[Guess, ...], ...]


class MaskFiller:
    """A model and its tokenizer, ready to fill masks; it computes on one device, in float32.

    The function is compiled once a shape: rows are padded to a multiple of 32 tokens, and so is
    their number.
    """

    def __init__(
        self, config: Any, params: PyTree, tokenizer: Path | None, *, special: bool = False
    ) -> None:
        """`special` admits special tokens as guesses; probabilities are over all tokens anyway.

        Raises:
            UserError: the model has no masked LM head, or the tokenizer is missing, lacks a token
                or does not fit.
        """
        if tokenizer is None:
            raise UserError("the model comes without a tokenizer, which filling masks needs")
        if "mlm" not in config.heads:
            raise UserError(
                f"the model has no masked language modelling head (heads: {list(config.heads)})"
            )
        self._config, self._params = config, params
        self._tokenizer = tokenizers.load(tokenizer)
        self._vocabulary = self._tokenizer.vocabulary
        self._vocabulary.require("mask", "cls", "sep", "pad")
        if self._vocabulary.size > config.vocab_size:
            raise UserError(
                f"{tokenizer} has {self._vocabulary.size} tokens, but the model only "
                f"{config.vocab_size}: it belongs to another model"
            )
        self._barred = np.zeros(config.padded_vocab_size, bool)
        self._barred[config.vocab_size :] = True
        if not special:
            self._barred[list(self._vocabulary.special_ids)] = True
        self._best = jax.jit(self._make_best(), static_argnames="top_k")

    def fill(self, texts: Sequence[str], top_k: int = 5) -> Iterator[Filled]:
        """The `top_k` likeliest tokens for every mask of every text, in order.

        Raises:
            UserError: a text without a mask or too long for the model, or an impossible `top_k`.
        """
        most = int((~self._barred).sum())
        if not 1 <= top_k <= most:
            raise UserError(f"--top-k must lie in 1 to {most}; got {top_k}")
        rows = [self._encode(text) for text in texts]
        if not rows:
            return
        length = _up(max(len(row) for row in rows), _LENGTH_STEP)
        slots = max(row.count(self._mask) for row in rows)
        height = min(_ROWS, len(rows))
        for first in range(0, len(rows), height):
            part = rows[first : first + height]
            ids, scores = self._run(
                part, height, min(length, self._config.max_length), slots, top_k
            )
            for number, row in enumerate(part):
                count = row.count(self._mask)
                masks = tuple(
                    tuple(map(self._guess, ids[number, slot], scores[number, slot]))
                    for slot in range(count)
                )
                yield Filled(texts[first + number], masks)

    @property
    def _mask(self) -> int:
        return int(self._vocabulary.mask or 0)

    def _encode(self, text: str) -> list[int]:
        name = self._tokenizer.roles["mask"]
        spelled = text
        for spelling in MASKS:
            spelled = spelled.replace(spelling, name)
        if name not in spelled:
            raise UserError(
                f"{text!r} has no mask: write [MASK] (or <mask>) where a word is to be guessed"
            )
        body = self._tokenizer.backend.encode(spelled, add_special_tokens=False).ids
        row = [int(self._vocabulary.cls or 0), *body, int(self._vocabulary.sep or 0)]
        if len(row) > self._config.max_length:
            raise UserError(
                f"{text[:40]!r}... has {len(row)} tokens with [CLS] and [SEP], but the model has "
                f"positions for {self._config.max_length}: shorten it"
            )
        return row

    def _run(
        self, rows: list[list[int]], height: int, length: int, slots: int, top_k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        input_ids = np.full((height, length), int(self._vocabulary.pad or 0), np.int32)
        segment_ids = np.zeros((height, length), np.int32)
        positions = np.zeros((height, slots), np.int32)
        for number, row in enumerate(rows):
            input_ids[number, : len(row)] = row
            segment_ids[number, : len(row)] = 1
            places = np.flatnonzero(np.array(row) == self._mask)
            positions[number, : len(places)] = places
        with locally():
            result = self._best(self._params, input_ids, segment_ids, positions, top_k=top_k)
        return jax.device_get(result)

    def _make_best(self) -> Any:
        model, barred = model_of(self._config.build), self._barred

        def best(
            params: PyTree,
            input_ids: Int[Array, "B L"],
            segment_ids: Int[Array, "B L"],
            positions: Int[Array, "B M"],
            *,
            top_k: int,
        ) -> tuple[Int[Array, "B M k"], Float[Array, "B M k"]]:
            """Ids and probabilities of the likeliest tokens at the positions."""
            module: Any = model.bind(params)
            places = jnp.broadcast_to(jnp.arange(input_ids.shape[1])[None], input_ids.shape)
            hidden = module.embed(input_ids, segment_ids, places.astype(jnp.int32))
            hidden = module.encode(hidden, segment_ids)
            picked = jnp.take_along_axis(hidden, positions[..., None], axis=1)
            shares = jax.nn.softmax(module.logits(picked).astype(jnp.float32), axis=-1)
            shown = jnp.where(barred[None, None], -1.0, shares)
            scores, ids = jax.lax.top_k(shown, top_k)
            return ids, scores

        return best

    def _guess(self, number: Any, score: Any) -> Guess:
        number = int(number)
        token = self._tokenizer.backend.decode([number], skip_special_tokens=False)
        return Guess(token, number, float(score))


def _up(value: int, step: int) -> int:
    return -(-value // step) * step


def show(filled: Filled, console: Console) -> None:
    """Prints a text and, for each mask, a line a guess: probability, bar, token."""
    console.print(Text(filled.text, style="bold"), soft_wrap=True)
    for number, guesses in enumerate(filled.masks, start=1):
        if len(filled.masks) > 1:
            console.print(Text(f"  mask {number}", style="italic"))
        for guess in guesses:
            bar = bar_of(guess.probability)
            console.print(
                Text(f"  {guess.probability:7.2%}  ").append(f"{bar:<{_BAR}}", style="green"),
                Text(guess.token),
                soft_wrap=True,
            )


def bar_of(share: float, width: int = _BAR) -> str:
    """A bar of block characters, to an eighth of a character."""
    eighths = round(share * width * 8)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


@dataclasses.dataclass(frozen=True, kw_only=True)
class FillMask:
    """Shows what the trained model puts into sentences: for `Run.finish`.

    `part` is the network, where the objective has several; `special` admits special tokens.
    """

    sentences: tuple[str, ...]
    top_k: int = 5
    part: str | None = None
    special: bool = False

    def __post_init__(self) -> None:
        """Raises UserError on a sentence without a mask, before anything is trained."""
        if not self.sentences or self.top_k < 1:
            raise UserError("FillMask needs sentences and a top_k of 1 or more")
        for sentence in self.sentences:
            if not any(mask in sentence for mask in MASKS):
                raise UserError(f"FillMask.sentences: {sentence!r} has no [MASK]")

    def run(self, session: Any) -> None:
        """Prints the guesses for every sentence."""
        config, params = session_part(session, self.part)
        if jax.process_index() != 0:
            return
        folder = session.dataset.tokenizer_folder
        filler = MaskFiller(config, params, folder, special=self.special)
        # Where `say` writes to: colours are for a terminal only.
        console = Console(stderr=True)
        for filled in filler.fill(self.sentences, self.top_k):
            with console.capture() as captured:
                show(filled, console)
            session.say(captured.get().rstrip("\n"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class WatchMasks(FillMask):
    """`FillMask` for `Run.evaluations`: before the first step and after the last.

    every_steps, every_epochs: and every so often between them.
    """

    name: str = "fill_mask"
    at_start: bool = True
    every_steps: int | None = None
    every_epochs: float | None = None
