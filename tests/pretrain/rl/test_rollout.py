"""Rollouts: bad rewards drop their samples, the policy's process computes none, and what is pending survives a restart."""

import dataclasses
import json
import math
import os
import time

import jax
import numpy as np
import pytest

from pretrain.config import ConfigError
from pretrain.model.transformer import ModelConfig, init_params
from pretrain.rl.grader import Graders
from pretrain.rl.policy_loss import PolicyLossConfig
from pretrain.rl.problem import ArithmeticConfig
from pretrain.rl.rollout import RolloutBatches, RolloutConfig
from pretrain.sharding import MeshConfig, make_mesh
from pretrain.tokenizer import BytesConfig

MODEL = ModelConfig(
    num_layers=1, width=16, num_heads=2, num_kv_heads=1, head_width=8, hidden_width=32, dtype="float32"
)
PROBLEMS = ArithmeticConfig(max_operand=9, num_train=8, num_heldout=4)
P = 2
VOCAB = BytesConfig().build("", None).vocab_size


@dataclasses.dataclass(frozen=True)
class Pid:
    """Who computes rewards."""

    def __call__(self, problem, text):
        return float(os.getpid())


@dataclasses.dataclass(frozen=True)
class Faulty:
    """Fails in its own way on every second problem."""

    def __call__(self, problem, text):
        match [p.id for p in PROBLEMS.train()].index(problem.id):
            case 0:
                raise ValueError("no")
            case 2:
                time.sleep(60)
            case 4:
                return math.nan
            case 6:
                return "1.0"
        return (sum(text.encode()) % 7) / 7


def batches(reward, reference=None, loss=PolicyLossConfig(chunk_tokens=16), **changes):
    values = {
        "problems": PROBLEMS, "reward": reward, "tokenizer": BytesConfig(),
        "prompts_per_step": 4, "samples_per_prompt": P, "max_prompt_tokens": 6, "max_new_tokens": 3, "slots": 8,
        "updates_per_rollout": 2, "reward_timeout_s": 0.5, **changes,
    }  # fmt: skip
    config = RolloutConfig(**values)
    tokenizer = config.tokenizer.build("", None)
    mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])
    graders = Graders(config.reward, config.judge, timeout_s=config.reward_timeout_s)
    return RolloutBatches(
        config, config.problems.train(), graders, MODEL, loss, tokenizer, seed=5, mesh=mesh,
        reference=reference,
    )  # fmt: skip


@pytest.fixture(scope="module")
def params():
    return init_params(MODEL, VOCAB, seed=3)


@dataclasses.dataclass(frozen=True)
class Sum:
    """Of the bytes: samples of a group differ, and nothing fails."""

    def __call__(self, problem, text):
        return (sum(text.encode()) % 7) / 7


def same(left, right):
    return all(
        np.array_equal(np.asarray(getattr(left, f.name)), np.asarray(getattr(right, f.name)))
        for f in dataclasses.fields(left)
    )


def test_bad_rewards_drop_their_samples_and_are_counted(params):
    source = batches(Faulty())
    try:
        parts = [source.next(step, params) for step in (0, 1)]  # one rollout, every problem once
        report = source.report()
        ids = [name for step in (0, 1) for name in source.row_ids(step)]
    finally:
        source.close()
    assert report["dropped"] == {"raised": P, "timeout": P, "not finite": P, "not a number": P}
    order = [p.id for p in PROBLEMS.train()]
    kept_B = np.repeat([order.index(name) % 2 == 1 for name in ids], P)
    assert kept_B.sum() == len(kept_B) / 2
    for name in ("weights_BT", "share_B", "advantage_B"):
        values = np.concatenate([np.asarray(getattr(part, name)) for part in parts])
        assert np.isfinite(values).all()
        assert not values[~kept_B].any(), f"{name} of a dropped sample"
        if name != "advantage_B":  # of a group whose rewards are equal it is zero, dropped or not
            assert values[kept_B].reshape(kept_B.sum(), -1).any(axis=1).all()
    advantage_QP = np.concatenate([np.asarray(part.advantage_B) for part in parts]).reshape(-1, P)
    assert advantage_QP.any()
    assert np.abs(advantage_QP.sum(axis=1)).max() < 1e-6
    assert 0 <= report["reward_mean"] <= report["reward_max"] < 1


def test_the_policys_process_computes_no_reward_and_no_verdict(params):
    source = batches(Pid(), judge=Pid())
    graders = source._valuer
    try:
        source.next(0, params)
        report = source.report()
        judged = graders.judge([(PROBLEMS.heldout()[0], "1")])
        assert report["reward_mean"] == report["reward_max"] == graders._reward._process.pid != os.getpid()
        assert judged[0].reward == graders._judge._process.pid
        assert judged[0].reward not in (os.getpid(), report["reward_max"])
    finally:
        source.close()


