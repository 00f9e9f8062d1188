"""Does search find a better way to train a small language model than independent ideas do?

48 mutation ideas, 24 in each arm, on the byte language model of the `toy` task; no key, no network, two CPU cores. The best
of each arm is confirmed on fresh seeds, paired with the baseline on the same ones, and the page shows both arms.
Command: python -m research_env.main --config configs/research_env/quickstart.py
"""

from research_env.search.recipe import ResearchConfig


def get_config() -> ResearchConfig:
    return ResearchConfig(
        codebase="toy",
        workdir="runs/research/quickstart",
        arms=("best_of_n", "explore_exploit"),
        num_candidates=24,
        batch=6,
        epoch_size=6,
        noise_repeats=8,
        max_confirmed=3,
    )
