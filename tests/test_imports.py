"""The rooms and their one-way imports, as docs/architecture.md draws them."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "flaxpretrain"

BELOW = {
    "errors",
    "shapes",
    "hardware",
    "locations",
    "overrides",
    "rendering",
    "config",
    "program",
    "supervisor",
}
MAY_IMPORT = {
    "data": BELOW | {"data"},
    "models": BELOW | {"models"},
    "objectives": BELOW | {"data", "models", "objectives"},
}
LEARNING = MAY_IMPORT["objectives"]
MAY_IMPORT |= {
    "training": LEARNING | {"training"},
    # A converter reads and writes a training run's checkpoints.
    "conversion": LEARNING | {"training", "conversion"},
    "generation": LEARNING | {"generation"},
}
ALL_BUT_ANALYSIS = set().union(*MAY_IMPORT.values())
MAY_IMPORT |= {
    "evaluation": ALL_BUT_ANALYSIS | {"evaluation"},
    "analysis": ALL_BUT_ANALYSIS | {"analysis"},
    "electra_hparams": LEARNING | {"training"},
    "electra_import": LEARNING | {"training", "electra_hparams"},
    "main": ALL_BUT_ANALYSIS | {"evaluation", "analysis", "electra_hparams"},
}
MAY_IMPORT |= {name: BELOW for name in BELOW}

FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def imported(path: Path) -> set[str]:
    """Names of the rooms that a file imports."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
            if node.module == "flaxpretrain":
                names = [f"flaxpretrain.{alias.name}" for alias in node.names]
        rooms |= {n.split(".")[1] for n in names if n.startswith("flaxpretrain.")}
    return rooms


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert imported(path) - {"__version__"} <= MAY_IMPORT[room]


def test_training_names_no_objective_and_no_architecture():
    for path in (PACKAGE / "training").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                room, _, module = node.module.removeprefix("flaxpretrain.").partition(".")
                modules = {module} if module else {alias.name for alias in node.names}
                if room == "objectives":
                    assert modules == {"objective"}, path
                if room == "models":
                    assert modules <= {"functional", "attention", "partition", "quantization"}, path


def test_the_data_room_never_imports_jax():
    modules = ["flaxpretrain.data." + p.stem for p in sorted((PACKAGE / "data").glob("[!_]*.py"))]
    code = f"import sys, {', '.join(modules)}; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_importing_the_library_touches_no_device():
    code = "import flaxpretrain.main, jax, sys; sys.exit(bool(jax._src.xla_bridge._backends))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_and_functions_stay_short(path):
    text = path.read_text()
    assert text.count("\n") <= 500
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 90, node.name
