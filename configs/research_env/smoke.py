"""Does the whole road work: mutate, sandbox, judge, ledger, search, confirm, page? Seconds on two CPU cores, no key.

Command: python -m research_env.main --config configs/research_env/smoke.py
"""

from research_env.ideator.mutate import MutationIdeas
from research_env.search.recipe import ResearchConfig


def get_config() -> ResearchConfig:
    return ResearchConfig(
        codebase="planted",
        workdir="runs/research/smoke",
        arms=("best_of_n", "explore_exploit"),
        num_candidates=12,
        batch=4,
        epoch_size=4,
        noise_repeats=8,
        max_confirmed=2,
        ideas=MutationIdeas(fault_share=0.1),
    )
