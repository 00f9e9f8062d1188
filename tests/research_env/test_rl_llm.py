"""A language model as ideator: sentences become the diffs that they say, executed values become rewards, and a run resumes."""

import dataclasses
import json
import random
from pathlib import Path

import numpy as np
import pytest

from pretrain.config import ConfigError, apply_overrides, load_config
from pretrain.rl.problem import Problem
from pretrain.train import train
from research_env.env import AIResearchEnv
from research_env.ideator.llm import ModelIdeas
from research_env.ideator.mutate import OPERATORS, MutationIdeas, find_sites, mutate
from research_env.ledger import Ledger, ledger_path
from research_env.records import Result, Status
from research_env.rl.carry_out import ModelExecutor, SentenceExecutor, Sentences
from research_env.rl.execution import ExecutedIdeas, best_epoch
from research_env.rl.ideator import IdeatorConfig, idea_documents, idea_prompt
from research_env.schedule import Budget, CannotGoOn
from research_env.task import open_task
from synth.llm.scripted import ScriptedConfig

ROOT = Path(__file__).parents[2]
PROMPT = Problem(id="planted", prompt="?", answer="")
GOOD, BAD = "Change WIDTH from 64 to 128.", "Change WIDTH from 64 to 16."


@pytest.fixture
def env(isolation, tmp_path):
    with AIResearchEnv(codebase="planted", workdir=tmp_path / "campaign", sandbox=isolation) as env:
        yield env


def valuer(env, **changes):
    values = {
        "samples_per_group": 4, "seed": 1, "reward": "paper", "advantage": "grpo", "count_weight": 0.0, "novelty_weight": 0.0,
        **changes,
    }  # fmt: skip
    return ExecutedIdeas(env, SentenceExecutor().build(env), **values)


def rewards(valuer, texts, step=0):
    return [grade.reward for grade in valuer.value(step, [(PROMPT, text) for text in texts])]


# --- ideas become diffs


@pytest.mark.parametrize("codebase", ["planted", "toy"])
def test_what_a_mutation_says_is_carried_out_as_the_mutation_does(codebase, tmp_path):
    task = open_task(codebase, tmp_path)
    executor, rng, seen = Sentences(task, SentenceExecutor()), random.Random(0), set()
    names = [site.name for site in find_sites(task.baseline, task.policy)]
    twice = [name for name in names if names.count(name) > 1]  # words do not say which of them is meant
    assert len(set(names) - set(twice)) > 10
    for _ in range(200):
        idea = mutate(task.baseline, task.policy, rng, frozen=twice)
        assert executor.carry_out(idea.text) == idea.diff
        seen.add(idea.operator)
    # `planted` has neither a switch nor a choice.
    assert seen == (set(OPERATORS) if codebase == "toy" else set(OPERATORS) - {"toggle", "swap"})


@pytest.mark.parametrize(
    ("idea", "reason"),
    [
        ("", "no idea of 1 to 4 whole sentences"),
        ("Change WIDTH from 64 to 1e999.", "WIDTH is 64, and '1e999' is no such number"),
        ("Change RATE from 0.1 to 1e999.", "RATE must be finite"),
        ("Change WIDTH from 64 to 128", "no idea of 1 to 4 whole sentences"),
        (5 * "Change WIDTH from 64 to 128. ", "no idea of 1 to 4 whole sentences"),
        ("Improve everything.", "not an instruction that is understood"),
        ("Change BREADTH from 64 to 128.", "one constant BREADTH must be 64, found nothing"),
        ("Change WIDTH from 65 to 128.", "one constant WIDTH must be 65, found 64"),
        ("Change WIDTH from 64 to 1.5.", "WIDTH is 64, and '1.5' is no such number"),
        ("Change RATE from 0.1 to nan.", "RATE must be finite"),
        ("Change WIDTH from 64 to 128. Change WIDTH from 64 to 32.", "changes one constant twice"),
        ("Turn WIDTH off.", "that is no switch"),
        ("Double RATE and halve WIDTH.", "only whole numbers are doubled"),
        ("Change WIDTH from 64 to __import__('os').", "not an instruction that is understood"),
    ],
)
def test_what_is_unclear_is_said_and_not_guessed(idea, reason, tmp_path):
    executor = Sentences(open_task("planted", tmp_path), SentenceExecutor())
    assert reason in executor.carry_out(idea)


