"""Chinese BERT-base with whole word masks: characters as tokens, words as jieba finds them.

    python tools/build_pretraining_dataset.py --corpus-dir TEXT --vocab-file vocab.txt \
        --words jieba --language zh --output-dir DATA
    python run_pretraining.py configs/chinese_wwm_base.py --data-dir DATA

DATA is made with the vocabulary of bert-base-chinese (21,128 tokens); without --words jieba each
character is a word, and the masks are those of tokens. The plan follows Cui et al. 2019,
https://arxiv.org/abs/1906.08101, section 2: 100,000 steps at 128 with batch 2,560, then 100,000 at
512 with batch 384, rate 1e-4. Differences: words by jieba instead of LTP, no next-sentence term,
AdamW instead of LAMB, which they used for batches this large, and attention dropout is 0.
"""

from bert_base import HARDWARE

from flaxpretrain.config import Checkpoints, Data, Phase, Precision, Run
from flaxpretrain.data.rows import Documents
from flaxpretrain.data.word_masking import WordMasking
from flaxpretrain.models.bert import BertConfig
from flaxpretrain.objectives.masked_lm import MaskedLM
from flaxpretrain.training.evaluate import FixedNoise
from flaxpretrain.training.guard import Guard
from flaxpretrain.training.optimizers import AdamW
from flaxpretrain.training.schedules import WarmupLinear

POD = "v5e:4x4"


def recipe() -> Run:
    """12 layers x 768, 12 heads, feed-forward 3072, vocabulary 21,128."""
    return Run(
        model=BertConfig(vocab_size=21128, attention_probs_dropout_prob=0.0),
        objective=MaskedLM(masking=WordMasking(rate=0.15)),
        data=Data(layout=Documents()),
        optimizer=AdamW(1e-4, weight_decay=0.01, eps=1e-6, clip_norm=1.0),
        schedule=WarmupLinear(warmup_steps=10_000),
        guard=Guard(),
        phases=(
            Phase(steps=100_000, length=128, batch_size=2_560),
            Phase(steps=100_000, length=512, batch_size=384),
        ),
        precision=Precision(compute="bfloat16"),
        hardware=HARDWARE,
        remat="dots",
        evaluations=(FixedNoise(every_steps=10_000, batch_size=256, max_rows=16_384),),
        checkpoints=Checkpoints(every_steps=5_000, keep_last=3, keep_every=50_000),
        device="tpu or gpu",
    )
