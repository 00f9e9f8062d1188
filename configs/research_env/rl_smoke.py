"""Does learning work through the sandbox: real diffs of mutations, run and judged, with one among them that fails on purpose?

Too few samples to show anything about variants. `bandit.codebase=` names another task or a folder; all runs of an epoch share
a seed, so an epoch costs at most one run for each idea, and the same command again runs nothing.
Command: python -m research_env.main --config configs/research_env/rl_smoke.py
Hardware, time: two minutes on one core of a machine that was busy with other runs.
"""

from research_env.ideator.mutate import MutationIdeas
from research_env.rl.bandit import CodebaseBanditConfig
from research_env.rl.experiment import IdeatorRlConfig
from research_env.rl.learn import Variant


def get_config() -> IdeatorRlConfig:
    return IdeatorRlConfig(
        bandit=CodebaseBanditConfig(codebase="planted", num_ideas=8, ideas=MutationIdeas(fault_share=0.4)),
        workdir="runs/research/rl_smoke",
        seeds=(0,),
        num_epochs=10,
        samples_per_epoch=8,
        shares_seed=True,
        variants=(
            Variant(name="grpo (paper)"),
            Variant(name="top_k ent 0.3", advantage="top_k", entropy_weight=0.3),
        ),
    )
