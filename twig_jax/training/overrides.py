"""Typed overrides of frozen configurations: `optim.lr=2e-4`."""

import ast
import contextlib
import dataclasses
import difflib
import inspect
import os
from collections.abc import Sequence
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")


def override(config: T, assignments: Sequence[str]) -> T:
    """The configuration with each `path.to.field=value` applied, in order.

    Values are Python literals; what is none is taken as a string, a home folder's name with its
    path. Raises ValueError for an unknown
    field (with the nearest name), for a value of another type than the field has, and where the
    configuration itself does.
    """
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise ValueError(f"an override is written name=value, not {assignment!r}")
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError):
            value = os.path.expanduser(text)  # shells leave it alone behind an equals sign
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
    kind = get_type_hints(type(config))[name]
    try:
        value = _typed(value, kind)
    except TypeError:
        raise ValueError(
            f"{path} is {inspect.formatannotation(kind)} ({old!r}), "
            f"not {type(value).__name__} ({value!r})"
        ) from None
    return dataclasses.replace(config, **{name: value})


def _typed(value: Any, kind: Any) -> Any:
    """The value as an annotation has it: a class, a tuple[...], or one of several, A | B.

    Whole numbers become floats where only those are expected. Raises TypeError for other values.
    """
    kinds = get_args(kind)
    if get_origin(kind) is tuple:
        if not isinstance(value, tuple):
            raise TypeError
        if kinds[-1] is ...:
            kinds = kinds[:1] * len(value)
        if len(value) != len(kinds):
            raise TypeError
        return tuple(map(_typed, value, kinds))
    for one in kinds:
        with contextlib.suppress(TypeError):
            return _typed(value, one)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise TypeError
    return value
