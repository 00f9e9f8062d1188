"""Offline ideas: operators that edit a codebase at syntax-tree positions and emit real unified diffs with a sentence.

They take the same road as a model's diffs. What they may touch are constants: `NAME = 0.1` and `f(name=0.1)` in editable
Python files. A comment that lists choices (`ACTIVATION = "tanh"  # tanh, relu, silu`) makes a constant swappable.
"""

import ast
import dataclasses
import math
import random
import re
from collections.abc import Mapping, Sequence

from pretrain.config import ConfigError, stable_seed
from research_env.diff import PathPolicy, emit_diff, make_diff
from research_env.records import Idea

FACTORS = (0.25, 0.4, 0.6, 0.8, 1.25, 1.6, 2.5, 4.0)
_CHOICES = re.compile(r"#\s*((?:[A-Za-z0-9_.-]+\s*,\s*)+[A-Za-z0-9_.-]+)\s*$")


@dataclasses.dataclass(frozen=True)
class Site:
    """A constant in a file: where it stands and what it is."""

    path: str
    line: int  # from 1
    start: int  # byte columns in that line
    end: int
    name: str
    value: bool | int | float | str
    choices: tuple[str, ...] = ()


def find_sites(
    tree: Mapping[str, bytes], policy: PathPolicy, frozen: Sequence[str] = (), focus: Sequence[str] = ()
) -> list[Site]:
    """All constants that a mutation may change, in file order. Names in `frozen` are left alone; `focus` narrows the paths."""
    sites: list[Site] = []
    for path in sorted(tree):
        if not path.endswith(".py") or policy.refusal(path) is not None:
            continue
        if focus and not path.startswith(tuple(focus)):
            continue
        source = tree[path]
        lines = source.split(b"\n")
        try:
            module = ast.parse(source)
        except (SyntaxError, ValueError, RecursionError):
            continue  # a candidate that does not compile has no constants
        for node in ast.walk(module):
            if (
                isinstance(node, ast.Assign)
                and len(node.targets) == 1
                and isinstance(node.targets[0], ast.Name)
            ):
                name, value = node.targets[0].id, node.value
            elif (
                isinstance(node, ast.AnnAssign)
                and isinstance(node.target, ast.Name)
                and node.value is not None
            ):
                name, value = node.target.id, node.value
            elif isinstance(node, ast.keyword) and node.arg is not None:
                name, value = node.arg, node.value
            else:
                continue
            if (
                not isinstance(value, ast.Constant)
                or not isinstance(value.value, (bool, int, float, str))
                or name in frozen
            ):
                continue
            if value.end_lineno != value.lineno or value.end_col_offset is None:
                continue
            choices = ()
            if isinstance(value.value, str):
                comment = _CHOICES.search(lines[value.lineno - 1].decode("utf-8", "replace"))
                choices = tuple(word.strip() for word in comment[1].split(",")) if comment else ()
                if value.value not in choices:
                    continue
            sites.append(
                Site(path, value.lineno, value.col_offset, value.end_col_offset, name, value.value, choices)
            )
    return sorted(sites, key=lambda site: (site.path, site.line, site.start))


def replace_values(tree: Mapping[str, bytes], changes: Sequence[tuple[Site, str]]) -> dict[str, bytes]:
    """The tree with each site's source text replaced."""
    result = dict(tree)
    for site, text in sorted(changes, key=lambda change: (change[0].line, change[0].start), reverse=True):
        lines = result[site.path].split(b"\n")
        line = lines[site.line - 1]
        lines[site.line - 1] = line[: site.start] + text.encode() + line[site.end :]
        result[site.path] = b"\n".join(lines)
    return result


def _number(value: int | float) -> str:
    if isinstance(value, int):
        return str(value)
    rounded = float(f"{value:.3g}")
    return repr(rounded)


def _scaled(site: Site, factor: float) -> str:
    assert isinstance(site.value, (int, float))
    if isinstance(site.value, int):
        new = max(1, round(site.value * factor)) if site.value > 0 else round(site.value * factor)
        return _number(new if new != site.value else site.value + 1)
    value = site.value * factor
    if 0.5 < site.value < 1.0 and value >= 1.0:
        value = (
            1.0 - (1.0 - site.value) / factor
        )  # a share close to 1 moves on the scale of its distance from 1
    return _number(value)


