"""The loop closed once: what research found on a small model, replayed on larger ones, and whether the gain is there too.

The best promoted change of a campaign on `pretrain_tiny` becomes an arm of a ladder (pretrain/scaling): at every budget and
shape the base recipe and the changed one are trained with the same FLOPs and seed. The answer is the effective compute
multiplier, how much more compute the base needs for the changed recipe's loss, with its interval.
`python -m research_env.rl --config FILE key=value ...` does it.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pretrain.config import ConfigError, local
from pretrain.rundir import write_atomic, write_json_atomic
from pretrain.scaling.cells import LADDER, Cell
from pretrain.scaling.compare import Multiplier
from pretrain.scaling.fit import Interval
from pretrain.scaling.plan import Arm, Planned, ScalingConfig, plan_cells
from pretrain.scaling.report import analyze, write_report
from pretrain.scaling.run import Tables, finished_cells, run_cells
from research_env.diff import DiffFailed, DiffRefused, read_change
from research_env.ledger import Ledger, ledger_path
from research_env.records import Node, tree_digest
from research_env.rl.recipe_change import Change, recipe_changes, replay
from research_env.task import read_task

ARM = "research"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransferConfig:
    """A campaign, and the ladder that its best change is put on.

    Attributes:
      campaign: folder of a finished campaign, with its ledger.
      node: a node of the ledger, promoted or not; "" is the promoted one with the largest posterior gain.
      codebase: the campaign's built-in task.
      scaling: `train` is the base recipe; its fields that the diff changes hold the diff's old values.
    """

    campaign: str = local()
    node: str = ""
    codebase: str = "pretrain_tiny"
    scaling: ScalingConfig

    def __post_init__(self) -> None:
        if self.scaling.ladder.arms:
            raise ConfigError("scaling.ladder.arms must be (): the campaign's change is the arm")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """A change that a campaign found, and its gain there: `gain` and its interval in the task's metric, better is positive."""

    node: Node
    changes: tuple[Change, ...]
    gain: float | None
    interval: tuple[float, float] | None
    num_seeds: int


def found_change(config: TransferConfig) -> Found:
    """The campaign's change, read from its ledger.

    Raises:
      ConfigError: no campaign, nothing promoted, no such node, or a change that no ladder can replay.
    """
    folder = Path(config.campaign)
    codebase = folder / "codebases" / config.codebase
    if not ledger_path(folder).is_file() or not codebase.is_dir():
        raise ConfigError(
            f"campaign must be the folder of a campaign on {config.codebase}, got {config.campaign!r}; run "
            "`python -m research_env.main --config configs/research_env/pretrain_tiny.py` first"
        )
    ledger = Ledger(ledger_path(folder))
    try:
        verdicts = {key: json.loads(detail) for key, detail in ledger.events("verdict")}
        name = config.node or _best_promoted(verdicts)
        try:
            node = ledger.node(name)
        except KeyError:
            raise ConfigError(f"node must be in the ledger of {config.campaign}, got {name!r}") from None
    finally:
        ledger.close()
    # The codebase as the campaign saw it, which today's sources need not be.
    task = read_task(codebase)
    try:
        tree, _ = read_change(node.diff, task.baseline, task.policy)
    except (DiffRefused, DiffFailed) as error:
        raise ConfigError(f"node {name} must hold a diff that applies: {error}") from error
    if tree_digest(tree) != node.tree_digest:
        raise ConfigError(
            f"{codebase} must be what the campaign ran, and has changed since: node {name} differs"
        )
    verdict = verdicts.get(name)
    return Found(
        node=node,
        changes=tuple(recipe_changes(task.baseline, tree)),
        gain=None if verdict is None else verdict["mean"],
        interval=None if verdict is None else (verdict["lower"], verdict["upper"]),
        num_seeds=0 if verdict is None else verdict["num_seeds"],
    )


def _best_promoted(verdicts: Mapping[str, Mapping[str, Any]]) -> str:
    promoted = {name: v for name, v in verdicts.items() if v["decision"] == "promote"}
    if not promoted:
        raise ConfigError(
            f"the campaign must have promoted a change, got {len(verdicts)} confirmed and none promoted; name one by "
            "node= to replay it all the same"
        )
    return max(promoted, key=lambda name: promoted[name]["posterior"])


def with_arm(scaling: ScalingConfig, changes: Sequence[Change]) -> ScalingConfig:
    """The ladder with the change as its arm, on all of the ladder's budgets that arms are trained on."""
    arm = Arm(name=ARM, train=replay(list(changes), scaling.train))
    return dataclasses.replace(scaling, ladder=dataclasses.replace(scaling.ladder, arms=(arm,)))


def paired(cells: Sequence[Cell], planned: Sequence[Planned]) -> list[Cell]:
    """The cells, those of the arm with N and D of the base run of the same budget, shape and seed.

    A change of the hidden width or of tied weights changes N, and so D at equal FLOPs. What is compared is the loss at
    equal compute, and pairs are known by their base.
    """

    def key(cell: Cell) -> tuple[Any, ...]:
        model = plans[cell.name].train.model
        return (cell.budget_flops, model.width, model.num_layers, cell.seed)

    plans = {plan.name: plan for plan in planned}
    base = {key(cell): cell for cell in cells if cell.role == LADDER}
    found = []
    for cell in cells:
        if cell.role != ARM:
            found.append(cell)
        elif (own := base.get(key(cell))) is not None:
            found.append(dataclasses.replace(cell, params=own.params, tokens=own.tokens))
    return found


