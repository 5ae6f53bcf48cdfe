"""ELECTRA on a corpus of one's own of some 25 MB, Spanish here, on any CPU.

    python tools/train_tokenizer.py --corpus-dir novels --vocab-size 4096 --no-strip-accents \
        --output-dir spanish_tokenizer
    python tools/build_pretraining_dataset.py --corpus-dir novels --tokenizer spanish_tokenizer \
        --output-dir spanish_data --validation-share 0.02 --max-seq-length 64 --language es
    python run_pretraining.py configs/electra_spanish.py --data-dir spanish_data

docs/electra_spanish.md walks through it. On 23.9 MB of Spanish novels and 512 held-out rows the
discriminator ends at AUC 0.797 and recall 0.31 against the samples it trains with, drawn at
temperature 1.3 (the rarity of tokens alone gives 0.59), and at AUC 0.730 and recall 0.21 against
samples at temperature 1; the masked LM at 3.31 nat, where counting tokens gives 6.58 and counting
pairs 5.21. It took 36 minutes of processor time, about half an hour on two cores.
benchmarks/results/electra_spanish.json has the curve.
"""

import dataclasses

from flaxpretrain.config import Checkpoints, Data, Logging, Phase, Run
from flaxpretrain.data.masking import TokenMasking
from flaxpretrain.data.rows import Documents
from flaxpretrain.evaluation.baselines import NgramBaselines
from flaxpretrain.models.electra import ElectraConfig
from flaxpretrain.objectives.generators import Sampling, Scaled
from flaxpretrain.objectives.replaced_tokens import ReplacedTokens
from flaxpretrain.objectives.sharing import Whole
from flaxpretrain.training.evaluate import FixedNoise
from flaxpretrain.training.guard import Guard
from flaxpretrain.training.optimizers import Muon
from flaxpretrain.training.schedules import WarmupLinear

POD = "v5e:1x1"
"""The TPU slice that tools/compile_all.py compiles this recipe for."""


def recipe() -> Run:
    """2 layers x 128, 4 heads, feed-forward 512, vocabulary 4,096; 64 rows of 64.

    One network is generator and discriminator, for a discriminator of its own stays on the plateau
    "all original" that long: what the masked LM learns of words is what gets it off. 25 % masks
    and a discriminator's weight of 10 leave that masked LM its share of the gradient. Its samples
    would be as good as itself; ELECTRA's paper advises a generator that is weaker, which a
    temperature of 1.3 makes it. Muon, wide initial weights and sinusoidal positions are the
    quickstart's, for its reasons.
    """
    objective = ReplacedTokens(
        masking=TokenMasking(rate=0.25, count="electra", mask_share=0.85, random_share=0.0),
        generator=Scaled(width=1.0),
        sharing=Whole(),
        terms={"masked_lm": 1.0, "discriminator": 10.0},
        sampling=Sampling(temperature=1.3),
    )
    as_it_is = dataclasses.replace(objective, sampling=Sampling())
    evaluation = FixedNoise(every_steps=500, batch_size=64, max_rows=512)
    return Run(
        model=ElectraConfig(
            vocab_size=4_096,
            embedding_size=128,
            hidden_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=512,
            max_position_embeddings=64,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            initializer_range=0.08,
            position_init="sinusoidal",
        ),
        objective=objective,
        data=Data(layout=Documents()),
        optimizer=Muon(1e-2, adam_rate=0.3, weight_decay=0.1),
        schedule=WarmupLinear(warmup_share=0.1),
        guard=Guard(),
        phases=(Phase(steps=4_000, length=64, batch_size=64),),
        remat="save_all",
        evaluations=(
            evaluation,
            dataclasses.replace(evaluation, name="temperature_1", objective=as_it_is),
        ),
        checkpoints=Checkpoints(every_steps=500, keep_last=1),
        logging=Logging(every_steps=50),
        finish=(NgramBaselines(),),
    )