def scale(sites: Sequence[Site], rng: random.Random) -> tuple[list[tuple[Site, str]], str] | None:
    """One number times a factor."""
    numbers = [
        s
        for s in sites
        if isinstance(s.value, (int, float)) and not isinstance(s.value, bool) and s.value != 0
    ]
    if not numbers:
        return None
    site = rng.choice(numbers)
    text = _scaled(site, rng.choice(FACTORS))
    return [(site, text)], f"Change {site.name} from {site.value} to {text}."


def toggle(sites: Sequence[Site], rng: random.Random) -> tuple[list[tuple[Site, str]], str] | None:
    """Switch a boolean, or give a zero a small value."""
    switches = [s for s in sites if isinstance(s.value, bool) or s.value == 0]
    if not switches:
        return None
    site = rng.choice(switches)
    if isinstance(site.value, bool):
        return [(site, str(not site.value))], f"Turn {site.name} {'off' if site.value else 'on'}."
    text = rng.choice(("0.01", "0.1", "1.0")) if isinstance(site.value, float) else "1"
    return [(site, text)], f"Turn {site.name} on with {text}."


def swap(sites: Sequence[Site], rng: random.Random) -> tuple[list[tuple[Site, str]], str] | None:
    """Another of the choices that the code's comment lists."""
    named = [s for s in sites if set(s.choices) - {s.value}]
    if not named:
        return None
    site = rng.choice(named)
    text = rng.choice([choice for choice in site.choices if choice != site.value])
    return [(site, repr(text).replace("'", '"'))], f"Use {text} for {site.name} in place of {site.value}."


