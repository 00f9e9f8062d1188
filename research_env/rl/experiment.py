"""Variants of learning side by side on the same bandits: a table with intervals, a picture, and who cures the disease.

The first variant is the reference (the paper's). Differences to it are paired by seed: a seed decides the ideas, how often
they run and every draw, and variants share it. Intervals are 95 % percentile bootstraps over seeds. "Start" is the
first epoch, sampled before anything is learned; "end" is the mean over the last `WINDOW` epochs.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.config import ConfigError, local, to_json
from pretrain.evals.interval import Estimate, mean_interval, paired_difference, ratio_interval
from pretrain.plots import COLORS, INK, QUIET, Curve, Level, Panel, draw, smooth
from pretrain.rundir import RunDir, write_atomic, write_json_atomic
from research_env.rl.bandit import CodebaseBanditConfig, PlantedBanditConfig
from research_env.rl.learn import Variant, learn

WINDOW = 5  # epochs at the end
MAX_NAMED_CURVES = 5
MIN_SEEDS = 5  # fewer give no interval worth a verdict: of one seed it is a point
CURE_RATIO = 5.0  # of the effective number of ideas, to call a variant a cure
# What the table shows: (key of an epoch's numbers, heading, digits). Absent where the truth is not known.
COLUMNS = (
    ("mean", "mean", 3),
    ("maximum", "maximum", 4),
    ("true_maximum", "maximum without noise", 4),
    ("success_rate", "ran well", 2),
    ("effective_ideas", "effective ideas", 1),
    ("top_two_share", "share of top two", 2),
    ("best_idea_chance", "chance of the best idea", 3),
    ("idea_words", "words", 1),
    ("kl", "KL", 2),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class IdeatorRlConfig:
    """Which ideas, which variants of learning, on how many seeds."""

    bandit: PlantedBanditConfig | CodebaseBanditConfig
    workdir: str = local()
    variants: tuple[Variant, ...]  # the first is the reference
    seeds: tuple[int, ...] = tuple(range(10))
    num_epochs: int = 70
    samples_per_epoch: int = 128
    shares_seed: bool = (
        False  # one seed for all runs of an epoch: equal ideas are one run, which a real codebase wants
    )

    def __post_init__(self) -> None:
        faults = []
        for name in ("variants", "seeds"):
            keys = [getattr(item, "name", item) for item in getattr(self, name)]
            if not keys or len(set(keys)) < len(keys):
                faults.append(f"{name} must be at least one and all different, got {keys}")
        if self.num_epochs < 2 * WINDOW:
            faults.append(
                f"num_epochs must be at least {2 * WINDOW} to compare the end with the start, got {self.num_epochs}"
            )
        if self.samples_per_epoch < 2:
            faults.append(f"samples_per_epoch must be at least 2 to be a group, got {self.samples_per_epoch}")
        if faults:
            raise ConfigError(*faults)


# Numbers of each epoch: curves[variant][key] is [seeds, epochs].
Curves = Mapping[str, Mapping[str, np.ndarray]]


def run_experiment(config: IdeatorRlConfig, say: Callable[[str], None]) -> dict[str, Any]:
    """Learn with every variant on every seed; writes config.json, metrics.jsonl, summary.json, table.md and learning.png.

    Running it again gives the same files; what a ledger knows is not run again.

    Raises:
      ConfigError: the bandit cannot be made, or the folder not written.
      OutOfBudget: a codebase's budget is used up; the ledger keeps what ran.
    """
    folder = Path(config.workdir)
    RunDir(folder).create()
    write_json_atomic(folder / "config.json", to_json(config))
    lines: list[dict[str, Any]] = []
    baselines = []
    for seed in config.seeds:
        with config.bandit.open(seed, folder) as bandit:
            baselines.append(bandit.baseline_value)
            for variant in config.variants:
                learned = learn(
                    bandit, variant, seed=seed, num_epochs=config.num_epochs,
                    samples_per_epoch=config.samples_per_epoch, shares_seed=config.shares_seed,
                )  # fmt: skip
                lines += [
                    {"step": epoch + 1, "kind": "epoch", "variant": variant.name, "seed": seed, **numbers}
                    for epoch, numbers in enumerate(learned.epochs)
                ]
        say(f"seed {seed}: {len(config.variants)} variants, {config.num_epochs} epochs each")
    write_atomic(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    curves = collect(lines, config)
    summary = {"baseline_value": float(np.mean(baselines)), **summarize(curves, config)}
    write_json_atomic(folder / "summary.json", summary)
    write_atomic(folder / "table.md", table(summary) + "\n\n" + "\n".join(verdicts(summary)) + "\n")
    write_atomic(folder / "learning.png", picture(curves, summary))
    return summary


def collect(lines: Sequence[Mapping[str, Any]], config: IdeatorRlConfig) -> dict[str, dict[str, np.ndarray]]:
    """The epochs' numbers by variant and name, float64 [seeds, epochs]; a number that some epoch lacks is left out."""
    row = {seed: i for i, seed in enumerate(config.seeds)}
    shape = (len(config.seeds), config.num_epochs)
    curves: dict[str, dict[str, np.ndarray]] = {variant.name: {} for variant in config.variants}
    for line in lines:
        for key, value in line.items():
            if key not in ("step", "kind", "variant", "seed"):
                found = curves[line["variant"]].setdefault(key, np.full(shape, np.nan))
                found[row[line["seed"]], line["step"] - 1] = value
    names = set.intersection(
        *({key for key, values in own.items() if np.isfinite(values).all()} for own in curves.values())
    )
    return {name: {key: own[key] for key in own if key in names} for name, own in curves.items()}


