"""Does successive halving work on the whole road? Six mutations an arm on a third, then all of the template's budget.

Command: python -m research_env.main --config configs/research_env/smoke_halving.py
"""

from research_env.ideator.mutate import MutationIdeas
from research_env.search.recipe import ResearchConfig
from research_env.search.rungs import HalvingConfig


def get_config() -> ResearchConfig:
    return ResearchConfig(
        codebase="template",
        workdir="runs/research/smoke_halving",
        arms=("best_of_n", "explore_exploit"),
        num_candidates=6,
        batch=3,
        epoch_size=3,
        noise_repeats=3,
        max_confirmed=1,
        halving=HalvingConfig(eta=3, survivor_share=0.1),
        ideas=MutationIdeas(),
    )
