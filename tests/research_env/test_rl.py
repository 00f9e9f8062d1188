"""Learning on the ideator: gradients against differences, advantages that sum to zero, and going on that equals never stopping."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.config import ConfigError, apply_overrides, load_config
from research_env.env import AIResearchEnv
from research_env.ideator.mutate import MutationIdeas
from research_env.main import main
from research_env.records import Idea, Result, Status
from research_env.rl.bandit import BEST_SHARE, CodebaseBanditConfig, PlantedBanditConfig
from research_env.rl.credit import (
    ADVANTAGES,
    REWARDS,
    TOP_SHARE,
    advantages_P,
    rewards_of,
    shaped_P,
    top_P,
)
from research_env.rl.experiment import (
    IdeatorRlConfig,
    collect,
    is_cure,
    run_experiment,
    summarize,
    verdicts,
)
from research_env.rl.learn import Variant, learn
from research_env.rl.measure import effective_number, measure, similarities_AA
from research_env.rl.policy import PolicyState, entropy, gradient_A, kl, log_softmax, sample, update
from research_env.schedule import Budget, CannotGoOn, OutOfBudget

LOGITS = st.lists(st.floats(-4, 4), min_size=2, max_size=8).map(np.array)
# Few values, so that ties are common; NaN is a sample that the host lost.
REWARD_LISTS = st.lists(st.sampled_from([0.0, 0.1, 0.3, 0.30001, 0.5, float("nan")]), min_size=1, max_size=70)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    with PlantedBanditConfig(num_ideas=20).open(0, tmp_path_factory.mktemp("bandit")) as bandit:
        yield bandit


# --- the policy


@given(LOGITS, st.data(), st.floats(0, 2))
def test_the_gradient_is_that_of_the_objective(logits_A, data, weight):
    picks_P = np.array(data.draw(st.lists(st.integers(0, len(logits_A) - 1), min_size=1, max_size=6)))
    advantages = np.array(data.draw(st.lists(st.floats(-2, 2), min_size=len(picks_P), max_size=len(picks_P))))

    def objective(x_A):
        return float((advantages * log_softmax(x_A)[picks_P]).mean() + weight * entropy(x_A))

    found_A = gradient_A(logits_A, picks_P, advantages, weight)
    for a in range(len(logits_A)):
        step_A = np.eye(len(logits_A))[a] * 1e-5
        numeric = (objective(logits_A + step_A) - objective(logits_A - step_A)) / 2e-5
        assert found_A[a] == pytest.approx(
            numeric, abs=1e-7
        )  # differences of float64 are good to about 1e-10 / 1e-5
    assert found_A.sum() == pytest.approx(0, abs=1e-12)  # a softmax does not change when all logits do


@given(LOGITS)
def test_chances_are_chances_and_kl_is_zero_only_at_home(logits_A):
    state = PolicyState(epoch=0, logits=tuple(logits_A), visits=(0,) * len(logits_A))
    assert state.probs_A.sum() == pytest.approx(1)
    assert np.all(state.probs_A > 0)
    assert kl(logits_A, logits_A + 3.0) == pytest.approx(0, abs=1e-12)
    moved_A = logits_A + np.eye(len(logits_A))[0]
    assert kl(moved_A, logits_A) > 0
    assert 0 <= entropy(logits_A) <= np.log(len(logits_A)) + 1e-12


def test_samples_follow_the_chances():
    chances_A = np.array([0.7, 0.2, 0.1])
    picks_P = sample(PolicyState.start(chances_A), 20_000, np.random.default_rng(0))
    # Four standard errors of a share are at most 4 * sqrt(0.25 / 20000) = 0.014.
    assert np.bincount(picks_P) / 20_000 == pytest.approx(chances_A, abs=0.014)


@given(LOGITS, st.integers(0, 100))
def test_a_state_survives_json(logits_A, visits):
    state = PolicyState(epoch=3, logits=tuple(logits_A), visits=(visits,) * len(logits_A))
    assert PolicyState.from_json(json.loads(json.dumps(state.to_json()))) == state


def test_a_better_idea_becomes_likelier_and_visits_are_counted():
    state = PolicyState.start(np.array([0.5, 0.25, 0.25]))
    moved = update(
        state, np.array([0, 1, 1, 2]), np.array([-1.0, 1.0, 1.0, -1.0]), learning_rate=0.5, entropy_weight=0.0
    )
    assert moved.probs_A[1] > state.probs_A[1]
    assert (moved.visits, moved.epoch) == ((1, 2, 1), 1)


# --- rewards and advantages


@given(REWARD_LISTS, st.sampled_from(ADVANTAGES))
def test_advantages_of_a_group_sum_to_zero_and_lost_samples_get_none(rewards, kind):
    rewards_P = np.array(rewards)
    found_P = advantages_P(rewards_P, kind)
    assert found_P.sum() == pytest.approx(0, abs=1e-9)
    assert np.all(found_P[np.isnan(rewards_P)] == 0)
    kept_P = rewards_P[np.isfinite(rewards_P)]
    if len(kept_P) and np.ptp(top_P(kept_P) if kind == "top_k" else kept_P) > 1e-3:
        assert np.mean(found_P[np.isfinite(rewards_P)] ** 2) == pytest.approx(1)


@given(REWARD_LISTS, st.sampled_from(ADVANTAGES), st.randoms(use_true_random=False))
def test_advantages_keep_the_order_of_rewards_and_do_not_know_the_order_of_samples(rewards, kind, random):
    rewards_P = np.array(rewards)
    found_P = advantages_P(rewards_P, kind)
    kept = [i for i in range(len(rewards)) if np.isfinite(rewards[i])]
    for i in kept:
        for j in kept:
            assert rewards[i] != rewards[j] or found_P[i] == pytest.approx(found_P[j])
            assert rewards[i] <= rewards[j] or found_P[i] >= found_P[j] - 1e-9
    order = list(range(len(rewards)))
    random.shuffle(order)
    assert advantages_P(rewards_P[order], kind) == pytest.approx(found_P[order], abs=1e-9)


@given(REWARD_LISTS)
def test_a_sixteenth_counts_as_best(rewards):
    kept = [reward for reward in rewards if np.isfinite(reward)]
    found = top_P(np.array(rewards))
    if kept:
        assert np.nansum(found) == pytest.approx(max(1, len(kept) // TOP_SHARE))
        assert np.nanmax(found) == found[rewards.index(max(kept))]


@given(st.lists(st.one_of(st.none(), st.floats(0.5, 9.0)), min_size=1, max_size=20), st.booleans())
def test_rewards_follow_the_metric_and_no_failure_outranks_a_success(metrics, higher):
    results = [
        Result(status=Status.RUN_CRASH) if m is None
        else Result(status=Status.OK, metric=m, higher_is_better=higher) for m in metrics
    ]  # fmt: skip
    for name in REWARDS:
        rewards_P = rewards_of(results, name)
        for i, left in enumerate(results):
            for j, right in enumerate(results):
                if left.metric is None and right.metric is not None:
                    assert rewards_P[i] < rewards_P[j]
                if left.better_than(right) and right.metric is not None:
                    assert rewards_P[i] >= rewards_P[j]


def test_the_hosts_faults_are_no_samples():
    results = [
        Result(status=Status.OK, metric=2.0),
        Result(status=Status.INFRA_ERROR),
        Result(status=Status.RUN_CRASH),
    ]
    assert np.isnan(rewards_of(results, "paper")).tolist() == [False, True, False]
    numbers = measure(
        np.array([0, 1, 1]), results, PolicyState.start(np.array([0.5, 0.5])),
        PolicyState.start(np.array([0.5, 0.5])), [Idea(text="a b"), Idea(text="c")], np.eye(2),
    )  # fmt: skip
    assert numbers["dropped"] == 1
    assert numbers["success_rate"] == 0.5
    assert numbers["mean"] == 0.25
    assert numbers["idea_words"] == 1.5


def test_one_over_a_loss_that_is_not_positive_is_refused():
    with pytest.raises(ConfigError, match="need positive metrics, got -1.0; let the evaluator"):
        rewards_of([Result(status=Status.OK, metric=-1.0)], "paper")


def test_a_crowd_pays_and_the_new_earns():
    rewards_P, picks_P, visits_A = np.array([1.0, 1.0, 1.0, np.nan]), np.array([0, 0, 1, 1]), np.array([3, 0])
    count_P = shaped_P(rewards_P, picks_P, visits_A, count_weight=0.3, novelty_weight=0.0)
    assert count_P == pytest.approx(
        [0.8, 0.8, 0.9, np.nan], nan_ok=True
    )  # shares 2/3 and 1/3: the lost do not count
    novel_P = shaped_P(rewards_P, picks_P, visits_A, count_weight=0.0, novelty_weight=0.3)
    assert novel_P == pytest.approx([1.15, 1.15, 1.3, np.nan], nan_ok=True)


# --- what is measured


@given(st.integers(1, 12), st.integers(1, 9))
def test_equal_use_of_n_ideas_is_n_effective_ideas(num, each):
    assert effective_number(np.array([each] * num + [0])) == pytest.approx(num)


def test_similarity_counts_pairs_of_samples():
    ideas = [Idea(text="raise the rate"), Idea(text="lower depth")]
    results = [Result(status=Status.OK, metric=1.0)] * 3
    state = PolicyState.start(np.array([0.5, 0.5]))
    numbers = measure(np.array([0, 0, 1]), results, state, state, ideas, similarities_AA(ideas))
    assert numbers["similarity"] == pytest.approx(
        1 / 3
    )  # one of three pairs is the same idea, the others share no word
    assert numbers["top_two_share"] == 1.0
    assert numbers["unique_share"] == pytest.approx(2 / 3)
    assert numbers["kl"] == 0.0
    assert "true_maximum" not in numbers


# --- the bandits


def test_the_planted_bandit_is_what_it_says(planted):
    losses_A = planted.true_losses_A
    assert losses_A[:2] == pytest.approx([2.98, 2.98])
    assert losses_A[planted.best] == pytest.approx(2.89)
    assert losses_A[3:].min() >= losses_A[:2].min()  # no other idea beats the safe ones
    assert planted.start_probs_A.sum() == pytest.approx(1)
    assert planted.start_probs_A[planted.best] == BEST_SHARE
    results = planted.pull(np.zeros(2000, int), range(2000))
    # The standard error of the share is 0.004.
    assert np.mean([r.status is Status.OK for r in results]) == pytest.approx(planted.chances_A[0], abs=0.016)


def test_the_planted_bandit_pays_what_the_jail_pays(planted, isolation, tmp_path):
    """The same diff and seed through patch, sandbox and judge: the same status and, bit for bit, the same metric."""
    picks, seeds = [2, 7], [5, 2**62]
    with AIResearchEnv(codebase="planted", workdir=tmp_path, sandbox=isolation) as env:
        real = [env.value(planted.ideas[p].diff, seed=s) for p, s in zip(picks, seeds, strict=True)]
    for pick, seed, result in zip(picks, seeds, real, strict=True):
        assert result.status is Status.OK
        tries = planted._carry_out(pick, seed)
        if tries.status is Status.OK:  # the executor's luck is the bandit's own
            assert tries.metric == result.metric
        expected = planted.true_losses_A[pick] + planted._truth["noise"](planted._settings[pick], str(seed))
        assert result.metric == expected
        assert result.extra["true_loss"] == planted.true_losses_A[pick]


def test_a_codebase_is_a_bandit_and_learning_again_runs_nothing(isolation, tmp_path):
    config = CodebaseBanditConfig(
        codebase="planted", num_ideas=4, ideas=MutationIdeas(fault_share=0.25), budget=Budget(max_runs=20)
    )
    found = []
    for _ in range(2):
        with config.open(3, tmp_path) as bandit:
            found.append(
                learn(bandit, Variant(name="x"), seed=3, num_epochs=2, samples_per_epoch=4, shares_seed=True)
            )
            runs = bandit._env.ledger.spent()["runs"]
            assert 1 < runs <= 9  # the baseline, and in each epoch each idea at most once
    assert found[0] == found[1]
    assert 0 < found[0].epochs[0]["true_maximum"] < 0.4
    with (
        CodebaseBanditConfig(codebase="planted", num_ideas=4, budget=Budget(max_runs=1)).open(
            3, tmp_path / "poor"
        ) as bandit,
        pytest.raises(OutOfBudget),
    ):
        learn(bandit, Variant(name="x"), seed=3, num_epochs=1, samples_per_epoch=4, shares_seed=True)


def test_a_codebase_without_constants_or_with_too_few_is_refused(tmp_path):
    code = tmp_path / "code"
    code.mkdir()
    (code / "run.sh").write_text("true\n")
    (code / "eval.sh").write_text('echo "{\\"metric\\": 1}" > "$RESULT"\n')
    for text, fault in (("f()\n", "must hold constants"), ("ON = False\n", "asks for 3 different mutations")):
        (code / "model.py").write_text(text)
        with (
            pytest.raises(ConfigError, match=fault),
            CodebaseBanditConfig(codebase=str(code), num_ideas=3).open(0, tmp_path / "run"),
        ):
            pass


# --- the loop

FAST = {"samples_per_epoch": 16, "shares_seed": False}


@pytest.mark.parametrize("stop", [1, 3])
@pytest.mark.parametrize(
    "variant",
    [
        Variant(name="paper"),
        Variant(name="all", advantage="top_k", reward="rank", entropy_weight=0.1, count_weight=0.3, novelty_weight=0.3),
    ],
    ids=lambda v: getattr(v, "name", v),
)  # fmt: skip
def test_going_on_from_a_state_equals_never_having_stopped(planted, variant, stop):
    whole = learn(planted, variant, seed=1, num_epochs=5, **FAST)
    first = learn(planted, variant, seed=1, num_epochs=stop, **FAST)
    state = PolicyState.from_json(json.loads(json.dumps(first.state.to_json())))
    rest = learn(planted, variant, seed=1, num_epochs=5, state=state, **FAST)
    assert rest.state == whole.state
    assert first.epochs + rest.epochs == whole.epochs


def test_best_of_n_never_moves_and_a_learner_does(planted):
    still = learn(planted, Variant(name="still", learning_rate=0.0), seed=1, num_epochs=3, **FAST)
    moved = learn(planted, Variant(name="moved"), seed=1, num_epochs=3, **FAST)
    assert still.state.probs_A == pytest.approx(planted.start_probs_A)
    assert [numbers["kl"] for numbers in still.epochs] == pytest.approx([0, 0, 0], abs=1e-12)
    assert moved.epochs[2]["kl"] > 1e-4
    assert (
        moved.epochs[0]["mean"] == still.epochs[0]["mean"]
    )  # the first epoch is drawn before anything is learned


def test_a_host_that_fails_on_everything_stops_the_run(planted):
    class Broken:
        ideas, start_probs_A, best = planted.ideas, planted.start_probs_A, planted.best

        def pull(self, picks_P, seeds):
            return [Result(status=Status.INFRA_ERROR, reason="the disk is full")] * len(picks_P)

    with pytest.raises(CannotGoOn, match="all runs of epoch 0: the disk is full"):
        learn(Broken(), Variant(name="x"), seed=0, num_epochs=1, **FAST)


def test_runs_of_an_epoch_share_a_seed_when_asked(planted):
    seeds = []

    class Listening:
        ideas, start_probs_A, best = planted.ideas, planted.start_probs_A, planted.best

        def pull(self, picks_P, drawn):
            seeds.append(list(drawn))
            return planted.pull(picks_P, drawn)

    for shares in (True, False):
        learn(
            Listening(), Variant(name="x"), seed=1, num_epochs=2, samples_per_epoch=8, shares_seed=shares
        )  # fmt: skip
    assert [len(set(drawn)) for drawn in seeds] == [1, 1, 8, 8]
    assert len({s for drawn in seeds for s in drawn}) == 2 + 16 - 2  # slot 0 is the shared one


# --- the experiment


def small(tmp_path, **changes):
    return IdeatorRlConfig(**{
        "bandit": PlantedBanditConfig(num_ideas=12), "workdir": str(tmp_path), "seeds": (0, 1), "num_epochs": 10,
        "samples_per_epoch": 16, "variants": (Variant(name="paper"), Variant(name="top", advantage="top_k")), **changes,
    })  # fmt: skip


SMALL = """
from research_env.rl.bandit import PlantedBanditConfig
from research_env.rl.experiment import IdeatorRlConfig
from research_env.rl.learn import Variant

