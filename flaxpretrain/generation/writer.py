"""Texts instead of token ids: a model with its tokenizer writes, guesses and judges."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import PyTree

from flaxpretrain.data import tokenizers
from flaxpretrain.data.causal import first_and_last_token
from flaxpretrain.data.encoder_decoder import BART_ENDS, T5_ENDS
from flaxpretrain.data.framing import token_ids
from flaxpretrain.errors import UserError
from flaxpretrain.generation.generator import Generator, Likelihood
from flaxpretrain.generation.rules import Rules, rules_of
from flaxpretrain.generation.strategies import Strategy

_ENDS = {"bart": BART_ENDS, "t5": T5_ENDS}
"""How sources and targets are framed, by model type."""


class Written(NamedTuple):
    """A text that goes on from a prompt or answers it, its token ids, and beam search's score.

    `ended` says whether the model ended it, rather than its length.
    """

    text: str
    ids: tuple[int, ...]
    ended: bool
    score: float | None


class Guess(NamedTuple):
    """A next token: as text, its id, and its probability among all tokens."""

    token: str
    id: int
    probability: float


class Judged(NamedTuple):
    """A continuation with its log likelihood in nats, its tokens, and its share among those given.

    Shares are what the likelihoods of all continuations, added up, make 1.
    """

    text: str
    nats: float
    tokens: int
    share: float


class Writer:
    """A model and its tokenizer, ready to generate text."""

    def __init__(
        self,
        config: Any,
        params: PyTree,
        tokenizer: Path | None,
        *,
        generation: Mapping[str, Any] | None = None,
        begins: bool = True,
        compute: str = "float32",
    ) -> None:
        """`generation` is the content of a generation_config.json, which names special tokens.

        Without one they are the tokenizer's. `begins` puts the token in front of a prompt that
        opens documents, where the model is a decoder alone: it was trained so.

        Raises:
            UserError: the tokenizer is missing, lacks a token or does not fit the model.
        """
        if tokenizer is None:
            raise UserError("the model comes without a tokenizer, which generating text needs")
        self.tokenizer = tokenizers.load(tokenizer)
        vocabulary = self.tokenizer.vocabulary
        if vocabulary.size > config.vocab_size:
            raise UserError(
                f"{tokenizer} has {vocabulary.size} tokens, but the model only "
                f"{config.vocab_size}: it belongs to another model"
            )
        self._ends = _ENDS.get(config.model_type)
        if self._ends is None:
            first, last = first_and_last_token(vocabulary)
            self._before, self._after = ([first] if begins else []), []
            stated = {"eos_token_id": last}
        else:
            opens = () if self._ends.first is None else (self._ends.first,)
            self._before = list(token_ids(vocabulary, *opens))
            self._after = list(token_ids(vocabulary, self._ends.last))
            (start,) = token_ids(vocabulary, self._ends.start)
            stated = {"eos_token_id": self._after[0], "decoder_start_token_id": start}
            if getattr(config, "forced_eos_token_id", None) is not None:
                stated["forced_eos_token_id"] = self._after[0]
        if vocabulary.pad is not None:
            stated["pad_token_id"] = vocabulary.pad
        rules = rules_of(config, stated | dict(generation or {}))
        self.generator = Generator(config, params, rules, compute=compute)

    @property
    def rules(self) -> Rules:
        """What every text begins and ends with."""
        return self.generator.rules

    def encode(self, text: str) -> list[int]:
        """Ids of a prompt or source, special tokens around it included."""
        body = self.tokenizer.backend.encode(text, add_special_tokens=False).ids
        return [*self._before, *body, *self._after]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids without the tokens that open, end and fill rows; sentinels are shown."""
        vocabulary = self.tokenizer.vocabulary
        names = ("pad", "cls", "sep", "bos", "eos")
        frame = {getattr(vocabulary, name) for name in names} | set(self.rules.eos)
        size = vocabulary.size
        shown = [i for i in ids if i not in frame and i < size]
        return self.tokenizer.backend.decode(shown, skip_special_tokens=False)

    def write(
        self,
        texts: Sequence[str],
        strategy: Strategy | None = None,
        *,
        max_new_tokens: int,
        count: int = 1,
        seed: int = 0,
        rules: Mapping[str, Any] | None = None,
    ) -> list[list[Written]]:
        """`count` texts for every prompt; see `Generator.generate`, whose rules `rules` change.

        What a decoder alone writes goes on where the prompt ends, its space included.
        """
        prompts = [self.encode(text) for text in texts]
        found = self.generator.generate(
            prompts,
            strategy,
            max_new_tokens=max_new_tokens,
            count=count,
            seed=seed,
            rules=dataclasses.replace(self.rules, **dict(rules or {})),
        )
        return [
            [Written(self._after_prompt(prompt, t.ids), t.ids, t.ended, t.score) for t in some]
            for prompt, some in zip(prompts, found, strict=True)
        ]

    def next_tokens(self, texts: Sequence[str], top_k: int) -> list[list[Guess]]:
        """The likeliest next tokens of every text; those that open an encoder-decoder's answer."""
        found = self.generator.next_tokens([self.encode(text) for text in texts], top_k)
        decode = self.tokenizer.backend.decode
        return [
            [
                Guess(decode([int(i)], skip_special_tokens=False), int(i), float(share))
                for i, share in zip(ids, shares, strict=True)
            ]
            for ids, shares in found
        ]

    def judge(self, text: str, continuations: Sequence[str], joint: str = " ") -> list[Judged]:
        """Continuations of a text, or answers to a source, the likeliest first.

        `joint` stands between text and continuation. The end of an answer counts as a token of it.
        """
        likelihoods = self.likelihoods([text] * len(continuations), continuations, joint)
        most = max((found.nats for found in likelihoods), default=0.0)
        total = sum(math.exp(found.nats - most) for found in likelihoods)
        judged = [
            Judged(text, found.nats, found.tokens, math.exp(found.nats - most) / total)
            for text, found in zip(continuations, likelihoods, strict=True)
        ]
        return sorted(judged, key=lambda each: -each.nats)

    def likelihoods(
        self, texts: Sequence[str], continuations: Sequence[str], joint: str = " "
    ) -> list[Likelihood]:
        """The likelihood of each continuation of its text, or of each answer to its source."""
        prompts = [self.encode(text) for text in texts]
        if self._ends is not None:
            targets = [self.encode(answer) for answer in continuations]
            return self.generator.likelihoods(prompts, targets)
        rest = []
        for number, (text, more) in enumerate(zip(texts, continuations, strict=True)):
            whole = self.encode(f"{text}{joint}{more}")
            # Where the last token of the text and the first that follows it are made one.
            shared = next(
                (i for i, (a, b) in enumerate(zip(prompts[number], whole, strict=False)) if a != b),
                min(len(prompts[number]), len(whole)),
            )
            prompts[number], more_ids = whole[:shared], whole[shared:]
            rest.append(more_ids)
        return self.generator.likelihoods(prompts, rest)

    def _after_prompt(self, prompt: Sequence[int], ids: Sequence[int]) -> str:
        if self._ends is not None:
            return self.decode(ids)
        before, whole = self.decode(prompt), self.decode([*prompt, *ids])
        return whole[len(before) :] if whole.startswith(before) else self.decode(ids)


def diversity(texts: Sequence[Sequence[int]]) -> dict[str, float]:
    """How varied texts are, as shares from 0 to 1; those of no n-grams are left out.

    `distinct_n` is the share of different n-grams among all n-grams of all texts; `repeated_4` that
    of 4-grams which their own text already had.

    References: https://arxiv.org/abs/1510.03055, section 5.2; https://arxiv.org/abs/1908.04319,
    section 6, seq-rep-4.
    """
    figures = {}
    for size in (1, 2, 3):
        grams = [gram for text in texts for gram in _ngrams(text, size)]
        if grams:
            figures[f"distinct_{size}"] = len(set(grams)) / len(grams)
    fours = [_ngrams(text, 4) for text in texts]
    count = sum(map(len, fours))
    if count:
        figures["repeated_4"] = 1 - sum(len(set(grams)) for grams in fours) / count
    return figures


def _ngrams(text: Sequence[int], size: int) -> list[tuple[int, ...]]:
    return list(zip(*(text[start:] for start in range(size)), strict=False))
