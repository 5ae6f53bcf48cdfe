"""UL2 on T5 v1.1 base: a mixture of seven denoisers, each told by its mode token.

    python tools/build_pretraining_dataset.py --corpus-dir TEXT --tokenizer google-t5/t5-base \
        --output-dir DATA
    python run_pretraining.py configs/ul2_base.py --data-dir DATA

DATA is made with T5's tokenizer: 32,100 tokens, the last hundred of which are its sentinels; the
last three of these tell the mode. Two examples share a row of 512 inputs, so that 311 positions
hold their targets; one example a row needs 512 positions, two in five of them empty, and 130
sentinels (--set objective.noise.examples_per_row=1). The seven denoisers are alike likely, as in
the paper's code; batch 128, 500,000 steps, Adafactor at 1 / sqrt(max(step, 10,000)).
"""

from flaxpretrain.config import Checkpoints, Data, Phase, Precision, Run
from flaxpretrain.data.denoisers import ul2
from flaxpretrain.data.rows import Blocks
from flaxpretrain.models.t5 import T5Config
from flaxpretrain.objectives.span_denoising import SpanDenoising
from flaxpretrain.training.evaluate import FixedNoise
from flaxpretrain.training.guard import Guard
from flaxpretrain.training.optimizers import Adafactor
from flaxpretrain.training.schedules import InverseSquareRoot

POD = "v5e:2x4"
"""The TPU slice that tools/compile_all.py compiles this recipe for."""


def recipe() -> Run:
    """12 + 12 layers x 768, 12 heads of 64, gated feed-forward 2048; 128 rows of 512 and 311."""
    return Run(
        model=T5Config(
            vocab_size=32100,
            d_model=768,
            d_kv=64,
            d_ff=2048,
            num_layers=12,
            num_heads=12,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
        ),
        objective=SpanDenoising(noise=ul2(examples_per_row=2)),
        data=Data(layout=Blocks()),
        optimizer=Adafactor(1e-2, decay_rate=0.8),
        schedule=InverseSquareRoot(warmup_steps=10_000),
        guard=Guard(),
        phases=(Phase(steps=500_000, length=512, batch_size=128),),
        precision=Precision(compute="bfloat16"),
        remat="save_all",
        evaluations=(FixedNoise(every_steps=10_000, batch_size=128, max_rows=12_800),),
        checkpoints=Checkpoints(every_steps=5_000, keep_last=3, keep_every=100_000),
        device="tpu or gpu",
    )
