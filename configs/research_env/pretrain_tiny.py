"""Does research improve this repository's own trainer? The codebase is pretrain/, the recipe a small decoder on bytes.

A candidate costs about 20 cpu-seconds, most of them compiling: ideas change constants that are compiled into the step, so only
what the baseline compiled too comes from the cache. 20 ideas an arm are about 20 minutes on two quiet CPU cores.
Command: python -m research_env.main --config configs/research_env/pretrain_tiny.py
"""

from research_env.ideator.mutate import MutationIdeas
from research_env.search.recipe import ResearchConfig


def get_config() -> ResearchConfig:
    return ResearchConfig(
        codebase="pretrain_tiny",
        workdir="runs/research/pretrain_tiny",
        arms=("best_of_n", "explore_exploit"),
        num_candidates=20,
        batch=5,
        epoch_size=5,
        noise_repeats=8,
        max_confirmed=2,
        # Left alone: what the judge dictates, and how the scan is laid out.
        ideas=MutationIdeas(focus=("recipe.py",), frozen=("VOCAB", "ROW", "scan_layers", "chunk_tokens")),
    )
