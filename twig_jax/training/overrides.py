"""Typed overrides of frozen configurations: `optim.lr=2e-4`."""

import ast
import dataclasses
import difflib
from collections.abc import Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def override(config: T, assignments: Sequence[str]) -> T:
    """The configuration with each `path.to.field=value` applied, in order.

    Values are Python literals; what is none is taken as a string. Raises ValueError for an unknown
    field (with the nearest name) and for a value of another type than the field has.
    """
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise ValueError(f"an override is written name=value, not {assignment!r}")
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        config = _replace(config, path.split("."), value, path)
    return config


def _replace(config: Any, names: list[str], value: Any, path: str) -> Any:
    fields = [f.name for f in dataclasses.fields(config)]
    name, *rest = names
    if name not in fields:
        near = difflib.get_close_matches(name, fields, 1)
        hint = f"; did you mean {near[0]}?" if near else f"; there are: {', '.join(fields)}"
        raise ValueError(f"no setting {path!r}{hint}")
    old = getattr(config, name)
    if rest:
        if not dataclasses.is_dataclass(old):
            raise ValueError(f"{name} in {path!r} has no settings of its own")
        return dataclasses.replace(config, **{name: _replace(old, rest, value, path)})
    if dataclasses.is_dataclass(old):
        raise ValueError(f"{path!r} is a group of settings; set one of them")
    if isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if old is not None and value is not None and type(value) is not type(old):
        raise ValueError(
            f"{path} is {type(old).__name__} ({old!r}), not {type(value).__name__} ({value!r})"
        )
    return dataclasses.replace(config, **{name: value})
