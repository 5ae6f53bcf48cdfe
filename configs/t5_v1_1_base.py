"""T5 v1.1 base: 12 + 12 layers of 768, gated GELU, a vocabulary head of its own.

    python tools/build_pretraining_dataset.py --corpus-dir TEXT --tokenizer google-t5/t5-base \
        --output-dir DATA
    python run_pretraining.py configs/t5_v1_1_base.py --data-dir DATA

DATA is made with T5's tokenizer: 32,100 tokens, the last hundred of which are its sentinels; add
--set model.vocab_size=N for another. Rows hold 568 tokens of text, which become 512 of input and
114 of target. The numbers are those of T5 v1.1 on C4: a million steps of
2,048 rows, Adafactor at 1 / sqrt(max(step, 10,000)), no dropout, z-loss 1e-4.
"""

from flaxpretrain.config import Checkpoints, Data, Phase, Precision, Run
from flaxpretrain.data.noising import SpanCorruption
from flaxpretrain.data.rows import Blocks
from flaxpretrain.data.spans import RandomSpans
from flaxpretrain.hardware import HardwareRule
from flaxpretrain.models.t5 import T5Config
from flaxpretrain.objectives.span_denoising import SpanDenoising
from flaxpretrain.training.evaluate import FixedNoise
from flaxpretrain.training.guard import Guard
from flaxpretrain.training.optimizers import Adafactor
from flaxpretrain.training.schedules import InverseSquareRoot

POD = "v5e:8x16"
"""The TPU slice that tools/compile_all.py compiles this recipe for."""

HARDWARE = (
    HardwareRule("TPU v5 ?(lite|e)", {"remat": "save_all"}, tokens_per_device=16_384),
    HardwareRule("TPU v6 ?(lite|e)", {"remat": "save_all"}, tokens_per_device=32_768),
    HardwareRule("TPU v5p?$", {"remat": "save_all"}, tokens_per_device=65_536),
    HardwareRule("H100|H200|A100.*80", {"remat": "save_all"}, tokens_per_device=65_536),
    HardwareRule("A100", {"remat": "save_all"}, tokens_per_device=32_768),
)
"""What a device has memory for; no remat where that leaves enough rows at once."""


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
        hardware=HARDWARE,
        remat="save_all",
        evaluations=(FixedNoise(every_steps=10_000, batch_size=512, max_rows=12_800),),
        checkpoints=Checkpoints(every_steps=5_000, keep_last=3, keep_every=100_000),
        device="tpu or gpu",
    )
