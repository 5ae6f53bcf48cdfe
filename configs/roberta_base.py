"""RoBERTa-base: rows of 512, dynamic masks, large batches.

    python run_pretraining.py configs/roberta_base.py --data-dir DATA

DATA is made by tools/build_pretraining_dataset.py with RoBERTa's byte-level tokenizer (50,265
tokens, padded to 50,304 in the table). For a TPU slice or a GPU box; raise `phases.0.microbatches`
(--set microbatches=8) where 2,048 rows do not fit.

The numbers are those of fairseq (examples/roberta/config/pretraining/base.yaml): batch 2,048,
125,000 steps, Adam 5e-4 with betas .9 and .98 and eps 1e-6, weight decay .01, no clipping, warm-up
10,000 then linear to zero, masks drawn anew every epoch with probabilistic rounding. Attention
dropout is 0, because the flash kernels have none. Rows are blocks of the token stream; whole
sentences come with the sentence objectives.
"""

from bert_base import HARDWARE

from flaxpretrain.config import Checkpoints, Data, Phase, Precision, Run
from flaxpretrain.data.masking import TokenMasking
from flaxpretrain.data.rows import Blocks
from flaxpretrain.models.roberta import RobertaConfig
from flaxpretrain.objectives.masked_lm import MaskedLM
from flaxpretrain.training.evaluate import FixedNoise
from flaxpretrain.training.guard import Guard
from flaxpretrain.training.optimizers import AdamW
from flaxpretrain.training.schedules import Polynomial

POD = "v5e:4x8"
"""The TPU slice that tools/compile_all.py compiles this recipe for."""


def recipe() -> Run:
    """12 layers x 768, 12 heads, feed-forward 3072, vocabulary 50,265, no segment types."""
    return Run(
        model=RobertaConfig(attention_probs_dropout_prob=0.0),
        objective=MaskedLM(masking=TokenMasking(rate=0.15, count="fairseq")),
        data=Data(layout=Blocks()),
        optimizer=AdamW(5e-4, b2=0.98, weight_decay=0.01, eps=1e-6, clip_norm=None),
        schedule=Polynomial(warmup_steps=10_000, power=1.0, shifted=True),
        guard=Guard(),
        phases=(Phase(steps=125_000, length=512, batch_size=2048),),
        precision=Precision(compute="bfloat16"),
        hardware=HARDWARE,
        remat="dots",
        evaluations=(FixedNoise(every_steps=2_500, batch_size=1024, max_rows=16_384),),
        checkpoints=Checkpoints(
            every_steps=1_000,
            keep_last=3,
            keep_every=25_000,
            best="validation/masked_lm",
            temporary_every_seconds=900,
        ),
        device="tpu or gpu",
    )
