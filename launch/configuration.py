"""A YAML file and overrides from the command line become a `Config`, or one message that helps.

    configs/gpt.yaml + ["train.steps=20"]  ->  plain values  ->  all problems at once, or  ->  Config

Every problem is told with its place (file and line, or the override), the key by its whole path, the value, what is
allowed, and the nearest right spelling. Types, names and allowed values are read off the structs of `dtrain.config`:
nothing of them is written here a second time.
"""

import difflib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec

from dtrain import config as schema
from dtrain.config import Config
from dtrain.errors import UserError
from dtrain.launch import yamltree


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Return the configuration in the file, changed by overrides `key.path=value` (the value is YAML); UserError."""
    path = Path(path)
    values, lines = _read(path)
    _spell_out(values)
    changed = []
    for override in overrides:
        changed.append(_override(values, override))
        _spell_out(values)

    def place(key: str) -> str:
        """Where the key stands: the override that set it, or the line of it or of the nearest enclosing section."""
        if any(key == other or key.startswith(f"{other}.") for other in changed):
            return "command line"
        if key not in lines and any(other.startswith(f"{key}.") for other in changed):  # a section that they made
            return "command line"
        while key and key not in lines:
            key = key.rpartition(".")[0]
        return f"{path}, line {lines[key]}" if key else str(path)

    values.setdefault("name", path.stem)
    problems = list(_problems(values, Config, ""))
    if problems:
        told = [f"{place(key)}: {key}: {problem}" for key, problem in problems[:8]]
        told += [f"... and {len(problems) - 8} more"] if len(problems) > 8 else []
        raise UserError("\n".join(told))
    try:
        return msgspec.convert(values, Config, strict=False)  # lax only for 1e3 as a whole number: types are checked
    except (
        msgspec.ValidationError
    ) as error:  # a check of dtrain.config; msgspec adds where, the message says it already
        message = str(error).rpartition(" - at `$")[0] or str(error)
        raise UserError(f"{place(message.partition(':')[0])}: {message}") from None


def _spell_out(values: dict[str, Any]) -> None:
    """`parallel: auto` is short for a section."""
    if values.get("parallel") == "auto":
        values["parallel"] = {"auto": True}


def for_ranks(config: Config, num_ranks: int) -> Config:
    """Return the configuration with the mesh filled in for `num_ranks`; UserError when mesh or batch do not fit."""
    try:
        return schema.check(config, num_ranks)
    except ValueError as error:
        raise UserError(str(error)) from None


def dump(config: Config) -> str:
    """Return the whole configuration as YAML, defaults written out; `load` reads it back to an equal one."""
    return yamltree.text(msgspec.to_builtins(config))


def brief(config: Config) -> Iterator[str]:
    """The configuration as YAML, a line per section: those that must be given whole, of the others what is not the
    default. `load` reads it back to an equal one."""
    yield from (yamltree.line(key, value) for key, value in _told(config, whole=False).items())


def _told(section: msgspec.Struct, whole: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"kind": _tag(type(section))} if _tag(type(section)) else {}
    for field in msgspec.structs.fields(section):
        value = getattr(section, field.name)
        default = field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
        if value == default and (value is None or not whole):
            continue
        nested = isinstance(value, msgspec.Struct)
        found[field.encode_name] = _told(value, whole or field.required) if nested else msgspec.to_builtins(value)
    return found


# --- reading ----------------------------------------------------------------------------------------------------------


def _read(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    try:
        values, lines = yamltree.parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file{_neighbours(path)}") from None
    except IsADirectoryError:
        inside = (
            f"; did you mean {path / 'config.yaml'}?" if (path / "config.yaml").is_file() else _neighbours(path / "x")
        )
        raise UserError(f"{path}: is a folder, not a YAML file{inside}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file (byte {error.start} is not UTF-8)") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except yamltree.YAMLError as error:
        raise UserError(f"{path}, line {error.line}: {error}") from None
    if not isinstance(values, dict):
        found = "is empty" if values is None else f"holds {_shown(values)}"
        raise UserError(f"{path}: {found}; a configuration has the sections {', '.join(get_type_hints(Config))}")
    return values, lines


def _neighbours(path: Path) -> str:
    """Name the existing YAML files that the user may have meant, the most alike first."""
    folders = {path.parent, Path("configs"), Path(".")}
    files = sorted({str(file) for folder in folders if folder.is_dir() for file in folder.glob("*.y*ml")})
    alike = sorted(files, key=lambda file: -difflib.SequenceMatcher(None, Path(file).name, path.name).ratio())
    return f"; there are: {', '.join(alike[:6])}" if alike else ""


def _override(values: dict[str, Any], override: str) -> str:
    """Set one `key.path=value` in place, making sections on the way; return the key."""
    section: Any = values
    key, equals, value = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise UserError(f"command line: {override!r} is not key.path=value, such as train.steps=20")
    for depth, part in enumerate(parts[:-1], 1):
        if section.get(part) is None:
            section[part] = {}
        section = section[part]
        if not isinstance(section, dict):
            above = ".".join(parts[:depth])
            raise UserError(f"command line: {override!r}: {above} is {_shown(section)}, it has no keys inside")
    try:
        section[parts[-1]] = yamltree.parse(value)[0] if value.strip() else ""
    except yamltree.YAMLError as error:
        raise UserError(f"command line: {override!r}: the value is {error}") from None
    return ".".join(parts)


# --- checking against the structs -------------------------------------------------------------------------------------


def _problems(value: Any, wanted: Any, key: str) -> Iterator[tuple[str, str]]:
    """Yield (key, problem) for everything in a plain value that is not of the wanted type."""
    structs = _structs(wanted)
    if value is None and NoneType in _options(wanted):
        return
    table = next((get_args(option) for option in _options(wanted) if get_origin(option) is dict), None)
    if table and isinstance(value, dict):
        for name, part in value.items():
            yield from _problems(part, table[1], f"{key}.{name}")
        return
    if not structs:
        if not any(_is(value, option) for option in _options(wanted)):
            hint = _nearest(value, [name for option in _options(wanted) for name in _names(option)])
            yield key, f"{_shown(value)}; must be {_described(wanted)}{hint}"
        return
    if not isinstance(value, dict):
        kinds = [str(tag) for tag in map(_tag, structs) if tag]
        example = f"{{kind: {kinds[0]}, ...}}" if kinds else f"{{{next(iter(get_type_hints(structs[0])))}: ...}}"
        yield key, f"{_shown(value)}; must be a section, such as {example}"
        return
    inside = f"{key}." if key else ""
    by_kind = {_tag(struct): struct for struct in structs}
    if None not in by_kind:
        kind = value.get("kind")
        allowed = [str(tag) for tag in by_kind]
        if "kind" not in value:
            yield f"{inside}kind", f"missing; allowed: {', '.join(allowed)}"
            return
        if not isinstance(kind, str) or kind not in by_kind:
            yield f"{inside}kind", f"{_shown(kind)}; allowed: {', '.join(allowed)}{_nearest(kind, allowed)}"
            return
        struct = by_kind[kind]
    else:
        struct = structs[0]
    yield from _struct_problems(value, struct, inside)


def _struct_problems(value: dict[Any, Any], struct: type[msgspec.Struct], inside: str) -> Iterator[tuple[str, str]]:
    hints = get_type_hints(struct)
    fields = {field.encode_name: hints[field.name] for field in msgspec.structs.fields(struct)}
    known = [*(["kind"] if _tag(struct) else []), *fields]
    of = f" of {inside}kind: {_tag(struct)}" if _tag(struct) else ""
    for name, part in value.items():
        if name not in known:
            yield f"{inside}{name}", f"unknown key{of}; allowed: {', '.join(known)}{_elsewhere(name, known, inside)}"
        elif name in fields:
            yield from _problems(part, fields[name], f"{inside}{name}")
    for field in msgspec.structs.fields(struct):
        if field.required and field.encode_name not in value:
            yield f"{inside}{field.encode_name}", f"missing; must be {_described(fields[field.encode_name])}"


def _tag(struct: type[msgspec.Struct]) -> str | int | None:
    return struct.__struct_config__.tag


def _elsewhere(name: Any, known: Sequence[str], inside: str) -> str:
    """Where an unknown key may belong: a key alike in its section, or the same one in another section or member."""
    owners = [(path, owner) for path, owner in _paths(Config, "") if path.rpartition(".")[2] == name]
    kinds = [str(owner) for path, owner in owners if path == f"{inside}{name}"]
    if kinds:
        return f"; it is a key of {_listed(kinds)}"
    return _nearest(name, known) or (
        f"; did you mean {_listed(sorted({path for path, _ in owners}))}?" if owners else ""
    )


def _paths(wanted: Any, key: str) -> Iterator[tuple[str, str | int | None]]:
    """Yield every key by its path, with the member of its family that has it."""
    for struct in _structs(wanted):
        for name, hint in get_type_hints(struct).items():
            path = f"{key}.{name}" if key else name
            yield path, _tag(struct)
            yield from _paths(hint, path)


# --- types of plain values --------------------------------------------------------------------------------------------

_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null"}


def _options(wanted: Any) -> tuple[Any, ...]:
    return get_args(wanted) if get_origin(wanted) in (UnionType, Union) else (wanted,)


def _structs(wanted: Any) -> list[type[msgspec.Struct]]:
    return [option for option in _options(wanted) if isinstance(option, type) and issubclass(option, msgspec.Struct)]


def _names(option: Any) -> tuple[Any, ...]:
    return get_args(option) if get_origin(option) is Literal else ()


def _is(value: Any, option: Any) -> bool:
    if get_origin(option) is Literal:
        return value in get_args(option)
    if get_origin(option) is tuple:
        items = get_args(option)
        if not isinstance(value, list):
            return False
        items = items[:1] * len(value) if items[-1] is Ellipsis else items
        return len(items) == len(value) and all(map(_is, value, items))
    if option is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if option is int:  # 1e3 is a float in YAML, but a whole number
        return (isinstance(value, int) and not isinstance(value, bool)) or (
            isinstance(value, float) and value.is_integer()
        )
    if get_origin(option) is dict:  # its values are looked at one by one
        return isinstance(value, dict)
    return isinstance(value, option)


def _described(wanted: Any) -> str:
    structs = _structs(wanted)
    if structs:
        kinds = [str(_tag(struct)) for struct in structs if _tag(struct)]
        return "a section" + (f" with kind: {_listed(kinds)}" if kinds else "")
    words: list[str] = []
    for option in _options(wanted):
        if get_origin(option) is tuple:
            items = get_args(option)
            count = "" if items[-1] is Ellipsis else f"{len(items)} "
            what = "texts" if items[0] is str else f"{'whole ' if items[0] is int else ''}numbers"
            words.append(f"a list of {count}{what}")
        elif get_origin(option) is dict:
            words.append(f"a table whose values are {_described(get_args(option)[1])}")
        else:
            words += [_WORDS[option]] if option in _WORDS else map(str, get_args(option))
    return _listed(words)


def _listed(words: list[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _shown(value: Any) -> str:
    """The value as the user wrote it, near enough, and short."""
    shown = yamltree.text(value).removesuffix("...\n").strip().replace("\n", ", ")
    shown = f"'{shown}'" if isinstance(value, str) and not shown.startswith(("'", '"')) else shown
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def _nearest(value: Any, names: Sequence[Any]) -> str:
    near = difflib.get_close_matches(value, list(map(str, names)), n=1) if isinstance(value, str) else []
    return f"; did you mean {near[0]}?" if near else ""