def test_focus_and_frozen_constants_are_the_executors_too(tmp_path):
    task = open_task("planted", tmp_path)
    assert "found nothing" in Sentences(task, SentenceExecutor(frozen=("WIDTH",))).carry_out(GOOD)
    assert "found nothing" in Sentences(task, SentenceExecutor(focus=("model.py",))).carry_out(GOOD)


def test_a_model_may_carry_ideas_out_and_is_asked_once_for_one_idea(env):
    ideas = ModelIdeas(models=(ScriptedConfig(),), num_samples=1, num_revisions=0)
    executor = ModelExecutor(ideas=ideas).build(env)
    first = executor.carry_out(GOOD)
    assert first  # words of the prompt, which are no diff: the environment refuses them
    assert env.ledger.calls() == {"DONE": 1}
    assert executor.carry_out(GOOD) == first
    assert env.ledger.calls() == {"DONE": 1}
    executor.carry_out(BAD)
    assert env.ledger.calls() == {"DONE": 2}
    with pytest.raises(ConfigError, match="one model and no writer"):
        ModelExecutor(ideas=dataclasses.replace(ideas, writer=ScriptedConfig()))


# --- executed values become rewards


def test_rewards_are_those_of_the_executed_values(env):
    found = valuer(env)
    paper = rewards(found, [GOOD, BAD, "nonsense", GOOD])
    assert paper[0] == paper[3] > paper[1] > paper[2] == 0.0
    ledger = {env.ledger.node(node).idea: result for node, _, result in env.ledger.results("screen")}
    assert paper[0] == 1.0 / ledger[GOOD].metric
    assert ledger["nonsense"].status is Status.PATCH_REJECTED
    numbers = found.report()["ideas"]
    assert numbers["mean"] == pytest.approx(np.mean(paper))
    assert numbers["maximum"] == numbers["best_so_far"] == paper[0]
    assert numbers["true_maximum"] == pytest.approx(1 / 2.92)
    assert numbers["success_rate"] == 0.75
    assert numbers["effective_ideas"] == pytest.approx(np.exp(-(0.5 * np.log(0.5) + 2 * 0.25 * np.log(0.25))))
    assert (numbers["top_two_share"], numbers["unique_share"]) == (0.75, 0.75)
    assert numbers["idea_words"] == (3 * 6 + 1) / 4
    assert best_epoch(env)["idea"] == GOOD
    assert rewards(valuer(env, reward="rank"), [GOOD, BAD, "nonsense", GOOD]) == [
        pytest.approx(2.5 / 3), pytest.approx(1 / 3), 0.0, pytest.approx(2.5 / 3),
    ]  # fmt: skip
    separated = rewards(valuer(env, reward="failure_separated"), [GOOD, BAD, "nonsense", GOOD])
    assert separated == pytest.approx([2.5 / 3 - 0.5, 1 / 3 - 0.5, -0.6, 2.5 / 3 - 0.5])
    assert rewards(valuer(env, advantage="top_k"), [GOOD, BAD, "nonsense", GOOD]) == [0.5, 0.0, 0.0, 0.5]


def test_equal_ideas_are_one_run_and_an_idea_that_changes_nothing_is_none(env):
    texts = [GOOD, "Double WIDTH and halve DEPTH.", GOOD + " ", "Change WIDTH from 64 to 64."]
    found = rewards(valuer(env), texts)
    assert env.ledger.spent()["runs"] == 2
    assert found[3] == 0.0
    assert rewards(valuer(env), texts) == found
    assert env.ledger.spent()["runs"] == 2


