"""The benchmark of duplicates measures what it says, on a small corpus."""

import json
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "deduplication.py"


def test_figures_of_a_small_corpus(tmp_path):
    words = (f"word{n % 997}x{n}" for n in range(6000))
    (tmp_path / "corpus.txt").write_text(" ".join(words) + "\n")
    output = tmp_path / "figures.json"
    arguments = ["--corpus", tmp_path / "corpus.txt", "--sizes", "40", "80", "--output", output]
    subprocess.run([sys.executable, PROGRAM, *arguments], check=True, timeout=300)
    rows = json.loads(output.read_text())["rows"]
    assert [row["documents"] for row in rows] == [40, 80]
    for row in rows:
        assert row["planted_duplicates"] == row["documents"] // 10
        assert row["found_share"] >= 0.75 and row["wrongly_dropped"] == 0
