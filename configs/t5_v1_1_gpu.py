"""T5 v1.1 base on GPUs as NVIDIA's Rosetta trains it: AdamW and dropout in place of Adafactor.

    python tools/build_pretraining_dataset.py --corpus-dir TEXT --tokenizer google-t5/t5-base \
        --output-dir DATA
    python run_pretraining.py configs/t5_v1_1_gpu.py --data-dir DATA

DATA is made with T5's tokenizer: 32,100 tokens, the last hundred of which are its sentinels; add
--set model.vocab_size=N for another. Rows hold 568 tokens of text, which become 512 of input and
114 of target. A million steps of 2,048 rows, AdamW from 1e-4 linearly down to 1e-5, weight decay
0.01, clipping at 1, dropout 0.1, on the Pile or C4, as in google-research/t5x contrib/gpu and
NVIDIA's JAX-Toolbox (rosetta/projects/t5x). Warm-up, 10,000 steps, and z-loss are those of T5 v1.1.
"""

from flaxpretrain.config import Checkpoints, Data, Phase, Precision, Run
from flaxpretrain.data.noising import SpanCorruption
from flaxpretrain.data.rows import Blocks
from flaxpretrain.data.spans import RandomSpans
from flaxpretrain.models.t5 import T5Config
from flaxpretrain.objectives.span_denoising import SpanDenoising
from flaxpretrain.training.evaluate import FixedNoise
from flaxpretrain.training.guard import Guard
from flaxpretrain.training.optimizers import AdamW
from flaxpretrain.training.schedules import Polynomial

POD = "v5e:8x16"
"""The TPU slice that tools/compile_all.py compiles this recipe for."""


def recipe() -> Run:
    """12 + 12 layers x 768, 12 heads of 64, gated feed-forward 2048; 2,048 rows of 512 and 114."""
    return Run(
        model=T5Config(
            vocab_size=32100,
            d_model=768,
            d_kv=64,
            d_ff=2048,
            num_layers=12,
            num_heads=12,
            dropout_rate=0.1,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
        ),
        objective=SpanDenoising(
            noise=SpanCorruption(pattern=RandomSpans(rate=0.15, mean_length=3.0)),
            terms={"denoising": 1.0, "z_loss": 1e-4},
        ),
        data=Data(layout=Blocks()),
        optimizer=AdamW(1e-4, weight_decay=0.01, clip_norm=1.0),
        schedule=Polynomial(warmup_steps=10_000, power=1.0, end=0.1),
        guard=Guard(),
        phases=(Phase(steps=1_000_000, length=512, batch_size=2_048),),
        precision=Precision(compute="bfloat16"),
        remat="save_all",
        evaluations=(FixedNoise(every_steps=10_000, batch_size=512, max_rows=12_800),),
        checkpoints=Checkpoints(every_steps=5_000, keep_last=3, keep_every=100_000),
        device="tpu or gpu",
    )
