"""The first run with more time: a larger model and four times the tokens of the quickstart.

    python run_pretraining.py configs/quickstart_30min.py

It is sized to go below the bigram model, which has 5.39 nat at the quickstart's validation
positions. Nobody has run it to its end yet: what it reaches, and how long it takes, is not known.
"""

import dataclasses

from quickstart import recipe as quickstart

from flaxpretrain.config import Checkpoints, Logging, Phase, Run
from flaxpretrain.training.optimizers import Muon

POD = "v5e:1x1"
"""The TPU slice that tools/compile_all.py compiles this recipe for."""


def recipe() -> Run:
    """The quickstart with 6 layers x 192 and 2,400 steps; dropout, for it sees the text often."""
    run = quickstart()
    model = dataclasses.replace(
        run.model,
        hidden_size=192,
        num_hidden_layers=6,
        num_attention_heads=6,
        intermediate_size=768,
        hidden_dropout_prob=0.1,
    )
    (evaluation,) = run.evaluations
    return dataclasses.replace(
        run,
        model=model,
        optimizer=Muon(3e-3, weight_decay=0.1),
        phases=(Phase(steps=2_400, length=64, batch_size=64),),
        evaluations=(dataclasses.replace(evaluation, every_steps=400),),
        checkpoints=Checkpoints(every_steps=400, keep_last=1),
        logging=Logging(every_steps=40),
    )
