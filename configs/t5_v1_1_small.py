"""T5 v1.1 small: 8 + 8 layers of 512, gated GELU, a vocabulary head of its own.

    python tools/build_pretraining_dataset.py --corpus-dir TEXT --tokenizer google-t5/t5-base \
        --output-dir DATA
    python run_pretraining.py configs/t5_v1_1_small.py --data-dir DATA

DATA is made with T5's tokenizer: 32,100 tokens, the last hundred of which are its sentinels; add
--set model.vocab_size=N for another. Rows hold 568 tokens of text, which become 512 of input and
114 of target. The numbers are those of T5 v1.1 on C4: a million steps of
2,048 rows, Adafactor at 1 / sqrt(max(step, 10,000)), no dropout, z-loss 1e-4.
"""

from flaxpretrain.config import Checkpoints, Data, Phase, Precision, Run
from flaxpretrain.data.noising import SpanCorruption
from flaxpretrain.data.rows import Blocks
from flaxpretrain.data.spans import RandomSpans
from flaxpretrain.models.t5 import T5Config
from flaxpretrain.objectives.span_denoising import SpanDenoising
from flaxpretrain.training.evaluate import FixedNoise
from flaxpretrain.training.guard import Guard
from flaxpretrain.training.optimizers import Adafactor
from flaxpretrain.training.schedules import InverseSquareRoot

POD = "v5e:8x8"
"""The TPU slice that tools/compile_all.py compiles this recipe for."""


def recipe() -> Run:
    """8 + 8 layers x 512, 6 heads of 64, gated feed-forward 1024; 2,048 rows of 512 and 114."""
    return Run(
        model=T5Config(
            vocab_size=32100,
            d_model=512,
            d_kv=64,
            d_ff=1024,
            num_layers=8,
            num_heads=6,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
        ),
        objective=SpanDenoising(
            noise=SpanCorruption(pattern=RandomSpans(rate=0.15, mean_length=3.0)),
            terms={"denoising": 1.0, "z_loss": 1e-4},
        ),
        data=Data(layout=Blocks()),
        optimizer=Adafactor(1e-2, decay_rate=0.8),
        schedule=InverseSquareRoot(warmup_steps=10_000),
        guard=Guard(),
        phases=(Phase(steps=1_000_000, length=512, batch_size=2_048),),
        precision=Precision(compute="bfloat16"),
        remat="save_all",
        evaluations=(FixedNoise(every_steps=10_000, batch_size=512, max_rows=12_800),),
        checkpoints=Checkpoints(every_steps=5_000, keep_last=3, keep_every=100_000),
        device="tpu or gpu",
    )
