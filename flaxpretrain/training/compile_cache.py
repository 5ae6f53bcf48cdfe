"""Compiled programs that are kept, so that a run which is started again begins at once."""

import platform
import zlib
from pathlib import Path

import jax

from flaxpretrain.locations import Location, joined

FOLDER = "compile_cache"
NONE = "none"

SHORTEST_SECONDS = 0.1
"""Programs that compile faster are not worth a file."""


def use_compile_cache(workdir: Location, wanted: Location | None) -> None:
    """Keeps compiled programs in `wanted`, or in the workdir; nowhere if it is "none".

    What jax was told by its own settings (JAX_COMPILATION_CACHE_DIR) goes before the workdir.
    Several processes on CPUs share no programs: theirs hold the addresses of one start.
    """
    if str(wanted) == NONE:
        jax.config.update("jax_enable_compilation_cache", False)
        return
    on_cpu = jax.devices()[0].platform == "cpu"
    if on_cpu and jax.process_count() > 1:
        return
    told = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    if wanted is None and told is not None:
        return
    folder = joined(workdir, FOLDER) if wanted is None else wanted
    if on_cpu:
        folder = joined(folder, f"cpu-{processor():08x}")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", SHORTEST_SECONDS)


def processor() -> int:
    """A number for this kind of processor: programs for one may not run on another."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    telling = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return zlib.crc32(f"{platform.machine()} {platform.processor()} {telling}".encode())
