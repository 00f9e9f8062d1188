"""A language model as ideator, taught by executed experiments: an objective of pretrain's one training loop.

The prompt is the task's context, a sample is an idea in words, its reward is what the executed diff was worth (the third
part of the thesis, arXiv 2601.14525, section 5: GRPO, one prompt for each environment, a large group). A step is an epoch.
`python -m pretrain.main` runs it like any other run; what executed candidates are remembered by the campaign's ledger.
"""

import dataclasses
import hashlib
import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from pretrain.config import ConfigError, local, to_json
from pretrain.data.source import MemoryConfig, TextDocument
from pretrain.generate import Request
from pretrain.objective import Evaluation
from pretrain.pretrained import load_init
from pretrain.rl.grpo import RlConfig, no_texts
from pretrain.rl.policy_loss import TERMS, policy_loss
from pretrain.rl.problem import Problem
from pretrain.rl.rollout import RolloutBatches, SamplingConfig, encode_prompt
from research_env.env import AIResearchEnv
from research_env.ideator.context import code_text, task_text
from research_env.ideator.mutate import MutationIdeas
from research_env.records import Resource
from research_env.rl.carry_out import ExecutorConfig
from research_env.rl.credit import ADVANTAGES, REWARDS, Advantage, Reward, rewards_of
from research_env.rl.execution import ExecutedIdeas, best_epoch
from research_env.sandbox.ladder import SandboxConfig
from research_env.schedule import Budget, OutOfBudget
from research_env.task import Task, open_task

MAX_CODE_CHARACTERS = 60_000


def idea_prompt(task: Task, template: str) -> str:
    """What the policy reads: `template` with {task} (description, metric, limits) and {code} (the editable files).

    Other braces of the template stand as they are.
    """
    code = code_text(task.baseline, task.policy, (), MAX_CODE_CHARACTERS)
    fields = {"task": task_text(task, None), "code": code}
    return re.sub(r"\{(task|code)\}", lambda found: fields[found[1]], template)


def idea_documents(codebase: str, template: str, ideas: MutationIdeas, count: int, seed: int) -> MemoryConfig:
    """Texts for a base that knows how ideas are said and not which are good: the prompt, then a random mutation's words.

    Raises:
      ConfigError: no such codebase.
    """
    with tempfile.TemporaryDirectory() as folder:
        task = open_task(codebase, folder)
    ideator, prompt = ideas.build(seed), idea_prompt(task, template)
    texts = [
        ideator.propose(f"read/{number}", task.baseline, task.policy, task.baseline, []).text
        for number in range(count)
    ]
    documents = tuple(TextDocument(id=str(i), text=f"{prompt}{text}\n") for i, text in enumerate(texts))
    return MemoryConfig(name="ideas", documents=documents)


