"""How programs end: exit codes, and one line for a mistake."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

SCRIPT = """
from flaxpretrain import program
from flaxpretrain.errors import UserError
def main(argv):
    parser = program.Parser("Does things.")
    parser.add_argument("--count", type=int, default=3, help="how many")
    parser.add_argument("--name", help="whose")
    count = parser.parse_args(argv).count
    if count < 0:
        raise UserError(f"--count {count}: expected 0 or more;\\nadd a sign")
    if count == 99:
        raise RuntimeError("a bug")
    return 75 if count == 75 else None
program.run(main)
"""


def start(*arguments):
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, cwd=ROOT
    )


@pytest.mark.parametrize(("count", "code"), [("1", 0), ("75", 75), ("99", 1), ("-1", 2), ("x", 2)])
def test_exit_codes(count, code):
    assert start("--count", count).returncode == code


def test_a_mistake_is_one_line_without_a_traceback():
    assert start("--count", "-1").stderr.count("\n") == 1
    assert "expected 0 or more; add a sign" in start("--count", "-1").stderr
    assert start("--cuont", "1").stderr.count("\n") == 1


def test_debug_shows_the_traceback():
    assert "Traceback" in start("--count", "-1", "--debug").stderr


def test_help_shows_defaults():
    assert "how many (default: 3)" in start("--help").stdout
    assert "None" not in start("--help").stdout


@pytest.mark.parametrize(
    ("kernel", "given", "found"),
    [
        ("always [madvise] never", None, "glibc.malloc.hugetlb=1"),
        ("always [madvise] never", "glibc.malloc.check=0", "glibc.malloc.check=0"),
        ("[always] madvise never", None, "None"),
        (None, None, "None"),
    ],
)
def test_malloc_asks_for_huge_pages_where_that_is_left_to_programs(tmp_path, kernel, given, found):
    setting = tmp_path / "enabled"
    if kernel is not None:
        setting.write_text(kernel)
    script = (
        "import os, pathlib, sys; from flaxpretrain import program; "
        f"program.HUGE_PAGES = pathlib.Path({str(setting)!r}); program.use_huge_pages(); "
        "print(os.environ.get('GLIBC_TUNABLES'), *sys.argv[1:])"
    )
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    done = subprocess.run(
        [sys.executable, "-c", script, "kept", "a b"],
        env=environment | ({"GLIBC_TUNABLES": given} if given else {}),
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.stdout == f"{found} kept a b\n"
