"""Reads JSON that somebody else may have written, and says in one sentence what is wrong with it.

The schema is a type: what `typing` can say, read at run time. A dataclass names all its fields and
is built; a `TypedDict` names some and lets others be; `Annotated[int, Within(0, 9)]` adds a range.
Everything that is read is of bounded size and depth, without repeated names, and finite where
nothing else is asked for.
"""

from __future__ import annotations

import dataclasses
import json
import math
import reprlib
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Literal,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

SIZE = 64 * 2**20
"""Largest file, in bytes: an index of half a million tensors."""
DEPTH = 64
"""Objects and lists inside each other; Python's own parser ends at about 1000."""
_DIGITS = 300  # tokenizers have a largest length of 31 digits; 309 are more than a float holds
_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    type(None): "null",
    dict: "an object",
    list: "a list",
    tuple: "a list",
    Mapping: "an object",
}
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 40
_SHORT.maxdict = _SHORT.maxlist = 2


class JsonError(ValueError):
    """What is wrong with a JSON text or value, as the second half of a sentence."""


@dataclass(frozen=True, slots=True)
class Within:
    """Bounds of a number, or of a list's length; both are allowed values."""

    low: int | float = -math.inf
    high: int | float = math.inf

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"{self.low:g} or more"
        return f"from {self.low:g} to {self.high:g}"


Count = Annotated[int, Within(0)]
Positive = Annotated[int, Within(1)]


def read_json(
    path: Path,
    schema: Any,
    *,
    error: type[ValueError] = ValueError,
    remedy: str,
    infinite: bool = False,
) -> Any:
    """Reads a JSON file and checks it against a schema.

    Args:
        path: of a regular file of at most `SIZE` bytes; symbolic links are followed.
        schema: see the module.
        error: class of what is raised.
        remedy: end of the sentence, such as "fetch it again".
        infinite: see `parse_json`.

    Returns:
        The value; lists are tuples and objects are dataclasses where the schema says so.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: of the class `error`; one sentence that names the file, the field and its value.
    """
    try:
        return parse_json(_content(path), schema, infinite=infinite)
    except FileNotFoundError:
        raise
    except OSError as problem:
        raise error(
            f"{path} cannot be read: {(problem.strerror or str(problem)).lower()}"
        ) from None
    except JsonError as problem:
        raise error(f"{path} is damaged: {problem}; {remedy}") from None


def parse_json(text: str | bytes, schema: Any, *, infinite: bool = False) -> Any:
    """Parses a JSON text and checks it against a schema, see `read_json`.

    Args:
        text: of one value.
        schema: see the module.
        infinite: whether the words Infinity and -Infinity are numbers, as in configurations that
            Python's json has written; NaN never is one.

    Raises:
        JsonError: what is wrong, as the second half of a sentence.
    """
    try:
        decoded = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        value = json.loads(
            decoded,
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_number,
            parse_constant=_constant if infinite else _finite_constant,
        )
    except JsonError:
        raise
    except UnicodeDecodeError as problem:
        raise JsonError(f"byte {problem.start} is not UTF-8") from None
    except json.JSONDecodeError as problem:
        raise JsonError(f"not JSON, {problem.msg} at line {problem.lineno}") from None
    except (ValueError, RecursionError, MemoryError):
        raise JsonError(f"nested more than {DEPTH} deep, or not JSON") from None
    _check_depth(value, surrogates="\\ud" in decoded or "\\uD" in decoded)
    return convert(value, schema)


def convert(value: Any, schema: Any, name: str = "") -> Any:
    """Checks a decoded value against a schema; lists become tuples, objects dataclasses.

    Args:
        value: of what JSON has.
        schema: see the module.
        name: of the value, for the sentence.

    Raises:
        JsonError: what is wrong, as the second half of a sentence.
    """
    origin, arguments = get_origin(schema) or schema, get_args(schema)
    if schema is Any:
        return value
    if origin is Annotated:
        return _bounded(convert(value, arguments[0], name), arguments[1], name)
    if origin in (Union, types.UnionType):
        return _any_of(value, arguments, name)
    if origin is Literal:
        if not any(type(value) is type(choice) and value == choice for choice in arguments):
            raise _wrong(value, schema, name)
        return value
    if dataclasses.is_dataclass(schema) and isinstance(schema, type):
        return _built(value, schema, name)
    if is_typeddict(schema):
        return _fields(value, schema, name, known_only=False)
    if origin in (dict, Mapping):
        if not isinstance(value, dict):
            raise _wrong(value, dict, name)
        inner = arguments[1] if arguments else Any
        return {key: convert(item, inner, _at(name, key)) for key, item in value.items()}
    if origin in (list, tuple):
        return _sequence(value, origin, arguments, name)
    if origin is float:
        fits = isinstance(value, int | float) and not isinstance(value, bool)
    else:
        fits = type(value) is origin
    if not fits:
        raise _wrong(value, schema, name)
    return value


def shown(value: object) -> str:
    """A value in a sentence: on one line, at most about 50 characters."""
    return _SHORT.repr(value)[:60]