def summarize(curves: Curves, config: IdeatorRlConfig) -> dict[str, Any]:
    """Starts and ends with intervals, paired differences to the reference, and the two verdicts."""
    reference = config.variants[0].name
    rows = []
    for variant in config.variants:
        own = curves[variant.name]
        row: dict[str, Any] = {
            "name": variant.name,
            "variant": to_json(variant),
            "start": {},
            "end": {},
            "change": {},
        }
        for key, _, _ in COLUMNS:
            if key in own:
                start, end = own[key][:, 0].tolist(), _end(own[key])
                row["start"][key], row["end"][key] = _said(mean_interval(start)), _said(mean_interval(end))
                row["change"][key] = _said(paired_difference(start, end))
        row["best_so_far"] = _said(mean_interval(_best(own)))
        row["versus_reference"] = {
            key: _said(paired_difference(_end(curves[reference][key]), _end(own[key])))
            for key in ("mean", "maximum", "true_maximum")
            if key in own
        }
        row["versus_reference"]["effective_ideas_ratio"] = _said(
            ratio_interval(
                _end(own["effective_ideas"]),
                _end(curves[reference]["effective_ideas"]),
            )
        )
        row["cures"] = len(config.seeds) >= MIN_SEEDS and is_cure(row["versus_reference"])
        rows.append(row)
    return {
        "seeds": list(config.seeds),
        "num_epochs": config.num_epochs,
        "samples_per_epoch": config.samples_per_epoch,
        "reference": reference,
        "variants": rows,
        "disease": disease(rows[0]) if len(config.seeds) >= MIN_SEEDS else None,
        "cures": [row["name"] for row in rows if row["cures"]],
    }


def is_cure(versus: Mapping[str, Mapping[str, float]]) -> bool:
    """A higher maximum, with noise and (where known) without, and 5 times the ideas: by the lower ends of all intervals."""
    higher = [versus[key]["low"] > 0 for key in ("maximum", "true_maximum") if key in versus]
    return all(higher) and versus["effective_ideas_ratio"]["low"] >= CURE_RATIO


def disease(row: Mapping[str, Any]) -> dict[str, bool]:
    """The three signs in the reference: each is judged by the end of the interval that speaks against it."""
    signs = {
        "mean_rises": row["change"]["mean"]["low"] > 0,
        "maximum_does_not_rise": row["change"]["maximum"]["low"] <= 0,
        "top_two_share_over_0.9": row["end"]["top_two_share"]["low"] > 0.9,
    }
    return {**signs, "holds": all(signs.values())}


