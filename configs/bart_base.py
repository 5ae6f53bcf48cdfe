"""BART-base: 6 + 6 layers of 768 that restore infilled and permuted text.

    python tools/build_pretraining_dataset.py --corpus-dir TEXT --tokenizer facebook/bart-base \
        --output-dir DATA
    python run_pretraining.py configs/bart_base.py --data-dir DATA

DATA is made with BART's tokenizer (50,265 tokens with <mask>); add --set model.vocab_size=N for
another. Sentences are the lines of TEXT; where its lines are paragraphs, name the full stop's id
instead: --set objective.noise.stops=[4]. Documents are packed whole, each attending only to itself.
The numbers are the authors': 30 % of the words in spans of Poisson length 3.5, every tenth span a
random token, all sentences permuted; 3.28 million tokens a step (6,400 rows), 500,000 steps, Adam
4e-4, warm-up 10,000, linear decay, weight decay 0.01, clipping 0.1. Unlike theirs, attention
weights and activations have no dropout here, so that flash attention can be used.
"""

from flaxpretrain.config import Checkpoints, Data, Phase, Precision, Run
from flaxpretrain.data.infilling import BartNoise
from flaxpretrain.data.rows import Documents
from flaxpretrain.models.bart import BartConfig
from flaxpretrain.objectives.span_denoising import SpanDenoising
from flaxpretrain.training.evaluate import FixedNoise
from flaxpretrain.training.guard import Guard
from flaxpretrain.training.optimizers import AdamW
from flaxpretrain.training.schedules import WarmupLinear

POD = "v5e:16x16"
"""The TPU slice that tools/compile_all.py compiles this recipe for."""


def recipe() -> Run:
    """6 + 6 layers x 768, 12 heads, feed-forward 3072; 6,400 rows of 512."""
    return Run(
        model=BartConfig(vocab_size=50265, attention_dropout=0.0, activation_dropout=0.0),
        objective=SpanDenoising(noise=BartNoise(mask_rate=0.3, poisson_mean=3.5)),
        data=Data(layout=Documents()),
        optimizer=AdamW(4e-4, weight_decay=0.01, b2=0.98, eps=1e-6, clip_norm=0.1),
        schedule=WarmupLinear(warmup_steps=10_000),
        guard=Guard(),
        phases=(Phase(steps=500_000, length=512, batch_size=6_400),),
        precision=Precision(compute="bfloat16"),
        remat="save_all",
        evaluations=(FixedNoise(every_steps=10_000, batch_size=1_280, max_rows=12_800),),
        checkpoints=Checkpoints(every_steps=2_000, keep_last=3, keep_every=50_000),
        device="tpu or gpu",
    )
