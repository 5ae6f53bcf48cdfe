"""Settings of every test: eight fake devices, strict numerics, shapes checked at run time."""

import contextlib
import os

from flaxpretrain import program

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Programs of tests run for milliseconds and take seconds to compile, mostly in LLVM: whole, as both
# cores have tests to run (level 0 rounds the same sums differently in two programs).
for flag in (
    "xla_force_host_platform_device_count=8",
    "xla_backend_optimization_level=1",
    "xla_cpu_parallel_codegen_split_count=1",
):
    flags = os.environ.get("XLA_FLAGS", "")
    if flag.partition("=")[0] not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --{flag}".strip()
program.avoid_known_faults()
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Several test processes may load libtpu at once; none has a TPU.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("NNX_GRAPH_MODE", "false")
os.environ.setdefault("NNX_GRAPH_UPDATES", "false")

from jaxtyping import install_import_hook

install_import_hook("flaxpretrain", "tests.typecheck.check")

from pathlib import Path

import jax
import pytest

from flaxpretrain.training.jax_settings import nothing_cached

CACHE = Path(__file__).parent.parent / ".cache" / "jax"
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture(autouse=True)
def _no_tpu_program_is_kept(request):
    """Without its device a program can be written to the cache of programs and not read again."""
    with nothing_cached() if request.node.get_closest_marker("tpu") else contextlib.nullcontext():
        yield


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real corpora named by FLAXPRETRAIN_TEST_DATA; skips where there is none."""
    folder = os.environ.get("FLAXPRETRAIN_TEST_DATA")
    if not folder:
        pytest.skip("set FLAXPRETRAIN_TEST_DATA to the folder of real corpora to run this test")
    if not Path(folder).is_dir():
        pytest.fail(f"FLAXPRETRAIN_TEST_DATA={folder} is not a folder")
    return Path(folder)
