"""Greedy and beam search are Transformers', token for token; draws follow their distribution."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxpretrain.errors import UserError
from flaxpretrain.generation.generator import Generator
from flaxpretrain.generation.rules import rules_of
from flaxpretrain.generation.strategies import Beam, Greedy, Sample, Temperature, TopK, TopP
from flaxpretrain.models.bart import BartConfig
from flaxpretrain.models.functional import model_of
from flaxpretrain.models.gpt2 import GPT2Config
from flaxpretrain.models.t5 import T5Config
from tests import toys
from tests.models.oracles import loaded, random_network
from tests.tolerances import REMEMBERED_FLOAT32

NEW = 12
PROMPTS = [[11, 12, 13, 14, 15, 16], [21, 22], [31, 32, 33], [41]]
SPECIAL = dict(pad_token_id=0, bos_token_id=3, eos_token_id=4)
NETWORKS = {
    "gpt2": (
        GPT2Config,
        "GPT2LMHeadModel",
        dict(vocab_size=61, n_embd=24, n_layer=2, n_head=3, n_positions=40) | SPECIAL,
    ),
    "t5": (
        T5Config,
        "T5ForConditionalGeneration",
        dict(vocab_size=61, d_model=24, d_kv=8, d_ff=40, num_layers=2, num_heads=3)
        | dict(relative_attention_num_buckets=8, relative_attention_max_distance=12)
        | dict(decoder_start_token_id=0, pad_token_id=0, eos_token_id=4),
    ),
    "bart": (
        BartConfig,
        "BartForConditionalGeneration",
        dict(vocab_size=61, d_model=24, encoder_layers=2, encoder_ffn_dim=40)
        | dict(encoder_attention_heads=3, decoder_layers=2, decoder_ffn_dim=40)
        | dict(decoder_attention_heads=3, max_position_embeddings=40)
        | dict(decoder_start_token_id=4, forced_eos_token_id=None)
        | SPECIAL,
    ),
}
BEAMS = [
    Beam(2, 0.0, "never"),
    Beam(3, 1.0, False),
    Beam(3, 1.5, True),
    Beam(4, 2.0, "never"),
    Beam(4, -1.0, False),
]


@pytest.fixture(scope="module", params=NETWORKS)
def pair(request):
    """Transformers' network and our generator of the same weights, which end texts at times."""
    kind, name, values = NETWORKS[request.param]
    network = random_network(name, values)
    import torch

    with torch.no_grad():  # the end of a text is neither certain nor impossible
        head = network.get_input_embeddings().weight
        head *= 0.35 / head.std()
    config, params, _ = loaded(kind, network)
    return network, Generator(config, params)


def reseeded(network, generator):
    """Gives both other weights, three times: these, and the same with noise."""
    import torch

    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    params = generator._params
    for seed in range(3):
        if seed:
            torch.manual_seed(seed)
            with torch.no_grad():
                for tensor in {id(t): t for t in network.parameters()}.values():
                    tensor.add_(0.1 * torch.randn_like(tensor))
            generator._params = jax.tree.map(
                jnp.asarray, loaded(type(generator.config), network)[1]
            )
        yield seed
    network.load_state_dict(state)
    generator._params = params


def theirs(network, prompts, count=1, **options):
    """New tokens of Transformers' `generate`, without the end and what follows it."""
    import torch

    decoder = not network.config.is_encoder_decoder
    longest = max(map(len, prompts))
    pads = [[0] * (longest - len(p)) for p in prompts]
    rows = [(pad + p if decoder else p + pad) for p, pad in zip(prompts, pads, strict=True)]
    ones = [
        ([0] * len(pad) + [1] * len(p) if decoder else [1] * len(p) + [0] * len(pad))
        for p, pad in zip(prompts, pads, strict=True)
    ]
    with torch.no_grad():
        found = network.generate(
            input_ids=torch.tensor(rows),
            attention_mask=torch.tensor(ones),
            max_new_tokens=NEW,
            num_return_sequences=count,
            **({"do_sample": False} | options),
        ).tolist()
    texts = [row[longest:] if decoder else row[1:] for row in found]
    cut = [row[: row.index(4)] if 4 in row else row for row in texts]
    return [cut[i : i + count] for i in range(0, len(cut), count)]


def ours(generator, prompts, strategy, count=1, **rules):
    changed = dataclasses.replace(generator.rules, **rules)
    found = generator.generate(prompts, strategy, max_new_tokens=NEW, count=count, rules=changed)
    return [[list(text.ids) for text in texts] for texts in found]


