"""A small BERT: 12 layers of 256, rows of 128.

    python tools/build_pretraining_dataset.py --corpus-dir TEXT --tokenizer TOKENIZER \
        --output-dir DATA --max-seq-length 128
    python run_pretraining.py configs/bert_small.py --data-dir DATA

For a tokenizer of 8,000 tokens; add --set model.vocab_size=N for another. It is the model of the
CPU benchmarks, and trains on one GPU or one TPU chip in hours.
"""

from flaxpretrain.config import Checkpoints, Data, Phase, Precision, Run
from flaxpretrain.data.masking import TokenMasking
from flaxpretrain.data.rows import Blocks
from flaxpretrain.models.bert import BertConfig
from flaxpretrain.objectives.masked_lm import MaskedLM
from flaxpretrain.training.evaluate import FixedNoise
from flaxpretrain.training.guard import Guard
from flaxpretrain.training.optimizers import AdamW
from flaxpretrain.training.schedules import WarmupLinear

POD = "v5e:1x1"
"""The TPU slice that tools/compile_all.py compiles this recipe for."""


def recipe() -> Run:
    """12 layers x 256, 4 heads, feed-forward 1024, vocabulary 8,000; 128 rows of 128."""
    return Run(
        model=BertConfig(
            vocab_size=8_000,
            hidden_size=256,
            num_hidden_layers=12,
            num_attention_heads=4,
            intermediate_size=1024,
            max_position_embeddings=512,
            attention_probs_dropout_prob=0.0,
        ),
        objective=MaskedLM(masking=TokenMasking(rate=0.15, count="bert")),
        data=Data(layout=Blocks()),
        optimizer=AdamW(5e-4, weight_decay=0.01, eps=1e-6, clip_norm=1.0),
        schedule=WarmupLinear(warmup_steps=10_000),
        guard=Guard(),
        phases=(Phase(steps=100_000, length=128, batch_size=128),),
        precision=Precision(compute="bfloat16"),
        remat="save_all",
        evaluations=(FixedNoise(every_steps=5_000, batch_size=128, max_rows=8_192),),
        checkpoints=Checkpoints(every_steps=5_000, keep_last=2, best="validation/masked_lm"),
    )
