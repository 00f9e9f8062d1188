"""A campaign's config: which codebase, which arms, how many candidates, what they may cost."""

import dataclasses

from pretrain.config import ConfigError, local
from pretrain.jobs.api import JobsConfig
from research_env.choose import Noise, passes_screen, posterior_mean
from research_env.env import AIResearchEnv
from research_env.ideator.llm import ModelIdeas
from research_env.ideator.mutate import MutationIdeas
from research_env.records import Resource
from research_env.sandbox.ladder import SandboxConfig
from research_env.schedule import Budget
from research_env.search.best_of_n import BestOfN
from research_env.search.explore_exploit import ExploreExploit
from research_env.search.greedy import Greedy
from research_env.search.islands import Islands
from research_env.search.makers import Maker, ModelMaker, MutationMaker
from research_env.search.proposal import Search, Told
from research_env.search.rungs import HalvingConfig, Rungs
from research_env.search.tree import Tree

ARMS = ("best_of_n", "greedy", "explore_exploit", "islands", "tree")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResearchConfig:
    """One campaign. Arms see the same codebase, noise and number of candidates."""

    codebase: str
    workdir: str = local()
    resource: str = "1xCPU"
    accelerators: tuple[str, ...] = local(())  # what this host has besides its cores: ("8xH100",)
    seed: int = 0
    arms: tuple[str, ...] = ("best_of_n", "explore_exploit")
    num_candidates: int = 40  # told candidates of each arm
    batch: int = 8
    epoch_size: int = 10  # explore_exploit: ideas an epoch
    noise_repeats: int = 8
    max_confirmed: int = 4
    halving: HalvingConfig | None = None  # None: every candidate runs at full length
    ideas: MutationIdeas | ModelIdeas = MutationIdeas()
    sandbox: SandboxConfig = SandboxConfig()
    jobs: JobsConfig | None = local(
        None
    )  # who runs candidates elsewhere: PoolConfig, RayJobsConfig, SlurmJobsConfig
    budget: Budget = Budget()

    def __post_init__(self) -> None:
        faults = [
            f"arms must be among {', '.join(ARMS)}, got {arm!r}" for arm in self.arms if arm not in ARMS
        ]
        for text in (self.resource, *self.accelerators):
            Resource.parse(text)
        for name in ("num_candidates", "batch", "epoch_size", "max_confirmed"):
            if getattr(self, name) < 1:
                faults.append(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.noise_repeats < 2:
            faults.append(f"noise_repeats must be at least 2 to estimate sigma0, got {self.noise_repeats}")
        if faults:
            raise ConfigError(*faults)


def build_arm(name: str, config: ResearchConfig, noise: Noise) -> Search:
    """The search method of that name."""
    if name == "best_of_n":
        return BestOfN(config.seed)
    if name == "explore_exploit":
        return ExploreExploit(
            config.seed,
            config.epoch_size,
            floor_to=1 if config.epoch_size < 20 else 10,
            mutates_winners=isinstance(config.ideas, MutationIdeas),
        )
    if name == "islands":
        return Islands(config.seed)
    if name == "tree":
        return Tree(config.seed, lambda found: posterior_mean(found, 1, noise, 2 * noise.sigma))
    gains: dict[str, float] = {"": 0.0}

    def is_real(parent: str, item: Told) -> bool:
        assert item.gain is not None
        gains[item.node.id] = item.gain
        return passes_screen(item.gain - gains[parent], noise)

    return Greedy(config.seed, is_real)


def build_rungs(env: AIResearchEnv, name: str, config: ResearchConfig) -> Rungs | None:
    """How long candidates of arm `name` run.

    Raises:
      ConfigError: the task has no rungs below the top.
    """
    return None if config.halving is None else Rungs(env, config.halving, name, config.seed)


def build_maker(env: AIResearchEnv, name: str, config: ResearchConfig, baseline_mean: float) -> Maker:
    """Who turns the wishes of arm `name` into candidates."""
    if isinstance(config.ideas, MutationIdeas):
        return MutationMaker(env, config.ideas, config.seed, name)
    return ModelMaker(env, config.ideas, config.seed, name, baseline_mean)
