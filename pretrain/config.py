"""Typed configs: a Python file returns a frozen dataclass, the command line overrides its fields.

A config is a nested tree of frozen, keyword-only dataclasses. Fields are part of the run's *identity*
unless they are declared with `local(...)`: identity fields enter `fingerprint` and may not change when a
run resumes; local fields (where the run writes, how often it logs, when it stops) may.
"""

import ast
import dataclasses
import difflib
import hashlib
import importlib
import importlib.util
import json
import math
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


class ConfigError(ValueError):
    """The caller gave something wrong: rule, value and remedy, one line for each fault."""

    def __init__(self, *faults: str):
        self.faults = faults
        super().__init__("\n".join(faults))


def local(default: Any = dataclasses.MISSING, *, factory: Any = dataclasses.MISSING) -> Any:
    """A dataclass field that is not part of the run's identity."""
    if factory is not dataclasses.MISSING:
        return dataclasses.field(default_factory=factory, metadata={"local": True})
    return dataclasses.field(default=default, metadata={"local": True})


# --- loading -----------------------------------------------------------------------------------------


def load_config(path: str | Path) -> Any:
    """Run the config file at `path` and return what its `get_config()` returns.

    Raises:
      ConfigError: no such file, the file fails, or it has no `get_config`.
    """
    path = Path(path)
    if not path.is_file():
        near = _nearest(path.name, [p.name for p in path.parent.glob("*.py")])
        hint = f"; did you mean {path.parent / near}?" if near else ""
        raise ConfigError(f"--config must name a Python file, got {str(path)!r}, which is not there{hint}")
    name = f"autodidact_config_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses defined in a config file look their module up
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise ConfigError(f"{path} must define get_config() that returns a config dataclass; it does not")
        config = module.get_config()
    except ConfigError:
        raise
    except Exception as error:  # a config file is a program: it may raise anything
        raise ConfigError(f"{path} fails to load: {type(error).__name__}: {error}") from error
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise ConfigError(f"{path}: get_config() must return a config dataclass, got {type(config).__name__}")
    return config


def parse_argv(argv: Sequence[str]) -> tuple[str, list[str]]:
    """Split `--config X key=value ...` into the path and the overrides.

    Raises:
      ConfigError: another flag, or no --config.
    """
    path, overrides, faults = None, [], []
    arguments = iter(argv)
    for argument in arguments:
        if argument == "--config":
            path = next(arguments, None)
        elif argument.startswith("--config="):
            path = argument.removeprefix("--config=")
        elif argument.startswith("-") or "=" not in argument:
            faults.append(
                f"arguments are --config FILE and key=value, got {argument!r}; write e.g. run.num_steps=100"
            )
        else:
            overrides.append(argument)
    if path is None:
        faults.append("--config FILE is needed; the recipes are the files in configs/")
    if faults:
        raise ConfigError(*faults)
    assert path is not None
    return path, overrides


# --- overrides ---------------------------------------------------------------------------------------


def apply_overrides(config: T, overrides: Sequence[str]) -> T:
    """Return `config` with `dotted.key=value` overrides parsed against the fields' types.

    An element of a tuple of configs is named by its index or by its `name` field
    (`data.sources.books.path=...`). All faults are raised at once.

    Raises:
      ConfigError: an unknown key (names the nearest), a value of the wrong type, or a value a check refuses.
    """
    tree: dict[str, Any] = {}
    faults: list[str] = []
    for override in overrides:
        key, _, text = override.partition("=")
        node, parts = tree, key.split(".")
        for part in parts[:-1]:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                faults.append(f"{key} is set together with one of its parents; set only one of them")
                break
        else:
            node[parts[-1]] = text
    changed = _apply(config, tree, "", faults)
    if faults:
        raise ConfigError(*faults)
    return changed


