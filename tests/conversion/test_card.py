"""The model card: metadata that the hub takes, honest text, nothing private."""

import json
import os

import pytest
from huggingface_hub import ModelCard, metadata_load
from huggingface_hub.utils import validate_repo_id

from flaxpretrain.config import render
from flaxpretrain.conversion.card import Facts, model_card
from flaxpretrain.conversion.licences import HUB_LICENCES, licence_fields, require_licence
from flaxpretrain.conversion.public import public, public_command, public_values
from flaxpretrain.errors import UserError
from tests import toys

DATASET = {
    "sources": [{"name": "hf:wikitext:wikitext-2-raw-v1"}, {"path": "/home/ann/corpus/books.txt"}],
    "splits": {"train": {"documents": 1200, "tokens": 3_400_000, "bytes": 15_000_000}},
    "licence": "CC BY-SA 3.0",
    "attribution": "Wikipedia contributors",
    "language": "en",
}
ENVIRONMENT = {
    "flaxpretrain": "0.1.0",
    "packages": {"jax": "0.10.2"},
    "devices": {"count": 4, "kind": "TPU v5 lite"},
    "dataset": {"licence": "CC BY-SA 3.0"},
}


def facts(**changes) -> Facts:
    run = toys.run()
    data = {**render(run.data), "folder": "/home/ann/data/wiki"}
    values = {
        "name": "tiny",
        "run": {**render(run), "data": data},
        "dataset": DATASET,
        "environment": ENVIRONMENT,
        "figures": {"validation/masked_lm": 3.25, "validation/perplexity": 25.79},
        "step": 6,
        "command": "python run_pretraining.py /home/ann/x.py --set data.folder=/home/ann/d",
        "base_model": "google/bert",
    }
    return Facts(**(values | changes))


def written(tmp_path, **changes) -> tuple[str, dict]:
    text = model_card(facts(**changes), toys.bert().to_hf(), 12345, "[MASK]")
    (tmp_path / "README.md").write_text(text)
    return text, metadata_load(tmp_path / "README.md")


def test_the_metadata_is_what_the_hub_takes(tmp_path):
    text, metadata = written(tmp_path)
    assert metadata == {
        "language": ["en"],
        "license": "cc-by-sa-3.0",
        "datasets": ["wikitext"],
        "base_model": "google/bert",
        "pipeline_tag": "fill-mask",
        "library_name": "transformers",
        "tags": ["flaxpretrain", "jax", "bert"],
    }
    card = ModelCard(text)
    assert card.data.to_dict() == metadata
    assert metadata["license"] in HUB_LICENCES
    validate_repo_id(metadata["base_model"])


def test_the_text_says_what_was_done(tmp_path):
    text, _ = written(tmp_path)
    for part in (
        "# tiny",
        "A BertForMaskedLM (2 layers, 32 wide, 4 attention heads, 300 tokens; 12,345 parameters)",
        "pretrained with the objective MaskedLM for 6 steps from the weights of google/bert",
        'fill_mask("This is a great [MASK].")',
        "Sources: hf:wikitext:wikitext-2-raw-v1, books.txt",
        "train: 1,200 documents, 3,400,000 tokens, 15.0 MB of text",
        "Licence of the text: CC BY-SA 3.0",
        "Attribution: Wikipedia contributors",
        "| phase 1 | 6 steps, rows of 32, batches of 8 |",
        "| optimizer | AdamW: learning_rate 0.001",
        "| devices | 4 x TPU v5 lite |",
        "| validation/masked_lm | 3.2500 |",
        "python run_pretraining.py x.py --set data.folder=d",
        "With flaxpretrain 0.1.0, jax 0.10.2.",
    ):
        assert part in text, part


def test_the_configuration_in_it_can_be_read_back(tmp_path):
    text, _ = written(tmp_path)
    rendered = json.loads(text.split("```json\n")[1].split("\n```")[0])
    assert rendered == render(toys.run()) | {"data": rendered["data"]}
    assert rendered["data"]["folder"] == "wiki"


