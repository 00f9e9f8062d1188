"""The loss of a batch of samples: a surrogate of the expected reward, and how far the policy may move.

B samples, T target tokens, T1 = T + 1 tokens, D width.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pretrain.config import ConfigError
from pretrain.loss import LossSums, token_logprobs
from pretrain.model.transformer import ModelConfig, Params, forward, head_DV
from pretrain.sharding import place
from pretrain.step import LossFunction

# What the loop logs apart, in the order of `LossSums.nll_by_source`.
TERMS = ("surrogate", "kl", "clipped_share", "entropy")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyLossConfig:
    """Which surrogate, and over what its sum is divided.

    surrogate: "clipped" is that of PPO (arXiv 1707.06347, equation 7), with the lower and the upper end of the ratio
    apart (arXiv 2503.14476); "plain" is advantage times log-probability, without a ratio.
    normalize: "sequence" is the mean over samples of the mean over their tokens (GRPO), "token" the mean over all
    tokens (arXiv 2503.14476), "constant" divides by samples times the most new tokens (Dr. GRPO, arXiv 2503.20783).
    kl_weight: of the estimator exp(d) - d - 1, d = log reference - log policy, per token; 0 needs no reference.
    """

    surrogate: Literal["clipped", "plain"] = "clipped"
    clip_low: float = 0.2
    clip_high: float = 0.2
    normalize: Literal["sequence", "token", "constant"] = "token"
    kl_weight: float = 0.0
    chunk_tokens: int = 1024

    def __post_init__(self):
        faults = []
        for name, allowed in (
            ("surrogate", ("clipped", "plain")),
            ("normalize", ("sequence", "token", "constant")),
        ):
            if getattr(self, name) not in allowed:
                faults.append(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if not 0 < self.clip_low < 1:
            faults.append(f"clip_low must lie in (0, 1), got {self.clip_low}")
        if not self.clip_high > 0:
            faults.append(f"clip_high must be positive, got {self.clip_high}")
        if not self.kl_weight >= 0:
            faults.append(f"kl_weight must be at least 0, got {self.kl_weight}")
        if self.chunk_tokens < 1:
            faults.append(f"chunk_tokens must be positive, got {self.chunk_tokens}")
        if faults:
            raise ConfigError(*faults)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "tokens_BT1", "segment_ids_BT1", "positions_BT1", "weights_BT", "share_B", "advantage_B",
        "behavior_BT", "reference_BT",
    ],
    meta_fields=[],
)  # fmt: skip
@dataclasses.dataclass(frozen=True)
class SampleBatch:
    """Samples, one a row: prompt, new tokens, padding."""

    tokens_BT1: Int[Array, "B T1"]
    segment_ids_BT1: Int[Array, "B T1"]  # 1, and 0 on padding
    positions_BT1: Int[Array, "B T1"]
    weights_BT: Float[Array, "B T"]  # of target t + 1: above 0 on new tokens of samples that were not dropped
    share_B: Float[Array, " B"]  # of each sample in the divisor of the loss
    advantage_B: Float[Array, " B"]
    behavior_BT: Float[Array, "B T"]  # log-probabilities under the policy that wrote the samples
    reference_BT: Float[Array, "B T"]  # under the policy that the run started from, zeros when unused


def logprobs_BT(
    params: Params,
    model: ModelConfig,
    tokens_BT1: Int[Array, "B T1"],
    positions_BT1: Int[Array, "B T1"],
    segment_ids_BT1: Int[Array, "B T1"],
    chunk_tokens: int,
) -> Float[Array, "B T"]:
    """Log-probability of every target, by the forward pass that the loss differentiates."""
    hidden_BTD = forward(params, model, tokens_BT1[:, :-1], positions_BT1[:, :-1], segment_ids_BT1[:, :-1])
    return token_logprobs(
        hidden_BTD,
        head_DV(params, model),
        tokens_BT1[:, 1:],
        chunk_tokens=chunk_tokens,
        softcap=model.final_softcap,
    )


def policy_loss(model: ModelConfig, config: PolicyLossConfig) -> LossFunction:
    """Sums of a batch of samples, to be divided by `weight` like those of any batch."""

    def loss_sums(params: Params, batch: SampleBatch) -> LossSums:
        logprob_BT = logprobs_BT(
            params, model, batch.tokens_BT1, batch.positions_BT1, batch.segment_ids_BT1, config.chunk_tokens
        )
        weights_BT = place(batch.weights_BT, ("batch", "time"))
        behavior_BT = place(batch.behavior_BT, ("batch", "time"))
        advantage_B1 = place(batch.advantage_B, ("batch",))[:, None]
        used_BT = weights_BT > 0
        # Padding may hold any log-probability; its ratio must not overflow before it is weighed with zero.
        log_ratio_BT = jnp.where(used_BT, logprob_BT - behavior_BT, 0.0)
        ratio_BT = jnp.exp(log_ratio_BT)
        outside_BT = jnp.where(
            advantage_B1 > 0, ratio_BT > 1 + config.clip_high, ratio_BT < 1 - config.clip_low
        ) & (advantage_B1 != 0)
        if config.surrogate == "clipped":
            bounded_BT = jnp.clip(ratio_BT, 1 - config.clip_low, 1 + config.clip_high)
            gain_BT = jnp.minimum(ratio_BT * advantage_B1, bounded_BT * advantage_B1)
        else:
            gain_BT = advantage_B1 * jnp.where(used_BT, logprob_BT, 0.0)
        surrogate = -jnp.sum(weights_BT * gain_BT)
        kl = jnp.zeros((), jnp.float32)
        if config.kl_weight > 0:
            reference_BT = place(batch.reference_BT, ("batch", "time"))
            d_BT = jnp.where(used_BT, reference_BT - logprob_BT, 0.0)
            kl = jnp.sum(weights_BT * (jnp.exp(d_BT) - d_BT - 1))
        weight = jnp.sum(place(batch.share_B, ("batch",)))
        objective = surrogate + config.kl_weight * kl
        total, tokens = jnp.sum(weights_BT), jnp.sum(used_BT.astype(jnp.float32))
        terms = jnp.stack(
            [
                surrogate,
                kl,
                jnp.sum((outside_BT & used_BT).astype(jnp.float32)),
                # An estimate from the samples themselves: minus the mean log-probability of what was drawn.
                -jnp.sum(jnp.where(used_BT, logprob_BT, 0.0)),
            ]
        )
        return LossSums(
            objective=objective,
            nll=jax.lax.stop_gradient(objective),
            z=jnp.zeros((), jnp.float32),
            weight=weight,
            nll_by_source=jax.lax.stop_gradient(terms),
            weight_by_source=jnp.stack([weight, total, tokens, tokens]),
        )

    return loss_sums  # type: ignore[return-value]  (the step hands batches through unseen)
