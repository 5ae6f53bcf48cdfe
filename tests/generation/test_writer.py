"""Texts: what a decoder goes on with, what an encoder-decoder answers, and which is likelier."""

import numpy as np
import pytest

from flaxpretrain.conversion.sources import load_pretrained
from flaxpretrain.errors import UserError
from flaxpretrain.generation.strategies import Beam, Sample
from flaxpretrain.generation.writer import Writer, diversity
from tests import toys
from tests.evaluation import speech
from tests.tolerances import REMEMBERED_FLOAT32


@pytest.fixture(scope="module")
def writer(decoder):
    return Writer(*load_pretrained(decoder, head="lm"))


def test_a_decoder_opens_the_document_and_goes_on_from_the_prompt(writer):
    vocabulary = writer.tokenizer.vocabulary
    assert writer.encode("the cat")[0] == vocabulary.cls
    ((first,), (second,)) = writer.write(["the cat", "the king sees"], max_new_tokens=6)
    token = writer.tokenizer.backend.id_to_token
    assert token(first.ids[0]) in speech.DOES and token(second.ids[0]) in speech.WHAT
    together = writer.decode([*writer.encode("the cat"), *first.ids])
    assert together == "the cat" + first.text


def test_a_text_ends_with_the_token_that_ends_documents(writer):
    assert writer.rules.eos == (writer.tokenizer.vocabulary.sep,)
    some = writer.write(["the"], Sample(), max_new_tokens=50, count=8)[0]
    assert any(text.ended for text in some)
    for text in some:
        assert writer.rules.eos[0] not in text.ids
        assert text.ended or len(text.ids) == 50


def test_next_tokens_are_the_likely_ones(writer):
    guesses = writer.next_tokens(["the"], 5)[0]
    assert {guess.token for guess in guesses} == set(speech.WHO)
    shares = [guess.probability for guess in guesses]
    assert shares == sorted(shares, reverse=True) and sum(shares) > 0.8


def test_continuations_are_ranked_by_likelihood(writer):
    judged = writer.judge("the cat", ["sees milk .", "milk sees .", "likes gold ."])
    assert judged[-1].text == "milk sees ." and [each.tokens for each in judged] == [3, 3, 3]
    assert sum(each.share for each in judged) == pytest.approx(1)
    alone = writer.judge("the cat", ["milk sees ."])[0]
    np.testing.assert_allclose(alone.nats, judged[-1].nats, rtol=REMEMBERED_FLOAT32)
    assert alone.share == 1
    nats = np.log([each.share for each in judged])
    np.testing.assert_allclose(
        np.diff(nats), np.diff([each.nats for each in judged]), rtol=REMEMBERED_FLOAT32
    )


def test_an_encoder_decoder_answers_whole_sources(encoder_decoder):
    writer = Writer(*load_pretrained(encoder_decoder, head="lm"))
    vocabulary = writer.tokenizer.vocabulary
    ids = writer.encode("the cat [MASK] milk .")
    assert ids[0] == vocabulary.cls and ids[-1] == vocabulary.sep and vocabulary.mask in ids
    assert writer.rules.start == vocabulary.sep
    (texts,) = writer.write(["the cat [MASK] milk ."], Beam(3), max_new_tokens=5, count=2)
    assert texts[0].score >= texts[1].score
    assert writer.judge("the [MASK]", ["the cat"])[0].tokens == 4  # [CLS] and [SEP] count


def test_diversity_counts_ngrams():
    figures = diversity([(1, 2, 1, 2, 1, 2), (3,)])
    expected = {"distinct_1": 3 / 7, "distinct_2": 2 / 5, "distinct_3": 2 / 4, "repeated_4": 1 / 3}
    assert figures == pytest.approx(expected)
    assert diversity([()]) == {}


def test_a_tokenizer_of_another_model_is_refused(decoder):
    config, params, tokenizer = load_pretrained(decoder, head="lm")
    with pytest.raises(UserError, match="without a tokenizer"):
        Writer(config, params, None)
    with pytest.raises(UserError, match="belongs to another model"):
        Writer(toys.gpt2(vocab_size=7), params, tokenizer)
