"""ELECTRA-base: 12 layers of 768 and a generator a third as wide, rows of 512.

    python tools/build_pretraining_dataset.py --corpus-dir TEXT --vocab-file vocab.txt \
        --output-dir DATA --max-seq-length 512
    python run_pretraining.py configs/electra_base.py --data-dir DATA

DATA is made with the vocabulary of bert-base-uncased (30,522 tokens); add
--set model.vocab_size=N for another. The numbers are those of google-research/electra (the block
for base in configure_pretraining.py, which is commented out there, and the paper): batch 256,
766,000 steps, AdamW 2e-4 without bias correction, warm-up 10,000 multiplied into linear decay,
15 % masked, weights 1 and 50. Masked positions are distinct, where the original draws some twice.
"""

from flaxpretrain.config import Checkpoints, Data, Phase, Precision, Run
from flaxpretrain.data.masking import TokenMasking
from flaxpretrain.data.rows import Documents
from flaxpretrain.hardware import HardwareRule
from flaxpretrain.models.electra import ElectraConfig
from flaxpretrain.objectives.generators import Scaled
from flaxpretrain.objectives.replaced_tokens import ReplacedTokens
from flaxpretrain.training.evaluate import FixedNoise
from flaxpretrain.training.guard import Guard
from flaxpretrain.training.optimizers import AdamW
from flaxpretrain.training.schedules import WarmupTimesDecay

POD = "v5e:4x4"

HARDWARE = (
    HardwareRule("TPU v5 ?(lite|e)", {"remat": "dots"}, tokens_per_device=8_192),
    HardwareRule("TPU v6 ?(lite|e)", {"remat": "save_all"}, tokens_per_device=16_384),
    HardwareRule("TPU v5p?$", {"remat": "save_all"}, tokens_per_device=32_768),
    HardwareRule("H100|H200|A100.*80", {"remat": "save_all"}, tokens_per_device=32_768),
    HardwareRule("A100", {"remat": "save_all"}, tokens_per_device=8_192),
)
"""What a device has memory for; no remat where that leaves enough rows at once."""


def recipe() -> Run:
    """12 layers x 768, 12 heads, feed-forward 3072; generator 12 x 256, 4 heads."""
    return Run(
        model=ElectraConfig(
            vocab_size=30522,
            embedding_size=768,
            hidden_size=768,
            num_attention_heads=12,
            intermediate_size=3072,
        ),
        objective=ReplacedTokens(
            masking=TokenMasking(rate=0.15, count="electra", mask_share=0.85, random_share=0.0),
            generator=Scaled(width=0.33333),
        ),
        data=Data(layout=Documents()),
        optimizer=AdamW(2e-4, weight_decay=0.01, eps=1e-6, bias_correction=False, clip_norm=1.0),
        schedule=WarmupTimesDecay(warmup_steps=10_000),
        guard=Guard(),
        phases=(Phase(steps=766_000, length=512, batch_size=256),),
        precision=Precision(compute="bfloat16"),
        hardware=HARDWARE,
        remat="dots",
        evaluations=(FixedNoise(every_steps=10_000, batch_size=256, max_rows=12_800),),
        checkpoints=Checkpoints(every_steps=5_000, keep_last=3, keep_every=100_000),
        device="tpu or gpu",
    )
