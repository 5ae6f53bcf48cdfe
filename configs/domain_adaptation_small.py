"""Domain adaptation on a laptop: the model of configs/general_small.py on text of another kind.

    python tools/build_pretraining_dataset.py --corpus-dir TEXT --format lines \
        --tokenizer TOKENIZER --validation-share 0.1 --output-dir DATA --max-seq-length 64
    python run_pretraining.py configs/domain_adaptation_small.py --data-dir DATA \
        --init-from runs/general_small

TOKENIZER is that of the general model, and so are the masks, which the figures take at the course's
rate: three tokens in ten in training, 80/10/10. A rate of learning far under that of the general
model keeps what it knows. docs/domain_adaptation.md tells what it gave.
"""

import dataclasses

from domain_adaptation import recipe as with_distilbert
from general_small import recipe as general

from flaxpretrain.config import Phase, Run
from flaxpretrain.training.optimizers import Muon
from flaxpretrain.training.schedules import WarmupLinear

POD = "v5e:1x1"
"""The TPU slice that tools/compile_all.py compiles this recipe for."""


def recipe() -> Run:
    """BERT of 2 layers x 128, vocabulary 4,096; 5 epochs of 64 rows of 64."""
    return dataclasses.replace(
        with_distilbert(),
        model=general().model,
        objective=general().objective,
        optimizer=Muon(2e-3, adam_rate=0.3, weight_decay=0.1),
        schedule=WarmupLinear(warmup_share=0.1),
        phases=(Phase(epochs=5, length=64, batch_size=64),),
    )
