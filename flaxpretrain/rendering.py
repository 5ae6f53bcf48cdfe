"""Values of recipes as JSON data, and back: config.json of a workdir."""

import dataclasses
import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flaxpretrain.errors import UserError
from flaxpretrain.overrides import nearest


def render(value: Any) -> Any:
    """A value as JSON data; dataclasses carry the path of their class, so `parse` can rebuild."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        cls = type(value)
        fields = {
            f.name: render(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init
        }
        return {"class": f"{cls.__module__}.{cls.__qualname__}", **fields}
    if isinstance(value, Mapping):
        return {str(k): render(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [render(v) for v in value]
    if isinstance(value, (str, Path)):
        # A home folder is private; the same path can still be found from "~".
        text, home = str(value), os.path.expanduser("~")
        return "~" + text[len(home) :] if text.startswith(home + "/") else text
    if value is None or isinstance(value, (bool, int, float)):
        return value
    raise UserError(
        f"{type(value).__name__} cannot be written to config.json: recipes are made of frozen "
        "dataclasses, numbers, text, tuples and dictionaries"
    )


def parse(data: Any) -> Any:
    """The value that `render` wrote.

    Raises:
        UserError: a class that cannot be imported or is no dataclass, or fields it does not have.
    """
    if isinstance(data, list):
        return tuple(parse(v) for v in data)
    if not isinstance(data, Mapping):
        return data
    if "class" not in data:
        return {k: parse(v) for k, v in data.items()}
    path = data["class"]
    module_name, _, name = path.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"config.json names the class {path}, which cannot be imported ({error}): pass the "
            "recipe with --recipe, or put the folder of its file on PYTHONPATH"
        ) from error
    # A folder from elsewhere must not make us call an arbitrary function.
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise UserError(f"config.json names {path}, which is not a dataclass")
    fields = {k: parse(v) for k, v in data.items() if k != "class"}
    known = [f.name for f in dataclasses.fields(cls) if f.init]
    for field in fields:
        if field not in known:
            raise UserError(f"config.json: {path} has no field {field!r}{nearest(field, known)}")
    return cls(**fields)


def completed(data: Any) -> Any:
    """Rendered data of an older version with the fields that its classes have now, as they default.

    Classes that cannot be found are left as they are.
    """
    if isinstance(data, list):
        return [completed(v) for v in data]
    if not isinstance(data, Mapping):
        return data
    return _defaults(data.get("class")) | {k: completed(v) for k, v in data.items()}


def _defaults(path: str | None) -> dict[str, Any]:
    """The rendered defaults of a class's fields, of those that have one."""
    module_name, _, name = (path or "").rpartition(".")
    try:
        cls = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError):
        return {}
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        return {}
    defaults = {}
    for field in dataclasses.fields(cls):
        if field.init and field.default is not dataclasses.MISSING:
            defaults[field.name] = render(field.default)
        elif field.init and field.default_factory is not dataclasses.MISSING:
            defaults[field.name] = render(field.default_factory())
    return defaults


def flatten(data: Any, prefix: str = "") -> dict[str, Any]:
    """Rendered data as one level: dotted path -> leaf."""
    if isinstance(data, Mapping):
        items: list[tuple[str, Any]] = [(str(k), v) for k, v in data.items()]
    elif isinstance(data, list):
        items = [(str(i), v) for i, v in enumerate(data)]
    else:
        return {prefix: data}
    flat: dict[str, Any] = {} if items else {prefix: None}
    for key, value in items:
        flat |= flatten(value, f"{prefix}.{key}" if prefix else key)
    return flat