def shape(sites: Sequence[Site], rng: random.Random) -> tuple[list[tuple[Site, str]], str] | None:
    """Twice one size, half of another: about equal cost, another form."""
    sizes = [s for s in sites if isinstance(s.value, int) and not isinstance(s.value, bool) and s.value >= 4]
    if len(sizes) < 2:
        return None
    more, less = rng.sample(sizes, 2)
    changes = [(more, _number(int(more.value) * 2)), (less, _number(int(less.value) // 2))]
    return changes, f"Double {more.name} and halve {less.name}."


def pair(sites: Sequence[Site], rng: random.Random) -> tuple[list[tuple[Site, str]], str] | None:
    """Two numbers at once."""
    first, second = scale(sites, rng), scale(sites, rng)
    if first is None or second is None or first[0][0][0] == second[0][0][0]:
        return None
    return first[0] + second[0], f"{first[1]} {second[1]}"


OPERATORS = {
    "scale": (scale, 6),
    "toggle": (toggle, 2),
    "swap": (swap, 1),
    "shape": (shape, 1),
    "pair": (pair, 2),
}


def mutate(
    tree: Mapping[str, bytes],
    policy: PathPolicy,
    rng: random.Random,
    frozen: Sequence[str] = (),
    focus: Sequence[str] = (),
) -> Idea:
    """One idea against `tree`, with its diff.

    Raises:
      ConfigError: the tree holds no constant that may change.
    """
    sites = find_sites(tree, policy, frozen, focus)
    if not sites:
        raise ConfigError(
            f"ideas=MutationIdeas changes constants, and the editable files hold none (focus={tuple(focus)}); widen "
            "ideas.focus, or let a model have the ideas"
        )
    names = list(OPERATORS)
    weights = [OPERATORS[name][1] for name in names]
    while True:
        name = rng.choices(names, weights)[0]
        found = OPERATORS[name][0](sites, rng)
        if found is None:
            continue
        changes, sentence = found
        return Idea(
            text=sentence, diff=emit_diff(make_diff(tree, replace_values(tree, changes))), operator=name
        )


def cross(
    base: Mapping[str, bytes],
    left: Mapping[str, bytes],
    right: Mapping[str, bytes],
    policy: PathPolicy,
    focus: Sequence[str] = (),
) -> Idea | None:
    """Merge two parents: the left one, plus what the right one changed of the base. None when nothing is to merge."""
    own = {
        (s.path, s.name, _occurrence(sites, i)): s
        for sites in [find_sites(left, policy, (), focus)]
        for i, s in enumerate(sites)
    }
    before = find_sites(base, policy, (), focus)
    after = find_sites(right, policy, (), focus)
    if len(before) != len(after):
        return None
    changes = []
    for i, (old, new) in enumerate(zip(before, after, strict=True)):
        target = own.get((old.path, old.name, _occurrence(before, i)))
        if old.value != new.value and target is not None and target.value == old.value:
            text = (
                repr(new.value).replace("'", '"')
                if isinstance(new.value, (str, bool))
                else _number(new.value)
            )
            changes.append((target, text))
    if not changes:
        return None
    sentence = (
        "Take over from the other parent: "
        + ", ".join(f"{site.name} = {text}" for site, text in changes)
        + "."
    )
    return Idea(
        text=sentence, diff=emit_diff(make_diff(left, replace_values(left, changes))), operator="cross"
    )


def _occurrence(sites: Sequence[Site], index: int) -> int:
    site = sites[index]
    return sum(1 for other in sites[:index] if (other.path, other.name) == (site.path, site.name))


def fault(tree: Mapping[str, bytes], policy: PathPolicy, rng: random.Random) -> Idea:
    """A diff that fails on purpose, so that tests and rehearsals see the failure statuses occur."""
    path = next(p for p in sorted(tree) if p.endswith(".py") and policy.refusal(p) is None)
    kind = rng.choice(("does not apply", "crashes", "does not compile", "is refused"))
    if kind == "does not apply":
        text = f"--- a/{path}\n+++ b/{path}\n@@ -1 +1 @@\n-no such line {rng.random()}\n+x\n"
    elif kind == "is refused":
        text = "--- a/eval.sh\n+++ b/eval.sh\n@@ -1 +1 @@\n-x\n+y\n"
    else:
        line = b"raise RuntimeError('on purpose')\n" if kind == "crashes" else b"x = (\n"
        text = emit_diff(make_diff(tree, {**tree, path: tree[path] + b"\n" + line}))
    return Idea(text=f"A change that {kind}.", diff=text, operator="fault")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MutationIdeas:
    """Ideas without a model. `focus` are the paths that may be mutated (all editable ones when empty)."""

    focus: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()  # constants that are left alone
    fault_share: float = 0.0  # ideas that fail on purpose, for rehearsals

    def __post_init__(self) -> None:
        if not 0.0 <= self.fault_share <= 1.0:
            raise ConfigError(f"ideas.fault_share must lie in [0, 1], got {self.fault_share}")

    def build(self, seed: int) -> "MutationIdeator":
        """The ideator of a campaign with this seed."""
        return MutationIdeator(seed, self)


class MutationIdeator:
    """Ideas from operators; a pure function of (campaign seed, slot key), so that a replay finds the same ones."""

    def __init__(self, seed: int, config: MutationIdeas = MutationIdeas()):
        self._seed, self._config = seed, config

    def can_change(self, tree: Mapping[str, bytes], policy: PathPolicy) -> bool:
        """Whether `tree` holds a constant to change."""
        return bool(find_sites(tree, policy, self._config.frozen, self._config.focus))

    def propose(
        self,
        key: str,
        tree: Mapping[str, bytes],
        policy: PathPolicy,
        baseline: Mapping[str, bytes],
        others: Sequence[Mapping[str, bytes]],
    ) -> Idea:
        """One idea against `tree`; with other parents at hand, half of the time a cross."""
        rng = random.Random(stable_seed(self._seed, "mutate", key))
        if rng.random() < self._config.fault_share:
            return fault(tree, policy, rng)
        if others and rng.random() < 0.5:
            found = cross(baseline, tree, rng.choice(list(others)), policy, self._config.focus)
            if found is not None:
                return found
        return mutate(tree, policy, rng, self._config.frozen, self._config.focus)


def entropy(counts: Sequence[int]) -> float:
    """exp of the entropy of a histogram: how many operators or ideas are effectively in use."""
    total = sum(counts)
    return math.exp(-sum(c / total * math.log(c / total) for c in counts if c)) if total else 0.0