@pytest.mark.hf
def test_greedy_is_that_of_transformers_for_prompts_of_unequal_length(pair):
    network, generator = pair
    texts = set()
    for _ in reseeded(network, generator):
        expected = theirs(network, PROMPTS)
        assert ours(generator, PROMPTS, Greedy()) == expected
        texts |= {tuple(text[0]) for text in expected}
    assert len(texts) > len(PROMPTS)


@pytest.mark.hf
@pytest.mark.parametrize("strategy", BEAMS, ids=str)
def test_beam_search_is_that_of_transformers(pair, strategy):
    network, generator = pair
    options = {"num_beams": strategy.size} | {
        name: getattr(strategy, name) for name in ("length_penalty", "early_stopping")
    }
    for _ in reseeded(network, generator):
        expected = theirs(network, PROMPTS, strategy.size, **options)
        assert ours(generator, PROMPTS, strategy, strategy.size) == expected


@pytest.mark.hf
@pytest.mark.parametrize(
    ("beams", "rules"),
    [
        (3, {"forced_bos": 9, "forced_eos": 4}),
        (1, {"no_repeat_ngram_size": 2, "min_new_tokens": 5}),
        (3, {"no_repeat_ngram_size": 1, "repetition_penalty": 1.7}),
        (3, {"eos": (4, 50, 51)}),
    ],
    ids=str,
)
def test_rules_are_those_of_transformers(pair, beams, rules):
    network, generator = pair
    if "forced_bos" in rules and not generator.has_encoder:
        rules = {"forced_eos": 4}
    options = {
        "forced_bos": "forced_bos_token_id",
        "forced_eos": "forced_eos_token_id",
        "eos": "eos_token_id",
    }
    named = {options.get(k, k): list(v) if k == "eos" else v for k, v in rules.items()}
    # One prompt at a time: Transformers counts padding among the tokens that were there.
    expected = [theirs(network, [p], beams, num_beams=beams, **named)[0] for p in PROMPTS]
    ends = rules.get("eos", (4,))
    for texts in expected:
        for text in texts:
            text[:] = text[: next((i for i, t in enumerate(text) if t in ends), None)]
    strategy = Beam(beams) if beams > 1 else Greedy()
    assert ours(generator, PROMPTS, strategy, beams, **rules) == expected


def draws(strategy, count=8192, seed=3):
    """Next tokens drawn after one prompt, and the model's own distribution of them."""
    config = toys.gpt2(vocab_size=23, bos_token_id=None, eos_token_id=None)
    params = model_of(config.build).init(jax.random.key(1))
    params["embeddings"]["words"] *= 5.0
    generator = Generator(config, params)
    shares = np.zeros(23)
    ids, found = generator.next_tokens([[5, 6, 7]], 23)[0]
    shares[ids] = found
    (texts,) = generator.generate([[5, 6, 7]], strategy, max_new_tokens=1, count=count, seed=seed)
    return np.bincount([text.ids[0] for text in texts], minlength=23), shares


def top_p(shares, mass):
    order = np.argsort(-shares)
    before = np.cumsum(shares[order]) - shares[order]
    kept = np.zeros(len(shares), bool)
    kept[order[before < mass]] = True
    return np.where(kept, shares, 0)


def top_k(shares, count):
    return np.where(shares >= np.sort(shares)[-count], shares, 0)


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        (Sample(), lambda p: p),
        (Sample((Temperature(0.6),)), lambda p: p ** (1 / 0.6)),
        (Sample((TopK(5),)), lambda p: top_k(p, 5)),
        (Sample((TopP(0.7),)), lambda p: top_p(p, 0.7)),
        (
            Sample((Temperature(1.5), TopK(9), TopP(0.8))),
            lambda p: top_p((q := top_k(p ** (1 / 1.5), 9)) / q.sum(), 0.8),
        ),
    ],
    ids=["all", "temperature", "top-k", "top-p", "in turn"],
)
def test_draws_follow_the_distribution(strategy, expected):
    counts, shares = draws(strategy)
    expected = expected(shares.astype(np.float64))
    expected *= counts.sum() / expected.sum()
    assert 1 < np.count_nonzero(expected) and not counts[expected == 0].any()
    kept = expected > 0
    from scipy import stats

    assert stats.chisquare(counts[kept], expected[kept]).pvalue > 1e-3


def test_a_text_depends_on_seed_and_numbers_not_on_its_neighbours():
    generator = Generator(toys.gpt2(), model_of(toys.gpt2().build).init(jax.random.key(1)))
    strategy, options = Sample((TopP(0.9),)), {"max_new_tokens": 6, "count": 2}
    prompts = [[5 + i, 6, 7][: 1 + i % 3] for i in range(35)]
    whole = generator.generate(prompts, strategy, **options, seed=1)
    assert whole == generator.generate(prompts, strategy, **options, seed=1)
    assert whole[:3] == generator.generate(prompts[:3], strategy, **options, seed=1)
    assert whole != generator.generate(prompts, strategy, **options, seed=2)
    assert whole[0][0] != whole[0][1]


