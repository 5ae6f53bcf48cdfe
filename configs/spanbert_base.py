"""SpanBERT-base: geometric spans and the span boundary objective, rows of 512.

    python run_pretraining.py configs/spanbert_base.py --data-dir DATA

DATA is made with the vocabulary of bert-base-cased (28,996 tokens). The numbers are those of
facebookresearch/SpanBERT pretraining/README.md: Adam 1e-4, eps 1e-8, 2,400,000 updates, warm-up
10,000 then linear, weight decay 0.01, clipping at 1, 15 % in spans of up to 10 words (p 0.2), each
[MASK], random or kept as a whole, the boundary term with weight 1 and 15 places, rows of one
segment within a document. Their batches of 4,096 tokens on 32 GPUs are 256 rows here. Differences:
attention dropout is 0, because the flash kernels have none, and short documents share a row.
"""

from bert_base import HARDWARE

from flaxpretrain.config import Checkpoints, Data, Phase, Precision, Run
from flaxpretrain.data.rows import Documents
from flaxpretrain.data.span_masking import SpanMasking
from flaxpretrain.models.bert import BertConfig
from flaxpretrain.objectives.second_terms import MaskedLMWith, SpanBoundary
from flaxpretrain.training.evaluate import FixedNoise
from flaxpretrain.training.guard import Guard
from flaxpretrain.training.optimizers import AdamW
from flaxpretrain.training.schedules import WarmupLinear

POD = "v5e:4x4"


def recipe() -> Run:
    """12 layers x 768, 12 heads, feed-forward 3072, vocabulary 28,996."""
    return Run(
        model=BertConfig(vocab_size=28996, attention_probs_dropout_prob=0.0),
        objective=MaskedLMWith(masking=SpanMasking(rate=0.15), also=(SpanBoundary(),)),
        data=Data(layout=Documents()),
        optimizer=AdamW(1e-4, weight_decay=0.01, eps=1e-8, clip_norm=1.0),
        schedule=WarmupLinear(warmup_steps=10_000),
        guard=Guard(),
        phases=(Phase(steps=2_400_000, length=512, batch_size=256),),
        precision=Precision(compute="bfloat16"),
        hardware=HARDWARE,
        remat="dots",
        evaluations=(FixedNoise(every_steps=10_000, batch_size=256, max_rows=16_384),),
        checkpoints=Checkpoints(every_steps=5_000, keep_last=3, keep_every=100_000),
        device="tpu or gpu",
    )
