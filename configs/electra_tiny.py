"""An ELECTRA that trains on a laptop in minutes: 2 layers of 128, rows of 128.

    python tools/build_pretraining_dataset.py --corpus-dir TEXT --tokenizer TOKENIZER \
        --output-dir DATA --max-seq-length 128
    python run_pretraining.py configs/electra_tiny.py --data-dir DATA

For a tokenizer of 8,000 tokens; add --set model.vocab_size=N for another. Documents are packed
whole, each attending only to itself.
"""

from flaxpretrain.config import Checkpoints, Data, Logging, Phase, Run
from flaxpretrain.data.masking import TokenMasking
from flaxpretrain.data.rows import Documents
from flaxpretrain.models.electra import ElectraConfig
from flaxpretrain.objectives.generators import Scaled
from flaxpretrain.objectives.replaced_tokens import ReplacedTokens
from flaxpretrain.training.evaluate import FixedNoise
from flaxpretrain.training.guard import Guard
from flaxpretrain.training.optimizers import AdamW
from flaxpretrain.training.schedules import WarmupTimesDecay

POD = "v5e:1x1"


def recipe() -> Run:
    """2 layers x 128, 2 heads, feed-forward 512, embeddings 64; generator 2 x 64, 1 head."""
    return Run(
        model=ElectraConfig(
            vocab_size=8_000,
            embedding_size=64,
            hidden_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=512,
            max_position_embeddings=128,
        ),
        objective=ReplacedTokens(
            masking=TokenMasking(rate=0.15, count="electra", mask_share=0.85, random_share=0.0),
            generator=Scaled(width=0.5),
        ),
        data=Data(layout=Documents()),
        optimizer=AdamW(1e-3, weight_decay=0.01, eps=1e-6, bias_correction=False, clip_norm=1.0),
        schedule=WarmupTimesDecay(warmup_steps=500),
        guard=Guard(),
        phases=(Phase(steps=10_000, length=128, batch_size=32),),
        remat="save_all",
        evaluations=(FixedNoise(every_steps=1_000, batch_size=64, max_rows=2_048),),
        checkpoints=Checkpoints(every_steps=1_000, keep_last=2),
        logging=Logging(every_steps=50),
    )
