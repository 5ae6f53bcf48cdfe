"""What the ways to lay text into rows cost in padding, beside each other on one dataset."""

import dataclasses
from collections.abc import Iterator

from flaxpretrain.config import Data, Run
from flaxpretrain.data.buckets import LengthBuckets
from flaxpretrain.data.rows import Blocks, Documents, Layout, PaddedDocuments
from flaxpretrain.data.sentence_pairs import SentencePairs
from flaxpretrain.data.store import Dataset
from flaxpretrain.errors import UserError
from flaxpretrain.training.session import row_plan

_SHORTEST = 16


def padding_by_layout(
    run: Run, dataset: Dataset, data: Data, length: int
) -> dict[str, tuple[int, float]]:
    """Positions of an epoch, and the share of them that is padding, by the name of a layout.

    The recipe's own comes first. Rows of `length`, of pairs where the recipe's are.
    """
    found = {}
    for layout in (data.layout, *_others(data.layout, length)):
        name = _name(layout)
        try:
            plan = row_plan(run, dataset, dataclasses.replace(data, layout=layout), length)
        except UserError:
            # The objective does not go with such rows, or a bucket would be all but empty.
            if layout is data.layout:
                raise
            continue
        found.setdefault(name, (plan.rows_per_epoch * length, plan.padding_share))
    return found


def _others(layout: Layout, length: int) -> Iterator[Layout]:
    buckets = tuple(
        length // part for part in (8, 4, 2) if length % part == 0 and length // part >= _SHORTEST
    )
    inner = layout.layout if isinstance(layout, LengthBuckets) else layout
    if isinstance(inner, SentencePairs):
        packed = inner if inner.most > 1 else dataclasses.replace(inner, most=SentencePairs().most)
        alone = dataclasses.replace(inner, most=1)
        yield packed
    elif isinstance(inner, (Blocks, Documents, PaddedDocuments)):
        alone = PaddedDocuments()
        yield from (Blocks(), Documents())
    else:
        return
    if buckets:
        yield LengthBuckets(buckets, alone)
    yield alone


def _name(layout: Layout) -> str:
    if isinstance(layout, LengthBuckets):
        lengths = ", ".join(map(str, layout.lengths))
        return f"LengthBuckets({lengths}) of {_name(layout.layout)}"
    if isinstance(layout, SentencePairs):
        return f"SentencePairs(most={layout.most})"
    return type(layout).__name__


__all__ = ["padding_by_layout"]
