"""How every program starts and ends: arguments, exit codes, one line for a mistake."""

import argparse
import importlib.metadata
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from flaxpretrain.errors import UserError
from flaxpretrain.locations import is_remote

EXIT_OK = 0
EXIT_BUG = 1
EXIT_USER = 2
EXIT_NOT_FINITE = 3
EXIT_PEER_GONE = 69
EXIT_PREEMPTED = 75
EXIT_WATCHDOG = 124
EXIT_INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """A parser that shows defaults, knows `--debug`, and answers a mistake in one line."""

    def __init__(self, description: str | None, **kwargs) -> None:
        """`description` is usually the module's docstring; its line breaks are kept."""
        super().__init__(
            description=description, formatter_class=_Formatter, allow_abbrev=False, **kwargs
        )
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def add_overrides(self, help: str) -> None:
        """Adds `--set FIELD=VALUE`, repeatable, as `overrides`."""
        self.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="FIELD=VALUE",
            dest="overrides",
            help=help,
        )

    def error(self, message: str) -> NoReturn:
        """Prints one line and exits with 2."""
        print(f"{self.prog}: {message}; see {self.prog} --help", file=sys.stderr)
        raise SystemExit(EXIT_USER)


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults in the help, but for options that have none."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def output_folder(text: str) -> Path:
    """A folder that a program writes: not a URL, which a Path would take for a folder `gs:`."""
    if is_remote(text):
        raise argparse.ArgumentTypeError(
            f"{text} is a URL, and this is written on the disk: name a folder, and copy it then"
        )
    return Path(text)


YNN_OFF = "--xla_cpu_experimental_ynn_fusion_type="


def avoid_known_faults() -> None:
    """Sets XLA flags against faults of the installed jax; before jax touches a device.

    jax 0.10 computes wrong gradients on the CPU in some batched products: values of one segment
    reach another through XLA's YNNPACK fusions (seen with 0.10.2, gone in 0.12.0).
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if importlib.metadata.version("jax").startswith("0.10.") and YNN_OFF not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {YNN_OFF}".strip()


GOOGLE = "0x1ae0"
"""The vendor of TPUs on the PCI bus."""


def has_tpu() -> bool:
    """Whether this machine has a TPU on its PCI bus."""
    vendors = Path("/sys/bus/pci/devices").glob("*/vendor")
    return any(vendor.read_text().strip() == GOOGLE for vendor in vendors)


def quiet_absent_tpu() -> None:
    """Keeps libtpu from reporting that it finds no TPU, on a machine that has none."""
    if has_tpu():
        return
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        # Any will do: it asks for them before it looks for a device.
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_MIN_LOG_LEVEL": "3",
        "TPU_STDERR_LOG_LEVEL": "3",
    }.items():
        os.environ.setdefault(name, value)


HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
TUNABLES = "GLIBC_TUNABLES"


def use_huge_pages() -> None:
    """Starts this program again with malloc asking for huge pages, where the kernel lets us.

    The temporaries of a step are new memory each time. On two CPU cores a step of bert_small met
    170,000 new pages of 4 KB, a tenth of its time; with pages of 2 MB, 900. glibc reads the request
    (glibc.malloc.hugetlb, since 2.35) only at the start of a process. Call it before slow imports.
    """
    if not HUGE_PAGES.exists() or "[madvise]" not in HUGE_PAGES.read_text():
        return
    if TUNABLES in os.environ:  # ours from the first start, or the user's
        return
    os.environ[TUNABLES] = "glibc.malloc.hugetlb=1"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def one_line(error: BaseException) -> str:
    """The text of an error without line breaks."""
    return " ".join(str(error).split())


def run(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Runs `main(argv)` and exits with its code; a `UserError` becomes one line and code 2."""
    avoid_known_faults()
    quiet_absent_tpu()
    argv = sys.argv[1:]
    name = os.path.basename(sys.argv[0])
    # A reader that closes our pipe early (`| head`) is no error of ours.
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        code = main(argv) or EXIT_OK
    except UserError as error:
        if "--debug" in argv:
            traceback.print_exc()
        print(f"{name}: error: {one_line(error)}", file=sys.stderr)
        code = EXIT_USER
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        code = EXIT_INTERRUPTED
    sys.stdout.flush()
    raise SystemExit(code)
