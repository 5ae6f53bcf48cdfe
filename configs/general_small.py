"""A small general BERT of one's own text, in minutes on two CPU cores.

    python tools/train_tokenizer.py --corpus-dir TEXT --model wordpiece --vocab-size 4096 \
        --output-dir TOKENIZER
    python tools/build_pretraining_dataset.py --corpus-dir TEXT --tokenizer TOKENIZER \
        --output-dir DATA --max-seq-length 64
    python run_pretraining.py configs/general_small.py --data-dir DATA

docs/domain_adaptation.md adapts it to film reviews.
"""

import dataclasses

from quickstart import recipe as quickstart

from flaxpretrain.config import Checkpoints, Logging, Phase, Run
from flaxpretrain.training.schedules import WarmupLinear

POD = "v5e:1x1"
"""The TPU slice that tools/compile_all.py compiles this recipe for."""


def recipe() -> Run:
    """The quickstart's network, objective and optimizer; 2,000 steps of 64 x 64."""
    run = quickstart()
    (evaluation,) = run.evaluations
    return dataclasses.replace(
        run,
        prepare=(),
        schedule=WarmupLinear(warmup_steps=100),
        phases=(Phase(steps=2_000, length=64, batch_size=64),),
        evaluations=(dataclasses.replace(evaluation, every_steps=250),),
        checkpoints=Checkpoints(every_steps=125, keep_last=1),
        logging=Logging(every_steps=25),
        finish=(),
    )