def test_what_the_policy_chose_is_learned_from_up_to_its_end_token_or_stop_text(params, monkeypatch):
    """And the log-probabilities that ratios are measured from are those that the sampler drew with."""
    source = batches(Sum(), stop=("7", "ab"), max_new_tokens=40, samples_per_prompt=8, updates_per_rollout=1)
    generator, found = source.generator(params), []
    generate = generator.generate
    monkeypatch.setattr(
        generator,
        "generate",
        lambda requests: (
            found.extend(zip(requests, generate(requests), strict=True)) or [c for _, c in found]
        ),
    )
    try:
        batch = source.next(0, params)
        report = source.report()
    finally:
        source.close()
    used_BT, behavior_BT = np.asarray(batch.weights_BT) > 0, np.asarray(batch.behavior_BT)
    tokens_BT, gaps, ends = np.asarray(batch.tokens_BT1)[:, 1:], [], set()
    for row, (request, completion) in enumerate(found):
        assert tokens_BT[row][used_BT[row]].tolist() == list(completion.ids)
        assert used_BT[row].argmax() == len(request.ids) - 1
        if completion.finish == "stop":
            by_token = completion.ids[-1] in request.stop_ids
            ends.add(by_token)
            assert by_token or completion.ids[-1] in (ord("7"), ord("b")), (
                "the stop text is among what was chosen"
            )
        gaps += np.abs(behavior_BT[row][used_BT[row]] - completion.logprobs).tolist()
    assert ends == {True, False}
    assert max(gaps) < 1e-4  # float32, two programs
    assert report["sampler_gap"] == pytest.approx(np.mean(gaps), rel=1e-3)


def test_a_loss_without_a_ratio_learns_from_fresh_samples_only():
    plain = PolicyLossConfig(surrogate="plain", chunk_tokens=16)
    with pytest.raises(
        ConfigError, match="surrogate=plain has no ratio .*data.updates_per_rollout must be 1, got 2"
    ):
        batches(Sum(), loss=plain, updates_per_rollout=2)
    batches(Sum(), loss=plain, updates_per_rollout=1).close()


def test_the_distance_to_the_start_is_zero_at_home_and_measured_elsewhere(params):
    sources = [
        batches(Sum(), reference=reference) for reference in (params, init_params(MODEL, VOCAB, seed=4))
    ]
    try:
        parts = [source.next(0, params) for source in sources]
        reports = [source.report() for source in sources]
    finally:
        for source in sources:
            source.close()
    assert reports[0]["kl_to_start"] == 0
    used_BT = np.concatenate([np.asarray(sources[1].next(step, None).weights_BT) > 0 for step in (0, 1)])
    rows = [sources[1].next(step, None) for step in (0, 1)]
    moved_BT = np.concatenate([np.asarray(r.behavior_BT) - np.asarray(r.reference_BT) for r in rows])
    assert reports[1]["kl_to_start"] == pytest.approx((moved_BT * used_BT).sum() / len(used_BT), rel=1e-5)
    assert reports[1]["kl_to_start"] != 0
    assert np.array_equal(np.asarray(parts[0].tokens_BT1), np.asarray(parts[1].tokens_BT1))


def test_a_restored_source_goes_on_with_the_pending_rollout_bit_for_bit(params):
    whole, part, rest = batches(Sum()), batches(Sum()), batches(Sum())
    try:
        expected = [whole.next(step, params) for step in (0, 1)]
        assert same(part.next(0, params), expected[0])
        state = json.loads(json.dumps(part.state()))
        with pytest.raises(AssertionError, match="trains on the rollout of step 0, which is not here"):
            rest.next(1, None)
        rest.restore(state)
        assert same(rest.next(1, None), expected[1]), "no parameters: nothing is sampled anew"
        assert not same(*expected)
        assert rest.report() == whole.report()
    finally:
        for source in (whole, part, rest):
            source.close()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"samples_per_prompt": 1}, "samples_per_prompt must be at least 2"),
        ({"updates_per_rollout": 0}, "updates_per_rollout must be at least 1"),
        ({"reward_timeout_s": 0.0}, "reward_timeout_s must be positive"),
        ({"estimator": "best"}, "estimator must be one of grpo, mean, rloo"),
    ],
)
def test_settings_that_cannot_teach_are_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        batches(Sum(), **changes)


def test_a_prompt_that_is_too_long_is_named():
    with pytest.raises(ConfigError, match="at most data.max_prompt_tokens=3 tokens"):
        batches(Sum(), max_prompt_tokens=3)
