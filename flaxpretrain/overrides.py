"""Text into the type of a field, with an answer a user can act on."""

import ast
import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from flaxpretrain.errors import UserError


def nearest(name: str, known: Sequence[str]) -> str:
    """`"; did you mean 'x'?"` for the nearest known name, else the list of all."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(sorted(known))}"


def coerce(owner: Any, field: str, value: Any, where: str) -> Any:
    """`value`, text or not, as the annotated type of `owner.field`.

    Raises:
        UserError: the value does not read as that type; the line begins with `where`.
    """
    hint = typing.get_type_hints(type(owner))[field]
    if hint is Any and dataclasses.is_dataclass(getattr(owner, field)):
        held = type(getattr(owner, field)).__name__
        raise UserError(
            f"{where}: {field} holds {held}; change its fields ({field}.NAME=VALUE), or choose "
            "another in the recipe"
        )
    candidates = [_literal(value), value] if isinstance(value, str) else [value]
    for candidate in candidates:
        fits, result = _fit(candidate, hint)
        if fits:
            return result
    raise UserError(f"{where}: expected {_name(hint)}; got {value!r}")


def _literal(text: str) -> Any:
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _fit(value: Any, hint: Any) -> tuple[bool, Any]:
    """Whether `value` is of type `hint`, and the value as that type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return isinstance(value, (str, int, float, bool, type(None))), value
    if origin in (typing.Union, types.UnionType):
        fitting = [r for ok, r in (_fit(value, a) for a in arguments) if ok]
        return bool(fitting), fitting[0] if fitting else None
    if origin is typing.Literal:
        return value in arguments, value
    if origin is tuple:
        items = value if isinstance(value, (tuple, list)) else (value,)
        kinds = [arguments[0]] * len(items) if arguments[-1:] == (...,) else list(arguments)
        if len(kinds) != len(items):
            return False, None
        fits = [_fit(v, k) for v, k in zip(items, kinds, strict=True)]
        return all(ok for ok, _ in fits), tuple(r for _, r in fits)
    if origin is not None and issubclass(origin, Mapping):
        return isinstance(value, dict), value
    if hint is float:
        ok = isinstance(value, (int, float)) and not isinstance(value, bool)
        return ok, float(value) if ok else None
    if hint is int:
        # 1e6 is how people write a million.
        ok = not isinstance(value, bool) and isinstance(value, (int, float))
        ok = ok and float(value).is_integer()
        return ok, int(value) if ok else None
    if hint is type(None):
        return value is None, None
    if isinstance(hint, type) and not dataclasses.is_dataclass(hint):
        return isinstance(value, hint), value
    return isinstance(hint, type) and isinstance(value, hint), value


def _name(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join("none" if a is type(None) else _name(a) for a in typing.get_args(hint))
    return names.get(hint, str(getattr(hint, "__name__", hint)).replace("typing.", ""))
