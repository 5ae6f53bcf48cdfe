"""A Chinese BART-base of characters, masked by n-grams of words, as Fengshenbang's Randeng-BART.

    python tools/build_pretraining_dataset.py --corpus-dir TEXT --vocab-file vocab.txt \
        --words jieba --language zh --output-dir DATA
    python run_pretraining.py configs/chinese_bart_base.py --data-dir DATA

DATA is made with the vocabulary of bert-base-chinese (21,128 tokens) and the words that jieba
finds; without --words jieba each character is a word. Sentences end at one of
。;；!！?？ and are permuted; 30 % of the characters are masked by n-grams of one to three words,
80 % of them [MASK] and 10 % random, and neighbouring [MASK] are one. The original trains 32 rows a
GPU at 1e-4 with weight decay 0.1 and a hundredth of the steps as warm-up; batch and steps are ours,
and attention weights and activations have no dropout.
"""

from flaxpretrain.config import Checkpoints, Data, Phase, Precision, Run
from flaxpretrain.data.infilling import FusedMasks
from flaxpretrain.data.rows import Documents
from flaxpretrain.data.word_masking import NgramMasking
from flaxpretrain.models.bart import BartConfig
from flaxpretrain.objectives.span_denoising import SpanDenoising
from flaxpretrain.training.evaluate import FixedNoise
from flaxpretrain.training.guard import Guard
from flaxpretrain.training.optimizers import AdamW
from flaxpretrain.training.schedules import WarmupLinear

POD = "v5e:2x4"
"""The TPU slice that tools/compile_all.py compiles this recipe for."""

STOPS = (511, 132, 8039, 106, 8013, 136, 8043)
"""。 ; ； ! ！ ? ？ in the vocabulary of bert-base-chinese."""


def recipe() -> Run:
    """6 + 6 layers x 768, 12 heads, feed-forward 3072; 256 rows of 512."""
    return Run(
        model=BartConfig(
            vocab_size=21128,
            attention_dropout=0.0,
            activation_dropout=0.0,
            pad_token_id=0,
            bos_token_id=101,
            eos_token_id=102,
            decoder_start_token_id=102,
            forced_eos_token_id=102,
        ),
        objective=SpanDenoising(
            noise=FusedMasks(
                masking=NgramMasking(rate=0.3, mask_share=0.8, random_share=0.1), stops=STOPS
            ),
        ),
        data=Data(layout=Documents()),
        optimizer=AdamW(1e-4, weight_decay=0.1, eps=1e-6, clip_norm=1.0),
        schedule=WarmupLinear(warmup_share=0.01),
        guard=Guard(),
        phases=(Phase(steps=500_000, length=512, batch_size=256),),
        precision=Precision(compute="bfloat16"),
        remat="save_all",
        evaluations=(FixedNoise(every_steps=10_000, batch_size=256, max_rows=12_800),),
        checkpoints=Checkpoints(every_steps=5_000, keep_last=3, keep_every=50_000),
        device="tpu or gpu",
    )