def test_nothing_private_is_in_it(tmp_path):
    text, _ = written(tmp_path)
    for private in ("/home", "ann", os.path.expanduser("~") + "/"):
        assert private not in text


def test_unknown_things_are_left_out_not_invented(tmp_path):
    empty = Facts(name="imported")
    text = model_card(empty, toys.bert().to_hf(), 12345, None)
    (tmp_path / "README.md").write_text(text)
    assert metadata_load(tmp_path / "README.md") == {
        "license": "unknown",
        "pipeline_tag": "feature-extraction",
        "library_name": "transformers",
        "tags": ["flaxpretrain", "jax", "bert"],
    }
    for heading in ("## Training", "## Evaluation", "## Repeating"):
        assert heading not in text


def test_what_the_hub_would_refuse_stays_out_of_the_metadata(tmp_path):
    dataset = DATASET | {"language": "English", "sources": ["hf:not/a/dataset", "plain.txt"]}
    _, metadata = written(tmp_path, dataset=dataset, base_model="runs/some/folder")
    assert metadata.keys().isdisjoint({"language", "datasets", "base_model"})


def test_the_licence_of_the_model_may_be_stated(tmp_path):
    text, metadata = written(tmp_path, licence="apache-2.0")
    assert metadata["license"] == "apache-2.0"
    assert "Licence of the text: CC BY-SA 3.0" in text


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        (None, {"license": "unknown"}),
        ("CC BY-SA 4.0", {"license": "cc-by-sa-4.0"}),
        ("Creative Commons Attribution-ShareAlike 4.0 International", {"license": "cc-by-sa-4.0"}),
        ("The Artistic Licence 2.0", {"license": "artistic-2.0"}),
        ("House rules, v2", {"license": "other", "license_name": "house-rules-v2"}),
        ("Apache-2.0", {"license": "apache-2.0"}),
        ("MIT License", {"license": "mit"}),
        (
            "public domain",
            {
                "license": "other",
                "license_name": "public-domain",
                "license_link": "https://creativecommons.org/publicdomain/mark/1.0/",
            },
        ),
        (
            "PSF-2.0",
            {
                "license": "other",
                "license_name": "psf-2.0",
                "license_link": "https://docs.python.org/3/license.html",
            },
        ),
    ],
)
def test_licences_of_corpora_in_the_hubs_words(text, fields):
    assert licence_fields(text) == fields


def test_a_licence_that_the_user_states_must_be_one_of_the_hubs():
    assert require_licence("cc0-1.0") == "cc0-1.0"
    with pytest.raises(UserError, match="--license apache2: not an identifier .* 'apache-2.0'"):
        require_licence("apache2")


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("python run.py configs/x.py", "python run.py configs/x.py"),
        ("run --data-dir /home/ann/wiki", "run --data-dir wiki"),
        ("run --data-dir=/home/ann/wiki/", "run --data-dir=wiki"),
        ("run --set data.folder=~/wiki", "run --set data.folder=wiki"),
        ("run --set=data.folder=/mnt/ann/wiki", "run --set=data.folder=wiki"),
        ("run '/home/ann/my data/wiki'", "run wiki"),
        ("run gs://anns-bucket/runs/7", "run 7"),
        ("run ../ann/wiki", "run wiki"),
        ("HF_TOKEN=hf_abcdefghijkl run", "'HF_TOKEN=***' run"),
        ("run --init-from google/bert", "run --init-from google/bert"),
        ("run 'unbalanced /home/ann/x", "run 'unbalanced x"),
    ],
)
def test_commands_without_private_parts(command, shown):
    assert public_command(command) == shown


def test_prose_and_values_keep_their_sense():
    assert public("See https://a.org/b/c and either/or.") == "See https://a.org/b/c and either/or."
    assert public("from /home/ann/x y") == "from x y"
    assert public_values({"a": ["~/b/c", 1, None], "class": "x.y"}) == {
        "a": ["c", 1, None],
        "class": "x.y",
    }
