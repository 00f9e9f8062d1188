"""A small decoder that has read programs for tasks such as `x plus 7`, most of them wrong: where code_grpo.py starts.

As in arithmetic_base.py the right program is among what is written and not the commonest, so that there is something to reward.
Command: python -m pretrain.main --config configs/rl/code_base.py
"""

import dataclasses
from pathlib import Path

from pretrain.config import load_config
from pretrain.data.source import MemoryConfig, TextDocument
from pretrain.generate import SampleConfig
from pretrain.train import TrainConfig
from research_env.rl.programs import ProgramTasksConfig, program

TASKS = ProgramTasksConfig()
SLIPS = 3 * (0,) + 7 * (1,)  # what is added to the constant; each task stands in the corpus once for each


def get_config() -> TrainConfig:
    sums = load_config(Path(__file__).with_name("arithmetic_base.py"))
    documents = tuple(
        TextDocument(id=f"{p.id} {i}", text=p.prompt + program(p, slip))
        for p in TASKS.train()
        for i, slip in enumerate(SLIPS)
    )
    return dataclasses.replace(
        sums,
        data=dataclasses.replace(sums.data, sources=(MemoryConfig(name="programs", documents=documents),)),
        run=dataclasses.replace(sums.run, num_steps=400, eval_every_steps=200),
        sample=SampleConfig(prompts=("x plus 7\n",), max_new_tokens=48),
    )