def at_equal_compute(multiplier: Multiplier, cells: Sequence[Cell]) -> Multiplier:
    """The multiplier for a unit of compute: runs have whole steps, so a pair's FLOPs differ a little where N does."""
    base = {(c.params, c.tokens, c.seed): c.flops for c in cells if c.role == LADDER}
    ratio = {c.name: base[c.params, c.tokens, c.seed] / c.flops for c in cells if c.role == ARM}
    pairs = tuple((name, value * ratio[name]) for name, value in multiplier.cells)
    factor = math.exp(sum(math.log(ratio[name]) for name, _ in pairs) / len(pairs))
    low, high = multiplier.interval.low * factor, multiplier.interval.high * factor
    return dataclasses.replace(
        multiplier, value=multiplier.value * factor, interval=Interval(low, high), cells=pairs
    )


def verdict(multiplier: Multiplier) -> str:
    """What the interval says."""
    if multiplier.better is None:
        return "not shown: the interval holds 1"
    return "transferred" if multiplier.better else "reversed"


def by_budget(multiplier: Multiplier, cells: Sequence[Cell]) -> list[dict[str, float]]:
    """For each budget: geometric mean of the multipliers of its pairs, and the mean difference of the loss (nats)."""
    budgets = {cell.name: cell.budget_flops for cell in cells}
    base = {(c.params, c.tokens, c.seed): c for c in cells if c.role == LADDER}
    arm = [cell for cell in cells if cell.role == ARM]
    rows = []
    for budget in sorted({cell.budget_flops for cell in arm}):
        values = [value for name, value in multiplier.cells if budgets[name] == budget]
        gaps = [c.loss - base[c.params, c.tokens, c.seed].loss for c in arm if c.budget_flops == budget]
        rows.append(
            {
                "budget_flops": budget,
                "pairs": len(values),
                "multiplier": math.exp(sum(map(math.log, values)) / len(values)),
                "loss_difference": sum(gaps) / len(gaps),
            }
        )
    return rows


def transfer(config: TransferConfig, name: str, command: str, say: Callable[[str], None]) -> dict[str, Any]:
    """Replay, train, compare; writes transfer.json and transfer.md beside the ladder's own page. Returns the former.

    Cells that are finished are read, so the same command after any death goes on where it was.

    Raises:
      ConfigError: see `found_change` and `replay`, or too few pairs.
      JobsFailed: cells failed for good.
    """
    found = found_change(config)
    scaling = with_arm(config.scaling, found.changes)
    say(f"replaying node {found.node.id}: {found.node.idea}")
    tables = Tables(scaling)
    planned = plan_cells(scaling, tables.vocab_size)
    for cell in planned:
        tables.of(cell.train)
    run_cells(scaling, name, planned, say)
    cells, missing = finished_cells(scaling, name, tables)
    cells = paired(cells, planned)
    analysis = analyze(cells, scaling.fit, num_missing=len(missing))
    multiplier = at_equal_compute(analysis.multipliers[0], cells)
    largest = max((plan for plan in planned if plan.role == ARM), key=lambda plan: plan.params)
    report = {
        "node": found.node.id,
        "idea": found.node.idea,
        "replayed": [str(change) for change in found.changes if change.place],
        "not_replayed": [str(change) for change in found.changes if not change.place],
        "campaign_gain": found.gain,
        "campaign_interval": found.interval,
        "campaign_seeds": found.num_seeds,
        "multiplier": multiplier.value,
        "interval": [multiplier.interval.low, multiplier.interval.high],
        "confidence": scaling.fit.confidence,
        "pairs": len(multiplier.cells),
        "budgets": by_budget(multiplier, cells),
        "largest_params": largest.params,
        "verdict": verdict(multiplier),
        "doubts": list(analysis.doubts),
    }
    analysis = dataclasses.replace(analysis, multipliers=(multiplier,))
    page = write_report(analysis, scaling, name, command)
    write_json_atomic(page.with_name("transfer.json"), report)
    write_atomic(page.with_name("transfer.md"), text_of(report) + "\n")
    say(text_of(report))
    say(f"page: {page}")
    return report


def text_of(report: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    low, high = report["interval"]
    gain = "was not confirmed"
    if report["campaign_gain"] is not None:
        ends = report["campaign_interval"]
        gain = f"was {report['campaign_gain']:+.4f} [{ends[0]:+.4f}, {ends[1]:+.4f}] on {report['campaign_seeds']} paired seeds"
    left = (
        f" Not replayed, because the ladder sets it: {', '.join(report['not_replayed'])}."
        if report["not_replayed"]
        else ""
    )
    lines = [
        f"Node {report['node']}: {report['idea']}",
        f"Replayed: {', '.join(report['replayed'])}.{left}",
        f"In the campaign its gain {gain}. On models of up to {report['largest_params']:,} parameters it is worth "
        f"{report['multiplier']:.3f} [{low:.3f}, {high:.3f}] times the compute "
        f"({report['confidence']:.0%} interval, {report['pairs']} pairs): {report['verdict']}.",
        "",
        "| budget, FLOPs | pairs | multiplier | loss difference, nats |",
        "|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row['budget_flops']:.3g} | {row['pairs']} | {row['multiplier']:.3f} | {row['loss_difference']:+.4f} |"
        for row in report["budgets"]
    ]
    lines += [f"\nDoubt: {doubt}." for doubt in report["doubts"]]
    return "\n".join(lines)
