"""T5 v1.0 small: 6 + 6 layers of 512, ReLU, one table for words and logits.

    python tools/build_pretraining_dataset.py --corpus-dir TEXT --tokenizer google-t5/t5-base \
        --output-dir DATA
    python run_pretraining.py configs/t5_v1_0_small.py --data-dir DATA

DATA is made with T5's tokenizer: 32,100 tokens, the last hundred of which are its sentinels; add
--set model.vocab_size=N for another. Rows hold 568 tokens of text, which become 512 of input and
114 of target. The numbers are those of the paper: 2**19 steps of 128 rows,
Adafactor at 1 / sqrt(max(step, 10,000)), dropout 0.1.
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

POD = "v5e:2x4"
"""The TPU slice that tools/compile_all.py compiles this recipe for."""


def recipe() -> Run:
    """6 + 6 layers x 512, 8 heads of 64, feed-forward 2048; 128 rows of 512 and 114."""
    return Run(
        model=T5Config(vocab_size=32100),
        objective=SpanDenoising(
            noise=SpanCorruption(pattern=RandomSpans(rate=0.15, mean_length=3.0)),
        ),
        data=Data(layout=Blocks()),
        optimizer=Adafactor(1e-2, decay_rate=0.8),
        schedule=InverseSquareRoot(warmup_steps=10_000),
        guard=Guard(),
        phases=(Phase(steps=524_288, length=512, batch_size=128),),
        precision=Precision(compute="bfloat16"),
        remat="save_all",
        evaluations=(FixedNoise(every_steps=10_000, batch_size=128, max_rows=12_800),),
        checkpoints=Checkpoints(every_steps=5_000, keep_last=3, keep_every=100_000),
        device="tpu or gpu",
    )
