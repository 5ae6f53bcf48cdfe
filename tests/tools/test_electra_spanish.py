"""The steps of docs/electra_spanish.md, run short: novels to networks that Transformers loads."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from flaxpretrain.data.rows import Blocks
from flaxpretrain.data.store import open_dataset
from flaxpretrain.evaluation.fixed_masks import FixedMasks, baselines
from flaxpretrain.evaluation.subject import open_subject

torch = pytest.importorskip("torch", reason="computes with PyTorch Transformers")
pytestmark = [pytest.mark.slow, pytest.mark.hf]

ROOT = Path(__file__).parent.parent.parent
STEPS, ROWS = 1_000, 256
LEARNT_NATS = 0.7
"""Under the unigram entropy: more than how frequent words are."""
SENTENCE = "Los pájaros están hablando"


def run(*command):
    """A program in a process of its own, on the one device that its users have."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def trained(test_data, tmp_path_factory):
    """Folder with `data`, a workdir `w`, and `hf/generator` and `hf/discriminator`."""
    folder = tmp_path_factory.mktemp("spanish")
    text = test_data / "es_novels_eltec" / "train.txt"
    tokenizer, data = folder / "tokenizer", folder / "data"
    run(
        *("tools/train_tokenizer.py", "--corpus-dir", text, "--vocab-size", 4096),
        *("--no-strip-accents", "--output-dir", tokenizer),
    )
    run(
        *("tools/build_pretraining_dataset.py", "--corpus-dir", text, "--tokenizer", tokenizer),
        *("--output-dir", data, "--validation-share", 0.02, "--max-seq-length", 64),
    )
    run(
        *("run_pretraining.py", "configs/electra_spanish.py", "--data-dir", data),
        *("--workdir", folder / "w", "--set", f"steps={STEPS}", "--set", "evaluations=()"),
        *("--set", "finish=()", "--quiet"),
    )
    run(
        *("tools/convert_checkpoint.py", "to-hf", folder / "w", "--part", "all"),
        *("--output-dir", folder / "hf"),
    )
    return folder


def loaded(architecture, folder):
    """A network of Transformers from a folder that has all it needs and no more."""
    model, report = architecture.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


def test_the_generator_has_learnt_more_than_how_frequent_words_are(trained):
    import transformers

    model = loaded(transformers.ElectraForMaskedLM, trained / "hf" / "generator")
    dataset = open_dataset(trained / "data")
    objective = open_subject(trained / "w").run.objective
    # No token is left as it was, for to copy it is no achievement.
    masked = dataclasses.replace(objective.masking, mask_share=1.0)
    objective = dataclasses.replace(objective, masking=masked)
    # Blocks are one segment a row: Transformers knows no others.
    rows = FixedMasks(objective=objective, layout=Blocks(), length=64, max_rows=ROWS)
    nats, slots = 0.0, 0.0
    for batch in rows.batches(dataset, 64):
        with torch.no_grad():
            logits = model(
                input_ids=torch.tensor(batch["input_ids"]).long(),
                attention_mask=torch.tensor(batch["segment_ids"] > 0).long(),
            ).logits
        row = np.arange(len(logits))[:, None]
        log_shares = torch.log_softmax(logits, -1).numpy()
        chosen = log_shares[row, batch["masked_positions"], batch["masked_labels"]]
        nats -= float((chosen * batch["masked_weights"]).sum())
        slots += float(batch["masked_weights"].sum())
    counted = baselines(dataset, rows)
    assert counted.positions == slots > 2000
    assert nats / slots < counted.unigram - LEARNT_NATS


def test_the_discriminator_judges_every_token_of_the_tutorials_sentence(trained):
    import transformers

    folder = trained / "hf" / "discriminator"
    model = loaded(transformers.ElectraForPreTraining, folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(SENTENCE, return_tensors="pt")
    assert tokenizer.unk_token_id not in inputs["input_ids"]
    with torch.no_grad():
        theirs = torch.sigmoid(model(**inputs).logits)[0, 1:-1]
    ours = run("tools/evaluate.py", trained / "w", "--discriminate", SENTENCE)
    lines = ours.splitlines()[1:]
    assert len(lines) == len(theirs)
    for line, share in zip(lines, theirs.tolist(), strict=True):
        assert abs(float(line.split("%")[0]) / 100 - share) < 1e-3
