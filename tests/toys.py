"""Tiny models, batches and runs that the tests share."""

import dataclasses

import jax
import numpy as np

from flaxpretrain.analysis import hlo
from flaxpretrain.config import Checkpoints, Data, Logging, Phase, Run
from flaxpretrain.data import tokenizers
from flaxpretrain.data.masking import TokenMasking
from flaxpretrain.data.rows import Blocks, Documents
from flaxpretrain.data.store_writer import write_dataset
from flaxpretrain.data.vocabulary import Vocabulary
from flaxpretrain.models.bart import BartConfig
from flaxpretrain.models.bert import BertConfig
from flaxpretrain.models.electra import ElectraConfig
from flaxpretrain.models.gpt2 import GPT2Config
from flaxpretrain.models.t5 import T5Config
from flaxpretrain.objectives.generators import Scaled
from flaxpretrain.objectives.masked_lm import MaskedLM
from flaxpretrain.objectives.replaced_tokens import ReplacedTokens
from flaxpretrain.training.guard import Guard
from flaxpretrain.training.optimizers import AdamW
from flaxpretrain.training.schedules import WarmupLinear

VOCABULARY = Vocabulary(
    size=300, pad=0, unk=1, cls=2, sep=3, mask=4, bos=2, eos=3, special_ids=(0, 1, 2, 3, 4)
)


def bert(**changes) -> BertConfig:
    """A BERT of 2 layers of 32, for a vocabulary of 300."""
    return dataclasses.replace(
        BertConfig(
            vocab_size=300,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=64,
        ),
        **changes,
    )


def gpt2(**changes) -> GPT2Config:
    """A GPT-2 of 2 layers of 32, without dropout on the attention weights."""
    return dataclasses.replace(
        GPT2Config(
            vocab_size=300,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=64,
            attn_pdrop=0.0,
            bos_token_id=2,
            eos_token_id=3,
            pad_token_id=0,
        ),
        **changes,
    )


def t5(**changes) -> T5Config:
    """A T5 v1.0 of 2 + 2 layers of 32."""
    return dataclasses.replace(
        T5Config(
            vocab_size=300,
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            relative_attention_num_buckets=8,
            relative_attention_max_distance=20,
            eos_token_id=3,
        ),
        **changes,
    )


def bart(**changes) -> BartConfig:
    """A BART of 2 + 2 layers of 32, without dropout on the attention weights."""
    return dataclasses.replace(
        BartConfig(
            vocab_size=300,
            d_model=32,
            encoder_layers=2,
            encoder_ffn_dim=64,
            encoder_attention_heads=4,
            decoder_layers=2,
            decoder_ffn_dim=64,
            decoder_attention_heads=4,
            attention_dropout=0.0,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=2,
            eos_token_id=3,
            decoder_start_token_id=3,
            forced_eos_token_id=3,
        ),
        **changes,
    )


def electra(**changes) -> ElectraConfig:
    """An ELECTRA of 2 layers of 32 behind embeddings of 16."""
    return dataclasses.replace(
        ElectraConfig(
            vocab_size=300,
            embedding_size=16,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=64,
        ),
        **changes,
    )


def replaced_tokens(**changes) -> ReplacedTokens:
    """ELECTRA's objective at 15 %, with a generator of half the width."""
    masking = TokenMasking(rate=0.15, count="electra", mask_share=0.85, random_share=0.0)
    return ReplacedTokens(**({"masking": masking, "generator": Scaled(width=0.5)} | changes))


def masked_lm(**changes) -> MaskedLM:
    """Masked LM at 15 %."""
    return MaskedLM(masking=TokenMasking(**({"rate": 0.15} | changes)))


def run(**changes) -> Run:
    """A run of a few steps; `data.folder` and the like through `changes`."""
    values = dict(
        model=bert(),
        objective=masked_lm(),
        data=Data(layout=Blocks()),
        optimizer=AdamW(1e-3),
        schedule=WarmupLinear(warmup_steps=2),
        phases=(Phase(steps=6, length=32, batch_size=8),),
        checkpoints=Checkpoints(every_steps=100),
        logging=Logging(every_steps=1, tensorboard=False),
        remat="save_all",
    )
    return Run(**(values | changes))


def packed_run(folder: str, steps: int = 12, **changes) -> Run:
    """Documents packed into rows of 32; saved every 4 steps."""
    values = dict(
        data=Data(layout=Documents(), folder=folder),
        phases=(Phase(steps=steps, length=32, batch_size=8),),
        checkpoints=Checkpoints(every_steps=4, keep_last=2),
        guard=Guard(),
    )
    return run(**(values | changes))


def rows(count: int, capacity: int, seed: int = 0, shortest: int = 1) -> dict[str, np.ndarray]:
    """Random rows of one piece each, of uneven lengths; the last row is empty."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(shortest, capacity + 1, count).astype(np.int32)
    lengths[-1] = 0
    ids = generator.integers(5, VOCABULARY.size, (count, capacity)).astype(np.int32)
    ids[np.arange(capacity) >= lengths[:, None]] = 0
    return {
        "ids": ids,
        "word_starts": np.ones((count, capacity), bool),
        "piece_lengths": lengths[:, None],
    }


def batch(objective: MaskedLM, count: int, length: int, seed: int = 0) -> dict[str, np.ndarray]:
    """A framed and noised batch of random rows."""
    framing = objective.framing(VOCABULARY, length)
    keys = np.random.default_rng(seed + 1).integers(0, 2**63, count).astype(np.uint64)
    capacity = length - framing.specials_per_piece
    return dict(framing.examples(rows(count, capacity, seed), keys, 0))


def product_flops(step, *arguments) -> int:
    """FLOPs of the matrix products in XLA's program; its own count also takes elementwise work."""
    return hlo.totals(hlo.parse(jax.jit(step).lower(*arguments).compile().as_text())).flops


def tokenizer(folder):
    """A WordPiece tokenizer of `VOCABULARY`, written to a folder; its tokens are w5, w6, ..."""
    folder.mkdir(parents=True)
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [f"w{i}" for i in range(len(specials), VOCABULARY.size)]
    (folder / "vocab.txt").write_text("\n".join(specials + words) + "\n")
    loaded = tokenizers.load(folder / "vocab.txt")
    loaded.save(folder)
    return loaded


def dataset(folder, documents: int = 60, seed: int = 0, vocabulary: Vocabulary = VOCABULARY):
    """Writes a dataset of random documents whose tokens come in runs, so that they can be learnt.

    Returns the folder.
    """
    made = tokenizer(folder / "tokenizer")
    generator = np.random.default_rng(seed)

    def document() -> list[list[int]]:
        sentences = []
        for _ in range(generator.integers(1, 6)):
            start = int(generator.integers(5, 250))
            sentences.append([start + i for i in range(int(generator.integers(3, 20)))])
        return sentences

    write_dataset(
        folder,
        vocabulary,
        {
            "train": [document() for _ in range(documents)],
            "validation": [document() for _ in range(documents // 4)],
        },
        fingerprint=made.fingerprint,
    )
    return folder