def _apply(value: Any, tree: Mapping[str, Any], prefix: str, faults: list[str]) -> Any:
    """Rebuild `value` once with every change below it, so that checks see the final state only."""
    if isinstance(value, tuple):
        return _apply_to_tuple(value, tree, prefix, faults)
    hints = typing.get_type_hints(type(value))
    fields = {f.name: f for f in dataclasses.fields(value) if f.init}
    changes = {}
    for key, new in tree.items():
        path = f"{prefix}{key}"
        if key not in fields:
            faults.append(_unknown_key(value, prefix, key))
            continue
        old = getattr(value, key)
        if isinstance(new, dict):
            if dataclasses.is_dataclass(old) or isinstance(old, tuple):
                changes[key] = _apply(old, new, f"{path}.", faults)
            else:
                faults.append(
                    f"{path} is a value of type {_type_name(hints[key])}, it has no field {next(iter(new))!r}"
                )
            continue
        try:
            changes[key] = _parse(new, hints[key])
        except ValueError:
            faults.append(f"{path} must be {_type_name(hints[key])}, got {new!r}")
    if not changes or faults:
        return value
    try:
        return dataclasses.replace(value, **changes)
    except ValueError as error:
        faults.extend(f"{prefix}{line}" for line in str(error).split("\n"))
        return value


def _apply_to_tuple(value: tuple, tree: Mapping[str, Any], prefix: str, faults: list[str]) -> tuple:
    items = list(value)
    names = [getattr(item, "name", str(i)) for i, item in enumerate(items)]
    for key, new in tree.items():
        index = int(key) if key.isdigit() else names.index(key) if key in names else -1
        if not 0 <= index < len(items) or not isinstance(new, dict):
            known = ", ".join(names) or "none"
            faults.append(f"{prefix}{key} must name one of: {known} (and a field of it)")
            continue
        items[index] = _apply(items[index], new, f"{prefix}{key}.", faults)
    return tuple(items)


def _unknown_key(value: Any, prefix: str, key: str) -> str:
    names = [f.name for f in dataclasses.fields(value) if f.init]
    near = _nearest(key, names)
    hint = f"did you mean {prefix}{near}?" if near else f"known: {', '.join(names)}"
    return f"unknown config key {prefix}{key}; {hint}"


def _nearest(word: str, words: Sequence[str]) -> str | None:
    return next(iter(difflib.get_close_matches(word, words, n=1, cutoff=0.5)), None)


def _type_name(hint: Any) -> str:
    if isinstance(hint, type) and not typing.get_args(hint):
        return {"str": "text", "bool": "true or false", "int": "an integer", "float": "a number"}.get(
            hint.__name__, hint.__name__
        )
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join("none" if h is type(None) else _type_name(h) for h in typing.get_args(hint))
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(repr(a) for a in typing.get_args(hint))
    return str(hint).replace("typing.", "")


