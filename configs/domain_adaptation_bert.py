"""Domain adaptation of BERT, with masks of whole words: one in five, each always [MASK].

    python tools/build_pretraining_dataset.py --corpus-dir TEXT --format lines \
        --tokenizer google-bert/bert-base-uncased --validation-share 0.1 --output-dir DATA
    python run_pretraining.py configs/domain_adaptation_bert.py --data-dir DATA \
        --init-from google-bert/bert-base-uncased

All else is configs/domain_adaptation.py, but for the masks of the evaluation, 15 % of the tokens:
they are always [MASK] too. A model that has been taught by [MASK] alone no longer says what the
tokens are that 80/10/10 keeps, and figures under such masks would rise while it learns. The rate of
0.2 is that of whole_word_masking_data_collator in chapter 7 of the Hugging Face course.
"""

import dataclasses

from domain_adaptation import recipe as with_distilbert

from flaxpretrain.config import Run
from flaxpretrain.data.masking import BernoulliMasking
from flaxpretrain.data.word_masking import WordBernoulliMasking
from flaxpretrain.models.bert import BertConfig
from flaxpretrain.objectives.masked_lm import MaskedLM

POD = "v5e:1x1"
"""The TPU slice that tools/compile_all.py compiles this recipe for."""


def recipe() -> Run:
    """BERT-base: 12 layers x 768, vocabulary 30,522."""
    run = with_distilbert()
    figures, *rest = run.evaluations
    always_mask = BernoulliMasking(rate=0.15, mask_share=1.0, random_share=0.0)
    return dataclasses.replace(
        run,
        model=BertConfig(),
        objective=MaskedLM(masking=WordBernoulliMasking(rate=0.2)),
        evaluations=(
            dataclasses.replace(figures, objective=MaskedLM(masking=always_mask)),
            *rest,
        ),
    )
