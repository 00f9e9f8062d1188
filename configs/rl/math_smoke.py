r"""Does every part of learning on published problems work? MATH's, its answers graded as expressions, by the model of the sums.

Nothing can be learned here: a model of 0.67M parameters that has read sums solves none. It shows the road before a model that
can walk it is there (math_smollm2.py). The files hold lines with a `problem` and an `answer`; no solutions are needed.
Command: python -m pretrain.main --config configs/rl/arithmetic_base.py
         python -m pretrain.main --config configs/rl/math_smoke.py init=runs/arithmetic_base/FINGERPRINT
             data.problems.train_path=FOLDER/MATH_train.jsonl.gz data.problems.heldout_path=FOLDER/MATH_test.jsonl.gz
"""

import dataclasses
from pathlib import Path

from pretrain.config import load_config
from pretrain.rl.grpo import RlConfig
from pretrain.rl.problem import QuestionFileConfig
from pretrain.rl.reward import ExpressionReward


def get_config() -> RlConfig:
    sums = load_config(Path(__file__).with_name("arithmetic_grpo.py"))
    return dataclasses.replace(
        sums,
        data=dataclasses.replace(
            sums.data,
            problems=QuestionFileConfig(
                train_path="MATH_train.jsonl.gz",
                heldout_path="MATH_test.jsonl.gz",
                question_key="problem",
                template="{question}\n",
                max_question_characters=120,
                num_heldout=16,
            ),
            # Any expression earns a little, so that there is something to learn.
            reward=ExpressionReward(place="whole", format_reward=0.1),
            prompts_per_step=4,
            max_prompt_tokens=160,
            max_new_tokens=16,
            stop=("\n",),
            slots=32,
        ),
        run=dataclasses.replace(sums.run, num_steps=2, log_every_steps=1, eval_every_steps=2),
    )
