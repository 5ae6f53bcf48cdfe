"""Like Chinese MacBERT-base: n-grams of jieba's words, sentence order prediction, rows of 512.

    python tools/build_pretraining_dataset.py --corpus-dir TEXT --vocab-file vocab.txt \
        --words jieba --language zh --output-dir DATA
    python run_pretraining.py configs/chinese_macbert_like.py --data-dir DATA

DATA is made with the vocabulary of bert-base-chinese (21,128 tokens), a sentence a line and a blank
line between documents. From https://arxiv.org/abs/2004.13922: n-grams of one to four words with
chances 40, 30, 20 and 10 %, 15 % masked, sentence order prediction, rows of 512. Unlike MacBERT the
hidden words become [MASK] and not a similar word, so that no table of synonyms is needed. Batch,
rate and steps are ours: the paper continues from BERT, which --init-from does.
"""

from bert_base import HARDWARE

from flaxpretrain.config import Checkpoints, Data, Phase, Precision, Run
from flaxpretrain.data.sentence_pairs import SentencePairs
from flaxpretrain.data.word_masking import NgramMasking
from flaxpretrain.models.bert import BertConfig
from flaxpretrain.objectives.second_terms import MaskedLMWith, SentenceRelation
from flaxpretrain.training.evaluate import FixedNoise
from flaxpretrain.training.guard import Guard
from flaxpretrain.training.optimizers import AdamW
from flaxpretrain.training.schedules import WarmupLinear

POD = "v5e:4x4"


def recipe() -> Run:
    """12 layers x 768, 12 heads, feed-forward 3072, vocabulary 21,128, pooler and pair head."""
    return Run(
        model=BertConfig(
            vocab_size=21128, attention_probs_dropout_prob=0.0, heads=("mlm", "pooler", "nsp")
        ),
        objective=MaskedLMWith(
            masking=NgramMasking(rate=0.15, weights=(0.4, 0.3, 0.2, 0.1)),
            also=(SentenceRelation(),),
        ),
        data=Data(layout=SentencePairs(negatives="swapped", lone="alone")),
        optimizer=AdamW(1e-4, weight_decay=0.01, eps=1e-6, clip_norm=1.0),
        schedule=WarmupLinear(warmup_steps=10_000),
        guard=Guard(),
        phases=(Phase(steps=1_000_000, length=512, batch_size=512),),
        precision=Precision(compute="bfloat16"),
        hardware=HARDWARE,
        remat="dots",
        evaluations=(FixedNoise(every_steps=10_000, batch_size=256, max_rows=16_384),),
        checkpoints=Checkpoints(every_steps=5_000, keep_last=3, keep_every=100_000),
        device="tpu or gpu",
    )
