"""Recipes for published problems and for programs: they load, and a step of each goes from prompts to graded samples."""

import dataclasses
import gzip
import json
from pathlib import Path

import pytest

from pretrain.config import ConfigError, apply_overrides, load_config
from pretrain.rl.grpo import RlConfig
from pretrain.rl.reward import ExpressionReward
from pretrain.train import train
from research_env.rl.code_reward import CodeReward, read_tests
from research_env.rl.programs import ProgramTasksConfig, program
from research_env.sandbox.ladder import SandboxConfig

ROOT = Path(__file__).parents[2]
TINY = ["model.num_layers=1", "model.width=32", "model.num_heads=2", "model.num_kv_heads=1", "model.head_width=16",
        "model.hidden_width=64", "run.num_steps=1", "run.eval_every_steps=1", "run.log_every_steps=1", "run.writers=()",
        "optim.schedule.num_warmup_steps=1", "checkpoint.every_steps=none", "data.prompts_per_step=2",
        "data.samples_per_prompt=4", "data.slots=8", "data.max_new_tokens=4"]  # fmt: skip


def one_step(config: RlConfig, untrained, tmp_path: Path, *overrides: str) -> tuple[dict, dict]:
    """(the line of the step, the summary) of a run of a tiny model that has read nothing."""
    config = apply_overrides(config, [*TINY, f"run.workdir={tmp_path}", *overrides])
    result = train(dataclasses.replace(config, init=untrained(config.model)), name="policy")
    lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    (line,) = [line for line in lines if line["kind"] == "train"]
    return line, result.summary


def test_a_step_on_problems_like_those_of_math(untrained, tmp_path):
    for name in ("train", "heldout"):
        with gzip.open(tmp_path / f"{name}.jsonl.gz", "wt") as file:
            for number in range(3):
                problem = {
                    "problem": f"What is $\\frac{{{number}}}{{7}}$ {name}?",
                    "answer": f"\\frac{{{number}}}{{7}}",
                }
                file.write(json.dumps(problem) + "\n")
    paths = [f"data.problems.{name}_path={tmp_path}/{name}.jsonl.gz" for name in ("train", "heldout")]
    line, summary = one_step(load_config(ROOT / "configs/rl/math_smoke.py"), untrained, tmp_path, *paths)
    assert line["dropped"] == {}
    assert 0 <= line["reward_mean"] <= 0.1  # noise now and then is some expression
    assert summary["val_heldout_problems"] == 3
    assert summary["val_dropped"] == 0


def test_the_recipe_for_a_published_model_differs_in_problems_and_lengths_alone():
    pytest.importorskip("gguf")
    config, sums = (load_config(ROOT / f"configs/rl/{name}_smollm2.py") for name in ("math", "gsm8k"))
    assert config.data.reward == ExpressionReward(place="whole", format_reward=0.1)
    assert config.data.problems.template.count("{question}") == 1
    assert r"\frac{1}{2}" in config.data.problems.template
    assert dataclasses.replace(config, data=sums.data) == sums


def test_a_step_on_programs_runs_them_in_the_sandbox(isolation, untrained, tmp_path):
    config = load_config(ROOT / "configs/rl/code_grpo.py")
    reward = dataclasses.replace(config.data.reward, sandbox=SandboxConfig(level=isolation.level))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, reward=reward))
    line, summary = one_step(config, untrained, tmp_path)
    assert (line["dropped"], line["reward_mean"]) == ({}, 0.0)  # noise is no program
    assert (summary["val_accuracy"], summary["val_dropped"]) == (0.0, 0)
    problem = config.data.problems.train()[0]
    assert [reward(problem, program(problem, slip)) for slip in (0, 1)] == [1.0, 0.0]


def test_the_time_of_a_sample_holds_all_its_tests():
    data = load_config(ROOT / "configs/rl/code_grpo.py").data
    assert isinstance(data.reward, CodeReward)
    num_tests = max(len(read_tests(p)) for p in (*data.problems.train(), *data.problems.heldout()))
    assert data.reward_timeout_s > 2 * num_tests * data.reward.wall_s


def test_what_the_base_reads_is_right_as_often_as_it_says():
    config = load_config(ROOT / "configs/rl/code_base.py")
    texts = {p.prompt: program(p) for p in ProgramTasksConfig().train()}
    (source,) = config.data.sources
    right = [d for d in source.documents if any(d.text == prompt + code for prompt, code in texts.items())]
    assert len(right) / len(source.documents) == pytest.approx(0.3)


def test_program_tasks_are_right_and_their_halves_are_apart():
    config = ProgramTasksConfig(max_constant=9, num_tests=3, num_heldout=5)
    train, heldout = config.train(), config.heldout()
    assert len({p.id for p in (*train, *heldout)}) == 24
    assert len(heldout) == 5
    for p in (*train, *heldout):
        tests = read_tests(p)
        assert len({given for given, _ in tests}) == 3
        code = program(p).split("print(")[1].split(")\n")[0]
        for given, expected in tests:
            assert eval(code.replace("int(input())", given.strip())) == int(expected)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"operations": ("modulo",)}, "operations must be some of plus, minus, times"),
        ({"num_tests": 0}, "num_tests must lie in"),
        ({"max_constant": 3, "num_heldout": 6}, "num_heldout must be at least 1 and below 6"),
    ],
)
def test_tasks_that_cannot_be_made_are_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        ProgramTasksConfig(**changes)
