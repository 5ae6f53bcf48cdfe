"""A small general BERT of one's own text, in half an hour on two CPU cores.

    python tools/train_tokenizer.py --corpus-dir TEXT --model wordpiece --vocab-size 8000 \
        --output-dir TOKENIZER
    python tools/build_pretraining_dataset.py --corpus-dir TEXT --tokenizer TOKENIZER \
        --output-dir DATA --max-seq-length 64
    python run_pretraining.py configs/general_30min.py --data-dir DATA

docs/domain_adaptation.md adapts it to film reviews.
"""

import dataclasses

from quickstart import recipe as quickstart

from flaxpretrain.config import Checkpoints, Logging, Phase, Run
from flaxpretrain.training.schedules import WarmupLinear

POD = "v5e:1x1"
"""The TPU slice that tools/compile_all.py compiles this recipe for."""


def recipe() -> Run:
    """The quickstart's network and optimizer, a vocabulary of 8,000, rows by 32, 6,000 steps.

    Diverse text keeps a small model on the unigram plateau for longer: smaller batches take more
    steps for the same tokens, and a short warm-up reaches the rate that leaves it sooner.
    """
    run = quickstart()
    (evaluation,) = run.evaluations
    return dataclasses.replace(
        run,
        prepare=(),
        model=dataclasses.replace(run.model, vocab_size=8_000),
        schedule=WarmupLinear(warmup_steps=150),
        phases=(Phase(steps=6_000, length=64, batch_size=32),),
        evaluations=(dataclasses.replace(evaluation, every_steps=500),),
        checkpoints=Checkpoints(every_steps=250, keep_last=1),
        logging=Logging(every_steps=50),
        finish=(),
    )
