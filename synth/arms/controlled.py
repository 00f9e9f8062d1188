"""One replicate of the experiment in controlled worlds: documents, questions, the base's reading, and the usual arms.

The arms differ in what stands in their text. `raw`: the documents, again and again. `shuffled`: the facts in new
orders and other words, each told from the end that the document tells it from; the control for mere repetition in
explicit words. `rephrase`: three styles, the third turns facts around. `entigraph`: pairs and triples of entities,
with what follows from the facts. `entigraph_no_compose`: the same without what follows.
"""

from dataclasses import replace

from pretrain.config import stable_seed
from pretrain.data.source import SourceConfig
from pretrain.train import TrainConfig
from synth.arms.plan import Arm, Replicate, Tuning
from synth.baselines.repeat import Repeat
from synth.baselines.rephrase import Rephrase
from synth.entigraph.relations import EntiGraph
from synth.generator import Generator
from synth.recipe import RecipeConfig
from synth.worlds.background import MadeSource, Recurring, RecurringQuestions
from synth.worlds.niche import WorldDocuments, WorldQuestions
from synth.worlds.reader import ReaderConfig
from synth.worlds.world import WorldConfig


def world_replicate(
    *,
    seed: int,
    world: WorldConfig,
    base: TrainConfig,
    tuning: Tuning,
    versions: int,
    max_triples: int | None,
) -> Replicate:
    """Worlds, base and orders of one seed: `world` and all that `base` and `tuning` read are taken with this seed.

    `versions` is how often the raw, shuffled and rephrased texts exist, `max_triples` bounds those of EntiGraph.
    """
    world = replace(world, seed=seed)
    documents = WorldDocuments(world=world)
    base = _seeded(base, world)
    recurring = next((source for source in base.data.sources if isinstance(source, Recurring)), None)

    def arm(name: str, generator: Generator, *, compose: bool = True, open_book: bool = False) -> Arm:
        recipe = RecipeConfig(
            sources=documents, generator=generator, llm=ReaderConfig(compose=compose), seed=seed
        )
        return Arm(name=name, recipe=recipe, open_book=open_book)

    shuffled = Rephrase(styles=("medium",), versions=versions, window_characters=None)
    entigraph = EntiGraph(max_triples=max_triples)
    return Replicate(
        name=f"seed{seed}",
        questions=WorldQuestions(documents=documents),
        background=RecurringQuestions(recurring=recurring) if recurring else None,
        base=base,
        tuning=replace(tuning, train=_seeded(tuning.train, world)),
        arms=(
            Arm(name="replay_only", recipe=None),
            arm("raw", Repeat(times=versions)),
            arm("shuffled", shuffled),
            arm("rephrase", Rephrase(versions=-(-versions // 3), window_characters=None)),
            arm("entigraph", entigraph, open_book=True),
            arm("entigraph_no_compose", entigraph, compose=False),
        ),
    )


def _seeded(train: TrainConfig, world: WorldConfig) -> TrainConfig:
    """The run with the seed of `world`: its draws, its order, and the texts it reads beside that world."""
    sources = tuple(_seeded_source(source, world) for source in train.data.sources)
    return replace(train, data=replace(train.data, sources=sources), run=replace(train.run, seed=world.seed))


def _seeded_source(source: SourceConfig, world: WorldConfig) -> SourceConfig:
    if not isinstance(source, MadeSource):
        return source
    found = replace(source, seed=stable_seed("replicate", world.seed, source.seed) % 2**31)
    return replace(found, world=world) if isinstance(found, Recurring) else found
