"""Batches of samples that the policy itself wrote: prompts -> generator -> rewards -> advantages.

The problems of a step and the seed of every sample are functions of (seed, step), so on-policy a resumed run needs
nothing but its parameters. With several updates for each rollout the samples of the last rollout are pending: they
are part of the run's state.

B samples of a step, P samples of a prompt, T targets of a row.
"""

import base64
import collections
import dataclasses
import functools
import io
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from pretrain.config import ConfigError, stable_seed
from pretrain.generate import GenerateConfig, Generator, Request
from pretrain.model.transformer import ModelConfig
from pretrain.rl.advantage import ESTIMATORS, Estimator, advantages
from pretrain.rl.grader import Grade
from pretrain.rl.policy_loss import PolicyLossConfig, SampleBatch, logprobs_BT
from pretrain.rl.problem import Problem, ProblemsConfig
from pretrain.rl.reward import Reward
from pretrain.sharding import ACTIVATION_RULES, OnMesh, partition_spec
from pretrain.tokenizer import Tokenizer, TokenizerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How a policy is sampled and what becomes of the rewards, whoever gives them.

    A step trains on prompts_per_step x samples_per_prompt samples; one rollout serves `updates_per_rollout` steps,
    so samples are at most that many steps minus one behind the policy, and the loss corrects by their ratio.
    """

    tokenizer: TokenizerConfig
    prompts_per_step: int
    samples_per_prompt: int
    max_prompt_tokens: int
    max_new_tokens: int
    stop: tuple[str, ...] = ()  # texts that end a sample, beside the end token
    updates_per_rollout: int = 1
    estimator: Estimator = "grpo"
    slots: int = 64

    def __post_init__(self):
        faults = []
        for name in (
            "prompts_per_step",
            "max_prompt_tokens",
            "max_new_tokens",
            "updates_per_rollout",
            "slots",
        ):
            if getattr(self, name) < 1:
                faults.append(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.samples_per_prompt < 2:
            faults.append(
                f"samples_per_prompt must be at least 2, its group is the baseline; got {self.samples_per_prompt}"
            )
        if self.estimator not in ESTIMATORS:
            faults.append(f"estimator must be one of {', '.join(ESTIMATORS)}, got {self.estimator!r}")
        if faults:
            raise ConfigError(*faults)

    @property
    def samples_per_step(self) -> int:
        """B."""
        return self.prompts_per_step * self.samples_per_prompt

    @property
    def row_length(self) -> int:
        """T."""
        return self.max_prompt_tokens + self.max_new_tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutConfig(SamplingConfig):
    """Problems with checkable answers, and how those are graded. `judge` grades held-out answers where that is not to
    be the reward.
    """

    problems: ProblemsConfig
    reward: Reward
    reward_timeout_s: float = 5.0
    judge: Reward | None = None

    def __post_init__(self):
        super().__post_init__()
        if not self.reward_timeout_s > 0:
            raise ConfigError(f"reward_timeout_s must be positive, got {self.reward_timeout_s}")


class Valuer(Protocol):
    """Who says what samples are worth, never by this process' own judgment: a grader, or code that is executed."""

    def value(self, step: int, items: Sequence[tuple[Problem, str]]) -> list[Grade]:
        """A grade for each sample of the rollout of `step`, those of a group side by side; None drops a sample."""
        ...

    def report(self) -> dict[str, Any]:
        """JSON: what is worth a line about the samples valued last."""
        ...

    def close(self) -> None: ...


def encode_prompt(tokenizer: Tokenizer, problem: Problem, max_tokens: int) -> tuple[int, ...]:
    """The ids of a prompt, bos first.

    Raises:
      ConfigError: longer than `max_tokens`.
    """
    ids = (tokenizer.bos_id, *tokenizer.encode(problem.prompt))
    if len(ids) > max_tokens:
        raise ConfigError(
            f"a prompt must have at most data.max_prompt_tokens={max_tokens} tokens, {problem.id} has {len(ids)}"
        )
    return ids


