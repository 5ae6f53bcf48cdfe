"""A BERT that trains on a laptop in minutes: 2 layers of 128, rows of 128.

    python tools/build_pretraining_dataset.py --corpus-dir TEXT --tokenizer TOKENIZER \
        --output-dir DATA --max-seq-length 128
    python run_pretraining.py configs/bert_tiny.py --data-dir DATA

For a tokenizer of 8,000 tokens; add --set model.vocab_size=N for another. Documents are packed
whole, each attending only to itself.
"""

from flaxpretrain.config import Checkpoints, Data, Logging, Phase, Run
from flaxpretrain.data.masking import TokenMasking
from flaxpretrain.data.rows import Documents
from flaxpretrain.models.bert import BertConfig
from flaxpretrain.objectives.masked_lm import MaskedLM
from flaxpretrain.training.evaluate import FixedNoise
from flaxpretrain.training.guard import Guard
from flaxpretrain.training.optimizers import AdamW
from flaxpretrain.training.schedules import WarmupLinear

POD = "v5e:1x1"
"""The TPU slice that tools/compile_all.py compiles this recipe for."""


def recipe() -> Run:
    """2 layers x 128, 2 heads, feed-forward 512; 32 rows of 128."""
    return Run(
        model=BertConfig(
            vocab_size=8_000,
            hidden_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=512,
            attention_probs_dropout_prob=0.0,
        ),
        objective=MaskedLM(masking=TokenMasking(rate=0.15, count="bert")),
        data=Data(layout=Documents()),
        optimizer=AdamW(1e-3, weight_decay=0.01, eps=1e-6, clip_norm=1.0),
        schedule=WarmupLinear(warmup_steps=500),
        guard=Guard(),
        phases=(Phase(steps=10_000, length=128, batch_size=32),),
        remat="save_all",
        evaluations=(FixedNoise(every_steps=1_000, batch_size=64, max_rows=2_048),),
        checkpoints=Checkpoints(every_steps=1_000, keep_last=2),
        logging=Logging(every_steps=50),
    )
