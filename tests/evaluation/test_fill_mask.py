"""Filling masks: the model's own probabilities, for any number of masks, in one compiled shape."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from flaxpretrain.data.store import open_dataset
from flaxpretrain.data.tokenizer_training import train_bpe
from flaxpretrain.errors import UserError
from flaxpretrain.evaluation.fill_mask import FillMask, MaskFiller, bar_of, show
from flaxpretrain.evaluation.subject import open_subject
from flaxpretrain.models.functional import model_of
from flaxpretrain.models.roberta import RobertaConfig
from flaxpretrain.training import sharding
from flaxpretrain.training.assembly import assemble
from flaxpretrain.training.session import Session
from tests.evaluation import speech
from tests.tolerances import LOGITS_FLOAT32

TEXT = "the cat [MASK] milk ."


@pytest.fixture(scope="module")
def model(workdir):
    subject = open_subject(workdir)
    return subject.run.model, subject.params, subject.tokenizer


@pytest.fixture(scope="module")
def filler(model):
    return MaskFiller(*model)


def probabilities(model, text):
    """Of every token at the first mask, computed for this text alone, without padding."""
    config, params, _ = model
    made = speech.tokenizer()
    ids = jnp.asarray([made.backend.encode(text).ids])
    module = model_of(config.build).bind(jax.tree.map(jnp.asarray, params))
    ones = jnp.ones_like(ids)
    hidden = module.encode(module.embed(ids, ones, jnp.cumsum(ones, 1) - 1), ones)
    where = ids[0].tolist().index(made.vocabulary.mask)
    logits = module.logits(hidden[:, where : where + 1])
    return np.array(jax.nn.softmax(logits[0, 0]))[: config.vocab_size]


def test_guesses_are_the_likeliest_tokens_with_the_models_probabilities(model, filler):
    (filled,) = filler.fill([TEXT], top_k=4)
    expected = probabilities(model, TEXT)
    expected[: len(speech.SPECIALS)] = -1
    best = np.argsort(-expected)[:4]
    (guesses,) = filled.masks
    assert [guess.id for guess in guesses] == best.tolist()
    names = (*speech.SPECIALS, *speech.WORDS)
    assert [guess.token for guess in guesses] == [names[i] for i in best]
    np.testing.assert_allclose(
        [guess.probability for guess in guesses], expected[best], atol=LOGITS_FLOAT32
    )


def test_special_tokens_are_guessed_only_when_admitted(model):
    everything = len(speech.SPECIALS) + len(speech.WORDS)
    (filled,) = MaskFiller(*model, special=True).fill([TEXT], top_k=everything)
    assert sorted(guess.id for guess in filled.masks[0]) == list(range(everything))
    np.testing.assert_allclose(sum(guess.probability for guess in filled.masks[0]), 1, rtol=1e-5)
    (filled,) = MaskFiller(*model).fill([TEXT], top_k=len(speech.WORDS))
    assert min(guess.id for guess in filled.masks[0]) == len(speech.SPECIALS)


def test_texts_together_give_what_each_gives_alone(filler):
    texts = [TEXT, "[MASK] king [MASK] [MASK] .", "the <mask> likes gold . the dog finds [MASK]"]
    together = list(filler.fill(texts))
    assert [len(filled.masks) for filled in together] == [1, 3, 2]
    for text, filled in zip(texts, together, strict=True):
        (alone,) = filler.fill([text])
        assert filled.text == text
        for one, other in zip(alone.masks, filled.masks, strict=True):
            assert [g.id for g in one] == [g.id for g in other]
            np.testing.assert_allclose(
                [g.probability for g in one], [g.probability for g in other], atol=LOGITS_FLOAT32
            )


def test_one_shape_is_compiled_for_many_texts(model):
    filler = MaskFiller(*model)
    texts = ["the [MASK] " + "sees milk " * (i % 9) + "." for i in range(70)]
    assert [filled.text for filled in filler.fill(texts)] == texts
    assert filler._best._cache_size() == 1
    list(filler.fill(texts[:40]))
    assert filler._best._cache_size() == 1


def test_no_texts_give_nothing(filler):
    assert list(filler.fill([])) == []


@pytest.mark.parametrize("mask", ["[MASK]", "<mask>"])
def test_a_roberta_takes_both_spellings(tmp_path, mask):
    tokenizer = train_bpe([" ".join(speech.sentences(50))], 300)
    tokenizer.save(tmp_path)
    config = RobertaConfig(
        vocab_size=tokenizer.vocabulary.size,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=40,
    )
    params = model_of(config.build).init(jax.random.key(0))
    (filled,) = MaskFiller(config, params, tmp_path).fill([f"the cat {mask} milk."], top_k=3)
    assert len(filled.masks) == 1 and len(filled.masks[0]) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("the cat sees milk .", "has no mask: write \\[MASK\\]"),
        ("[MASK] " + "milk " * 70, "has 73 tokens .* positions for 64"),
    ],
)
def test_a_text_that_cannot_be_filled_is_refused(filler, text, message):
    with pytest.raises(UserError, match=message):
        list(filler.fill([TEXT, text]))


@pytest.mark.parametrize("top_k", [0, 1000])
def test_an_impossible_number_of_guesses_is_refused(filler, top_k):
    with pytest.raises(UserError, match="--top-k must lie in 1 to 18"):
        list(filler.fill([TEXT], top_k))


def test_a_model_without_head_or_tokenizer_is_refused(model, tmp_path):
    config, params, tokenizer = model
    with pytest.raises(UserError, match="no masked language modelling head"):
        MaskFiller(dataclasses.replace(config, heads=("pooler",)), params, tokenizer)
    with pytest.raises(UserError, match="without a tokenizer"):
        MaskFiller(config, params, None)
    train_bpe(["the cat sees the milk"], 300).save(tmp_path)
    with pytest.raises(UserError, match="belongs to another model"):
        MaskFiller(config, params, tmp_path)


def test_guesses_are_shown_with_probabilities_and_bars(filler):
    console = Console(width=80)
    with console.capture() as captured:
        for filled in filler.fill([TEXT, "the [MASK] sees [MASK] ."], top_k=2):
            show(filled, console)
    lines = captured.get().splitlines()
    assert lines[0] == TEXT  # the brackets are text, not rich's markup
    assert "%" in lines[1] and lines[1].split()[-1] in speech.WORDS
    assert lines[3:5] == ["the [MASK] sees [MASK] .", "  mask 1"] and lines[7] == "  mask 2"
    assert len(lines) == 10


@pytest.mark.parametrize(
    ("share", "bar"), [(0, ""), (1, "████"), (0.5, "██"), (0.28125, "█▏"), (0.001, "")]
)
def test_bars_are_drawn_to_an_eighth_of_a_character(share, bar):
    assert bar_of(share, width=4) == bar


def test_a_recipe_may_end_with_predictions(model, data, workdir):
    run = open_subject(workdir).run
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    assembly = assemble(run, mesh, 4)
    state = assembly.initial_state()._replace(params=model[1])
    said = []
    session = Session(run, workdir, open_dataset(data), run.phases, assembly, state, 4, said.append)
    with jax.set_mesh(mesh):
        FillMask(sentences=(TEXT, "the [MASK] hears water ."), top_k=3).run(session)
    assert [text.splitlines()[0] for text in said] == [TEXT, "the [MASK] hears water ."]
    assert all(len(text.splitlines()) == 4 for text in said)


def test_a_recipe_with_a_sentence_without_mask_is_refused_before_it_trains():
    with pytest.raises(UserError, match="'the cat' has no \\[MASK\\]"):
        FillMask(sentences=(TEXT, "the cat"))
    with pytest.raises(UserError, match="needs sentences"):
        FillMask(sentences=())
