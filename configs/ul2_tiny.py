"""UL2's denoisers on a laptop: 2 + 2 layers of 128, rows of 128, two examples in each.

    python tools/build_pretraining_dataset.py --corpus-dir TEXT --tokenizer TOKENIZER \
        --output-dir DATA
    python run_pretraining.py configs/ul2_tiny.py --data-dir DATA

For a tokenizer of 8,000 tokens, 20 sentinels or more among them, the last three of which tell the
mode; add --set model.vocab_size=N for another.
"""

from flaxpretrain.config import Checkpoints, Data, Logging, Phase, Run
from flaxpretrain.data.denoisers import ul2
from flaxpretrain.data.rows import Blocks
from flaxpretrain.models.t5 import T5Config
from flaxpretrain.objectives.span_denoising import SpanDenoising
from flaxpretrain.training.evaluate import FixedNoise
from flaxpretrain.training.guard import Guard
from flaxpretrain.training.optimizers import Adafactor
from flaxpretrain.training.schedules import InverseSquareRoot

POD = "v5e:1x1"
"""The TPU slice that tools/compile_all.py compiles this recipe for."""


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
        objective=SpanDenoising(noise=ul2(examples_per_row=2)),
        data=Data(layout=Blocks()),
        optimizer=Adafactor(3e-2),
        schedule=InverseSquareRoot(warmup_steps=1_000),
        guard=Guard(),
        phases=(Phase(steps=10_000, length=128, batch_size=32),),
        remat="save_all",
        evaluations=(FixedNoise(every_steps=1_000, batch_size=64, max_rows=2_048),),
        checkpoints=Checkpoints(every_steps=1_000, keep_last=2),
        logging=Logging(every_steps=50),
    )
