"""T5 v1.1 base in 65,536 steps: nanoT5's recipe for one day of one GPU.

    python tools/build_pretraining_dataset.py --corpus-dir TEXT --tokenizer google-t5/t5-base \
        --output-dir DATA
    python run_pretraining.py configs/t5_v1_1_base_budget.py --data-dir DATA

DATA is made with T5's tokenizer: 32,100 tokens, the last hundred of which are its sentinels; add
--set model.vocab_size=N for another. Rows hold 568 tokens of text, which become 512 of input and
114 of target. 128 rows a step, AdamW scaled by the root mean square of each
parameter at 2e-2, warm-up 10,000, cosine to 1e-5, no dropout. Its author reports a held-out loss
of 1.953 nat on C4, the paper of v1.1 1.942. In 16 hours of an A100 it makes 53,332 steps of 256:
--set steps=53332 --set batch_size=256 --set schedule.warmup_steps=6666.
"""

from flaxpretrain.config import Checkpoints, Data, Phase, Precision, Run
from flaxpretrain.data.noising import SpanCorruption
from flaxpretrain.data.rows import Blocks
from flaxpretrain.data.spans import RandomSpans
from flaxpretrain.models.t5 import T5Config
from flaxpretrain.objectives.span_denoising import SpanDenoising
from flaxpretrain.training.evaluate import FixedNoise
from flaxpretrain.training.guard import Guard
from flaxpretrain.training.optimizers import RMSScaledAdamW
from flaxpretrain.training.schedules import Cosine

POD = "v5e:2x4"
"""The TPU slice that tools/compile_all.py compiles this recipe for."""


def recipe() -> Run:
    """12 + 12 layers x 768, 12 heads of 64, gated feed-forward 2048; 128 rows of 512 and 114."""
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
        objective=SpanDenoising(
            noise=SpanCorruption(pattern=RandomSpans(rate=0.15, mean_length=3.0)),
        ),
        data=Data(layout=Blocks()),
        optimizer=RMSScaledAdamW(2e-2, clip_norm=1.0),
        schedule=Cosine(warmup_steps=10_000, floor=5e-4),
        guard=Guard(),
        phases=(Phase(steps=65_536, length=512, batch_size=128),),
        precision=Precision(compute="bfloat16"),
        remat="save_all",
        evaluations=(FixedNoise(every_steps=5_000, batch_size=128, max_rows=12_800),),
        checkpoints=Checkpoints(every_steps=5_000, keep_last=3, keep_every=20_000),
        device="tpu or gpu",
    )
