"""Is search worth more than independent ideas on this repository's own trainer, at equal device-seconds?

Three campaigns of each arm, 150 processor seconds an arm (about 20 candidates), the picks on five fresh paired seeds. About
40 minutes on two CPU cores that others use too.
Command: python -m research_env.main --config configs/research_env/compare_pretrain_tiny.py
"""

from research_env.ideator.mutate import MutationIdeas
from research_env.search.compare import CompareConfig
from research_env.search.recipe import ResearchConfig


def get_config() -> CompareConfig:
    return CompareConfig(
        workdir="runs/research/compare_pretrain_tiny",
        num_campaigns=3,
        max_device_s=150.0,
        num_fresh_seeds=5,
        campaign=ResearchConfig(
            codebase="pretrain_tiny",
            workdir="",  # each campaign has a folder in the comparison's
            arms=("best_of_n", "explore_exploit", "greedy"),
            batch=5,
            epoch_size=5,
            noise_repeats=8,
            ideas=MutationIdeas(focus=("recipe.py",), frozen=("VOCAB", "ROW", "scan_layers", "chunk_tokens")),
        ),
    )
