"""What the tests of the tools share."""

import importlib.util
from pathlib import Path

import pytest

from tests.evaluation.conftest import data as data
from tests.evaluation.conftest import workdir as workdir
from tests.evaluation.workdirs import decoder as decoder
from tests.evaluation.workdirs import encoder_decoder as encoder_decoder

TOOLS = Path(__file__).parent.parent.parent / "tools"


@pytest.fixture
def tool():
    """Loads a tool by name; its `main` takes the arguments."""

    def load(name):
        spec = importlib.util.spec_from_file_location(f"tool_{name}", TOOLS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load
