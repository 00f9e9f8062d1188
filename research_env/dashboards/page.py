"""A campaign as one HTML page that needs nothing else: no script, no network, every foreign character escaped.

Ideas, diffs and logs are untrusted text. The page carries a policy that forbids scripts and requests, so that a hole in the
escaping would still do nothing.
"""

import collections
import dataclasses
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pretrain.rundir import write_atomic
from research_env.ledger import Ledger
from research_env.records import Node, Result
from research_env.task import Task

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_STYLE = """
body{font:14px/1.45 system-ui,sans-serif;max-width:1080px;margin:2em auto;padding:0 1em;color:#1a1a1a}
h1{font-size:1.5em}h2{font-size:1.15em;margin-top:2em;border-bottom:1px solid #ddd}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
td,th{padding:.25em .6em;text-align:right;border-bottom:1px solid #eee}td:first-child,th:first-child{text-align:left}
pre{background:#f6f6f6;padding:.7em;overflow:auto;max-height:22em;font-size:12px;white-space:pre-wrap}
details{border-bottom:1px solid #eee;padding:.2em 0}summary{cursor:pointer}.ok{color:#00704f}.bad{color:#a33}
.charts{display:flex;flex-wrap:wrap;gap:1em}svg{background:#fff}.note{color:#666}
"""


def write_page(ledger: Ledger, task: Task, path: Path, summary: Mapping[str, Any]) -> Path:
    """Write the page for what the ledger holds; returns its path."""
    arms = read_arms(ledger)
    verdicts = {key: json.loads(detail) for key, detail in ledger.events("verdict")}
    parts = [
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{_text(task.name)}</title>",
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}"><style>{_STYLE}</style></head><body>',
        f"<h1>Research on {_text(task.name)}</h1><p>{_text(task.description)}</p>",
        _headline(summary),
        "<h2>Best so far</h2><div class='charts'>",
        _chart(task, arms, "evaluations", lambda node, result: 1.0, summary),
        _chart(task, arms, "device-seconds", lambda node, result: result.device_s, summary),
        _chart(task, arms, "dollars", lambda node, result: node.cost_usd, summary)
        if any(node.cost_usd for items in arms.values() for node, _ in items)
        else "<p class='note'>No model was paid, so there is no curve against dollars.</p>",
        "</div>",
        "<h2>Arms</h2>",
        _table(summary.get("arms", [])),
        "<h2>Statuses and diversity</h2>",
        _statuses(arms),
        "<h2>Lineage</h2>",
        _lineage(arms),
        "<h2>Spend</h2>",
        _table([summary.get("spent", {})]),
        "<h2>Candidates</h2>",
    ]
    for arm, items in arms.items():
        parts.append(f"<h3>{_text(arm)}</h3>")
        parts += [_candidate(node, result, verdicts.get(node.id), task) for node, result in items]
    parts.append("</body></html>\n")
    write_atomic(path, "\n".join(parts))
    return path


def read_arms(ledger: Ledger) -> dict[str, list[tuple[Node, Result]]]:
    """What each arm was told, in order."""
    arms: dict[str, list[tuple[Node, Result]]] = {}
    for arm, detail in ledger.events("told"):
        fields = json.loads(detail)
        result = ledger.result(fields["run"])
        assert result is not None, "told after it was finished"
        result = dataclasses.replace(result, device_s=fields["device_s"])
        arms.setdefault(arm, []).append((ledger.node(fields["node"]), result))
    return arms


def _text(value: Any) -> str:
    """Escaped text; characters that are no text in HTML are replaced."""
    kept = "".join(
        c if c in "\n\t" or (c.isprintable() and not 0xD800 <= ord(c) <= 0xDFFF) else "\ufffd"
        for c in str(value)
    )
    return html.escape(kept, quote=True)


