"""What a compilation leaves behind."""

import sys
from pathlib import Path

import pytest

from flaxpretrain.training.programs import give_back_memory

STATUS = Path("/proc/self/status")


def resident_bytes():
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(not STATUS.exists(), reason="needs Linux's /proc")
def test_memory_that_was_freed_goes_back_to_the_system():
    # Blocks that malloc takes from its heap, where the last one keeps it from shrinking by itself.
    blocks = [bytes(60_000) for _ in range(4_000)]
    last = bytes(60_000)
    del blocks
    before = resident_bytes()
    give_back_memory()
    assert len(last) and before - resident_bytes() > 100e6


def test_where_there_is_no_glibc_it_does_nothing(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    give_back_memory()
