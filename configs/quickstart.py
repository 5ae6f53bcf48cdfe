"""The first run, on any machine: no download, no corpus, no accelerator.

    python run_pretraining.py configs/quickstart.py

It reads the English that ships with every Python, trains a WordPiece tokenizer, builds the rows,
trains a small BERT, evaluates it under fixed masks beside what counting achieves, exports it for
Transformers, and shows what it puts into sentences.

It took 138 s on two idle CPU cores (219 s of processor time). Expect a validation loss of
4.80 nat at 15 % fixed masks, 1.50 under the unigram entropy of the same positions (6.30) and 0.59
under a bigram model (5.39). Other machines differ in the last digits.
"""

from flaxpretrain.config import Checkpoints, Data, Logging, Phase, Run
from flaxpretrain.conversion.finish import Export
from flaxpretrain.data.interpreter import InterpreterText
from flaxpretrain.data.masking import TokenMasking
from flaxpretrain.data.prepare import PrepareDataset, WordPiece
from flaxpretrain.data.rows import Blocks
from flaxpretrain.evaluation.baselines import NgramBaselines
from flaxpretrain.evaluation.fill_mask import FillMask
from flaxpretrain.models.bert import BertConfig
from flaxpretrain.objectives.masked_lm import MaskedLM
from flaxpretrain.training.evaluate import FixedNoise
from flaxpretrain.training.guard import Guard
from flaxpretrain.training.optimizers import Muon
from flaxpretrain.training.schedules import WarmupLinear

SENTENCES = (
    "See the [MASK] for more information.",
    "If the [MASK] is not given, the default is used.",
    "It must be [MASK] integer.",
    "The function [MASK] called with the arguments.",
)


POD = "v5e:1x1"
"""The TPU slice that tools/compile_all.py compiles this recipe for."""


def recipe() -> Run:
    """2 layers x 128, 4 heads, feed-forward 512, vocabulary 4,096; 64 rows of 64.

    Muon and wide initial weights bring a small model off the unigram plateau in a hundred steps,
    where AdamW with BERT's would stay on it; positions that start as sines and cosines teach it
    the order of words, which takes random ones ten times as long.
    """
    return Run(
        prepare=(
            PrepareDataset(
                source=InterpreterText(),
                tokenizer=WordPiece(vocab_size=4_096),
                validation_share=0.08,
                language="en",
                licence="psf-2.0",
                attribution="Documentation and docstrings of CPython, Python Software Foundation",
            ),
        ),
        model=BertConfig(
            vocab_size=4_096,
            hidden_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=512,
            max_position_embeddings=64,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            initializer_range=0.08,
            position_init="sinusoidal",
        ),
        # Twice BERT's rate teaches twice as much a step; it is evaluated at BERT's own.
        objective=MaskedLM(masking=TokenMasking(rate=0.3)),
        data=Data(layout=Blocks()),
        optimizer=Muon(1e-2, adam_rate=0.3, weight_decay=0.1),
        schedule=WarmupLinear(warmup_share=0.1),
        guard=Guard(),
        phases=(Phase(steps=600, length=64, batch_size=64),),
        remat="save_all",
        evaluations=(
            FixedNoise(
                every_steps=100,
                batch_size=64,
                objective=MaskedLM(masking=TokenMasking(rate=0.15)),
            ),
        ),
        checkpoints=Checkpoints(every_steps=200, keep_last=1),
        logging=Logging(every_steps=10),
        finish=(NgramBaselines(), Export(), FillMask(sentences=SENTENCES)),
    )
