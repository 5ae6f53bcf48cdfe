"""Compiler options that let a step compute while its collectives are under way, by device kind.

They go with each compilation, not through the environment, so that the kind of device is known and
an option that a release of the compiler lacks can be left out: as a flag it would end the process.
"""

import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from flaxpretrain.hardware import FLAG_VARIABLES, overlap_options
from flaxpretrain.training.jax_settings import nothing_cached


def compiler_options(mesh: Mesh, environment: Mapping[str, str] = os.environ) -> dict[str, int]:
    """The options for steps on these devices: none on one device, which waits for no other.

    Those that the user's flags name are left to them, and those that the compiler does not know.
    """
    if mesh.size == 1:
        return {}
    device = mesh.local_devices[0]
    flags = " ".join(environment.get(name, "") for name in FLAG_VARIABLES)
    told = {flag.removeprefix("--").partition("=")[0] for flag in flags.split()}
    options = overlap_options(device.device_kind)
    return accepted({name: v for name, v in options.items() if name not in told}, device)


def accepted(options: Mapping[str, int], device: Any) -> dict[str, int]:
    """Those of the options that the compiler of a device knows, by compiling next to nothing."""
    if not options or _compiles(options, device):
        return dict(options)
    return {name: value for name, value in options.items() if _compiles({name: value}, device)}


def _compiles(options: Mapping[str, int], device: Any) -> bool:
    one = jax.sharding.SingleDeviceSharding(device)
    number = jax.ShapeDtypeStruct((), jnp.float32, sharding=one)
    program = jax.jit(lambda x: x + np.float32(1), compiler_options=dict(options))
    try:
        # A program of one device is refused inside the run's mesh of several.
        with jax.set_mesh(Mesh(np.array([device]), "alone")), nothing_cached():
            program.lower(number).compile()
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" in str(error):
            return False
        raise
    return True
