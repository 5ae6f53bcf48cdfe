"""Workdirs of a decoder and of an encoder-decoder that have learnt a little of the language."""

import pytest

from flaxpretrain.data.infilling import BartNoise
from flaxpretrain.objectives.causal_lm import CausalLM
from flaxpretrain.objectives.span_denoising import SpanDenoising
from flaxpretrain.training.loop import train
from flaxpretrain.training.optimizers import AdamW
from tests import toys
from tests.evaluation import speech

SIZE = len(speech.SPECIALS) + len(speech.WORDS)


@pytest.fixture(scope="session")
def decoder(data, tmp_path_factory):
    """A GPT-2 that has seen the language for 60 steps."""
    folder = tmp_path_factory.mktemp("decoder") / "workdir"
    changes = dict(
        model=toys.gpt2(vocab_size=SIZE, bos_token_id=2, eos_token_id=3, resid_pdrop=0.0),
        objective=CausalLM(),
        optimizer=AdamW(1e-2),
    )
    assert train(speech.run(data, steps=60, **changes), folder, quiet=True) == 0
    return folder


@pytest.fixture(scope="session")
def encoder_decoder(data, tmp_path_factory):
    """A BART that has seen the language for 4 steps."""
    folder = tmp_path_factory.mktemp("encoder_decoder") / "workdir"
    changes = dict(
        model=toys.bart(vocab_size=SIZE, bos_token_id=2),
        objective=SpanDenoising(noise=BartNoise()),
    )
    assert train(speech.run(data, **changes), folder, quiet=True) == 0
    return folder