def _headline(summary: Mapping[str, Any]) -> str:
    winner = summary.get("winner")
    base = (
        f"<p>Baseline {_text(summary['metric'])} {summary['baseline']:.4f}, sigma0 {summary['sigma0']:.4f} "
        f"({summary['noise_repeats']} seeds). Isolation: {_text(summary['isolation'])}.</p>"
    )
    if winner is None:
        return base + "<p>No candidate beat the baseline on fresh paired seeds.</p>"
    return base + (
        f"<p class='ok'>Promoted: {_text(winner['idea'])} Gain {winner['mean']:.4f} "
        f"[{winner['lower']:.4f}, {winner['upper']:.4f}] on {winner['num_seeds']} fresh paired seeds, "
        f"{winner['posterior']:.4f} after shrinkage.</p>{_final(summary)}<pre>{_text(winner['diff'])}</pre>"
    )


def _final(summary: Mapping[str, Any]) -> str:
    """What the winner is worth on data that no search has seen."""
    if "final" not in summary:
        return "<p class='note'>The task has no final split: the gain above is on data that the search has used.</p>"
    final = summary["final"]
    if "stopped" in final:
        return f"<p class='bad'>The final split was not scored: {_text(final['stopped'])}</p>"
    return (
        f"<p class='ok'>Final split: gain {final['mean']:.4f} [{final['lower']:.4f}, {final['upper']:.4f}] on "
        f"{final['num_seeds']} fresh paired seeds.</p>"
    )


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return "<p class='note'>none</p>"
    names = list(rows[0])
    head = "".join(f"<th>{_text(name)}</th>" for name in names)
    body = "".join(
        "<tr>" + "".join(f"<td>{_cell(row[name])}</td>" for name in names) + "</tr>" for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else _text(value)


def _chart(
    task: Task,
    arms: Mapping[str, Sequence[tuple[Node, Result]]],
    label: str,
    cost: Any,
    summary: Mapping[str, Any],
) -> str:
    """Steps of the best metric against a running cost, one line an arm, the baseline dashed."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for arm, items in arms.items():
        x, best, points = 0.0, None, []
        for node, result in items:
            x += cost(node, result)
            if result.better_than(best):
                best = result.metric
            if best is not None:
                points.append((x, best))
        lines[arm] = points
    values = [y for points in lines.values() for _, y in points] + [float(summary["baseline"])]
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    right = max((x for points in lines.values() for x, _ in points), default=1.0) or 1.0
    width, height, left, bottom = 500, 260, 60, 36

    def place(x: float, y: float) -> tuple[float, float]:
        return left + x / right * (width - left - 10), 10 + (high - y) / span * (height - bottom - 20) + 5

    parts = [f"<svg width='{width}' height='{height}' role='img' aria-label='best so far against {label}'>"]
    for share in (0.0, 0.5, 1.0):
        y = low + share * span
        _, at = place(0, y)
        parts.append(f"<line x1='{left}' x2='{width - 10}' y1='{at:.1f}' y2='{at:.1f}' stroke='#eee'/>")
        parts.append(f"<text x='{left - 6}' y='{at + 4:.1f}' font-size='11' text-anchor='end'>{y:.4g}</text>")
    _, at = place(0, float(summary["baseline"]))
    parts.append(
        f"<line x1='{left}' x2='{width - 10}' y1='{at:.1f}' y2='{at:.1f}' stroke='#666' stroke-dasharray='4 3'/>"
    )
    for index, (arm, points) in enumerate(lines.items()):
        color = COLORS[index % len(COLORS)]
        path, last = [], None
        for x, y in points:
            px, py = place(x, y)
            path += [f"{px:.1f},{last:.1f}"] if last is not None else []
            path.append(f"{px:.1f},{py:.1f}")
            last = py
        parts.append(f"<polyline fill='none' stroke='{color}' stroke-width='2' points='{' '.join(path)}'/>")
        parts.append(
            f"<text x='{width - 14}' y='{24 + 14 * index}' font-size='12' text-anchor='end' fill='{color}'>{_text(arm)}</text>"
        )
    parts.append(
        f"<text x='{width / 2}' y='{height - 6}' font-size='12' text-anchor='middle'>{label} (to {right:.4g})</text></svg>"
    )
    return "".join(parts)


def _statuses(arms: Mapping[str, Sequence[tuple[Node, Result]]]) -> str:
    rows = []
    for arm, items in arms.items():
        counts = collections.Counter(result.status.value for _, result in items)
        trees = {node.tree_digest for node, _ in items if node.tree_digest}
        operators = collections.Counter(node.operator for node, _ in items)
        rows.append(
            {
                "arm": arm,
                "statuses": ", ".join(f"{name} {count}" for name, count in counts.most_common()),
                "unique trees": len(trees),
                "operators": ", ".join(f"{name} {count}" for name, count in operators.most_common()),
            }
        )
    return _table(rows)


def _lineage(arms: Mapping[str, Sequence[tuple[Node, Result]]]) -> str:
    """Children under their parents, as a nested list."""
    parts = []
    for arm, items in arms.items():
        children: dict[str, list[tuple[Node, Result]]] = {}
        for node, result in items:
            children.setdefault(node.parents[0] if node.parents else "", []).append((node, result))

        def draw(
            parent: str, depth: int, children: Mapping[str, Sequence[tuple[Node, Result]]] = children
        ) -> str:
            rows = ""
            for node, result in children.get(parent, []) if depth < 30 else []:
                metric = result.status.value if result.metric is None else f"{result.metric:.4f}"
                rows += (
                    f"<li>{_text(node.id[:8])} {metric} {_text(node.operator)}{draw(node.id, depth + 1)}</li>"
                )
            return f"<ul>{rows}</ul>" if rows else ""

        parts.append(f"<details><summary>{_text(arm)}</summary>{draw('', 0)}</details>")
    return "".join(parts)


def _sparkline(curve: Sequence[tuple[float, float]]) -> str:
    """The loss that a run streamed, as a small line: advice, never the score."""
    steps, losses = [step for step, _ in curve], [loss for _, loss in curve]
    right, low, high = max(steps) or 1.0, min(losses), max(losses)
    points = " ".join(
        f"{step / right * 230:.1f},{4 + (high - loss) / ((high - low) or 1.0) * 40:.1f}"
        for step, loss in curve
    )
    return (
        f"<p class='note'><svg width='236' height='50' role='img' aria-label='streamed loss'><polyline fill='none' "
        f"stroke='{COLORS[0]}' stroke-width='1.5' points='{points}'/></svg> streamed loss, advice and never the score: "
        f"{losses[0]:.4g} to {losses[-1]:.4g} at step {steps[-1]:.0f}</p>"
    )


def _candidate(node: Node, result: Result, verdict: Mapping[str, Any] | None, task: Task) -> str:
    style = "ok" if result.metric is not None else "bad"
    metric = result.status.value if result.metric is None else f"{result.metric:.4f}"
    parts = [
        f"<details><summary>{_text(node.id[:8])} <span class='{style}'>{metric}</span> {_text(node.idea[:160])}</summary>"
    ]
    if verdict is not None:
        parts.append(
            f"<p>{_text(verdict['decision'])}: gain {verdict['mean']:.4f} [{verdict['lower']:.4f}, {verdict['upper']:.4f}] "
            f"on {verdict['num_seeds']} fresh paired seeds</p>"
        )
    parts.append(
        f"<p class='note'>{_text(result.reason)} {result.wall_s:.1f} s, {result.cpu_s:.1f} cpu-s, "
        f"{result.peak_memory_bytes / 1e6:.0f} MB, seed {result.seed}, {_text(result.isolation)}</p>"
    )
    parts.append(f"<pre>{_text(node.diff)}</pre>")
    if result.curve:
        parts.append(_sparkline(result.curve))
    if result.status.shows_log and result.log_tail:
        parts.append(f"<pre>{_text(result.log_tail)}</pre>")
    return "".join(parts) + "</details>"