class RolloutBatches:
    """The batch source of reinforcement learning."""

    def __init__(
        self,
        config: SamplingConfig,
        problems: Sequence[Problem],
        valuer: Valuer,
        model: ModelConfig,
        loss: PolicyLossConfig,
        tokenizer: Tokenizer,
        *,
        seed: int,
        mesh: Mesh,
        reference: Any = None,
    ):
        """`reference` are the parameters that KL is measured from; needed when it has a weight in the loss.

        Raises:
          ConfigError: a prompt is too long, or samples would be older than the policy under a loss without their ratio.
        """
        if loss.surrogate == "plain" and config.updates_per_rollout > 1:
            raise ConfigError(
                "loss.surrogate=plain has no ratio to correct older samples by: data.updates_per_rollout must be 1, got "
                f"{config.updates_per_rollout}; or take clipped"
            )
        self._config, self._loss, self._tokenizer, self._seed, self._mesh = (
            config,
            loss,
            tokenizer,
            seed,
            mesh,
        )
        self._model, self._reference = model, reference
        self._problems, self._valuer = problems, valuer
        self._prompts = [encode_prompt(tokenizer, p, config.max_prompt_tokens) for p in self._problems]
        self._generator: Generator | None = None
        self._logprobs = OnMesh(
            jax.jit(functools.partial(_logprobs, model=model, chunk_tokens=loss.chunk_tokens)), mesh
        )
        self._rollout: dict[str, np.ndarray] | None = None  # of the steps from _first_step on
        self._first_step = -1
        self._report: dict[str, Any] = {}

    def generator(self, params: Any) -> Generator:
        """The sampler, reading these parameters."""
        if self._generator is None:
            sizes = GenerateConfig(max_length=self._config.row_length, slots=self._config.slots)
            self._generator = Generator(
                params, self._model, sizes, tokenizer=self._tokenizer, mesh=self._mesh
            )
        else:
            self._generator.load(params)
        return self._generator

    def next(self, step: int, params: Any) -> SampleBatch:
        first = step - step % self._config.updates_per_rollout
        if self._rollout is None or first != self._first_step:
            if step != first:
                raise AssertionError(f"step {step} trains on the rollout of step {first}, which is not here")
            self._rollout, self._report = self._sample(step, params)
            self._first_step = first
        B = self._config.samples_per_step
        part = slice((step - first) * B, (step - first + 1) * B)
        return self._to_devices({name: values[part] for name, values in self._rollout.items()})

    def batch_sizes(self) -> set[int]:
        return {self._config.samples_per_step}

    def row_ids(self, step: int) -> list[str]:
        """The problems of a step."""
        return [self._problems[i].id for i in self._problem_indices(step, self._config.prompts_per_step)]

    def report(self) -> dict[str, Any]:
        """What the last rollout earned."""
        return self._report

    def state(self) -> dict[str, Any]:
        """The pending rollout, bit for bit."""
        if self._rollout is None or self._config.updates_per_rollout == 1:
            return {}
        packed = io.BytesIO()
        np.savez_compressed(packed, allow_pickle=False, **self._rollout)
        return {
            "first_step": self._first_step,
            "report": self._report,
            "rollout": base64.b64encode(packed.getvalue()).decode(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up a pending rollout."""
        if state:
            with np.load(io.BytesIO(base64.b64decode(state["rollout"]))) as packed:
                self._rollout = dict(packed)
            self._first_step, self._report = state["first_step"], dict(state["report"])

    def close(self) -> None:
        """End the valuer's processes."""
        self._valuer.close()

    # --- one rollout -----------------------------------------------------------------------------------

    def _problem_indices(self, step: int, count: int) -> list[int]:
        """Problems in an order that is a permutation in every epoch."""
        places = range(step * self._config.prompts_per_step, step * self._config.prompts_per_step + count)
        size = len(self._problems)
        return [int(_permutation(size, self._seed, place // size)[place % size]) for place in places]

    def _sample(self, step: int, params: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        c = self._config
        P = c.samples_per_prompt
        indices = self._problem_indices(step, c.prompts_per_step * c.updates_per_rollout)
        requests = [
            Request(
                ids=self._prompts[i],
                max_new_tokens=c.max_new_tokens,
                stop=c.stop,
                stop_ids=(self._tokenizer.eos_id,),
                seed=stable_seed("sample", self._seed, step, place, p),
            )
            for place, i in enumerate(indices)
            for p in range(P)
        ]
        completions = self.generator(params).generate(requests)
        problems = [self._problems[i] for i in indices for _ in range(P)]
        # A text that did not end is graded as it stands: reaching the limit is the policy's doing.
        grades = self._valuer.value(step, [(p, c.text) for p, c in zip(problems, completions, strict=True)])
        rewards = np.array([np.nan if g.reward is None else g.reward for g in grades])
        rows = _rows(requests, completions, c.row_length, self._tokenizer.pad_id)
        advantage_B = advantages(rewards.reshape(-1, P), c.estimator).reshape(-1)
        kept_B = np.isfinite(rewards)
        length_B = rows["weights_BT"].sum(axis=1)
        rows["chosen_BT"] = rows["weights_BT"] > 0  # by the policy, those of dropped samples too
        weight_B, share_B = _normalized(self._loss.normalize, length_B, kept_B, c.max_new_tokens)
        rows["weights_BT"] *= weight_B[:, None].astype(np.float32)
        rows["share_B"] = share_B.astype(np.float32)
        rows["advantage_B"] = advantage_B.astype(np.float32)
        rows["behavior_BT"] = self._in_parts(params, rows)
        assert self._reference is not None or not self._loss.kl_weight, (
            "a KL term needs what it measures from"
        )
        report = self._describe(rewards, grades, completions)
        drawn = np.concatenate([c.logprobs for c in completions])
        # Ratios are measured from the trainer's own numbers; how far the sampler's are off, in nats per token.
        report["sampler_gap"] = float(np.abs(rows["behavior_BT"][rows["chosen_BT"]] - drawn).mean())
        if self._reference is None:
            rows["reference_BT"] = np.zeros_like(rows["behavior_BT"])
        else:
            rows["reference_BT"] = self._in_parts(self._reference, rows)
            moved_BT = np.where(rows["chosen_BT"], rows["behavior_BT"] - rows["reference_BT"], 0.0)
            # KL(policy || start) of whole texts in nats, from the samples themselves.
            report["kl_to_start"] = float(moved_BT.sum(axis=1).mean())
        del rows["chosen_BT"]
        return rows, report

    def _in_parts(self, params: Any, rows: dict[str, np.ndarray]) -> np.ndarray:
        """Log-probabilities of all rows, a step's worth at a time."""
        B, parts = self._config.samples_per_step, []
        names = ("tokens_BT1", "positions_BT1", "segment_ids_BT1")
        for start in range(0, len(rows["tokens_BT1"]), B):
            arrays = [_place(self._mesh, rows[name][start : start + B]) for name in names]
            parts.append(np.asarray(jax.device_get(self._logprobs(params, *arrays))))
        return np.concatenate(parts)

    def _describe(
        self,
        rewards: np.ndarray,
        grades: Sequence[Any],
        completions: Sequence[Any],
    ) -> dict[str, Any]:
        kept = rewards[np.isfinite(rewards)]
        groups = rewards.reshape(-1, self._config.samples_per_prompt)
        settled = sum(len(set(group[np.isfinite(group)].tolist())) <= 1 for group in groups)
        return {
            "reward_mean": float(kept.mean()) if len(kept) else 0.0,
            "reward_max": float(kept.max()) if len(kept) else 0.0,
            "settled_groups_share": settled / len(groups),  # groups that teach nothing
            "ended_share": sum(c.finish == "stop" for c in completions) / len(completions),
            "new_tokens_mean": sum(len(c.ids) for c in completions) / len(completions),
            "dropped": dict(collections.Counter(g.reason for g in grades if g.reward is None)),
            **self._valuer.report(),
        }

    def _to_devices(self, rows: Mapping[str, np.ndarray]) -> SampleBatch:
        return SampleBatch(
            **{f.name: _place(self._mesh, rows[f.name]) for f in dataclasses.fields(SampleBatch)}
        )


def _logprobs(
    params: Any, tokens: Any, positions: Any, segments: Any, *, model: ModelConfig, chunk_tokens: int
) -> Any:
    return logprobs_BT(params, model, tokens, positions, segments, chunk_tokens)


@functools.lru_cache(maxsize=4)
def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng(stable_seed("problems", seed, epoch)).permutation(size)


def _rows(
    requests: Sequence[Request], completions: Sequence[Any], row_length: int, pad_id: int
) -> dict[str, np.ndarray]:
    """Samples as rows of `row_length` + 1 tokens; weight 1 on targets that the policy chose."""
    B, T1 = len(requests), row_length + 1
    tokens_BT1 = np.full((B, T1), pad_id, np.int32)
    segment_ids_BT1 = np.zeros((B, T1), np.int32)
    weights_BT = np.zeros((B, row_length), np.float32)
    for b, (request, completion) in enumerate(zip(requests, completions, strict=True)):
        ids = (*request.ids, *completion.ids)
        tokens_BT1[b, : len(ids)] = ids
        segment_ids_BT1[b, : len(ids)] = 1
        weights_BT[b, len(request.ids) - 1 : len(ids) - 1] = 1.0
    positions_BT1 = np.broadcast_to(np.arange(T1, dtype=np.int32), (B, T1)).copy()
    return {
        "tokens_BT1": tokens_BT1,
        "segment_ids_BT1": segment_ids_BT1,
        "positions_BT1": positions_BT1,
        "weights_BT": weights_BT,
    }


def _normalized(
    normalize: str, length_B: np.ndarray, kept_B: np.ndarray, max_new_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """(weight of a token, share of the divisor) of each sample; see PolicyLossConfig. Dropped samples have none."""
    kept_B = kept_B.astype(np.float64)
    match normalize:
        case "sequence":
            return kept_B / np.maximum(length_B, 1), kept_B
        case "token":
            return kept_B, kept_B * length_B
        case "constant":
            return kept_B, kept_B * max_new_tokens
    raise AssertionError(normalize)


def _place(mesh: Mesh, values: np.ndarray) -> jax.Array:
    """Rows over the data axes."""
    dims: tuple[str | None, ...] = ("batch", *(None,) * (values.ndim - 1))
    return jax.device_put(
        values, NamedSharding(mesh, partition_spec(dims, values.shape, ACTIVATION_RULES, mesh))
    )