@dataclasses.dataclass(frozen=True, kw_only=True)
class IdeaConfig(SamplingConfig):
    """One codebase, how its ideas are asked for, carried out and rewarded.

    A group is `samples_per_prompt` ideas for the one prompt. Bonuses: see `credit.shaped_P`, in units of the reward.
    """

    codebase: str
    executor: ExecutorConfig
    workdir: str = local()  # of the campaign: ledger, sealed artifacts
    template: str
    prompts_per_step: int = 1
    reward: Reward = "paper"
    advantage: Advantage = "grpo"
    count_weight: float = 0.0
    novelty_weight: float = 0.0
    resource: str = "1xCPU"
    sandbox: SandboxConfig = SandboxConfig()
    budget: Budget = local(Budget())

    def __post_init__(self) -> None:
        super().__post_init__()
        Resource.parse(self.resource)
        faults = []
        if self.prompts_per_step != 1:
            faults.append(
                f"prompts_per_step must be 1, there is one prompt; got {self.prompts_per_step}, raise samples_per_prompt"
            )
        if "{task}" not in self.template and "{code}" not in self.template:
            faults.append(f"template must hold {{task}} or {{code}}, got {self.template!r}")
        for name, allowed in (("reward", tuple(REWARDS)), ("advantage", ADVANTAGES)):
            if getattr(self, name) not in allowed:
                faults.append(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name in ("count_weight", "novelty_weight"):
            if not getattr(self, name) >= 0:
                faults.append(f"{name} must be at least 0, got {getattr(self, name)}")
        if faults:
            raise ConfigError(*faults)


@dataclasses.dataclass(frozen=True, kw_only=True)
class IdeatorConfig(RlConfig):
    """A run in which a policy learns to have ideas; `init` names the model it starts from, which KL is measured to."""

    data: IdeaConfig  # type: ignore[assignment]

    def objective(self) -> "IdeatorObjective":  # type: ignore[override]
        return IdeatorObjective(self)


class IdeatorObjective:
    """The value of executed ideas; the verdict is the best so far, beside the baseline and the greedy idea."""

    def __init__(self, config: IdeatorConfig):
        """Raises:
        ConfigError: no such codebase, or several processes, of which one alone may hold the campaign.
        """
        if jax.process_count() > 1:
            raise ConfigError(f"an ideator learns in one process, got {jax.process_count()}; use one host")
        data = config.data
        self._config = config
        self.tokenizer = data.tokenizer.build("", no_texts)
        self.labels: Sequence[str] = TERMS
        self.tokens_per_row = data.row_length
        self.new_data_steps: Sequence[int] = ()
        self.loss = policy_loss(config.model, config.loss)
        task = open_task(data.codebase, data.workdir)
        self._prompt = Problem(id=task.name, prompt=idea_prompt(task, data.template), answer="")
        identity = [
            to_json(data, identity_only=True),
            self.tokenizer.sha256,
            self._prompt.prompt,
            task.digest,
            config.run.seed,
        ]
        self.fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        self._env: AIResearchEnv | None = None
        self._ideas: ExecutedIdeas | None = None
        self._batches: RolloutBatches | None = None
        self._baseline_value = 0.0

    def tokens_before(self, step: int) -> int:
        return step * self._config.data.samples_per_step * self.tokens_per_row

    def open(self, mesh: Mesh) -> RolloutBatches:
        """Open the campaign; its baseline is run first.

        Raises:
          ConfigError: the unchanged codebase does not run, or the budget is too small even for it.
        """
        c, data = self._config, self._config.data
        env = AIResearchEnv(
            codebase=data.codebase,
            resource=data.resource,
            workdir=data.workdir,
            sandbox=data.sandbox,
            budget=data.budget,
            seed=c.run.seed,
        )
        try:
            self._baseline_value = _baseline_value(env)
            reference = load_init(c.init, c.model, self.tokenizer, mesh)
            ideas = ExecutedIdeas(
                env,
                data.executor.build(env),
                samples_per_group=data.samples_per_prompt,
                seed=c.run.seed,
                reward=data.reward,
                advantage=data.advantage,
                count_weight=data.count_weight,
                novelty_weight=data.novelty_weight,
            )
            self._batches = RolloutBatches(
                data,
                [self._prompt],
                ideas,
                c.model,
                c.loss,
                self.tokenizer,
                seed=c.run.seed,
                mesh=mesh,
                reference=reference,
            )
        except BaseException:
            env.close()
            raise
        self._env, self._ideas = env, ideas
        return self._batches

    def evaluate(self, params: Any) -> Evaluation:
        """The greedy idea, run on the campaign's screening seed, and the best of all epochs so far."""
        assert self._batches is not None, "an objective is opened before it is evaluated"
        assert self._env is not None
        assert self._ideas is not None
        data = self._config.data
        request = Request(
            ids=encode_prompt(self.tokenizer, self._prompt, data.max_prompt_tokens),
            max_new_tokens=data.max_new_tokens,
            temperature=0.0,
            stop=data.stop,
            stop_ids=(self.tokenizer.eos_id,),
        )
        (completion,) = self._batches.generator(params).generate([request])
        (result,) = self._env.evaluate([self._ideas.candidate(completion.text.strip(), 0)])
        best = best_epoch(self._env)
        return Evaluation(
            headline=f"best value so far {best['value']:.4f}, the baseline's {self._baseline_value:.4f}: {best['idea']}",
            values={
                "best_value": best["value"],
                "best_idea": best["idea"],
                "baseline_value": self._baseline_value,
                "greedy_idea": completion.text.strip(),
                "greedy_status": result.status.value,
                "greedy_value": float(rewards_of([result], "paper")[0]) if result.status.is_sample else 0.0,
            },
        )

    def summary(self, evaluation: Evaluation, folder: Path) -> dict[str, Any]:
        """The last verdict; the epochs stand in metrics.jsonl, their `ideas`."""
        names = ("best_value", "best_idea", "baseline_value", "greedy_idea", "greedy_status", "greedy_value")
        return {**{name: evaluation.values[name] for name in names}, "closing": [evaluation.headline]}


def _baseline_value(env: AIResearchEnv) -> float:
    try:
        result = env.value("")
    except OutOfBudget as error:
        raise ConfigError(f"the budget must allow the baseline's run: {error}") from error
    if result.metric is None:
        raise ConfigError(
            f"the codebase must run before it is changed, got {result.status.value}: {result.reason} "
            f"{result.log_tail[-500:]}"
        )
    return float(rewards_of([result], "paper")[0])