def test_greedy_stays_greedy_when_one_token_is_left():
    config = toys.gpt2()
    generator = Generator(config, model_of(config.build).init(jax.random.key(1)))
    greedy = generator.generate([[5, 6]], max_new_tokens=5)
    for strategy in (
        Sample((TopK(1),)),
        Sample((TopP(1e-6),)),
        Sample((Temperature(1e-6),)),
        Beam(1),
    ):
        (text,) = generator.generate([[5, 6]], strategy, max_new_tokens=5)[0]
        assert text.ids == greedy[0][0].ids


@pytest.mark.parametrize("make", [toys.gpt2, toys.t5, toys.bart])
def test_likelihoods_are_products_of_next_token_probabilities(make):
    config = make()
    generator = Generator(config, model_of(config.build).init(jax.random.key(1)))
    prompts, more = [[5, 6, 7], [8]], [[9, 10, 11], [12, 13]]
    found = generator.likelihoods(prompts, more)
    for prompt, continuation, likelihood in zip(prompts, more, found, strict=True):
        assert likelihood.tokens == len(continuation)
        nats, right = 0.0, 0
        if generator.has_encoder:
            continue
        for i, token in enumerate(continuation):
            ids, shares = generator.next_tokens([prompt + continuation[:i]], 300)[0]
            nats += np.log(shares[ids.tolist().index(token)])
            right += ids[0] == token
        np.testing.assert_allclose(likelihood.nats, nats, rtol=REMEMBERED_FLOAT32)
        assert likelihood.right == right
    first = generator.next_tokens(prompts, 300)
    single = generator.likelihoods(prompts, [ids[:1].tolist() for ids, _ in first])
    for (_, shares), likelihood in zip(first, single, strict=True):
        np.testing.assert_allclose(np.exp(likelihood.nats), shares[0], rtol=REMEMBERED_FLOAT32)
        assert likelihood.right == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g: g.generate([[5]], Beam(200), max_new_tokens=3), "--beams 200: .* 150 beams"),
        (lambda g: g.generate([[5]], Beam(2), max_new_tokens=3, count=3), "--count 3: a beam of 2"),
        (lambda g: g.generate([[5]], max_new_tokens=3, count=2), "--count 2: .* same text"),
        (lambda g: g.generate([[5], []], max_new_tokens=3), "an empty prompt"),
        (lambda g: g.generate([[5]], max_new_tokens=0), "--max-new-tokens must be 1 or more"),
        (lambda g: g.generate([[5] * 60], max_new_tokens=5), "positions for 64: shorten"),
        (lambda g: g.next_tokens([[5]], 301), r"--top-k must lie in 1 to 300"),
        (lambda g: g.likelihoods([[5]], [[]]), "no tokens"),
        (lambda g: Beam(0), "--beams must be 1 or more"),
        (lambda g: Beam(2, 1.0, "soon"), "--early-stopping: expected true, false or never"),
        (lambda g: Temperature(0.0), "--temperature must be above 0"),
        (lambda g: TopK(0), "--top-k must be 1 or more"),
        (lambda g: TopP(1.5), "--top-p must lie above 0"),
        (lambda g: dataclasses.replace(g.rules, repetition_penalty=0.0), "--repetition-penalty"),
        (lambda g: dataclasses.replace(g.rules, min_new_tokens=-1), "--min-new-tokens must be 0"),
        (lambda g: g.rules.check_fits(2), "the eos token is 3, but the model has tokens 0 to 1"),
        (lambda g: Generator(toys.bert(), {}), "no language modelling head"),
    ],
)
def test_a_mistake_is_one_clear_line(plain, call, message):
    with pytest.raises(UserError, match=message) as raised:
        call(plain)
    assert "\n" not in str(raised.value)


@pytest.fixture(scope="module")
def plain():
    config = toys.gpt2()
    return Generator(config, model_of(config.build).init(jax.random.key(1)))


def test_rules_are_read_from_the_generation_configuration():
    found = rules_of(
        toys.bart(),
        {
            "eos_token_id": [7, 8],
            "forced_bos_token_id": 2,
            "no_repeat_ngram_size": 3,
            "num_beams": 4,
        },
    )
    assert found.eos == (7, 8) and found.forced_bos == 2 and found.forced_eos == 3
    assert found.start == 3 and found.no_repeat_ngram_size == 3 and found.pad == 0
    assert rules_of(toys.gpt2(), {"forced_bos_token_id": 2}).forced_bos is None
