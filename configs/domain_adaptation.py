"""Domain adaptation as the Hugging Face course has it: DistilBERT goes on learning on your text.

    python tools/build_pretraining_dataset.py --corpus-dir TEXT --format lines \
        --tokenizer distilbert/distilbert-base-uncased --validation-share 0.1 --output-dir DATA
    python run_pretraining.py configs/domain_adaptation.py --data-dir DATA \
        --init-from distilbert/distilbert-base-uncased

Texts are concatenated and cut into rows of 128, the last one dropped; 15 % of the tokens are
masked, anew in every epoch. The perplexity under masks that stay the same is taken before the first
step and after each epoch; sentences are completed before and after. --set
finish.0.push_to_hub=NAME/MODEL hands the result to the hub. docs/domain_adaptation.md walks through
it.

The numbers are those of chapter 7 of the course, its version with a loop of its own: AdamW 5e-5, 3
epochs, batch 64, linear to zero, no warm-up. There, [CLS] and [SEP] stand between texts; here they
stand around rows. The course reports a perplexity on IMDb of 21.75 before, 11.3 to 10.7 after.
"""

from flaxpretrain.config import Checkpoints, Data, Logging, Phase, Run
from flaxpretrain.conversion.finish import Export
from flaxpretrain.data.masking import BernoulliMasking
from flaxpretrain.data.rows import WholeBlocks
from flaxpretrain.evaluation.fill_mask import WatchMasks
from flaxpretrain.models.distilbert import DistilBertConfig
from flaxpretrain.objectives.masked_lm import MaskedLM
from flaxpretrain.training.evaluate import FixedNoiseByEpoch
from flaxpretrain.training.guard import Guard
from flaxpretrain.training.optimizers import AdamW
from flaxpretrain.training.schedules import WarmupLinear

POD = "v5e:1x1"
"""The TPU slice that tools/compile_all.py compiles this recipe for."""

SENTENCES = ("This is a great [MASK].", "The [MASK] is too long.", "I [MASK] this film.")


def recipe() -> Run:
    """DistilBERT-base: 6 layers x 768, vocabulary 30,522; 3 epochs of 64 rows of 128."""
    objective = MaskedLM(masking=BernoulliMasking(rate=0.15))
    return Run(
        model=DistilBertConfig(),
        objective=objective,
        data=Data(layout=WholeBlocks()),
        optimizer=AdamW(5e-5, weight_decay=0.01),
        schedule=WarmupLinear(),
        guard=Guard(),
        phases=(Phase(epochs=3, length=128, batch_size=64),),
        remat="save_all",
        evaluations=(
            # Its own objective: another masking in training leaves the figures comparable.
            FixedNoiseByEpoch(batch_size=64, objective=objective),
            WatchMasks(sentences=SENTENCES),
        ),
        checkpoints=Checkpoints(every_steps=500, keep_last=2),
        logging=Logging(every_steps=20),
        finish=(Export(),),
    )