def get_config():
    return IdeatorRlConfig(
        bandit=PlantedBanditConfig(num_ideas=12), workdir=WORKDIR, seeds=(0, 1), num_epochs=10, samples_per_epoch=16,
        variants=(Variant(name="paper"), Variant(name="top", advantage="top_k")),
    )
"""


def test_main_learns_and_the_experiment_writes_the_same_files_again(tmp_path, capsys):
    (tmp_path / "config.py").write_text(SMALL.replace("WORKDIR", repr(str(tmp_path / "run"))))
    argv = ["--config", str(tmp_path / "config.py")]
    assert main(argv) == 0
    said = capsys.readouterr().out
    assert "| paper |" in said
    assert "No verdict: it takes 5 seeds, there are 2." in said
    names = ("config.json", "metrics.jsonl", "summary.json", "table.md", "learning.png")
    first = {name: (tmp_path / "run" / name).read_bytes() for name in names}
    assert len(first["metrics.jsonl"].splitlines()) == 2 * 2 * 10
    assert first["learning.png"].startswith(b"\x89PNG")
    summary = run_experiment(load_config(tmp_path / "config.py"), lambda text: None)
    assert {name: (tmp_path / "run" / name).read_bytes() for name in names} == first
    own = summary["variants"][0]["versus_reference"]
    assert own["maximum"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert own["effective_ideas_ratio"]["value"] == 1.0
    assert main([*argv, "samples_per_epoch=1"]) == 2
    assert "must be at least 2 to be a group" in capsys.readouterr().err


def test_a_cure_needs_every_interval():
    good = {"low": 0.1, "value": 0.2, "high": 0.3}
    bad = {"low": -0.1, "value": 0.2, "high": 0.3}
    ratio = {"low": 5.0, "value": 6.0, "high": 7.0}
    assert is_cure({"maximum": good, "true_maximum": good, "effective_ideas_ratio": ratio})
    assert not is_cure({"maximum": bad, "true_maximum": good, "effective_ideas_ratio": ratio})
    assert not is_cure({"maximum": good, "true_maximum": bad, "effective_ideas_ratio": ratio})
    assert not is_cure({"maximum": good, "effective_ideas_ratio": {**ratio, "low": 4.9}})


def test_five_seeds_are_judged_by_their_intervals(tmp_path):
    """Built numbers: the first variant has every sign of the disease, the second lacks nothing of a cure, the third one thing."""
    config = small(
        tmp_path, seeds=tuple(range(5)), variants=tuple(Variant(name=name) for name in ("ill", "cured", "lucky"))
    )  # fmt: skip
    ends = {"ill": (0.3, 0.34, 2.0), "cured": (0.2, 0.35, 30.0), "lucky": (0.2, 0.35, 9.0)}
    lines = [
        {
            "step": step + 1, "kind": "epoch", "variant": name, "seed": seed, "kl": 0.0, "success_rate": 1.0, "idea_words": 3.0,
            "mean": 0.1 + (mean - 0.1) * step / 9 + 0.001 * seed,
            "maximum": 0.34 + (maximum - 0.34) * step / 9 + 1e-5 * ((seed + step) % 3),
            "effective_ideas": 40 + (number - 40) * min(1.0, step / 5), "top_two_share": 0.1 if step < 5 else 0.95,
        }
        for name, (mean, maximum, number) in ends.items() for seed in range(5) for step in range(10)
    ]  # fmt: skip
    summary = summarize(collect(lines, config), config)
    assert summary["disease"] == {
        "mean_rises": True, "maximum_does_not_rise": True, "top_two_share_over_0.9": True, "holds": True
    }  # fmt: skip
    assert summary["cures"] == ["cured"]
    assert "reproduced by ill" in verdicts(summary)[0]
    assert [line.split(";")[0] for line in verdicts(summary)[1:]] == ["cured: cures", "lucky: does not cure"]


def test_a_number_that_an_epoch_lacks_is_left_out(tmp_path):
    config = small(tmp_path, variants=(Variant(name="a"),), seeds=(0,))
    lines = [{"step": i + 1, "kind": "epoch", "variant": "a", "seed": 0, "mean": 1.0} for i in range(10)]
    lines[3]["true_maximum"] = 1.0
    assert collect(lines, config)["a"].keys() == {"mean"}


def test_faults_of_a_config_are_named_all_at_once(tmp_path):
    with pytest.raises(ConfigError) as caught:
        small(tmp_path, variants=(Variant(name="a"), Variant(name="a")), seeds=(), num_epochs=9, samples_per_epoch=1)  # fmt: skip
    assert len(caught.value.faults) == 4
    with pytest.raises(ConfigError) as caught:
        Variant(name=" ", reward="loss", advantage="ppo", entropy_weight=-1, learning_rate=float("nan"))
    assert len(caught.value.faults) == 5
    with pytest.raises(ConfigError, match="num_ideas must lie in"):
        PlantedBanditConfig(num_ideas=3)
    with pytest.raises(ConfigError, match="num_ideas must be at least 2"):
        CodebaseBanditConfig(codebase="toy", num_ideas=1)


@pytest.mark.slow
def test_the_papers_disease_and_a_cure(tmp_path):
    """Ten seeds that no weight was chosen on; about a minute."""
    config = apply_overrides(
        load_config("configs/research_env/rl_planted.py"), [f"workdir={tmp_path}", f"seeds={tuple(range(20, 30))}"]
    )  # fmt: skip
    summary = run_experiment(config, lambda text: None)
    assert summary["disease"]["holds"]
    assert summary["cures"]
