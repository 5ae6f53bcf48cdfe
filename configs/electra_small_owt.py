"""ELECTRA-small-OWT: ELECTRA-small on OpenWebText, the run of the original's quick start.

    python tools/build_pretraining_dataset.py --corpus-dir TEXT --vocab-file vocab.txt \
        --output-dir DATA --max-seq-length 128
    python run_pretraining.py configs/electra_small_owt.py --data-dir DATA

DATA is made with the vocabulary of bert-base-uncased (30,522 tokens); add
--set model.vocab_size=N for another. The numbers are those of google-research/electra
(configure_pretraining.py, model_size small): batch 128, 1,000,000 steps, AdamW 5e-4 without bias
correction, warm-up 10,000 multiplied into linear decay, 15 % masked, weights 1 and 50. Masked
positions are distinct, where the original draws some twice. One file of TEXT is one document of
OpenWebText. Reference on GLUE's development sets (README of the original, medians): CoLA 56.8, SST
88.3, MRPC 87.4, STS 86.8, QQP 88.3, MNLI 78.9, QNLI 87.9, RTE 68.5.
"""

from flaxpretrain.config import Checkpoints, Data, Phase, Precision, Run
from flaxpretrain.data.masking import TokenMasking
from flaxpretrain.data.rows import Documents
from flaxpretrain.models.electra import ElectraConfig
from flaxpretrain.objectives.generators import Scaled
from flaxpretrain.objectives.replaced_tokens import ReplacedTokens
from flaxpretrain.training.evaluate import FixedNoise
from flaxpretrain.training.guard import Guard
from flaxpretrain.training.optimizers import AdamW
from flaxpretrain.training.schedules import WarmupTimesDecay

POD = "v5e:2x2"


def recipe() -> Run:
    """12 layers x 256, 4 heads, feed-forward 1024, embeddings 128; generator 12 x 64, 1 head."""
    return Run(
        model=ElectraConfig(vocab_size=30522),
        objective=ReplacedTokens(
            masking=TokenMasking(rate=0.15, count="electra", mask_share=0.85, random_share=0.0),
            generator=Scaled(width=0.25),
        ),
        data=Data(layout=Documents()),
        optimizer=AdamW(5e-4, weight_decay=0.01, eps=1e-6, bias_correction=False, clip_norm=1.0),
        schedule=WarmupTimesDecay(warmup_steps=10_000),
        guard=Guard(),
        phases=(Phase(steps=1_000_000, length=128, batch_size=128),),
        precision=Precision(compute="bfloat16"),
        remat="save_all",
        evaluations=(FixedNoise(every_steps=10_000, batch_size=128, max_rows=12_800),),
        checkpoints=Checkpoints(every_steps=5_000, keep_last=3, keep_every=100_000),
        device="tpu or gpu",
    )
