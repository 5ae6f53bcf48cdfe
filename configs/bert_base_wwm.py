"""BERT-base with whole word masks, in two phases, on full blocks.

    python run_pretraining.py configs/bert_base_wwm.py --data-dir DATA

DATA as for configs/bert_base.py, whose numbers these are: only the mask differs. A word that would
pass the budget of 20 or 77 predictions a row is left out (google-research/bert,
do_whole_word_mask); --set objective.masking.mask_share=1 --set objective.masking.random_share=0
hides all of them behind [MASK].
"""

from bert_base import HARDWARE

from flaxpretrain.config import Checkpoints, Data, Phase, Precision, Run
from flaxpretrain.data.rows import Blocks
from flaxpretrain.data.word_masking import WordMasking
from flaxpretrain.models.bert import BertConfig
from flaxpretrain.objectives.masked_lm import MaskedLM
from flaxpretrain.training.evaluate import FixedNoise
from flaxpretrain.training.guard import Guard
from flaxpretrain.training.optimizers import AdamW
from flaxpretrain.training.schedules import WarmupLinear

POD = "v5e:4x4"


def recipe() -> Run:
    """12 layers x 768, 12 heads, feed-forward 3072, vocabulary 30,522."""
    return Run(
        model=BertConfig(attention_probs_dropout_prob=0.0),
        objective=MaskedLM(masking=WordMasking(rate=0.15)),
        data=Data(layout=Blocks()),
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
