"""Does a language model learn to have better ideas from what their execution was worth, and do its ideas stay alive?

The thesis' third part with the smallest true parts: prompt = the code of the `planted` task, sample = an idea in words, reward
= 1/loss of the executed diff (0 for a failure), GRPO on pretrain's one loop, 32 ideas an epoch. A rate near
0, `optim.peak_lr=1e-12`, is best of N. Each step logs its epoch as `ideas` in metrics.jsonl.

One seed, base of 300 steps, 120 epochs; means of the first 10 -> the last 10 epochs; the baseline's value is 0.333 without noise:

                                                mean           maximum        without noise  ran well     effective ideas  words
    as below (the paper's)                      .217 -> .299   .342 -> .338   .340 -> .333   .66 -> .90   30.7 -> 23.2     7.4 -> 6.1
    data.advantage=top_k data.count_weight=1.0  .194 -> .263   .345 -> .349   .344 -> .345   .59 -> .76   28.9 -> 27.4     7.4 -> 10.8

The paper's way teaches the model to change constants that do nothing (84 % of its new ideas after epoch 100): its mean rises,
its best idea of an epoch ends as good as no change. The other has the best one in each of the last 20 epochs, but not the
variety that its count of ideas says: it dodges the penalty by adding idle changes to one idea ("Double WIDTH and halve
WARMUP. Change NULL_G ..."), which the similarity of words shows, .25 -> .61. Seed 0 alone, 20 and 7 minutes of two shared cores.
Command: python -m pretrain.main --config configs/research_env/rl_llm_base.py
         python -m pretrain.main --config configs/research_env/rl_llm.py init=runs/rl_llm_base/FINGERPRINT
Another codebase or a larger model: data.codebase, and an executor that writes code: ModelExecutor (research_env/rl/carry_out.py).
"""

from pathlib import Path

from pretrain.checkpoint import CheckpointPolicy
from pretrain.config import load_config
from pretrain.generate import SampleConfig
from pretrain.optim import AdamWConfig, Constant, OptimConfig
from pretrain.rl.policy_loss import PolicyLossConfig
from pretrain.tokenizer import BytesConfig
from pretrain.train import RunConfig
from research_env.rl.carry_out import SentenceExecutor
from research_env.rl.ideator import IdeaConfig, IdeatorConfig


def get_config() -> IdeatorConfig:
    return IdeatorConfig(
        init="runs/rl_llm_base",
        model=load_config(Path(__file__).with_name("rl_llm_base.py")).model,
        data=IdeaConfig(
            codebase="planted",
            executor=SentenceExecutor(),
            workdir="runs/research/rl_llm",
            template="{code}\nIdea: ",
            tokenizer=BytesConfig(),
            samples_per_prompt=32,
            max_prompt_tokens=400,
            max_new_tokens=80,
            stop=("\n",),
            slots=32,
        ),
        optim=OptimConfig(
            method=AdamWConfig(), peak_lr=2e-4, schedule=Constant(num_warmup_steps=2), weight_decay=0.0
        ),
        loss=PolicyLossConfig(chunk_tokens=2048),
        run=RunConfig(num_steps=120, log_every_steps=1),
        checkpoint=CheckpointPolicy(every_steps=5, keep_last=1),
        sample=SampleConfig(prompts=()),
    )
