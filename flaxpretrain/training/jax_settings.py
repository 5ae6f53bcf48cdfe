"""Settings of jax for a while."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax


def nothing_cached() -> contextlib.AbstractContextManager[None]:
    """No program goes to jax's cache of programs: one without its device cannot be read again."""
    return configured({"jax_persistent_cache_min_compile_time_secs": float("inf")})


@contextlib.contextmanager
def configured(values: Mapping[str, Any]) -> Iterator[None]:
    """Settings of jax for a while."""
    before = {name: getattr(jax.config, name) for name in values}
    for name, value in values.items():
        jax.config.update(name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
