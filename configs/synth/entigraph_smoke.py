"""EntiGraph on two fictional documents with the perfect reader as the language model: seconds, no key, no network.

Command: python -m synth.main --config configs/synth/entigraph_smoke.py
Result: runs/synth/entigraph_smoke/report.md and corpus/00000-of-00001.jsonl.zst, the texts for pretrain.
"""

from synth.entigraph.relations import EntiGraph
from synth.recipe import RecipeConfig
from synth.stage import RunConfig
from synth.worlds.niche import WorldDocuments, WorldQuestions
from synth.worlds.reader import ReaderConfig
from synth.worlds.world import WorldConfig


def get_config() -> RecipeConfig:
    """Two worlds of 17 entities and 24 facts; all pairs and 200 triples of each."""
    documents = WorldDocuments(world=WorldConfig(seed=1, num_documents=2))
    return RecipeConfig(
        sources=documents,
        generator=EntiGraph(max_triples=200),
        llm=ReaderConfig(),
        evaluation=(WorldQuestions(documents=documents),),
        run=RunConfig(workdir="runs/synth/entigraph_smoke", num_shards=2),
    )
