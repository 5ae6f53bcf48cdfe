"""A tiny language with a tokenizer, a dataset of it, and a run that learns it."""

from pathlib import Path

import numpy as np

from flaxpretrain.config import Checkpoints, Data, Mesh, Phase, Run
from flaxpretrain.data.backends import roles_by_name, wordpiece_backend
from flaxpretrain.data.normalization import Normalization
from flaxpretrain.data.rows import Blocks
from flaxpretrain.data.store_writer import write_dataset
from flaxpretrain.data.tokenizers import Tokenizer
from flaxpretrain.training.evaluate import FixedNoise
from tests import toys

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WHO = ("cat", "dog", "bird", "child", "king")
DOES = ("sees", "hears", "likes", "finds")
WHAT = ("milk", "bread", "water", "fire", "gold", "##en")
WORDS = ("the", "a", ".", *WHO, *DOES, *WHAT)


def tokenizer() -> Tokenizer:
    """A WordPiece over the words of the language."""
    vocabulary = {word: number for number, word in enumerate((*SPECIALS, *WORDS))}
    return Tokenizer(
        wordpiece_backend(vocabulary, Normalization(lowercase=True)), roles_by_name(vocabulary)
    )


def sentences(count: int, seed: int = 0) -> list[str]:
    """Sentences such as "the cat sees milk .": a word's place tells what kind it is."""
    generator = np.random.default_rng(seed)

    def sentence() -> str:
        who, does, what = (str(generator.choice(words)) for words in (WHO, DOES, WHAT[:-1]))
        return f"the {who} {does} {what} ."

    return [sentence() for _ in range(count)]


def dataset(folder: Path, documents: int = 80) -> Path:
    """Writes a dataset of documents of four sentences, with its tokenizer; returns its folder."""
    made = tokenizer()

    def ids(text: str) -> list[int]:
        return made.backend.encode(text, add_special_tokens=False).ids

    texts = [sentences(4, seed) for seed in range(documents + documents // 4)]
    encoded = [[ids(sentence) for sentence in document] for document in texts]
    splits = {"train": encoded[:documents], "validation": encoded[documents:]}
    write_dataset(folder, made.vocabulary, splits, made.word_starts, fingerprint=made.fingerprint)
    made.save(folder / "tokenizer")
    return folder


def run(folder: Path, steps: int = 4, **changes) -> Run:
    """A few steps of a tiny BERT on rows of 16, evaluated at the end."""
    values = dict(
        model=toys.bert(vocab_size=len(SPECIALS) + len(WORDS)),
        data=Data(layout=Blocks(), folder=str(folder)),
        mesh=Mesh(data=8),
        phases=(Phase(steps=steps, length=16, batch_size=8),),
        evaluations=(FixedNoise(batch_size=8),),
        checkpoints=Checkpoints(every_steps=100),
    )
    return toys.run(**(values | changes))
