"""Search against control at equal cost: several campaigns, each arm with the same device-seconds, picks judged on fresh seeds.

What an arm found is not its best screened number, which is lucky, but the gain of that candidate on seeds that no arm has
seen, paired with the baseline on the same ones. An arm that found nothing above the baseline keeps the baseline: gain 0.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pretrain.config import ConfigError, local
from pretrain.rundir import write_atomic, write_json_atomic
from research_env.choose import Noise, mean_interval
from research_env.env import AIResearchEnv, Candidate
from research_env.records import Resource, Result
from research_env.schedule import CannotGoOn, Devices
from research_env.search.campaign import measure_noise, paired_gains, run_arm
from research_env.search.proposal import Told
from research_env.search.recipe import ResearchConfig, build_arm, build_maker, build_rungs

NO_LIMIT = 1_000_000  # candidates: the device-seconds end an arm


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Campaigns that differ in their seed alone; the first arm is the control. `campaign.num_candidates` is not used."""

    campaign: ResearchConfig
    workdir: str = local()
    num_campaigns: int = 3
    max_device_s: float  # what the candidates of one arm may use in one campaign
    num_fresh_seeds: int = 5

    def __post_init__(self) -> None:
        faults = []
        if len(self.campaign.arms) < 2:
            faults.append(f"campaign.arms must name a control and a search, got {self.campaign.arms}")
        if self.num_campaigns < 2:
            faults.append(f"num_campaigns must be at least 2 for an interval, got {self.num_campaigns}")
        if not self.max_device_s > 0:
            faults.append(f"max_device_s must be positive, got {self.max_device_s}")
        if self.num_fresh_seeds < 1:
            faults.append(f"num_fresh_seeds must be at least 1, got {self.num_fresh_seeds}")
        if faults:
            raise ConfigError(*faults)


def device_seconds(result: Result, resource: Resource) -> float:
    """What a run is charged. A core is shared with whoever else wants it, so there the processor seconds that the run got
    count, or a busy host would favor the arm that ran at the quieter time; an accelerator is leased whole.
    """
    return result.cpu_s if resource.kind == "CPU" else result.device_s


def within(told: Sequence[Told], resource: Resource, max_device_s: float) -> list[Told]:
    """The candidates, in order, that an arm could pay for."""
    kept, spent_s = [], 0.0
    for item in told:
        spent_s += device_seconds(item.result, resource)
        if spent_s > max_device_s:
            break
        kept.append(item)
    return kept


def run_comparison(config: CompareConfig, say: Callable[[str], None]) -> dict[str, Any]:
    """Run or resume all campaigns; writes comparison.json and comparison.md into the workdir.

    Raises:
      CannotGoOn: the baseline fails.
    """
    rows = []
    for number in range(config.num_campaigns):
        rows += _run_campaign(config, number, say)
    summary = summarize(rows, config)
    write_json_atomic(Path(config.workdir) / "comparison.json", summary)
    write_atomic(Path(config.workdir) / "comparison.md", comparison_table(summary) + "\n")
    return summary


