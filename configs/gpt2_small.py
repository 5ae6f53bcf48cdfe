"""GPT-2 small, 124 million parameters, rows of 1,024.

    python run_pretraining.py configs/gpt2_small.py --data-dir DATA

DATA is made from OpenWebText by tools/build_pretraining_dataset.py with GPT-2's own tokenizer
(50,257 tokens, padded to 50,304 in the table). For a TPU slice or a GPU box; the mesh takes all
devices as `data`.

The numbers are those of karpathy/nanoGPT (config/train_gpt2.py): 480 rows of 1,024, 600,000 steps,
AdamW 6e-4 down to 6e-5 by a cosine, warm-up 2,000, betas .9 and .95, weight decay .1, clipping at
1, no dropout. Its loss there on OpenWebText's held-out part: 2.85. Two differences, on purpose:
linear layers and norms have biases, as GPT-2's own have and Transformers' need; and documents are
packed whole and see only themselves, where nanoGPT's rows run across documents (that is
--set objective.within_documents=false). The logits are made in 8 parts: whole, those of 30 rows a
chip would take 6 GB.
"""

from flaxpretrain.config import Checkpoints, Data, Phase, Precision, Run
from flaxpretrain.data.rows import Documents
from flaxpretrain.hardware import HardwareRule
from flaxpretrain.models.gpt2 import GPT2Config
from flaxpretrain.objectives.causal_lm import CausalLM
from flaxpretrain.training.evaluate import FixedNoise
from flaxpretrain.training.guard import Guard
from flaxpretrain.training.optimizers import AdamW
from flaxpretrain.training.schedules import Cosine

POD = "v5e:4x4"
"""The TPU slice that tools/compile_all.py compiles this recipe for."""

HARDWARE = (
    HardwareRule("TPU v5 ?(lite|e)", {"remat": "dots"}, tokens_per_device=30_720),
    HardwareRule("TPU v6 ?(lite|e)", {"remat": "save_all"}, tokens_per_device=30_720),
    HardwareRule("TPU v5p?$", {"remat": "save_all"}, tokens_per_device=61_440),
    HardwareRule("H100|H200|A100.*80", {"remat": "save_all"}, tokens_per_device=61_440),
    HardwareRule("A100", {"remat": "save_all"}, tokens_per_device=30_720),
)
"""What a device has memory for; no remat where that leaves enough rows at once."""


def recipe() -> Run:
    """12 layers x 768, 12 heads, feed-forward 3072, vocabulary 50,257."""
    return Run(
        model=GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
        objective=CausalLM(chunks=8),
        data=Data(layout=Documents()),
        optimizer=AdamW(6e-4, b2=0.95, eps=1e-8, weight_decay=0.1, clip_norm=1.0),
        schedule=Cosine(warmup_steps=2_000, floor=0.1),
        guard=Guard(),
        phases=(Phase(steps=600_000, length=1_024, batch_size=480),),
        precision=Precision(compute="bfloat16"),
        hardware=HARDWARE,
        remat="dots",
        evaluations=(FixedNoise(every_steps=2_000, batch_size=256, max_rows=8_192),),
        checkpoints=Checkpoints(
            every_steps=2_000,
            keep_last=3,
            keep_every=100_000,
            best="validation/causal_lm",
            temporary_every_seconds=900,
        ),
        device="tpu or gpu",
    )
