"""Search against control on a byte language model: 24 mutation ideas in each arm, about three minutes on two CPU cores.

Command: python -m research_env.main --config configs/research_env/toy.py
"""

from research_env.search.recipe import ResearchConfig


def get_config() -> ResearchConfig:
    return ResearchConfig(
        codebase="toy",
        workdir="runs/research/toy",
        arms=("best_of_n", "explore_exploit"),
        num_candidates=24,
        batch=8,
        epoch_size=8,
        noise_repeats=8,
        max_confirmed=3,
    )