def _run_campaign(config: CompareConfig, number: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    campaign = dataclasses.replace(config.campaign, seed=config.campaign.seed + number)
    with AIResearchEnv(
        codebase=campaign.codebase,
        resource=campaign.resource,
        workdir=Path(config.workdir) / f"campaign-{number}",
        sandbox=campaign.sandbox,
        budget=campaign.budget,
        seed=campaign.seed,
        devices=Devices.of_this_host([Resource.parse(text) for text in campaign.accelerators]),
        jobs=campaign.jobs,
    ) as env:
        noise, mean = measure_noise(env, campaign.noise_repeats)
        say(f"campaign {number}: {env.task.metric} of the baseline {mean:.4f}, sigma0 {noise.sigma:.4f}")
        rows = []
        for name in campaign.arms:
            row = {
                "campaign": number,
                "seed": campaign.seed,
                "arm": name,
                "baseline": mean,
                "sigma0": noise.sigma,
            }
            row |= _run_arm(env, name, campaign, noise, mean, config)
            say(
                f"campaign {number}, {name}: {row['candidates']} candidates in {row['device_s']:.0f} device-s, "
                f"screened {row['screened_gain']:+.4f}, on fresh seeds {row['gain']:+.4f}"
            )
            rows.append(row)
        return rows


def _run_arm(
    env: AIResearchEnv,
    name: str,
    campaign: ResearchConfig,
    noise: Noise,
    mean: float,
    config: CompareConfig,
) -> dict[str, Any]:
    def is_spent(told: Sequence[Told]) -> bool:
        return len(within(told, env.resource, config.max_device_s)) < len(told)

    arm = run_arm(
        env,
        build_arm(name, campaign, noise),
        build_maker(env, name, campaign, mean),
        num_candidates=NO_LIMIT,
        batch=campaign.batch,
        noise=noise,
        baseline_mean=mean,
        is_enough=is_spent,
        rungs=build_rungs(env, name, campaign),
    )
    if arm.stopped:
        raise CannotGoOn(f"{name} ended before its device-seconds: {arm.stopped}")
    told = within(arm.told, env.resource, config.max_device_s)
    better = [item for item in told if item.gain is not None and item.gain > 0]
    best = max(better, key=lambda item: item.gain or 0.0, default=None)
    row: dict[str, Any] = {
        "candidates": len(told),
        "ok": sum(item.gain is not None for item in told),
        "duplicates": arm.num_duplicates,
        "device_s": sum(device_seconds(item.result, env.resource) for item in told),
    }
    if best is None:
        return row | {"screened_gain": 0.0, "gains": [], "gain": 0.0, "idea": "", "diff": ""}
    candidate = Candidate(best.node, env.tree_of(best.node), None)
    gains = paired_gains(env, candidate, env.add("", key="baseline"), range(config.num_fresh_seeds))
    return row | {
        "screened_gain": best.gain,
        "gains": gains,
        "gain": sum(gains) / len(gains),
        "idea": best.node.idea,
        "diff": best.node.diff,
    }


def summarize(rows: Sequence[Mapping[str, Any]], config: CompareConfig) -> dict[str, Any]:
    """Means over campaigns with 95 % t-intervals; differences to the control are paired by campaign."""
    control = config.campaign.arms[0]
    by_arm = {name: [row["gain"] for row in rows if row["arm"] == name] for name in config.campaign.arms}
    arms = []
    for name, gains in by_arm.items():
        differences = [mine - base for mine, base in zip(gains, by_arm[control], strict=True)]
        arms.append(
            {
                "arm": name,
                "campaigns": len(gains),
                "candidates": sum(row["candidates"] for row in rows if row["arm"] == name) / len(gains),
                "device_s": sum(row["device_s"] for row in rows if row["arm"] == name) / len(gains),
                "screened_gain": sum(row["screened_gain"] for row in rows if row["arm"] == name) / len(gains),
                "gain": mean_interval(gains),
                "over_control": None if name == control else mean_interval(differences),
            }
        )
    return {
        "codebase": config.campaign.codebase,
        "max_device_s": config.max_device_s,
        "num_fresh_seeds": config.num_fresh_seeds,
        "control": control,
        "rows": [dict(row) for row in rows],
        "arms": arms,
    }


def comparison_table(summary: Mapping[str, Any]) -> str:
    """Markdown: one line an arm."""

    def interval(found: Sequence[float]) -> str:
        return f"{found[0]:+.4f} [{found[1]:+.4f}, {found[2]:+.4f}]"

    lines = [
        f"| arm | candidates | device-s | screened gain | gain on fresh seeds | over {summary['control']} |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {arm['arm']} | {arm['candidates']:.1f} | {arm['device_s']:.0f} | {arm['screened_gain']:+.4f} | "
        f"{interval(arm['gain'])} | {'' if arm['over_control'] is None else interval(arm['over_control'])} |"
        for arm in summary["arms"]
    ]
    return "\n".join(lines)
