"""Which TPU slices a recipe is compiled for, and whether the record of that is up to date.

A recipe names its slice in a constant, `POD = "v5e:4x4"`. The record holds, beside each report, a
hash of the code that decides what is compiled; comments and docstrings do not change it.
"""

import ast
import hashlib
from collections.abc import Iterator
from pathlib import Path

import flaxpretrain
from flaxpretrain.errors import UserError

PACKAGE = Path(flaxpretrain.__file__).parent

ONE_A_FAMILY = ("bert_tiny", "electra_tiny", "t5_tiny", "bart_tiny", "gpt2_tiny")
"""Recipes that are compiled for a slice of every generation of TPUs, to see that they can be."""

OTHER_GENERATIONS = ("v4:2x2x1", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
"""The smallest whole hosts of the generations beside v5e, which recipes name themselves."""

ALWAYS = tuple(f"flaxpretrain.training.{name}" for name in ("step", "assembly", "sharding"))
"""Modules that every compiled step is made by, whether the recipe imports them or not."""

ROOMS = ("models", "objectives")
"""Rooms whose modules count when the recipe imports them, directly or through others."""


def pod_of(recipe: Path) -> str:
    """The topology that a recipe names.

    Raises:
        UserError: it names none.
    """
    for node in ast.parse(recipe.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            if names == ["POD"]:
                return str(node.value.value)
    raise UserError(f"{recipe} names no TPU slice: add a line such as POD = 'v5e:4x4'")


def slices_of(recipe: Path) -> tuple[str, ...]:
    """The topologies that the record has reports of: the recipe's own, and perhaps others."""
    own = pod_of(recipe)
    return (own, *OTHER_GENERATIONS) if recipe.stem in ONE_A_FAMILY else (own,)


def source_hash(recipe: Path) -> str:
    """SHA-256 of the recipe's code and of the model, objective and step code that it reaches."""
    digest = hashlib.sha256()
    for name, path in sorted(_reached(recipe).items()):
        digest.update(f"{name}\n{_code(path)}".encode())
    return digest.hexdigest()


def _reached(recipe: Path) -> dict[str, Path]:
    """The files that count, by module: the recipe, and what it imports in turn."""
    found = {recipe.stem: recipe}
    left = [*_imports(recipe), *ALWAYS]
    while left:
        module = left.pop()
        path = _file(module, recipe)
        if module not in found and path is not None:
            found[module] = path
            left.extend(_imports(path))
    return found


def _imports(path: Path) -> Iterator[str]:
    """Modules that a file imports; of `from room import name` both readings."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _file(module: str, recipe: Path) -> Path | None:
    """The file of a module that counts; a recipe may build on another one beside it."""
    package, _, rest = module.partition(".")
    path = recipe.parent / f"{module}.py"
    if package == PACKAGE.name and (rest.split(".")[0] in ROOMS or module in ALWAYS):
        path = PACKAGE.joinpath(*rest.split(".")).with_suffix(".py")
    return path if path.is_file() else None


def _code(path: Path) -> str:
    """A file's code without comments, docstrings and layout."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [s for s in body if not _is_text(s)]  # pyright: ignore
    return _written(tree)


def _written(node: object) -> str:
    """A tree as text that is the same under every Python: they differ in what is empty."""
    if isinstance(node, ast.AST):
        fields = [(name, value) for name, value in ast.iter_fields(node) if value not in (None, [])]
        inner = ",".join(f"{name}={_written(value)}" for name, value in fields)
        return f"{type(node).__name__}({inner})"
    if isinstance(node, list):
        return f"[{','.join(map(_written, node))}]"
    return repr(node)


def _is_text(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