def _parse(text: str, hint: Any) -> Any:
    """Parse `text` as a value of type `hint`; ValueError when it is not one."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if type(None) in arguments and text.lower() in ("none", "null"):
            return None
        for argument in arguments:
            if argument is not type(None):
                try:
                    return _parse(text, argument)
                except ValueError:
                    continue
        raise ValueError(text)
    if origin is typing.Literal:
        for argument in arguments:
            if text == str(argument):
                return argument
        raise ValueError(text)
    if hint is bool:
        if text.lower() in ("true", "yes", "1"):
            return True
        if text.lower() in ("false", "no", "0"):
            return False
        raise ValueError(text)
    if hint is int:
        number = _finite(float(text)) if set(text) & set("eE.") else int(text)
        if number != int(number):
            raise ValueError(text)
        return int(number)
    if hint is float:
        return _finite(float(text))
    if hint is str:
        return text
    if hint is Path:
        return Path(text)
    if origin in (tuple, dict):
        try:
            literal = ast.literal_eval(text)
        except (SyntaxError, ValueError) as error:
            raise ValueError(text) from error
        return _coerce(literal, hint)
    raise ValueError(text)


def _finite(number: float) -> float:
    """Checks are comparisons, which nan passes unseen; and neither nan nor infinity is JSON."""
    if not math.isfinite(number):
        raise ValueError(number)
    return number


def _coerce(value: Any, hint: Any) -> Any:
    """A Python literal, or a value from JSON, as the type `hint`."""
    if hint is Any:
        return value
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        if not isinstance(value, (tuple, list)):
            value = (value,)
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(_coerce(v, arguments[0]) for v in value)
        if len(value) != len(arguments):
            raise ValueError(value)
        return tuple(_coerce(v, a) for v, a in zip(value, arguments, strict=True))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ValueError(value)
        return {_coerce(k, arguments[0]): _coerce(v, arguments[1]) for k, v in value.items()}
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        for argument in arguments:
            try:
                return _coerce(value, argument)
            except ValueError:
                continue
        raise ValueError(value)
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return _finite(float(value))
    if hint is Path and isinstance(value, str):
        return Path(value)
    if isinstance(hint, type) and not (
        isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
    ):
        raise ValueError(value)
    return value


# --- JSON and identity -------------------------------------------------------------------------------


def to_json(value: Any, *, identity_only: bool = False) -> Any:
    """The config as plain JSON values; each dataclass carries its qualified name under "type"."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [f for f in dataclasses.fields(value) if not (identity_only and f.metadata.get("local"))]
        body = {f.name: to_json(getattr(value, f.name), identity_only=identity_only) for f in fields}
        return {"type": f"{type(value).__module__}:{type(value).__qualname__}", **body}
    if isinstance(value, Mapping):
        return {str(k): to_json(v, identity_only=identity_only) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [to_json(v, identity_only=identity_only) for v in value]
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a config holds dataclasses, tuples, dicts and plain values, got {type(value).__name__}")


def from_json(data: Any) -> Any:
    """The inverse of `to_json`."""
    if isinstance(data, Mapping) and ":" in str(data.get("type", "")):
        module, _, name = data["type"].partition(":")
        cls: Any = importlib.import_module(module)
        for part in name.split("."):
            cls = getattr(cls, part)
        hints = typing.get_type_hints(cls)
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = [k for k in data if k != "type" and k not in known]
        if unknown:
            raise ConfigError(f"stored config has fields that {name} does not know: {', '.join(unknown)}")
        values = {k: from_json(v) for k, v in data.items() if k != "type"}
        return cls(**{k: _restore(v, hints[k]) for k, v in values.items()})
    if isinstance(data, Mapping):
        return {k: from_json(v) for k, v in data.items()}
    if isinstance(data, list):
        return tuple(from_json(v) for v in data)
    return data


def _restore(value: Any, hint: Any) -> Any:
    try:
        return _coerce(value, hint)
    except (ValueError, TypeError):
        return value  # protocols and generics that _coerce does not model; the class checks its own fields


def fingerprint(config: Any) -> str:
    """Hash (hex, 64 characters) of the identity fields."""
    text = json.dumps(to_json(config, identity_only=True), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def diff(old: Any, new: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """Identity fields in which two configs (or their identity JSON) differ: (path, old, new)."""
    if dataclasses.is_dataclass(old):
        old = to_json(old, identity_only=True)
    if dataclasses.is_dataclass(new):
        new = to_json(new, identity_only=True)
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = list(dict.fromkeys([*old, *new]))
        return [d for k in keys for d in diff(old.get(k), new.get(k), f"{path}.{k}" if path else str(k))]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [d for i, (a, b) in enumerate(zip(old, new, strict=True)) for d in diff(a, b, f"{path}.{i}")]
    return [] if old == new else [(path, old, new)]


def stable_seed(*parts: object) -> int:
    """A 63-bit seed from the hash of `parts`: the same on every machine and Python, unlike `hash`."""
    digest = hashlib.sha256("\x1f".join(str(p) for p in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
