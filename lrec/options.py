"""Dataclasses from defaults, a YAML file and flags, in that order of rising weight.

A flag is a dataclass field: `--group_size 64` or `--group-size=64`; a bool may stand alone, be given true or false,
or be negated with `--no_`. An unknown key, from wherever, is an error that names the nearest right one.
"""

import dataclasses
import types
import typing
from pathlib import Path

from lrec.registry import nearest


def setting(default, help: str):
    """A settings field: its default, and the help text that the command line shows for its flag."""
    return dataclasses.field(default=default, metadata={"help": help})


def field_types(cls: type) -> dict[str, type]:
    """The type of each settable field of a dataclass."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init}


def read_flags(argv: list[str]) -> dict[str, str | bool]:
    """Flags as a dict, values still text; a flag without a value is True. Raises ValueError for stray words."""
    found: dict[str, str | bool] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise ValueError(f"unexpected argument {word!r}: settings are given as --name value")
        name, given, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if not given:
            is_value = bool(words) and (not words[0].startswith("--"))
            value = words.pop(0) if is_value else True
        if name in found:
            raise ValueError(f"--{name} is given twice; give it once")
        found[name] = value
    return found


def read_yaml(path: str) -> dict:
    """A YAML file of settings, flat. Raises ValueError if it is missing, not YAML or not a mapping."""
    import yaml

    if Path(path).exists() and not Path(path).is_file():
        raise ValueError(f"--config {path} is no ordinary file: name a YAML file of settings")
    try:
        values = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"--config {path} cannot be read ({error.strerror}): name a YAML file of settings") from error
    # ValueError and OverflowError: a number or date that is none.
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(
            f"--config {path} is not valid YAML, which has a line NAME: VALUE for each setting: {error}"
        ) from error
    if not isinstance(values, dict):
        raise ValueError(f"--config {path} must be a mapping of settings to values, but is a {type(values).__name__}")
    return {str(key).replace("-", "_"): value for key, value in values.items()}


def settings(argv: list[str]) -> dict[str, object]:
    """Flags over the YAML file that `--config` names."""
    flags = read_flags(argv)
    config = flags.pop("config", None)
    if config is True:
        raise ValueError("--config needs the path of a YAML file")
    return {**(read_yaml(config) if config else {}), **flags}


def fill(values: dict[str, object], *parts) -> list:
    """One dataclass instance per part (a class, or an instance that holds the defaults), filled from `values`.

    Raises ValueError for a key no part has (with the nearest that one has), for a value that does not parse, and for
    a field without default that is not given.
    """
    classes = [part if isinstance(part, type) else type(part) for part in parts]
    known = {name for cls in classes for name in field_types(cls)}
    values = {**values}
    for name in [n for n in values if n not in known and n.startswith("no_") and n[3:] in known and values[n] is True]:
        values[name[3:]] = not values.pop(name)
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError("; ".join(nearest(name, known, "setting") for name in unknown))
    return [_build(part, cls, values) for part, cls in zip(parts, classes, strict=True)]


def _build(part, cls: type, values: dict[str, object]):
    kinds = field_types(cls)
    given = {name: parse(name, value, kinds[name]) for name, value in values.items() if name in kinds}
    if part is not cls:
        return dataclasses.replace(part, **given)
    needed = [
        f.name
        for f in dataclasses.fields(cls)
        if f.init
        and f.name not in given
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if needed:
        raise ValueError(f"missing {', '.join('--' + name for name in needed)}; --help tells what each setting is for")
    return cls(**given)


def parse(name: str, value, kind):
    """A value as the field's type. Raises ValueError that says what came and what is allowed."""
    options = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    if type(None) in options and (value is None or value in ("none", "None", "null")):
        return None
    for option in (option for option in options if option is not type(None)):
        if typing.get_origin(option) is typing.Literal:
            if value in typing.get_args(option):
                return value
            raise ValueError(nearest(str(value), map(str, typing.get_args(option)), f"value of --{name}"))
        try:
            return _convert(value, option)
        except (ValueError, TypeError, KeyError):
            continue
    allowed = " or ".join(getattr(option, "__name__", str(option)) for option in options if option is not type(None))
    raise ValueError(f"--{name} is {value!r}, but must be {allowed}")


def _convert(value, kind):
    if isinstance(value, bool) and kind is not bool:
        raise ValueError
    if kind is bool and not isinstance(value, bool):
        return {"true": True, "false": False}[str(value).lower()]
    if kind is int and isinstance(value, float) and not value.is_integer():
        raise ValueError
    return kind(value)


def usage(*classes: type) -> str:
    """The settings of dataclasses as help lines: flag, default, and what it is for."""
    lines = []
    for cls in classes:
        for f in dataclasses.fields(cls):
            default = (
                "required"
                if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
                else f.default
            )
            lines.append(f"  --{f.name:<18} {f.metadata.get('help', '')} [{default}]")
    return "\n".join(lines)
