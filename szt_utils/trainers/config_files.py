"""Config files of trainers: written as TOML, read as TOML, JSON, YAML, or the flags in a command line."""

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..errors import InputError, first_line
from ..files import read_json, read_text

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

__all__ = ["Config", "read_config", "to_toml", "tomllib"]

_FLAG = re.compile(r"--([A-Za-z]\w*(?:-\w+)*)")


@dataclass(frozen=True)
class Config:
    """What a trainer's config files hold: one document a file, each a dictionary or a list."""

    documents: Sequence[Any]

    @property
    def settings(self) -> dict[str, Any]:
        """All settings by name, without dashes before it; those in sections stand beside the others."""
        flat: dict[str, Any] = {}
        for document in self.documents:
            if isinstance(document, dict):
                sections = [value for value in document.values() if isinstance(value, dict)]
                for key, value in (pair for part in (document, *sections) for pair in part.items()):
                    flat[str(key).lstrip("-").replace("-", "_")] = value
        return flat

    def number(self, name: str, default: float | None, among: Mapping[str, Any] | None = None) -> Any:
        """A setting as a number; InputError names one that is none."""
        value = (self.settings if among is None else among).get(name)
        if value is None or value == "":
            return default
        try:
            return float(value)
        except (TypeError, ValueError):
            raise InputError(f"'{name}' in the config is {value!r}, which is not a number.") from None

    def flag(self, name: str, default: bool = False, among: Mapping[str, Any] | None = None) -> bool:
        """A setting as true or false."""
        value = (self.settings if among is None else among).get(name, default)
        return value if isinstance(value, bool) else str(value).lower() in ("true", "1", "yes")

    def tables(self, *path: str) -> list[dict[str, Any]]:
        """The dictionaries of the list at a path of names in each document; none where it is absent."""
        found = []
        for document in self.documents:
            for name in path:
                document = document.get(name) if isinstance(document, dict) else None
            found += document if isinstance(document, list) else []
        if not all(isinstance(table, dict) for table in found):
            raise InputError(f"'{'.'.join(path)}' in the config must be a list of tables.")
        return found


def read_config(paths: Sequence[str | Path]) -> Config:
    """Read config files by their suffix; any other file is a command line, whose flags are read.

    InputError names a file that cannot be read or parsed.
    """
    return Config([_read(Path(path)) for path in paths])


def _read(path: Path) -> Any:
    if path.suffix == ".json":
        return read_json(path, "config")
    text = read_text(path, "config")
    try:
        if path.suffix == ".toml":
            return tomllib.loads(text)
        return yaml.safe_load(text) if path.suffix in (".yaml", ".yml") else dict(_flags(text, path.suffix))
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"The config '{path}' cannot be parsed ({first_line(error)}).") from None


def _flags(text: str, suffix: str) -> Iterator[tuple[str, Any]]:
    """The flags of a command with their first value, True for those without one.

    In the scripts of Windows a backslash is a part of a path.
    """
    escape = "" if suffix.lower() in (".bat", ".cmd", ".ps1") else "\\"
    lexer = shlex.shlex(re.sub(rf"[{escape}\^`]\n", " ", text), posix=True)
    lexer.whitespace_split, lexer.escape = True, escape
    words = list(lexer)
    if not any(_FLAG.match(word) for word in words):
        raise ValueError("it holds no flag such as --resolution")
    for word, following in zip(words, [*words[1:], "--"], strict=True):
        if match := _FLAG.match(word):
            value = word.partition("=")[2] if "=" in word else following
            yield match[1], True if value.startswith("--") else value
        elif word.endswith(".py"):
            yield "script", word


def to_toml(document: Mapping[str, Any], prefix: str = "") -> str:
    """TOML of strings, numbers, booleans, lists of these, tables, and lists of tables."""
    lines, tables = [], []
    for key, value in document.items():
        if isinstance(value, Mapping):
            tables.append(f"\n[{prefix}{key}]\n{to_toml(value, f'{prefix}{key}.')}")
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            tables += [f"\n[[{prefix}{key}]]\n{to_toml(entry, f'{prefix}{key}.')}" for entry in value]
        else:
            # JSON's scalars and lists are TOML's, too, but for its escapes of other than Latin letters.
            lines.append(f"{key} = {json.dumps(value, ensure_ascii=False)}\n")
    return "".join(lines + tables)
