"""A BART that trains on a laptop: 2 + 2 layers of 128, rows of 128.

    python tools/build_pretraining_dataset.py --corpus-dir TEXT --tokenizer TOKENIZER \
        --output-dir DATA
    python run_pretraining.py configs/bart_tiny.py --data-dir DATA

For a tokenizer of 8,000 tokens with [CLS], [SEP] and [MASK] as ids 2, 3 and 4 and [PAD] as 0; state
others by --set model.pad_token_id=N and so on.
"""

from flaxpretrain.config import Checkpoints, Data, Logging, Phase, Run
from flaxpretrain.data.infilling import BartNoise
from flaxpretrain.data.rows import Documents
from flaxpretrain.models.bart import BartConfig
from flaxpretrain.objectives.span_denoising import SpanDenoising
from flaxpretrain.training.evaluate import FixedNoise
from flaxpretrain.training.guard import Guard
from flaxpretrain.training.optimizers import AdamW
from flaxpretrain.training.schedules import WarmupLinear

POD = "v5e:1x1"
"""The TPU slice that tools/compile_all.py compiles this recipe for."""


def recipe() -> Run:
    """2 + 2 layers x 128, 4 heads, feed-forward 512; 32 rows of 128."""
    return Run(
        model=BartConfig(
            vocab_size=8_000,
            max_position_embeddings=128,
            d_model=128,
            encoder_layers=2,
            encoder_ffn_dim=512,
            encoder_attention_heads=4,
            decoder_layers=2,
            decoder_ffn_dim=512,
            decoder_attention_heads=4,
            attention_dropout=0.0,
            activation_dropout=0.0,
            pad_token_id=0,
            bos_token_id=2,
            eos_token_id=3,
            decoder_start_token_id=3,
            forced_eos_token_id=3,
        ),
        objective=SpanDenoising(noise=BartNoise()),
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
