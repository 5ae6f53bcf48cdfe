"""What a dataset holds, in words: counts of each split, and what a row length would pad."""

import numpy as np

from flaxpretrain.data.document import told
from flaxpretrain.data.offsets import portions
from flaxpretrain.data.rows import Blocks, Documents
from flaxpretrain.data.segments import SegmentPlan, recorded_layout
from flaxpretrain.data.sentence_pairs import PairedFraming, SentencePairs
from flaxpretrain.data.store import Dataset, Split
from flaxpretrain.data.vocabulary import Vocabulary
from flaxpretrain.errors import UserError


def losses(dataset: Dataset) -> list[str]:
    """A line for each source of which something was left out or changed, and why."""
    lines = []
    for source in dataset.metadata["sources"]:
        lines += told(source["name"], source.get("lost", {}))
    read = sum(source["documents"] for source in dataset.metadata["sources"])
    kept = sum(split.documents for split in dataset.splits.values())
    if kept < read:
        lines.append(f"{read - kept:,} of {read:,} documents hold no token")
    return lines


def counts(dataset: Dataset) -> list[str]:
    """A line for each split: documents, sentences, tokens, bytes, the share of unknown tokens.

    No token is lost between text and store: rows are views of all of them.
    """
    lines = []
    for name, split in dataset.splits.items():
        unknown = dataset.metadata["splits"][name]["unknown"]
        lines.append(
            f"{name}: {split.documents:,} documents, {split.sentences:,} sentences, "
            f"{split.bytes / 1e6:,.2f} MB of text; {split.tokens:,} tokens kept, 0 lost; "
            f"{split.tokens / max(split.bytes, 1):.3f} tokens a byte, "
            f"{unknown / max(split.tokens, 1):.3%} unknown"
        )
    return lines


def specials_per_piece(vocabulary: Vocabulary) -> int:
    """Special tokens that frame a piece of text: [CLS] and [SEP], or an end of text."""
    if vocabulary.cls is not None and vocabulary.sep is not None:
        return 2
    return 0 if vocabulary.eos is None else 1


def _holds_pairs(split: Split, length: int, vocabulary: Vocabulary) -> bool:
    """Whether there are sentences to pair, and tokens to frame the pairs."""
    framed = vocabulary.cls is not None and vocabulary.sep is not None
    return framed and length >= 5 and 1 < split.documents < split.sentences


def padding(dataset: Dataset, length: int) -> list[str]:
    """A line for each way to make rows of this length: what part of the positions is padding.

    Raises:
      UserError: the length leaves no room for text.
    """
    specials = specials_per_piece(dataset.vocabulary)
    if length <= specials:
        raise UserError(
            f"--max-seq-length {length} leaves no room beside {specials} special tokens"
        )
    split = dataset.split("train")
    lines = []
    layouts = [
        ("blocks (concatenated and cut)", Blocks(), specials),
        ("documents packed, with segments", Documents(), specials),
    ]
    if _holds_pairs(split, length, dataset.vocabulary):
        framed = PairedFraming.specials_per_piece
        layouts += [
            ("sentence pairs packed, a label each", SentencePairs(), framed),
            ("sentence pairs, one a row", SentencePairs(most=1), framed),
        ]
    for label, layout, framed in layouts:
        plan = layout.plan(split, length, framed)
        lines.append(f"{label}: {plan.rows_per_epoch:,} rows, {plan.padding_share:.2%} padding")
    compatible = recorded_layout(dataset)
    if compatible is not None:
        plan = compatible.plan(split, length, specials)
        assert isinstance(plan, SegmentPlan)
        lines.append(
            f"--compat electra: {plan.rows_per_epoch:,} rows, {plan.padding_share:.2%} padding, "
            f"{plan.tokens_lost:,} tokens ({plan.tokens_lost / split.tokens:.2%}) lost, "
            f"{plan.rows_of_two / plan.rows_per_epoch:.1%} of two segments; in a recipe: "
            f"Data(layout={compatible})"
        )
    offsets = split.document_offsets
    rows = sum(
        int((-(-np.diff(offsets[first : last + 1]) // (length - specials))).sum())
        for first, last in portions(offsets)
    )
    alone = 1 - (split.tokens + specials * rows) / (rows * length)
    lines.append(f"documents alone, for comparison: {rows:,} rows, {alone:.2%} padding")
    return [f"rows of {length}, {line}" for line in lines]
