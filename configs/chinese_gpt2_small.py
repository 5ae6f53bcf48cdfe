"""A Chinese GPT-2 small of characters: 12 layers of 768, rows of 128 and then of 1,024.

    python tools/build_pretraining_dataset.py --corpus-dir TEXT --vocab-file vocab.txt \
        --language zh --output-dir DATA
    python run_pretraining.py configs/chinese_gpt2_small.py --data-dir DATA

DATA is made with the vocabulary of bert-base-chinese (21,128 tokens, one a character): documents
open with [CLS] and end with [SEP]. The plan is that of uer/gpt2-chinese-cluecorpussmall (its model
card): 1,000,000 steps of 512 rows of 128 at 1e-4, then 250,000 of 128 rows of 1,024 at 5e-5, each
with a tenth of warm-up and a linear decay, dropout 0.1. Differences: documents are packed whole and
see only themselves, and attention weights have no dropout. The logits are made in 8 parts.
"""

from flaxpretrain.config import Checkpoints, Data, Phase, Precision, Run
from flaxpretrain.data.rows import Documents
from flaxpretrain.models.gpt2 import GPT2Config
from flaxpretrain.objectives.causal_lm import CausalLM
from flaxpretrain.training.evaluate import FixedNoise
from flaxpretrain.training.guard import Guard
from flaxpretrain.training.optimizers import AdamW
from flaxpretrain.training.schedules import Polynomial, Stage, Stages

POD = "v5e:4x4"
"""The TPU slice that tools/compile_all.py compiles this recipe for."""


def recipe() -> Run:
    """12 layers x 768, 12 heads, feed-forward 3072, vocabulary 21,128."""
    decay = Polynomial(warmup_share=0.1, power=1.0)
    return Run(
        model=GPT2Config(
            vocab_size=21128, attn_pdrop=0.0, bos_token_id=101, eos_token_id=102, pad_token_id=0
        ),
        objective=CausalLM(chunks=8),
        data=Data(layout=Documents()),
        optimizer=AdamW(1e-4, weight_decay=0.01, clip_norm=1.0),
        schedule=Stages(
            stages=(Stage(schedule=decay, steps=1_000_000), Stage(schedule=decay, scale=0.5))
        ),
        guard=Guard(),
        phases=(
            Phase(steps=1_000_000, length=128, batch_size=512),
            Phase(steps=250_000, length=1_024, batch_size=128),
        ),
        precision=Precision(compute="bfloat16"),
        remat="dots",
        evaluations=(FixedNoise(every_steps=10_000, batch_size=128, max_rows=4_096),),
        checkpoints=Checkpoints(every_steps=5_000, keep_last=3, keep_every=100_000),
        device="tpu or gpu",
    )
