"""BERT-base in two phases, rows of 128 then of 512, masked language modelling on full blocks.

    python run_pretraining.py configs/bert_base.py --data-dir DATA

DATA is made by tools/build_pretraining_dataset.py with the vocabulary of bert-base-uncased (30,522
tokens, padded to 30,592 in the table). For a TPU slice or a GPU box; the mesh takes all devices
as `data`.

The numbers are those of google-research/bert (run_pretraining.py and README): batch 256, 900,000
steps at 128 then 100,000 at 512, AdamW 1e-4 without bias correction, warm-up 10,000 then linear to
zero, 15 % masked, at most 20 or 77 a row. Two differences, on purpose: attention dropout is 0,
because the flash kernels have none, and there is no next-sentence term here.
"""

from flaxpretrain.config import Checkpoints, Data, Phase, Precision, Run
from flaxpretrain.data.masking import TokenMasking
from flaxpretrain.data.rows import Blocks
from flaxpretrain.hardware import HardwareRule
from flaxpretrain.models.bert import BertConfig
from flaxpretrain.objectives.masked_lm import MaskedLM
from flaxpretrain.training.evaluate import FixedNoise
from flaxpretrain.training.guard import Guard
from flaxpretrain.training.optimizers import AdamW
from flaxpretrain.training.schedules import WarmupLinear

POD = "v5e:4x4"
"""The TPU slice that tools/compile_all.py compiles this recipe for."""

FAST = {"remat": "none", "scan_layers": False}
"""Nothing is computed twice and each layer compiled by itself, which takes minutes."""

HARDWARE = (
    HardwareRule("TPU v5 ?(lite|e)", FAST, tokens_per_device=32_768),
    HardwareRule("TPU v6 ?(lite|e)", FAST, tokens_per_device=32_768),
    HardwareRule("TPU v5p?$", FAST, tokens_per_device=65_536),
    HardwareRule("H100|H200|A100.*80", {"remat": "save_all"}, tokens_per_device=32_768),
    HardwareRule("A100", {"remat": "save_all"}, tokens_per_device=16_384),
)
"""What a device has memory for; no remat where that leaves enough rows at once."""


def recipe() -> Run:
    """12 layers x 768, 12 heads, feed-forward 3072, vocabulary 30,522."""
    return Run(
        model=BertConfig(attention_probs_dropout_prob=0.0),
        objective=MaskedLM(masking=TokenMasking(rate=0.15, count="bert")),
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
        checkpoints=Checkpoints(
            every_steps=5_000,
            keep_last=3,
            keep_every=100_000,
            best="validation/masked_lm",
            temporary_every_seconds=900,
        ),
        device="tpu or gpu",
    )
