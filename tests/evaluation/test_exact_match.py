"""Exact answers: given the target's tokens, and by the model itself."""

import json

import pytest

from flaxpretrain.conversion.sources import load_pretrained
from flaxpretrain.errors import UserError
from flaxpretrain.evaluation.exact_match import Pair, answers, read_pairs, teacher_forced
from flaxpretrain.generation.writer import Writer
from tests.evaluation.workdirs import decoder as decoder
from tests.evaluation.workdirs import encoder_decoder as encoder_decoder


def test_a_model_exactly_gives_the_answers_it_would_give(encoder_decoder):
    writer = Writer(*load_pretrained(encoder_decoder, head="lm"))
    sources = ["the cat sees milk .", "the [MASK] .", "a king"]
    own = [texts[0].text.strip() for texts in writer.write(sources, max_new_tokens=6)]
    pairs = [Pair(s, t) for s, t in zip(sources, own, strict=True)]
    pairs[1] = pairs[1]._replace(target="gold")
    found = list(answers(writer, pairs, max_new_tokens=6))
    assert [each.is_exact for each in found] == [True, own[1] == "gold", True]
    assert [each.text for each in found] == own


def test_teacher_forced_figures_are_those_of_the_likelihoods(decoder):
    writer = Writer(*load_pretrained(decoder, head="lm"))
    likely = writer.write(["the cat"], max_new_tokens=3)[0][0]
    pairs = [Pair("the cat", likely.text.strip()), Pair("the cat", "milk milk")]
    found = teacher_forced(writer, pairs)
    assert found["exact_match"] == 0.5 and 0.5 < found["accuracy"] < 1
    judged = [writer.judge(p.source, [p.target])[0] for p in pairs]
    nats, tokens = (sum(getattr(j, name) for j in judged) for name in ("nats", "tokens"))
    assert found["loss"] == pytest.approx(-nats / tokens, rel=1e-5)
    (answer,) = answers(writer, pairs[:1], max_new_tokens=3)
    assert answer.is_exact


def test_pairs_are_read_line_by_line(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"source": "a", "target": "b"}\n\n' + json.dumps(Pair("ü", "c")._asdict()))
    assert read_pairs(path) == [Pair("a", "b"), Pair("ü", "c")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file"),
        ("\n", "has no pairs"),
        ('{"source": "a", "target": "b"}\n{"source": "a"}', "line 2: expected"),
        ('{"source": "a", "target": ""}', "line 1: expected"),
        ("a\tb", "line 1: expected"),
        ("[1, 2]", "line 1: expected"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, text, message):
    path = tmp_path / "pairs.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_pairs(path)
