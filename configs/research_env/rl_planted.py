"""Does reinforcement learning on the ideator raise the maximum, or only the mean, and what keeps the ideas alive?

Paper: arXiv 2601.14525, section 5: the mean rises, the maximum stays flat, two ideas go from 51 to 119 of 128. Here 60 ideas of
the `planted` task, two of them safe, one rare and best; 128 ideas an epoch, 70 epochs. Weights and learning rate were chosen
on seeds 0 to 9 (docs/research.md says what was tried); the seeds below took no part in that.
Command: python -m research_env.main --config configs/research_env/rl_planted.py
Hardware, time: one CPU core, 51 cpu-seconds; no sandbox, because nothing runs but the locked evaluator's own functions.
"""

from research_env.rl.bandit import PlantedBanditConfig
from research_env.rl.experiment import IdeatorRlConfig
from research_env.rl.learn import Variant


def get_config() -> IdeatorRlConfig:
    return IdeatorRlConfig(
        bandit=PlantedBanditConfig(),
        workdir="runs/research/rl_planted",
        seeds=tuple(range(10, 20)),
        variants=(
            Variant(name="grpo (paper)"),
            Variant(name="best of N", learning_rate=0.0),
            Variant(name="grpo rank", reward="rank"),
            Variant(name="grpo separated", reward="failure_separated"),
            Variant(name="grpo ent 0.1", entropy_weight=0.1),
            Variant(name="grpo ent 0.3", entropy_weight=0.3),
            Variant(name="grpo count 0.3", count_weight=0.3),
            Variant(name="grpo count 1", count_weight=1.0),
            Variant(name="grpo new 0.3", novelty_weight=0.3),
            Variant(name="top_k", advantage="top_k"),
            Variant(name="top_k ent 0.1", advantage="top_k", entropy_weight=0.1),
            Variant(name="top_k ent 0.3", advantage="top_k", entropy_weight=0.3),
            Variant(name="top_k count 1", advantage="top_k", count_weight=1.0),
            Variant(name="top_k new 0.3", advantage="top_k", novelty_weight=0.3),
            Variant(
                name="top_k separated count 1",
                reward="failure_separated",
                advantage="top_k",
                count_weight=1.0,
            ),
        ),
    )