def _content(path: Path) -> bytes:
    size = path.stat().st_size
    if not path.is_file():  # reading a pipe or a device may never end
        raise JsonError("it is not a regular file")
    if size > SIZE:
        raise JsonError(f"it has {size:,} bytes, more than {SIZE:,}")
    return path.read_bytes()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise JsonError(f"it has {shown(twice)} twice")
    return found


def _integer(text: str) -> int:
    if len(text) > _DIGITS:
        raise JsonError(f"it has a number of {len(text)} digits, {text[:8]}...")
    return int(text)


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise JsonError(f"it has {shown(text)}, which is no finite number")
    return value


def _constant(text: str) -> float:
    return _finite_constant(text) if text == "NaN" else float(text)


def _finite_constant(text: str) -> float:
    raise JsonError(f"it has {text}, which is no finite number")


def _check_depth(value: Any, *, surrogates: bool) -> None:
    """Raises JsonError for nesting that later code, recursive or not, cannot be asked to follow,
    and for half characters, which no file and no terminal takes.
    """
    level, depth = [value], 0
    while level:
        if surrogates and (text := next(filter(_is_torn, _texts(level)), None)) is not None:
            raise JsonError(f"{shown(text)} has half of a surrogate pair")
        inner = [item for item in level if isinstance(item, dict | list)]
        if inner and depth == DEPTH:
            raise JsonError(f"nested more than {DEPTH} deep")
        level = [
            part for item in inner for part in (item.values() if isinstance(item, dict) else item)
        ]
        depth += 1


def _texts(values: list[Any]) -> Iterator[str]:
    for value in values:
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            yield from value


def _is_torn(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def _bounded(value: Any, bounds: object, name: str) -> Any:
    assert isinstance(bounds, Within)
    measured = len(value) if isinstance(value, list | tuple | str) else value
    if not bounds.low <= measured <= bounds.high:
        what = shown(value) if measured is value else f"{measured} long"
        raise JsonError(f"{_subject(name)} is {what}, not {bounds}")
    return value


def _any_of(value: Any, choices: tuple[Any, ...], name: str) -> Any:
    faults = []
    for choice in choices:
        try:
            return convert(value, choice, name)
        except JsonError as fault:
            faults.append((choice, fault))
    # Of an optional object or list, what is wrong inside it.
    inside = [fault for choice, fault in faults if choice is not type(None)]
    if len(inside) == 1 and value is not None:
        raise inside[0]
    raise _wrong(value, Union[choices], name)  # noqa: UP007 (built at run time)


def _sequence(value: Any, origin: Any, arguments: tuple[Any, ...], name: str) -> Any:
    if not isinstance(value, list):
        raise _wrong(value, list, name)
    if origin is list or arguments[1:] == (...,) or not arguments:
        inner = [arguments[0] if arguments else Any] * len(value)
    else:
        inner = list(arguments)
        if len(inner) != len(value):
            raise JsonError(f"{_subject(name)} has {len(value)} items, not {len(inner)}")
    items = (
        convert(item, of, f"{name}[{number}]")
        for number, (item, of) in enumerate(zip(value, inner, strict=True))
    )
    return origin(items)


def _built(value: Any, schema: Any, name: str) -> Any:
    fields = _fields(value, schema, name, known_only=True)
    try:
        return schema(**fields)
    except ValueError as problem:  # of its own checks
        raise JsonError(str(problem)) from None


def _fields(value: Any, schema: Any, name: str, *, known_only: bool) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _wrong(value, dict, name)
    hints, required = _hints(schema)
    missing = sorted(required - value.keys())
    if missing:
        raise JsonError(f"{_subject(name)} lacks {_at('', missing[0])}")
    if known_only and (foreign := sorted(value.keys() - hints.keys())):
        raise JsonError(f"{_subject(name)} has {_at('', foreign[0])}, which is not known here")
    return {
        key: convert(item, hints[key], _at(name, key)) if key in hints else item
        for key, item in value.items()
    }


@cache
def _hints(schema: Any) -> tuple[dict[str, Any], frozenset[str]]:
    """(type of each field, fields that have to be there)."""
    hints = get_type_hints(schema, include_extras=True)
    if is_typeddict(schema):
        return hints, frozenset(schema.__required_keys__)
    empty = dataclasses.MISSING
    required = {
        field.name
        for field in dataclasses.fields(schema)
        if field.default is empty and field.default_factory is empty
    }
    return hints, frozenset(required)


def _wrong(value: Any, schema: Any, name: str) -> JsonError:
    if schema is dict and not name:
        return JsonError("it does not hold a JSON object")
    return JsonError(f"{_subject(name)} is {shown(value)}, not {_in_words(schema)}")


def _in_words(schema: Any) -> str:
    origin, arguments = get_origin(schema) or schema, get_args(schema)
    if origin is Literal:
        return "one of " + ", ".join(map(json.dumps, arguments))
    if origin is Annotated:
        return _in_words(arguments[0])
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_in_words, arguments)))
    return _WORDS.get(origin, "an object")


def _subject(name: str) -> str:
    return name or "it"


def _at(name: str, key: str) -> str:
    shortened = key if len(key) <= 60 else f"{key[:57]}..."
    quoted = shortened if shortened.isprintable() else ascii(shortened)
    return f"{name}.{quoted}" if name else quoted
