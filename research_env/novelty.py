"""Is this candidate new, before it costs a run? The tree's digest, then its meaning without comments, then its words."""

import ast
import re
from collections.abc import Iterable, Mapping

from research_env.records import digest

_WORD = re.compile(r"[A-Za-z_]+|\d+\.?\d*(?:e-?\d+)?")


def syntax_digest(tree: Mapping[str, bytes]) -> str:
    """Hash of what the files mean: Python without comments, docstrings and layout; other files by their bytes."""
    parts: list[str | bytes] = []
    for path in sorted(tree):
        parts += [path, _meaning(tree[path]) if path.endswith(".py") else tree[path]]
    return digest(*parts)


def _meaning(source: bytes) -> str | bytes:
    try:
        module = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return source
    for node in ast.walk(module):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                node.body = node.body[1:] or [ast.Pass()]
    try:
        return ast.dump(module)
    except RecursionError:
        return source


def words(text: str) -> frozenset[str]:
    """The set of words and numbers of an idea or a diff, lower case."""
    return frozenset(_WORD.findall(text.lower()))


def jaccard(left: frozenset[str], right: frozenset[str]) -> float:
    """Shared share of two sets; two empty sets are equal."""
    union = len(left | right)
    return len(left & right) / union if union else 1.0


def changed_lines(diff: str) -> str:
    """Only the added and removed lines of a diff: its words, without the code around it."""
    lines = diff.split("\n")
    return "\n".join(
        line[1:] for line in lines if line[:1] in ("+", "-") and not line.startswith(("+++", "---"))
    )


def nearest(text: str, others: Iterable[str]) -> float:
    """The largest similarity of `text` to any of `others`; 0 when there are none."""
    own = words(text)
    return max((jaccard(own, words(other)) for other in others), default=0.0)
