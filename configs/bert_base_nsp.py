"""BERT-base as published: masked language modelling and next sentence prediction, in two phases.

    python run_pretraining.py configs/bert_base_nsp.py --data-dir DATA

DATA holds a sentence a line and a blank line between documents, in the vocabulary of
bert-base-uncased (30,522 tokens). The export is a BertForPreTraining.

The numbers are those of google-research/bert: batch 256, 900,000 steps at 128 then 100,000 at 512,
AdamW 1e-4 without bias correction, warm-up 10,000 then linear to zero, 15 % masked, at most 20 or
77 a row. Differences, on purpose: pairs, masks and labels are drawn anew in every epoch, where the
original repeats ten fixed copies; short pairs share a row; attention dropout is 0, because the
flash kernels have none.
"""

from bert_base import HARDWARE

from flaxpretrain.config import Checkpoints, Data, Phase, Precision, Run
from flaxpretrain.data.masking import TokenMasking
from flaxpretrain.data.sentence_pairs import SentencePairs
from flaxpretrain.models.bert import BertConfig
from flaxpretrain.objectives.second_terms import MaskedLMWith, SentenceRelation
from flaxpretrain.training.evaluate import FixedNoise
from flaxpretrain.training.guard import Guard
from flaxpretrain.training.optimizers import AdamW
from flaxpretrain.training.schedules import WarmupLinear

POD = "v5e:4x4"


def recipe() -> Run:
    """12 layers x 768, 12 heads, feed-forward 3072, vocabulary 30,522, pooler and pair head."""
    return Run(
        model=BertConfig(attention_probs_dropout_prob=0.0, heads=("mlm", "pooler", "nsp")),
        objective=MaskedLMWith(masking=TokenMasking(rate=0.15), also=(SentenceRelation(),)),
        data=Data(layout=SentencePairs()),
        optimizer=AdamW(1e-4, weight_decay=0.01, eps=1e-6, bias_correction=False, clip_norm=1.0),
        schedule=WarmupLinear(warmup_steps=10_000),
        guard=Guard(),
        phases=(
            Phase(steps=900_000, length=128, batch_size=256),
            Phase(steps=100_000, length=512, batch_size=256),
        ),
        precision=Precision(compute="bfloat16"),
        hardware=HARDWARE,
        remat="dots",
        evaluations=(FixedNoise(every_steps=10_000, batch_size=256, max_rows=16_384),),
        checkpoints=Checkpoints(every_steps=5_000, keep_last=3, keep_every=100_000),
        device="tpu or gpu",
    )
