"""A T5 that learns two tasks at once on a laptop: what noise hid in text, and answers to questions.

    python tools/build_pretraining_dataset.py --corpus-dir TEXT --tokenizer TOKENIZER \
        --output-dir DATA/text
    python tools/build_pretraining_dataset.py --corpus-dir questions.csv --tokenizer TOKENIZER \
        --text-column text --target-column category --prefix "classify: " \
        --output-dir DATA/questions
    python run_pretraining.py configs/t5_multitask_tiny.py --data-dir DATA

Multi-task pretraining as in T5, section 3.5.2: examples-proportional mixing, here with a limit of
2^16 examples; each batch holds rows of denoising and rows of packed pairs of source and target.
More tasks are more parts. For a tokenizer of 8,000 tokens, sentinels among them; add
--set model.vocab_size=N for another.
"""

from flaxpretrain.config import Checkpoints, Logging, Phase, Run
from flaxpretrain.data.mixing import MixedData, Part
from flaxpretrain.data.noising import SpanCorruption
from flaxpretrain.data.pairs import SourceTarget, SourceTargetPairs
from flaxpretrain.data.rows import Blocks
from flaxpretrain.models.t5 import T5Config
from flaxpretrain.objectives.span_denoising import SpanDenoising
from flaxpretrain.training.evaluate import FixedNoise
from flaxpretrain.training.guard import Guard
from flaxpretrain.training.optimizers import Adafactor
from flaxpretrain.training.schedules import InverseSquareRoot

POD = "v5e:1x1"
"""The TPU slice that tools/compile_all.py compiles this recipe for."""

TARGET_LENGTH = 48
"""Of every part: their arrays lie in one batch."""


def recipe() -> Run:
    """2 + 2 layers x 128, 4 heads, gated feed-forward 256; 32 rows of 128."""
    return Run(
        model=T5Config(
            vocab_size=8_000,
            d_model=128,
            d_kv=32,
            d_ff=256,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
        ),
        objective=SpanDenoising(noise=SpanCorruption(), target_length=TARGET_LENGTH),
        data=MixedData(
            layout=Blocks(),
            limit=2**16,
            parts=(
                Part(name="text", folder="text"),
                Part(
                    name="questions",
                    folder="questions",
                    layout=SourceTargetPairs(cut=True),
                    objective=SpanDenoising(noise=SourceTarget(), target_length=TARGET_LENGTH),
                ),
            ),
        ),
        optimizer=Adafactor(3e-2),
        schedule=InverseSquareRoot(warmup_steps=1_000),
        guard=Guard(),
        phases=(Phase(steps=10_000, length=128, batch_size=32),),
        remat="save_all",
        evaluations=(FixedNoise(every_steps=1_000, batch_size=64, max_rows=2_048),),
        checkpoints=Checkpoints(every_steps=1_000, keep_last=2),
        logging=Logging(every_steps=50),
    )
