"""Does a small model learn to write right programs from their tests alone, each test run in the sandbox?

Tasks are made on the spot (research_env/rl/programs.py). Of other tasks, such as those of MBPP: a QuestionFileConfig whose
answers are JSON lists of [input, output] pairs. A sample costs a process in a jail for each test until one fails.
Greedy programs for 15 held-out tasks that pass their tests, 25 steps, two seeds (`run.seed` of both commands), two shared cores,
157 and 351 s: 0.0 -> 66.7 % and 0.0 -> 46.7 %, still rising on the second. No control with a random reward was run, which
without a pull back to the base teaches a little where the right answer is the second likeliest, as it is here (arithmetic_study.py).
Command: python -m pretrain.main --config configs/rl/code_base.py
         python -m pretrain.main --config configs/rl/code_grpo.py init=runs/code_base/FINGERPRINT
"""

import dataclasses
from pathlib import Path

from pretrain.config import load_config
from pretrain.rl.grpo import RlConfig
from pretrain.rl.policy_loss import PolicyLossConfig
from research_env.rl.code_reward import CodeReward
from research_env.rl.programs import ProgramTasksConfig


def get_config() -> RlConfig:
    sums = load_config(Path(__file__).with_name("arithmetic_grpo.py"))
    return dataclasses.replace(
        sums,
        init="runs/code_base",
        data=dataclasses.replace(
            sums.data,
            problems=ProgramTasksConfig(),
            reward=CodeReward(wall_s=2.0),
            reward_timeout_s=10.0,  # two tests of two seconds, and what starting their jails takes
            prompts_per_step=16,
            max_prompt_tokens=16,
            max_new_tokens=48,
            slots=128,
        ),
        loss=PolicyLossConfig(),
        run=dataclasses.replace(sums.run, num_steps=25),
    )
