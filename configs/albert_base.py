"""ALBERT-base: layers that share parameters, n-grams of words, sentence order prediction.

    python tools/build_pretraining_dataset.py --corpus-dir TEXT --tokenizer TOKENIZER \
        --output-dir DATA
    python run_pretraining.py configs/albert_base.py --data-dir DATA

TEXT holds a sentence a line and a blank line between documents; TOKENIZER has 30,000 tokens, a
Unigram by tools/train_tokenizer.py or that of albert/albert-base-v2. The export is an
AlbertForPreTraining.

The numbers are those of google-research/albert, version 1: batch 4,096 at 512, 125,000 steps, LAMB
1.76e-3, warm-up 3,125 then linear to zero, weight decay .01, n-grams of up to 3 words with chances
6/11, 3/11 and 2/11, 15 % masked (there at most 20 tokens a row); the negative of a pair is the pair
swapped. Differences, on purpose: pairs, masks and labels are drawn anew in every
epoch, where the original repeats forty fixed copies; short pairs share a row; no dropout, as in
version 2.
"""

from flaxpretrain.config import Checkpoints, Data, Phase, Precision, Run
from flaxpretrain.data.sentence_pairs import SentencePairs
from flaxpretrain.data.word_masking import NgramMasking
from flaxpretrain.models.albert import AlbertConfig
from flaxpretrain.objectives.second_terms import MaskedLMWith, SentenceRelation
from flaxpretrain.training.evaluate import FixedNoise
from flaxpretrain.training.guard import Guard
from flaxpretrain.training.optimizers import LAMB
from flaxpretrain.training.schedules import WarmupLinear

POD = "v5e:8x8"
"""The TPU slice that tools/compile_all.py compiles this recipe for."""


def recipe() -> Run:
    """12 layers x 768 from the parameters of one, embeddings of 128, vocabulary 30,000."""
    return Run(
        model=AlbertConfig(heads=("mlm", "pooler", "nsp")),
        objective=MaskedLMWith(masking=NgramMasking(rate=0.15), also=(SentenceRelation(),)),
        data=Data(layout=SentencePairs(negatives="swapped")),
        optimizer=LAMB(1.76e-3, weight_decay=0.01, eps=1e-6, clip_norm=1.0),
        schedule=WarmupLinear(warmup_steps=3_125),
        guard=Guard(),
        phases=(Phase(steps=125_000, length=512, batch_size=4_096, microbatches=2),),
        precision=Precision(compute="bfloat16"),
        remat="dots",
        evaluations=(FixedNoise(every_steps=2_500, batch_size=512, max_rows=16_384),),
        checkpoints=Checkpoints(every_steps=1_000, keep_last=3, keep_every=25_000),
        device="tpu or gpu",
    )