def test_each_group_is_ranked_by_itself(env):
    texts = [GOOD, BAD, BAD, BAD, BAD, BAD, BAD, BAD]
    found = rewards(valuer(env, reward="rank"), texts)
    assert found[1] == pytest.approx(0.5)  # the second of the group that the good idea leads
    assert found[4:] == pytest.approx([0.625] * 4)


def test_bonuses_know_this_epoch_and_the_earlier_ones_and_repeating_a_step_counts_once(env):
    found = valuer(env, count_weight=0.4)
    plain = rewards(valuer(env), [GOOD, GOOD, GOOD, BAD])
    assert rewards(found, [GOOD, GOOD, GOOD, BAD]) == pytest.approx(np.array(plain) - [0.3, 0.3, 0.3, 0.1])
    new = valuer(env, novelty_weight=1.0)
    for _ in range(2):  # the second time is a run that resumed before this step
        plain = rewards(valuer(env), [GOOD, BAD, BAD, BAD], step=1)
        bonus = np.array(rewards(new, [GOOD, BAD, BAD, BAD], step=1)) - plain
        assert bonus == pytest.approx([1 / 2, *3 * [1 / np.sqrt(2)]])


def test_a_fault_of_the_host_drops_the_sample_and_a_host_that_always_fails_stops_the_run(env, monkeypatch):
    lost = Result(status=Status.INFRA_ERROR, reason="the disk is full")
    real = env.evaluate_pairs([(env.add("", key="baseline"), 1)])[0]
    monkeypatch.setattr(env, "evaluate_pairs", lambda pairs: [real, lost, real, real])
    found = valuer(env)
    grades = found.value(0, [(PROMPT, GOOD)] * 4)
    assert [grade.reward is None for grade in grades] == [False, True, False, False]
    assert grades[1].reason == "the host failed"
    monkeypatch.setattr(env, "evaluate_pairs", lambda pairs: [lost] * 4)
    with pytest.raises(CannotGoOn, match="all runs of step 7: the disk is full"):
        found.value(7, [(PROMPT, GOOD)] * 4)


def test_a_used_up_budget_says_what_to_raise(isolation, tmp_path):
    with (
        AIResearchEnv(
            codebase="planted", workdir=tmp_path, sandbox=isolation, budget=Budget(max_runs=1)
        ) as env,
        pytest.raises(ConfigError, match="raise data.budget"),
    ):
        rewards(valuer(env), [GOOD, BAD, BAD, BAD])


# --- the run


def test_the_base_reads_the_prompt_that_the_policy_is_given(tmp_path):
    base = load_config(ROOT / "configs/research_env/rl_llm_base.py")
    policy = load_config(ROOT / "configs/research_env/rl_llm.py")
    prompt = idea_prompt(open_task(policy.data.codebase, tmp_path), policy.data.template)
    assert len(prompt) < policy.data.max_prompt_tokens  # bytes, and the bos
    documents = base.data.sources[0].documents
    assert all(document.text.startswith(prompt) for document in documents)
    longest = max(len(document.text) - len(prompt) for document in documents)
    assert longest <= policy.data.max_new_tokens
    assert idea_documents("planted", policy.data.template, MutationIdeas(), 3, 0).documents == documents[:3]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.prompts_per_step=2", "prompts_per_step must be 1"),
        ("data.template=Idea:", "template must hold"),
        ("data.count_weight=-1.0", "count_weight must be at least 0"),
        ("data.samples_per_prompt=1", "samples_per_prompt must be at least 2"),
    ],
)
def test_settings_that_cannot_teach_are_refused(override, words):
    with pytest.raises(ConfigError, match=words):
        apply_overrides(load_config(ROOT / "configs/research_env/rl_llm.py"), [override])


TINY = ["model.num_layers=1", "model.width=32", "model.num_heads=2", "model.num_kv_heads=1", "model.head_width=16",
        "model.hidden_width=64"]  # fmt: skip
EPOCH_NUMBERS = {
    "mean", "q10", "q50", "q90", "maximum", "success_rate", "ok_mean", "effective_ideas", "top_two_share", "unique_share",
    "similarity", "idea_words", "best_so_far",
}  # fmt: skip


