"""BERT-large in large batches with LAMB: 7,038 steps at 128, then 1,563 at 512.

    python run_pretraining.py configs/bert_large_lamb.py --data-dir DATA

DATA is made by tools/build_pretraining_dataset.py with the vocabulary of bert-base-uncased. For a
TPU pod slice: on 256 chips of v5e a step's 65,536 rows are 256 rows a chip, which fit in 4
microbatches (8 in the second phase); on other devices there are as many as HARDWARE says.

The numbers are those of NVIDIA's DeepLearningExamples (PyTorch/LanguageModeling/BERT), which follow
the LAMB paper, https://arxiv.org/abs/1904.00962: learning rate 6e-3 then 4e-3, polynomial decay of
power .5, warm-up .284 and .128 of the phase, weight decay .01. Attention dropout is 0, because the
flash kernels have none.
"""

from flaxpretrain.config import Checkpoints, Data, Phase, Precision, Run
from flaxpretrain.data.masking import TokenMasking
from flaxpretrain.data.rows import Blocks
from flaxpretrain.hardware import HardwareRule
from flaxpretrain.models.bert import BertConfig
from flaxpretrain.objectives.masked_lm import MaskedLM
from flaxpretrain.training.evaluate import FixedNoise
from flaxpretrain.training.guard import Guard
from flaxpretrain.training.optimizers import LAMB
from flaxpretrain.training.schedules import Polynomial, Stage, Stages

FIRST, SECOND = 7_038, 1_563


POD = "v5e:16x16"
"""The TPU slice that tools/compile_all.py compiles this recipe for."""

HARDWARE = (
    HardwareRule("TPU v5 ?(lite|e)", {"remat": "dots"}, tokens_per_device=8_192),
    HardwareRule("TPU v6 ?(lite|e)", {"remat": "save_all"}, tokens_per_device=8_192),
    HardwareRule("TPU v5p?$", {"remat": "save_all"}, tokens_per_device=32_768),
    HardwareRule("H100|H200|A100.*80", {"remat": "save_all"}, tokens_per_device=16_384),
    HardwareRule("A100", {"remat": "dots"}, tokens_per_device=8_192),
)
"""What a device has memory for; no remat where that leaves enough rows at once."""


def recipe() -> Run:
    """24 layers x 1024, 16 heads, feed-forward 4096, vocabulary 30,522."""
    return Run(
        model=BertConfig(
            hidden_size=1024,
            num_hidden_layers=24,
            num_attention_heads=16,
            intermediate_size=4096,
            attention_probs_dropout_prob=0.0,
        ),
        objective=MaskedLM(masking=TokenMasking(rate=0.15, count="bert")),
        data=Data(layout=Blocks()),
        optimizer=LAMB(6e-3, weight_decay=0.01, eps=1e-6, clip_norm=1.0),
        schedule=Stages(
            stages=(
                Stage(schedule=Polynomial(warmup_share=0.284, power=0.5), steps=FIRST),
                Stage(schedule=Polynomial(warmup_share=0.128, power=0.5), scale=4e-3 / 6e-3),
            )
        ),
        guard=Guard(),
        phases=(
            Phase(steps=FIRST, length=128, batch_size=65_536, microbatches=4),
            Phase(steps=SECOND, length=512, batch_size=32_768, microbatches=8),
        ),
        precision=Precision(compute="bfloat16"),
        hardware=HARDWARE,
        remat="dots",
        evaluations=(FixedNoise(every_steps=500, batch_size=1024, max_rows=16_384),),
        checkpoints=Checkpoints(
            every_steps=250,
            keep_last=3,
            best="validation/masked_lm",
            temporary_every_seconds=900,
        ),
        device="tpu or gpu",
    )
