"""Programs that were compiled once are not compiled again when a run is started again."""

import collections
import shutil

import jax
import pytest

from flaxpretrain import main
from flaxpretrain.training.compile_cache import FOLDER
from tests import toys

HIT, MISS = "/jax/compilation_cache/cache_hits", "/jax/compilation_cache/cache_misses"


@pytest.fixture
def counted():
    """Hits and misses of the cache."""
    count = collections.Counter()

    def listen(event, **_):
        count[event] += 1

    jax.monitoring.register_event_listener(listen)
    yield count
    jax.monitoring.unregister_event_listener(listen)


@pytest.fixture
def settings():
    """The tests' own cache is set aside."""
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_enable_compilation_cache",
    )
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    jax.experimental.compilation_cache.compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    jax.experimental.compilation_cache.compilation_cache.reset_cache()


def run(tmp_path, *more):
    data = tmp_path / "data"
    if not data.exists():
        toys.dataset(data)
    recipe = tmp_path / "toy.py"
    recipe.write_text(
        f"from tests import toys\ndef recipe():\n    return toys.packed_run({str(data)!r})\n"
    )
    jax.clear_caches()
    workdir = str(tmp_path / "run")
    assert main.main([str(recipe), "--workdir", workdir, "--quiet", *more]) == 0


def test_a_restart_compiles_nothing_that_took_long(tmp_path, settings, counted):
    run(tmp_path, "--set", "steps=8")
    kept = {path.name for path in (tmp_path / "run" / FOLDER).rglob("*-cache")}
    assert any(name.startswith("jit_train_step-") for name in kept)
    assert counted[MISS] > 0 and counted[HIT] == 0
    counted.clear()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "8")
    run(tmp_path, "--set", "steps=8")
    assert counted[HIT] >= 1
    again = {path.name for path in (tmp_path / "run" / FOLDER).rglob("*-cache")}
    steps = {name for name in kept | again if name.startswith("jit_train_step-")}
    assert steps <= kept


def test_the_cache_may_lie_elsewhere_or_nowhere(tmp_path, settings):
    run(tmp_path, "--set", "steps=1", "--compile-cache", "none")
    assert not (tmp_path / "run" / FOLDER).exists()
    # A process asks once whether there is a cache; programs never change their mind.
    jax.config.update("jax_enable_compilation_cache", True)
    jax.experimental.compilation_cache.compilation_cache.reset_cache()
    run(tmp_path, "--set", "steps=2", "--compile-cache", str(tmp_path / "elsewhere"))
    assert list((tmp_path / "elsewhere").rglob("jit_train_step-*-cache"))
    assert not (tmp_path / "run" / FOLDER).exists()
