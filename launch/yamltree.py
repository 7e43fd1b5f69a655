"""YAML text to plain values and back, strictly, and with the line of every key.

    train:                  {"train": {"steps": 200}}
      steps: 200      ->    lines: {"train": 1, "train.steps": 2}

What PyYAML alone does not do: a key that stands twice is an error; `1e-3` is a number and `no`, `on`, `12:30:00` are
text, as in YAML 1.2 and JSON (PyYAML follows 1.1); errors come as one line.
"""

import re
from collections.abc import Iterator
from typing import Any

import yaml

# Plain scalars of YAML 1.2's core schema: tag, pattern, first characters.
_SCALARS = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
     "-+.0123456789"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
)  # fmt: skip


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (PyYAML's own attribute)


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012


for _tag, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})\\Z"), list(_first))


class YAMLError(ValueError):
    """The text is not what it should be; `line` counts from 1."""

    def __init__(self, message: str, line: int) -> None:
        super().__init__(message)
        self.line = line


def parse(text: str) -> tuple[Any, dict[str, int]]:
    """Return the value and the line of every key by its path; YAMLError for bad syntax and keys that stand twice."""
    lines: dict[str, int] = {}
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, lines
        for path, key in _keys(node, ""):
            line = key.start_mark.line + 1
            if path in lines:
                raise YAMLError(f"{path}: stands twice, first in line {lines[path]}", line)
            lines[path] = line
        return loader.construct_document(node), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reason = ", ".join(part for part in (error.context, error.problem) if part)
        raise YAMLError(f"not valid YAML: {reason}", mark.line + 1 if mark else 1) from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        if isinstance(error, YAMLError):
            raise
        raise YAMLError(f"not valid YAML: {' '.join(str(error).split())}", 1) from None


def _keys(node: yaml.Node, prefix: str) -> Iterator[tuple[str, yaml.Node]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            path = f"{prefix}{key.value}"
            yield path, key
            yield from _keys(value, f"{path}.")


def text(value: Any) -> str:
    """Return a plain value as YAML; the innermost mappings and lists on one line each."""
    return str(
        yaml.dump(value, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=110, allow_unicode=True)
    )


def line(key: str, value: Any) -> str:
    """Return a key and its plain value as one line of YAML, however long."""
    shown = yaml.dump(
        {key: value}, Dumper=_Dumper, sort_keys=False, default_flow_style=True, width=1 << 30, allow_unicode=True
    )
    return str(shown).strip()[1:-1]
