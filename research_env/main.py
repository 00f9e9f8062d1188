"""`python -m research_env.main --config FILE key=value ...`: search a codebase for improvements, or learn to have ideas."""

import functools
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from pretrain.config import ConfigError, apply_overrides, load_config, parse_argv
from pretrain.rundir import write_json_atomic
from research_env.choose import Noise, gain, mean_interval
from research_env.dashboards.live import LiveTable
from research_env.dashboards.page import write_page
from research_env.env import AIResearchEnv
from research_env.records import Resource, Status
from research_env.rl.experiment import IdeatorRlConfig, run_experiment, table, verdicts
from research_env.schedule import CannotGoOn, Devices, OutOfBudget
from research_env.search.campaign import ArmResult, confirm_best, measure_noise, run_arm
from research_env.search.compare import CompareConfig, comparison_table, run_comparison
from research_env.search.recipe import ResearchConfig, build_arm, build_maker, build_rungs
from synth.llm.api import OutOfBudget as QuotaUsedUp
from synth.llm.api import Overloaded


def main(argv: Sequence[str]) -> int:
    """Run what a config describes; the return value is the process' exit code.

    0 done; 2 bad input; 1 stopped, and running it again goes on: the baseline fails, the budget ends before there is anything
    to compare with, the host or a model fails.
    """
    console = Console(highlight=False)
    try:
        path, overrides = parse_argv(argv)
        config = apply_overrides(load_config(path), overrides)
        if isinstance(config, IdeatorRlConfig):
            return learn_ideas(config, console)
        if isinstance(config, CompareConfig):
            return compare(config, console)
        if not isinstance(config, ResearchConfig):
            raise ConfigError(
                f"{path} must return a ResearchConfig, a CompareConfig or an IdeatorRlConfig for research_env.main, got "
                f"{type(config).__name__}"
            )
        return run(config, console)
    except ConfigError as error:
        for fault in error.faults:
            print(f"error: {fault}", file=sys.stderr)
        return 2
    except (OutOfBudget, Overloaded, QuotaUsedUp, CannotGoOn) as error:
        console.print(f"stopped, and what ran is kept: {error}", markup=False, soft_wrap=True)
        return 1


def run(config: ResearchConfig, console: Console) -> int:
    """Measure the noise, run every arm, confirm the best, write summary.json and index.html into the workdir."""
    with AIResearchEnv(
        codebase=config.codebase,
        resource=config.resource,
        workdir=config.workdir,
        sandbox=config.sandbox,
        budget=config.budget,
        seed=config.seed,
        devices=Devices.of_this_host([Resource.parse(text) for text in config.accelerators]),
        jobs=config.jobs,
    ) as env:
        console.print(
            f"{env.task.name}: isolation {env.label}, {env.resource}, folder {env.workdir}",
            markup=False,
        )
        seed = env.ledger.pin("seed", config.seed)
        if seed != config.seed:  # two campaigns would share a page, a history and a final split
            raise ConfigError(
                f"{env.workdir} holds the campaign with seed={seed}, got seed={config.seed}; use another workdir"
            )
        noise, mean = measure_noise(env, config.noise_repeats)
        console.print(
            f"baseline {env.task.metric} {mean:.4f}, sigma0 {noise.sigma:.4f} from {noise.num_repeats} seeds"
        )
        arms = []
        view = LiveTable(console, metric=env.task.metric, baseline=mean, num_candidates=config.num_candidates)
        with view:
            for name in config.arms:
                arms.append(_run_arm(env, name, config, noise, mean, view))
        fields = write_summary(env, arms, noise, mean)
        if env.task.has_final and fields["winner"] is not None:
            fields["final"] = score_final(env, fields["winner"]["node"])
            write_json_atomic(Path(env.workdir) / "summary.json", fields)
        page = write_page(env.ledger, env.task, env.workdir / "index.html", fields)
        best = fields["winner"]
        if best is None:
            console.print("no candidate was promoted: nothing beat the baseline on fresh paired seeds")
        else:
            console.print(
                f"promoted {best['node']} ({best['arm']}): gain {best['mean']:.4f} [{best['lower']:.4f}, {best['upper']:.4f}] "
                f"on {best['num_seeds']} fresh paired seeds: {best['idea']}",
                markup=False,
            )
            if "final" in fields:
                console.print(f"final split: {final_line(fields['final'])}", markup=False, soft_wrap=True)
        console.print(f"page: {page}", markup=False, soft_wrap=True)
    return 0