def tiny(init: str, workdir: Path, *overrides: str) -> IdeatorConfig:
    return apply_overrides(
        load_config(ROOT / "configs/research_env/rl_llm.py"),
        [
            *TINY, f"init={init or 'replaced'}", f"run.workdir={workdir}", f"data.workdir={workdir}/campaign", "run.num_steps=3",
            "run.writers=()", "data.samples_per_prompt=8", "data.slots=8", "data.max_new_tokens=40", "data.novelty_weight=0.1",
            "checkpoint.every_steps=none", "optim.peak_lr=1e-3", *overrides,
        ],
    )  # fmt: skip


def test_a_template_may_hold_other_braces_and_code_that_names_a_field(tmp_path):
    task = open_task("planted", tmp_path)
    prompt = idea_prompt(task, 'Answer as {"idea": ".."}, {}.\n{code}')
    assert prompt.startswith('Answer as {"idea": ".."}, {}.\n')
    assert prompt.removeprefix('Answer as {"idea": ".."}, {}.\n') == idea_prompt(task, "{code}")
    named = dataclasses.replace(task, description="about {code}")
    assert "about {code}" in idea_prompt(named, "{task}")


def test_an_epoch_goes_from_the_prompt_to_the_line_of_its_numbers(isolation, untrained, tmp_path):
    """A model that knows nothing says no idea: every sample is refused, valued 0, counted, and no candidate runs."""
    config = tiny(
        "", tmp_path, "run.num_steps=1", "optim.schedule.num_warmup_steps=1", "data.max_new_tokens=8"
    )
    result = train(dataclasses.replace(config, init=untrained(config.model)), name="ideator")
    (line,) = [
        record
        for record in map(json.loads, (result.folder / "metrics.jsonl").read_text().splitlines())
        if record["kind"] == "train"
    ]
    assert line["ideas"].keys() >= EPOCH_NUMBERS
    assert (line["ideas"]["success_rate"], line["ideas"]["maximum"]) == (0.0, 0.0)
    assert line["reward_mean"] == pytest.approx(0.1)  # all that is new earns, and this was
    assert line["ideas"]["effective_ideas"] > 1
    assert line["kl_to_start"] == 0
    assert result.summary["greedy_status"] == "patch_rejected"
    ledger = Ledger(ledger_path(tmp_path / "campaign"))
    try:
        assert ledger.spent()["runs"] == 1  # the baseline's
        assert len(ledger.events("rl epoch")) == 1
    finally:
        ledger.close()


@pytest.mark.slow
def test_a_tiny_model_learns_from_executed_ideas_and_stopping_changes_nothing(isolation, tmp_path):
    base = train(
        apply_overrides(
            load_config(ROOT / "configs/research_env/rl_llm_base.py"),
            [*TINY, f"run.workdir={tmp_path}", "run.num_steps=60", "run.writers=()"],
        ),
        name="base",
    ).folder
    whole = train(tiny(str(base), tmp_path / "whole"), name="ideator")
    lines = [json.loads(line) for line in (whole.folder / "metrics.jsonl").read_text().splitlines()]
    epochs = [line for line in lines if line["kind"] == "train"]
    assert len(epochs) == 3
    for line in epochs:
        assert line["ideas"].keys() >= EPOCH_NUMBERS
        assert 1 <= line["ideas"]["effective_ideas"] <= 8
        assert {"kl_to_start", "new_tokens_mean", "reward_mean", "dropped"} <= line.keys()
    assert epochs[0]["kl_to_start"] == 0
    assert {"best_value", "best_idea", "greedy_status", "params_sha256"} <= whole.summary.keys()
    assert whole.summary["baseline_value"] == pytest.approx(1 / 3, rel=0.03)
    for stop in (1, 2, 3):
        part = train(tiny(str(base), tmp_path / "parts", f"run.stop_step={stop}"), name="ideator")
    assert part.summary["params_sha256"] == whole.summary["params_sha256"]
