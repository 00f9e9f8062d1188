"""What a diff changed of a recipe, as changes of a training config: read from the syntax tree, never run.

A recipe is a Python file that assigns values and configs of `pretrain` to names (tasks/pretrain_tiny/codebase/recipe.py).
Candidate code runs in a jail only, so its recipe is not imported here: constants, arithmetic on them, and calls of our own
config classes are read; what else stands in the file may not have changed.
"""

import ast
import dataclasses
import operator
from collections.abc import Mapping
from typing import Any

from pretrain import loss, optim
from pretrain.config import ConfigError
from pretrain.model import transformer
from pretrain.train import TrainConfig

RECIPE = "recipe.py"
# Where each of the recipe's names stands in a TrainConfig.
PLACES = {
    "MODEL": "model",
    "OPTIM": "optim",
    "LOSS": "loss",
    "BATCH": "data.batch_rows",
    "ROW": "data.row_length",
}
# What the ladder decides itself, by budgets and shapes.
SIZES = ("STEPS", "MODEL.width", "MODEL.num_layers")

_CLASSES = {
    name: found
    for module in (optim, loss, transformer)
    for name, found in vars(module).items()
    if isinstance(found, type) and dataclasses.is_dataclass(found) and found.__module__ == module.__name__
}
_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
              ast.FloorDiv: operator.floordiv}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Unread:
    """An expression that is no plain value: only whether it changed is known."""

    text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Change:
    """A value of the recipe, `name` dotted like OPTIM.peak_lr, before and after."""

    name: str
    old: Any
    new: Any

    @property
    def place(self) -> str:
        """The dotted path of the TrainConfig field, or "" for a size."""
        if self.name in SIZES:
            return ""
        first, dot, rest = self.name.partition(".")
        return PLACES[first] + dot + rest

    def __str__(self) -> str:
        return f"{self.name} {self.old} -> {self.new}"


def recipe_changes(before: Mapping[str, bytes], after: Mapping[str, bytes]) -> list[Change]:
    """What changed between two trees.

    Raises:
      ConfigError: more than values of the recipe changed, or they make no valid config; all faults at once.
    """
    paths = [path for path in sorted({*before, *after}) if before.get(path) != after.get(path)]
    faults = [
        f"only {RECIPE} is replayed on a ladder, {path} changed too; let that change enter the code first"
        for path in paths
        if path != RECIPE
    ]
    if faults:
        raise ConfigError(*faults)
    old, old_rest = _read(before[RECIPE])
    new, new_rest = _read(after[RECIPE])
    if old_rest != new_rest or old.keys() != new.keys():
        faults.append(f"{RECIPE} must differ in values alone; statements or names changed too")
    changes: list[Change] = []
    for name in old.keys() & new.keys():
        changes += _differences(name, old[name], new[name])
    for change in changes:
        if change.name in SIZES:
            continue
        if change.name.partition(".")[0] not in PLACES:
            faults.append(f"{change.name} has no place in a TrainConfig; only {', '.join(PLACES)} have")
        elif isinstance(change.old, Unread) or isinstance(change.new, Unread):
            faults.append(f"{change.name} must be a plain value to be replayed, got {change.new}")
    if faults:
        raise ConfigError(*faults)
    return sorted(changes, key=lambda change: change.name)


def replay(changes: list[Change], train: TrainConfig) -> TrainConfig:
    """`train` with all changes that are not sizes; like a hunk of a diff, each finds its old value or fails.

    Raises:
      ConfigError: another value stands there, or nothing is left to replay; all faults at once.
    """
    carried = [change for change in changes if change.place]
    if not carried:
        said = ", ".join(map(str, changes)) or "nothing"
        raise ConfigError(f"a change of sizes alone is not replayed, the ladder sets them itself; got {said}")
    faults = []
    for change in carried:
        found = train
        for part in change.place.split("."):
            found = getattr(found, part)
        if found != change.old:
            faults.append(f"train.{change.place} must be {change.old}, which the diff changes, got {found}")
    if faults:
        raise ConfigError(*faults)
    for change in carried:
        train = _replaced(train, change.place.split("."), change.new)
    return train


def _replaced(config: Any, path: list[str], value: Any) -> Any:
    first, *rest = path
    return dataclasses.replace(
        config, **{first: _replaced(getattr(config, first), rest, value) if rest else value}
    )


def _differences(name: str, old: Any, new: Any) -> list[Change]:
    """By field where both are of one class; a config of another class is one change."""
    if dataclasses.is_dataclass(old) and type(old) is type(new) and not isinstance(old, Unread):
        return [
            change
            for field in dataclasses.fields(old)
            for change in _differences(
                f"{name}.{field.name}", getattr(old, field.name), getattr(new, field.name)
            )
        ]
    return [] if old == new else [Change(name=name, old=old, new=new)]


def _read(source: bytes) -> tuple[dict[str, Any], list[str]]:
    """(names and their values, all other statements as text)."""
    values: dict[str, Any] = {}
    rest = []
    for statement in _parsed(source).body:
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            name = statement.targets[0].id
            if name in values or len(statement.targets) > 1:
                raise ConfigError(f"{RECIPE} must assign each name once, {name} is assigned again")
            values[name] = _value(statement.value, values)
        else:
            rest.append(ast.dump(statement))
    return values, rest


def _parsed(source: bytes) -> ast.Module:
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ConfigError(f"{RECIPE} must be Python, got {type(error).__name__}: {error}") from error


def _value(node: ast.expr, known: Mapping[str, Any]) -> Any:
    """The value of an expression, `Unread` when it is none of ours."""
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name) if name in known:
            return known[name]
        case ast.UnaryOp(op=ast.USub()):
            value = _value(node.operand, known)
            return -value if isinstance(value, (int, float)) else Unread(ast.dump(node))
        case ast.BinOp():
            left, right, act = (
                _value(node.left, known),
                _value(node.right, known),
                _OPERATORS.get(type(node.op)),
            )
            if act is None or not all(isinstance(side, (int, float)) for side in (left, right)):
                return Unread(ast.dump(node))
            try:
                return act(left, right)
            except (ZeroDivisionError, OverflowError) as error:
                raise ConfigError(f"{RECIPE} holds a number that cannot be computed: {error}") from error
        case ast.Tuple(elts=items):
            return tuple(_value(item, known) for item in items)
        case ast.Call(func=ast.Name(id=name), args=[]) if name in _CLASSES:
            fields = {item.arg: _value(item.value, known) for item in node.keywords if item.arg is not None}
            is_whole = len(fields) == len(node.keywords)  # no **settings among them
            if not is_whole or any(isinstance(value, Unread) for value in fields.values()):
                return Unread(ast.dump(node))
            try:
                return _CLASSES[name](**fields)
            except TypeError as error:
                raise ConfigError(f"{RECIPE} gives {name} what it does not take: {error}") from error
    return Unread(ast.dump(node))
