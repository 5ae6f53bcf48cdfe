"""A GPT-2 that trains on a laptop in minutes: 2 layers of 128, rows of 128.

    python tools/build_pretraining_dataset.py --corpus-dir TEXT --tokenizer TOKENIZER \
        --output-dir DATA --max-seq-length 128
    python run_pretraining.py configs/gpt2_tiny.py --data-dir DATA

For a tokenizer of 8,000 tokens; add --set model.vocab_size=N for another. Documents are packed
whole, each attending only to itself.
"""

from flaxpretrain.config import Checkpoints, Data, Logging, Phase, Run
from flaxpretrain.data.rows import Documents
from flaxpretrain.models.gpt2 import GPT2Config
from flaxpretrain.objectives.causal_lm import CausalLM
from flaxpretrain.training.evaluate import FixedNoise
from flaxpretrain.training.guard import Guard
from flaxpretrain.training.optimizers import AdamW
from flaxpretrain.training.schedules import Cosine

POD = "v5e:1x1"
"""The TPU slice that tools/compile_all.py compiles this recipe for."""


def recipe() -> Run:
    """2 layers x 128, 2 heads, feed-forward 512; 32 rows of 128."""
    return Run(
        model=GPT2Config(
            vocab_size=8_000,
            n_positions=128,
            n_embd=128,
            n_layer=2,
            n_head=2,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=None,
        ),
        objective=CausalLM(),
        data=Data(layout=Documents()),
        optimizer=AdamW(1e-3, b2=0.95, eps=1e-8, weight_decay=0.1, clip_norm=1.0),
        schedule=Cosine(warmup_steps=500, floor=0.1),
        guard=Guard(),
        phases=(Phase(steps=10_000, length=128, batch_size=32),),
        remat="save_all",
        evaluations=(FixedNoise(every_steps=1_000, batch_size=64, max_rows=2_048),),
        checkpoints=Checkpoints(every_steps=1_000, keep_last=2),
        logging=Logging(every_steps=50),
    )
