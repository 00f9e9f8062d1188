"""Does a reward teach? One base a seed, and from each base the same run with different teachers.

    base -> reward       the policy as configured
         -> random       the same run, its reward drawn without looking at the text: must teach nothing
         -> supervised   the base trained on, with the answers before its eyes

Every model is judged by the accuracy of its greedy answers to the same held-out problems. What has been done is
remembered by the run folders alone: the same command after any death goes on where it was.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pretrain import plots
from pretrain.allocator import keep_heap
from pretrain.config import ConfigError, from_json, to_json
from pretrain.jobs.api import Job, JobsConfig, values
from pretrain.jobs.pool import PoolConfig
from pretrain.metrics import read_metrics
from pretrain.objective import Evaluation
from pretrain.optim import check_schedule
from pretrain.pretrained import load_init
from pretrain.rl.grpo import RlConfig
from pretrain.rl.reward import RandomReward
from pretrain.rundir import write_atomic, write_json_atomic
from pretrain.sharding import make_mesh
from pretrain.train import EXIT_PREEMPTED, TrainConfig, train

ARMS = ("reward", "random", "supervised")
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """What is compared: `base` makes the policies, `policy` teaches them, `supervised` teaches by answers.

    Seeds, `init` and work folders of the three are set by the study. `policy.run.eval_every_steps` draws the curves.
    """

    base: TrainConfig
    policy: RlConfig
    supervised: TrainConfig
    seeds: tuple[int, ...] = (1, 2, 3)
    random_chance: float = 0.5  # that a sample of the control is rewarded
    workdir: str = "runs/rl"
    jobs: JobsConfig = PoolConfig()

    def __post_init__(self):
        faults = []
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            faults.append(f"seeds must be different and at least one, got {self.seeds}")
        if self.base.model != self.policy.model or self.base.model != self.supervised.model:
            faults.append("base, policy and supervised must have the same model: they hand it on")
        if self.policy.run.eval_every_steps is None:
            faults.append("policy.run.eval_every_steps must be set: the curve is made of these evaluations")
        for role in ("base", "policy", "supervised"):  # before the first base is trained, not after the last
            config = getattr(self, role)
            try:
                check_schedule(config.optim, config.run.num_steps)
            except ConfigError as error:
                faults += [f"{role}: {fault}" for fault in error.faults]
        if faults:
            raise ConfigError(*faults)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """What one model ended with."""

    seed: int
    name: str  # of ARMS, or "base"
    accuracy: float
    num_problems: int
    params: int
    seconds: float  # of training, as the run itself counted them
    curve: tuple[tuple[int, float], ...] = ()  # (step, accuracy)


def accuracy_of(folder: str, judge: RlConfig) -> Evaluation:
    """Greedy answers of the model in a run folder, graded as those of `judge` are."""
    judge = dataclasses.replace(judge, init=folder)
    objective = judge.objective()
    mesh = make_mesh(judge.mesh)
    batches = objective.open(mesh)
    try:
        return objective.evaluate(load_init(folder, judge.model, objective.tokenizer, mesh))
    finally:
        batches.close()


def run_arm(config: TrainConfig, name: str, judge: RlConfig) -> dict[str, Any]:
    """The job: train one model and judge it; returns its folder and an `Arm` as JSON values.

    Raises:
      ConfigError: bad input, or the run was asked to stop and has saved.
    """
    keep_heap()
    result = train(config, name=name)
    if result.exit_code == EXIT_PREEMPTED:
        raise ConfigError(
            f"{result.folder} was asked to stop at step {result.steps}; the same command goes on"
        )
    judged = result.folder / "accuracy.json"
    if not judged.exists():
        found = accuracy_of(str(result.folder), judge).values
        write_json_atomic(judged, {key: found[key] for key in ("accuracy", "heldout_problems", "answers")})
    found = json.loads(judged.read_text())
    curve = [
        (line["step"], line["accuracy"])
        for line in read_metrics(result.folder / "metrics.jsonl")
        if line["kind"] == "eval" and "accuracy" in line
    ]
    arm = Arm(
        seed=config.run.seed,
        name=name,
        accuracy=found["accuracy"],
        num_problems=found["heldout_problems"],
        params=result.summary["params"],
        seconds=result.summary["seconds"],
        curve=tuple(curve),
    )
    return {"folder": str(result.folder), "arm": to_json(arm)}


def configs_of(study: StudyConfig, seed: int, base: str) -> dict[str, TrainConfig]:
    """The runs that start from the base of a seed."""

    def placed(config: TrainConfig) -> TrainConfig:
        run = dataclasses.replace(config.run, seed=seed, workdir=study.workdir)
        return dataclasses.replace(config, init=base, run=run)

    data = study.policy.data
    blind = dataclasses.replace(
        data, reward=RandomReward(chance=study.random_chance), judge=data.judge or data.reward
    )
    return {
        "reward": placed(study.policy),
        "random": placed(dataclasses.replace(study.policy, data=blind)),
        "supervised": placed(study.supervised),
    }


def run_study(study: StudyConfig, name: str, say: Say = print) -> list[Arm]:
    """All models of a study, bases first; finished ones are read.

    Raises:
      ConfigError, JobsFailed: see jobs/api.py.
    """
    runner = study.jobs.build(Path(study.workdir) / name / "jobs")
    bases = [
        dataclasses.replace(
            study.base, run=dataclasses.replace(study.base.run, seed=seed, workdir=study.workdir)
        )
        for seed in study.seeds
    ]
    say(f"training {len(bases)} bases")
    found = values(
        runner,
        [
            Job(name=f"base-seed{c.run.seed}", function=run_arm, arguments=(c, "base", study.policy))
            for c in bases
        ],
    )
    arms = [from_json(row["arm"]) for row in found]
    for arm in arms:
        say(f"base of seed {arm.seed}: {arm.accuracy:.1%} of {arm.num_problems} held-out problems right")
    say(f"training {len(ARMS) * len(bases)} models from them")
    jobs = [
        Job(name=f"{arm}-seed{seed}", function=run_arm, arguments=(config, arm, study.policy))
        for seed, row in zip(study.seeds, found, strict=True)
        for arm, config in configs_of(study, seed, row["folder"]).items()
    ]
    return arms + [from_json(row["arm"]) for row in values(runner, jobs)]


# --- the report --------------------------------------------------------------------------------------


def wilson(accuracy: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share of `count` (Wilson 1927): it is sane at 0 and 1 too."""
    z = 1.959964
    center = (accuracy + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(accuracy * (1 - accuracy) / count + z * z / (4 * count**2))
    return max(0.0, center - half), min(1.0, center + half)


def table(arms: Sequence[Arm]) -> str:
    """Accuracy by seed and teacher, as Markdown; intervals are over problems."""
    names = ("base", *ARMS)
    of = {(arm.seed, arm.name): arm for arm in arms}
    lines = ["| seed | " + " | ".join(names) + " |", "|---" * (1 + len(names)) + "|"]
    for seed in dict.fromkeys(arm.seed for arm in arms):
        cells = []
        for name in names:
            arm = of[seed, name]
            low, high = wilson(arm.accuracy, arm.num_problems)
            cells.append(f"{arm.accuracy:.1%} [{low:.1%}..{high:.1%}], {arm.seconds:.0f} s")
        lines.append(f"| {seed} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def picture(arms: Sequence[Arm], title: str) -> bytes:
    """Accuracy over steps, a line a seed."""
    of_base = {arm.seed: arm.accuracy for arm in arms if arm.name == "base"}
    panels = []
    for name in ("reward", "random"):
        curves = [
            plots.Curve(
                label=f"seed {arm.seed}",
                x=[0, *(step for step, _ in arm.curve)],
                y=[100 * of_base[arm.seed], *(100 * accuracy for _, accuracy in arm.curve)],
                color=color,
            )
            for arm, color in zip((a for a in arms if a.name == name), plots.COLORS, strict=False)
        ]
        panels.append(
            plots.Panel(
                title=f"{name} reward" if name == "random" else "the reward",
                x_label="steps",
                y_label="held-out answers right, %",
                curves=curves,
                y_range=(0.0, 103.0),
            )
        )
    (params,) = {arm.params for arm in arms}
    return plots.draw(panels, title=title, subtitle=f"{params:,} parameters, greedy answers")


def write_report(arms: Sequence[Arm], folder: Path, title: str) -> Mapping[str, Path]:
    """study.json, study.md and study.png."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {kind: folder / f"study.{kind}" for kind in ("json", "md", "png")}
    write_json_atomic(paths["json"], [dataclasses.asdict(arm) for arm in arms])
    write_atomic(paths["md"], table(arms) + "\n")
    write_atomic(paths["png"], picture(arms, title))
    return paths
