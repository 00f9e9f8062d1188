r"""Does SmolLM2-135M-Instruct learn from whether its answers to MATH's problems are right? The road of gsm8k_smollm2.py.

Answers are compared as expressions (pretrain/rl/expression.py): \frac{1}{2}, 0.5 and 2^{-1} are one. About 7 % of the
references are none of that grammar (matrices, words, unions) and are met by their own characters alone. Questions of at most
300 characters: 6,157 of 7,500 and 420 of 500. The ids do not prove that the training file is disjoint from the official
test set: say so beside any result. Nobody has run it yet.
Command: python -m pretrain.main --config configs/rl/math_smollm2.py data.problems.train_path=FOLDER/MATH_train.jsonl.gz
             data.problems.heldout_path=FOLDER/MATH_test.jsonl.gz
Needs the extra [hf] and the model, as gsm8k_smollm2.py says.
"""

import dataclasses
from pathlib import Path

from pretrain.config import load_config
from pretrain.rl.grpo import RlConfig

HERE = Path(__file__)
TEMPLATE = r"""Problem: What is the sum of $\frac{1}{3}$ and $\frac{1}{6}$?
Answer: \frac{1}{2}

Problem: Expand $(x+1)(x-3)$.
Answer: x^2-2x-3

Problem: {question}
Answer:"""


def get_config() -> RlConfig:
    config = load_config(HERE.with_name("gsm8k_smollm2.py"))
    parts = load_config(HERE.with_name("math_smoke.py")).data
    return dataclasses.replace(
        config,
        data=dataclasses.replace(
            config.data,
            problems=dataclasses.replace(
                parts.problems, template=TEMPLATE, max_question_characters=300, num_train=200, num_heldout=4
            ),
            reward=parts.reward,
            max_prompt_tokens=320,
            max_new_tokens=24,
        ),
    )