def table(summary: Mapping[str, Any]) -> str:
    """Markdown: a variant a row, start -> end [interval of the end], and the best of all epochs."""
    columns = [column for column in COLUMNS if column[0] in summary["variants"][0]["end"]]
    lines = [
        "| variant | " + " | ".join(heading for _, heading, _ in columns) + " | best so far |",
        "|---|" + "---:|" * (len(columns) + 1),
    ]
    for row in summary["variants"]:
        cells = [
            f"{row['start'][key]['value']:.{digits}f} -> {row['end'][key]['value']:.{digits}f} "
            f"[{row['end'][key]['low']:.{digits}f}, {row['end'][key]['high']:.{digits}f}]"
            for key, _, digits in columns
        ]
        best = row["best_so_far"]
        cells.append(f"{best['value']:.4f} [{best['low']:.4f}, {best['high']:.4f}]")
        lines.append(f"| {row['name']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def verdicts(summary: Mapping[str, Any]) -> list[str]:
    """What the table says, in sentences."""
    if summary["disease"] is None:
        return [f"No verdict: it takes {MIN_SEEDS} seeds, there are {len(summary['seeds'])}."]
    reference, signs = summary["variants"][0], summary["disease"]
    absent = [name for name, found in signs.items() if not found and name != "holds"]
    found = "reproduced" if signs["holds"] else f"not reproduced (missing: {', '.join(absent)})"
    lines = [
        f"The disease is {found} by {reference['name']}: mean {_signed(reference['change']['mean'], 3)}, maximum "
        f"{_signed(reference['change']['maximum'], 4)}, share of the top two "
        f"{reference['end']['top_two_share']['value']:.2f}."
    ]
    for row in summary["variants"][1:]:
        versus = row["versus_reference"]
        ratio = versus["effective_ideas_ratio"]
        lines.append(
            f"{row['name']}: {'cures' if row['cures'] else 'does not cure'}; maximum {_signed(versus['maximum'], 4)}, "
            f"effective ideas {ratio['value']:.1f} [{ratio['low']:.1f}, {ratio['high']:.1f}] times those of "
            f"{reference['name']}."
        )
    return lines


def picture(curves: Curves, summary: Mapping[str, Any]) -> bytes:
    """Four panels over epochs, means over seeds: mean, maximum, effective ideas, share of the top two.

    Named are the reference, in black, and the variants that end with the largest maxima; the others are faint.
    """
    rows = summary["variants"]
    best = sorted(rows[1:], key=lambda row: -row["end"]["maximum"]["value"])[: MAX_NAMED_CURVES - 1]
    colors = {row["name"]: COLORS[i] for i, row in enumerate(best)} | {rows[0]["name"]: INK}
    panels = []
    for key, title, factor, is_log in (
        ("mean", "Mean value", 100.0, False),
        ("maximum", "Best of the epoch", 100.0, False),
        ("effective_ideas", "Effective number of ideas", 1.0, True),
        ("top_two_share", "Share of the top two ideas", 1.0, False),
    ):
        drawn = []
        for row in rows:
            y = smooth(factor * curves[row["name"]][key].mean(axis=0), span=2)
            x = np.arange(1, len(y) + 1)
            named = row["name"] in colors
            drawn.append(
                Curve(
                    label=row["name"] if named else "",
                    x=x,
                    y=y,
                    color=colors.get(row["name"], QUIET),
                    width=1.6,
                    faint=not named,
                )
            )
        levels = [Level(label="baseline", y=100 * summary["baseline_value"])] if key == "maximum" else []
        unit = "100 x value" if factor > 1 else ("ideas" if is_log else "share")
        panels.append(
            Panel(title=title, x_label="epoch", y_label=unit, curves=drawn, levels=levels, y_log=is_log)
        )
    subtitle = f"{summary['samples_per_epoch']} ideas an epoch, means over {len(summary['seeds'])} seeds; gray: the other variants"
    return draw(panels, title="Learning to have ideas", subtitle=subtitle)


def _end(curve: np.ndarray) -> list[float]:
    """The mean of the last epochs for each seed."""
    return curve[:, -WINDOW:].mean(axis=1).tolist()


def _best(own: Mapping[str, np.ndarray]) -> list[float]:
    """The best of all epochs of each seed, without noise where that is known."""
    return own.get("true_maximum", own["maximum"]).max(axis=1).tolist()


def _said(estimate: Estimate) -> dict[str, float]:
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high}


def _signed(estimate: Mapping[str, float], digits: int) -> str:
    return f"{estimate['value']:+.{digits}f} [{estimate['low']:+.{digits}f}, {estimate['high']:+.{digits}f}]"
