"""What a model sees: the task, the code that may change, and what came of earlier ideas.

Code, ideas and logs are foreign text. They stand between <data> and </data>, cannot close that block, and are cut to a
stated length. From the judge a model learns the metric or the status, never a log.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from research_env.diff import PathPolicy
from research_env.novelty import changed_lines
from research_env.records import Node, Result
from research_env.task import Task

PROMPTS = Path(__file__).parent.parent / "prompts"
FIELDS = ("idea", "metric", "status", "diff", "log")
MAX_IDEA_CHARACTERS = 800
MAX_LOG_CHARACTERS = 1500
MAX_DIFF_CHARACTERS = 3000


def quote(text: str, max_characters: int) -> str:
    """Foreign text for a prompt: bounded, printable, and without the mark that would end its block."""
    kept = text if len(text) <= max_characters else text[: max_characters - 20] + "\n[cut here]"
    printable = "".join(c if c in "\n\t" or c.isprintable() else " " for c in kept)
    return printable.replace("<data>", "< data >").replace("</data>", "< /data >")


def task_text(task: Task, baseline: float | None) -> str:
    """What is to be improved, under which limits."""
    direction = "higher is better" if task.higher_is_better else "lower is better"
    limit = f"{task.limits.cpu_s:g} cpu-seconds" if task.limits.cpu_s else f"{task.limits.wall_s:g} seconds"
    score = "" if baseline is None else f" The unchanged code reaches {baseline:.4f}."
    return (
        f"{quote(task.description, 4000)}\nMetric: {task.metric}, {direction}.{score}\n"
        f"A run may use {limit} and {task.limits.memory_bytes >> 20} MiB of memory; there is no network, and no package can be installed.\n"
        f"Files that may be changed: {', '.join(task.policy.editable) or 'all'}. Locked: {', '.join(task.policy.locked)}."
    )


def code_text(
    tree: Mapping[str, bytes], policy: PathPolicy, focus: Sequence[str], max_characters: int
) -> str:
    """The editable files with their contents, those in `focus` first; files that do not fit are named only."""
    paths = sorted((p for p in tree if policy.refusal(p) is None), key=lambda p: (_rank(p, focus), p))
    parts, left, named = [], max_characters, []
    for path in paths:
        text = tree[path].decode("utf-8", "replace")
        if len(text) > left:
            named.append(path)
            continue
        left -= len(text)
        parts.append(f"=== {path}\n{quote(text, len(text))}")
    if named:
        parts.append("=== further files, not shown: " + ", ".join(named))
    return "\n".join(parts)


def _rank(path: str, focus: Sequence[str]) -> int:
    return next((i for i, name in enumerate(focus) if path == name or path.startswith(name)), len(focus))


def history_text(items: Sequence[tuple[Node, Result]], fields: Sequence[str]) -> str:
    """One paragraph for each earlier idea; a failure has a status instead of a metric."""
    parts = []
    for node, result in items:
        lines = []
        if "idea" in fields:
            lines.append(quote(node.idea, MAX_IDEA_CHARACTERS))
        if "metric" in fields:
            lines.append(
                "metric: " + ("none, it failed" if result.metric is None else f"{result.metric:.4f}")
            )
        if "status" in fields:
            lines.append(f"status: {result.status.value}")
        if "diff" in fields:
            lines.append(quote(changed_lines(node.diff), MAX_DIFF_CHARACTERS))
        if "log" in fields and result.status.shows_log:
            lines.append(quote(result.log_tail[-MAX_LOG_CHARACTERS:], MAX_LOG_CHARACTERS))
        parts.append("- " + "\n  ".join(lines))
    return "\n".join(parts) or "none yet"
