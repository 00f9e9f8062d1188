"""GRPO (arXiv 2402.03300) and its relatives as an objective of the one training loop."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from pretrain.config import ConfigError, to_json
from pretrain.generate import Request
from pretrain.health import HealthConfig
from pretrain.objective import Evaluation
from pretrain.pretrained import load_init
from pretrain.rl.grader import Graders
from pretrain.rl.policy_loss import TERMS, PolicyLossConfig, policy_loss
from pretrain.rl.problem import Problem
from pretrain.rl.rollout import RolloutBatches, RolloutConfig, encode_prompt
from pretrain.train import TrainConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class RlConfig(TrainConfig):
    """A run that learns from rewards: `init` names the policy it starts from, `data` the problems.

    The loss of a policy is near zero and jumps by nature, so the guard looks for numbers that are not finite and
    leaves spikes alone.
    """

    # Another objective reads another kind of data and loss; the loop passes both through.
    data: RolloutConfig  # type: ignore[assignment]
    loss: PolicyLossConfig = PolicyLossConfig()  # type: ignore[assignment]
    health: HealthConfig = HealthConfig(num_sigmas=1e9)

    def __post_init__(self):
        if not self.init:
            raise ConfigError(
                "init must name the policy that learning starts from, got nothing; pretrain one first"
            )

    def objective(self) -> "GrpoObjective":  # type: ignore[override]
        return GrpoObjective(self)


class GrpoObjective:
    """Expected reward on train problems, judged by the accuracy of greedy answers to held-out ones."""

    def __init__(self, config: RlConfig):
        self._config = config
        self.tokenizer = config.data.tokenizer.build("", no_texts)
        self.labels: Sequence[str] = TERMS
        self.tokens_per_row = config.data.row_length
        self.new_data_steps: Sequence[int] = ()
        self.loss = policy_loss(config.model, config.loss)
        self._heldout = config.data.problems.heldout()
        self._train = config.data.problems.train()
        overlap = {p.prompt for p in self._train} & {p.prompt for p in self._heldout}
        if overlap:
            raise ConfigError(
                f"held-out problems must not be trained on, got {len(overlap)}, such as {min(overlap)!r}"
            )
        identity = [to_json(config.data), self.tokenizer.sha256, *_texts(self._train), *_texts(self._heldout)]
        self.fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        self._graders: Graders | None = None
        self._batches: RolloutBatches | None = None

    def tokens_before(self, step: int) -> int:
        return step * self._config.data.samples_per_step * self.tokens_per_row

    def open(self, mesh: Mesh) -> RolloutBatches:
        c = self._config
        reference = load_init(c.init, c.model, self.tokenizer, mesh) if c.loss.kl_weight > 0 else None
        self._graders = Graders(c.data.reward, c.data.judge, timeout_s=c.data.reward_timeout_s)
        self._batches = RolloutBatches(
            c.data,
            self._train,
            self._graders,
            c.model,
            c.loss,
            self.tokenizer,
            seed=c.run.seed,
            mesh=mesh,
            reference=reference,
        )
        return self._batches

    def evaluate(self, params: Any) -> Evaluation:
        """Greedy answers to all held-out problems, graded by `data.judge`."""
        assert self._batches is not None, "an objective is opened before it is evaluated"
        assert self._graders is not None
        data = self._config.data
        requests = [
            Request(
                ids=encode_prompt(self.tokenizer, problem, data.max_prompt_tokens),
                max_new_tokens=data.max_new_tokens,
                temperature=0.0,
                stop=data.stop,
                stop_ids=(self.tokenizer.eos_id,),
            )
            for problem in self._heldout
        ]
        completions = self._batches.generator(params).generate(requests)
        grades = self._graders.judge(list(zip(self._heldout, (c.text for c in completions), strict=True)))
        rewards = [g.reward for g in grades if g.reward is not None]
        accuracy = sum(r == 1.0 for r in rewards) / len(grades)  # a dropped answer is a wrong one
        examples = [f"{p.prompt}{c.text}" for p, c in zip(self._heldout[:8], completions, strict=False)]
        return Evaluation(
            headline=f"{accuracy:.1%} of {len(grades)} held-out problems right",
            values={
                "accuracy": accuracy,
                "heldout_problems": len(grades),
                "dropped": len(grades) - len(rewards),
                "answers": {str(i): text for i, text in enumerate(examples)},
            },
        )

    def summary(self, evaluation: Evaluation, folder: Path) -> dict[str, Any]:
        """The accuracy at the end; the curve stands in metrics.jsonl."""
        values = {name: evaluation.values[name] for name in ("accuracy", "heldout_problems", "dropped")}
        return {**{f"val_{name}": value for name, value in values.items()}, "closing": [evaluation.headline]}


def _texts(problems: Sequence[Problem]) -> list[list[str]]:
    return [[p.id, p.prompt, p.answer] for p in problems]


def no_texts(max_bytes: int) -> Any:
    raise ConfigError(
        "data.tokenizer must exist before reinforcement learning, got one that is trained on a corpus"
    )