def score_final(env: AIResearchEnv, node: str) -> dict:
    """The winner on data that no search has seen, beside the baseline on the same fresh seeds; once a campaign."""
    try:
        pairs = env.final_score(env.ledger.node(node))
    except (OutOfBudget, ConfigError) as error:  # also when a campaign that went on has another winner now
        return {"stopped": str(error)}
    gains = [
        gain(mine.metric, base.metric, env.task.higher_is_better)
        for base, mine in pairs
        if mine.metric is not None and base.metric is not None
    ]
    if len(gains) < len(pairs):
        return {"stopped": ", ".join(result.status.value for pair in pairs for result in pair)}
    mean, lower, upper = mean_interval(gains)
    return {"mean": mean, "lower": lower, "upper": upper, "num_seeds": len(gains)}


def final_line(final: Mapping[str, Any]) -> str:
    """One line for a person."""
    if "stopped" in final:
        return f"not scored: {final['stopped']}"
    return f"gain {final['mean']:.4f} [{final['lower']:.4f}, {final['upper']:.4f}] on {final['num_seeds']} fresh paired seeds"


def learn_ideas(config: IdeatorRlConfig, console: Console) -> int:
    """Run every variant of learning; print the table and what it says."""

    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    summary = run_experiment(config, say)
    for text in (table(summary), "", *verdicts(summary), f"folder: {config.workdir}"):
        say(text)
    return 0


def compare(config: CompareConfig, console: Console) -> int:
    """Run the campaigns of a comparison; print its table."""

    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    summary = run_comparison(config, say)
    say(comparison_table(summary))
    say(f"folder: {config.workdir}")
    return 0


def _run_arm(
    env: AIResearchEnv, name: str, config: ResearchConfig, noise: Noise, mean: float, view: LiveTable
) -> ArmResult:
    search, maker = build_arm(name, config, noise), build_maker(env, name, config, mean)
    result = run_arm(
        env, search, maker, num_candidates=config.num_candidates, batch=config.batch, noise=noise, baseline_mean=mean,
        on_told=functools.partial(view.told, name), rungs=build_rungs(env, name, config),
    )  # fmt: skip
    return confirm_best(env, result, noise=noise, baseline_mean=mean, max_confirmed=config.max_confirmed)


def write_summary(env: AIResearchEnv, arms: Sequence[ArmResult], noise: Noise, mean: float) -> dict:
    """The campaign in numbers, also as summary.json."""
    rows, winner = [], None
    survivors = {(json.loads(detail)["arm"], node) for node, detail in env.ledger.events("survivor")}
    for arm in arms:
        best = arm.winner
        spared = [t.gain for t in arm.told if t.gain is not None and (arm.arm, t.node.id) in survivors]
        climbed = [t.gain for t in arm.told if t.gain is not None and (arm.arm, t.node.id) not in survivors]
        rows.append(
            {
                "arm": arm.arm,
                "told": len(arm.told),
                "executed": arm.num_executed,
                "ok": sum(item.gain is not None for item in arm.told),
                "early_killed": sum(item.result.status is Status.EARLY_KILLED for item in arm.told),
                "survivors": len(spared),  # ran on although halving would have ended them
                "false_kills": sum(found > max(climbed, default=-math.inf) for found in spared),
                "duplicates": arm.num_duplicates,
                "best_gain": None if arm.best is None else arm.best.gain,
                "corrected_gain": arm.corrected_best(noise),
                "confirmed": len(arm.confirmed),
                "promoted": sum(item.verdict.decision == "promote" for item in arm.confirmed),
                "device_s": sum(item.result.device_s for item in arm.told),
                "mean_ok_gain": mean_interval(gains)[0]
                if (gains := [t.gain for t in arm.told if t.gain is not None])
                else None,
                "stopped": arm.stopped,
            }
        )
        if best is not None and (winner is None or best.posterior > winner["posterior"]):
            v, node = best.verdict, best.candidate.node
            winner = {
                "node": node.id, "arm": arm.arm, "idea": node.idea, "diff": node.diff, "mean": v.mean, "lower": v.lower,
                "upper": v.upper, "num_seeds": v.num_seeds, "posterior": best.posterior,
            }  # fmt: skip
    fields = {
        "task": env.task.name,
        "folder": env.task.folder,
        "metric": env.task.metric,
        "baseline": mean,
        "sigma0": noise.sigma,
        "noise_repeats": noise.num_repeats,
        "isolation": env.label,
        "arms": rows,
        "winner": winner,
        "spent": env.ledger.spent(),
    }
    write_json_atomic(Path(env.workdir) / "summary.json", fields)
    return fields


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
