"""Terms beside masked language modelling: sentence pairs and span boundaries."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxpretrain.data.masking import TokenMasking
from flaxpretrain.data.randomness import row_keys
from flaxpretrain.data.rows import Blocks, Documents
from flaxpretrain.data.sentence_pairs import PairedFraming, SentencePairs
from flaxpretrain.data.span_masking import SpanMasking
from flaxpretrain.data.store import open_dataset
from flaxpretrain.errors import UserError
from flaxpretrain.models.functional import model_of
from flaxpretrain.objectives.masked_lm import MaskedLM
from flaxpretrain.objectives.second_terms import MaskedLMWith, SentenceRelation, SpanBoundary
from flaxpretrain.training import sharding
from flaxpretrain.training.assembly import assemble
from tests import toys
from tests.data.streams import DIGITS, drawn, undrawn
from tests.tolerances import GRADIENTS_FLOAT32, LOSS_REORDERED

PAIRS = MaskedLMWith(masking=TokenMasking(rate=0.3), also=(SentenceRelation(),))
SPANS = MaskedLMWith(
    masking=SpanMasking(rate=0.3), also=(SpanBoundary(longest=3, position_width=8),)
)
HEADS = ("mlm", "pooler", "nsp")


def network(objective, **changes):
    config = toys.bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **changes)
    model = model_of(lambda rngs: objective.build(config, rngs))
    return config, model, model.init(jax.random.key(0))


def gradient(objective, model, params, batch):
    weights = objective.weights(batch)

    def total(params, batch):
        sums = objective.loss(model, params, batch, None)
        return sum(sums[name].total for name in objective.terms), sums

    (_, sums), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(params, batch)
    for name in objective.terms:
        np.testing.assert_allclose(sums[name].weight, weights[name])
    return sums, grads


def unpacked(batch):
    """Each segment of a packed batch in a row of its own, with its masks, label and borders."""
    rows = []
    length = batch["input_ids"].shape[1]
    for row in range(len(batch["input_ids"])):
        segments = batch["segment_ids"][row]
        for slot, number in enumerate(range(1, segments.max() + 1)):
            where = np.flatnonzero(segments == number)
            first, size = where[0], len(where)
            alone = {}
            for name in ("input_ids", "position_ids", "token_type_ids", "segment_ids"):
                if name in batch:
                    alone[name] = np.zeros(length, np.int32)
                    alone[name][:size] = batch[name][row, where]
            alone["segment_ids"][:size] = 1
            inside = (batch["masked_positions"][row] >= first) & (
                batch["masked_positions"][row] < first + size
            )
            for name in ("masked_weights", "boundary_weights"):
                if name in batch:
                    alone[name] = batch[name][row] * inside
            for name in ("masked_labels", "boundary_offsets"):
                if name in batch:
                    alone[name] = batch[name][row]
            for name in ("masked_positions", "boundary_left", "boundary_right"):
                if name in batch:
                    alone[name] = np.clip(batch[name][row] - first, 0, length - 1)
            if "pair_labels" in batch:
                alone["pair_labels"] = batch["pair_labels"][row, slot : slot + 1]
                alone["pair_weights"] = batch["pair_weights"][row, slot : slot + 1]
                alone["pair_positions"] = np.zeros(1, np.int32)
            alone["noise_key"] = batch["noise_key"][row]
            rows.append(alone)
    return {name: jnp.asarray(np.stack([row[name] for row in rows])) for name in rows[0]}


def packed_batch(objective, layout, folder):
    split = open_dataset(toys.dataset(folder)).split("train")
    framing = layout.framing(objective.framing(toys.VOCABULARY, 48))
    plan = layout.fill(split, framing.room())
    # The rows of several pieces are the last ones.
    index = plan.rows_per_epoch - 1 - np.arange(4)
    keys = row_keys(0, index * 0, index)
    return framing.examples(plan.rows(0, index * 0, index), keys, 0)


@pytest.mark.parametrize(
    ("objective", "layout", "heads"),
    [(PAIRS, SentencePairs(), HEADS), (SPANS, None, ("mlm",))],
    ids=["pairs", "spans"],
)
def test_a_packed_row_gives_what_its_parts_give_alone(objective, layout, heads, tmp_path):
    batch = packed_batch(objective, layout or Documents(), tmp_path / "data")
    assert batch["segment_ids"].max() > 1
    _, model, params = network(objective, heads=heads)
    packed, grads = gradient(objective, model, params, jax.tree.map(jnp.asarray, batch))
    alone, alone_grads = gradient(objective, model, params, unpacked(batch))
    assert packed.keys() == alone.keys()
    for name, s in packed.items():
        assert float(s.weight) == float(alone[name].weight) > 0
        np.testing.assert_allclose(s.total, alone[name].total, rtol=LOSS_REORDERED)
    scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a / scale, b / scale, atol=GRADIENTS_FLOAT32, rtol=0
        ),
        grads,
        alone_grads,
    )


def test_the_pair_term_is_the_cross_entropy_of_the_labels():
    objective = PAIRS
    config, model, params = network(objective, heads=HEADS)
    framing = SentencePairs(most=2).framing(objective.framing(toys.VOCABULARY, 24))
    assert isinstance(framing, PairedFraming)
    rows = toys.rows(4, 18)
    batch = framing.examples(rows, row_keys(0, np.zeros(4, np.int64), np.arange(4)), 0)
    batch = jax.tree.map(jnp.asarray, batch)
    sums = objective.loss(model, params, batch, None)
    module = model.bind(params)
    hidden = objective.hidden(module, batch, None)
    scores = module.next_sentence_logits(jnp.tanh(module.pooler(hidden[:, :1])))[:, 0]
    wanted = -jax.nn.log_softmax(scores)[np.arange(4), batch["pair_labels"][:, 0]]
    weight = batch["pair_weights"][:, 0]
    np.testing.assert_allclose(
        sums["sentence_pairs"].total, jnp.sum(wanted * weight), rtol=LOSS_REORDERED
    )
    assert objective.terms == {"masked_lm": 1.0, "sentence_pairs": 1.0}
    assert {"sentence_pairs", "sentence_pairs_accuracy", "perplexity"} <= set(
        objective.summarize(sums)
    )


def test_golden_rows_of_span_boundaries():
    """Digits that are masked are drawn as _; below each its left and right neighbour and place."""
    framing = SpanBoundary(longest=2).framing(
        MaskedLM(masking=SpanMasking(rate=0.4, mask_share=1.0, random_share=0.0)).framing(
            DIGITS, 26
        )
    )
    text = undrawn("314159265358979323846264")
    rows = {
        "ids": text[None].astype(np.int32),
        "word_starts": np.ones((1, 24), bool),
        "piece_lengths": np.array([[15, 7]], np.int32),
    }
    batch = framing.examples(rows, row_keys(3, np.zeros(1, np.int64), np.zeros(1, np.int64)), 0)
    for name, (shape, dtype) in framing.spec(1).items():
        assert batch[name].shape == shape and batch[name].dtype == dtype
    ids = batch["input_ids"][0]
    lines = [drawn(ids), *([" "] * 26 for _ in range(3))]
    for position, left, right, offset, weight in zip(
        *(
            batch[name][0]
            for name in (
                "masked_positions",
                "boundary_left",
                "boundary_right",
                "boundary_offsets",
                "boundary_weights",
            )
        ),
        strict=True,
    ):
        if weight:
            lines[1][position] = drawn(ids[left : left + 1])
            lines[2][position] = drawn(ids[right : right + 1])
            lines[3][position] = str(offset)
    assert ["".join(line).rstrip() for line in lines] == GOLDEN


def test_the_head_of_spans_is_no_part_of_the_export():
    config, _, params = network(SPANS)
    assert "span_head" in params
    exported = SPANS.parts(config, params)["model"][1]
    plain = MaskedLM(masking=SPANS.masking)
    _, model, _ = network(plain)
    assert jax.tree.structure(exported) == jax.tree.structure(model.abstract())


def test_what_does_not_fit_is_said_before_anything_is_compiled():
    with pytest.raises(UserError, match="SentenceRelation needs the heads pooler and nsp"):
        network(PAIRS)
    mesh = sharding.make_mesh(8, 1, 1)
    run = toys.run(model=toys.bert(heads=HEADS), objective=PAIRS)
    assert run.data.layout == Blocks()
    with pytest.raises(UserError, match="reads pair_positions.*Blocks does not make"):
        assemble(run, mesh, 10)
    data = dataclasses.replace(run.data, layout=SentencePairs())
    assert assemble(dataclasses.replace(run, data=data), mesh, 10).state.params["nsp_head"]
    with pytest.raises(UserError, match="objective.also holds one or more terms, none twice"):
        MaskedLMWith(masking=TokenMasking(), also=(SpanBoundary(), SpanBoundary()))
    with pytest.raises(UserError, match="position_width of SpanBoundary must be positive"):
        SpanBoundary(position_width=0)


GOLDEN = [
    "<3_415926535____><___8_62>",
    "  3                   8",
    "  4                   6",
    "  0                   0",
]
