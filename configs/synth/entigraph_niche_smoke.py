"""EntiGraph on ten real stories with scripted replies: checks the real path's data and prices it before any key is used.

Command: python -m synth.main --config configs/synth/entigraph_niche_smoke.py sources.root=DATA evaluation.0.root=DATA run.dry_run=scripted
where DATA holds niche/stories.jsonl.gz and niche/mcq.jsonl.gz.
"""

from pretrain.data.source import JsonlConfig
from synth.entigraph.relations import EntiGraph
from synth.llm.scripted import ScriptedConfig
from synth.recipe import RecipeConfig
from synth.sources import Sources
from synth.stage import RunConfig
from synth.tasks.quality_qa import NicheQuestions


def get_config() -> RecipeConfig:
    """Ten stories in windows of 6,000 characters, at most 20 entities each."""
    return RecipeConfig(
        sources=Sources(
            sources=(JsonlConfig(name="stories", path="niche/stories.jsonl.gz", id_key="passage_id"),),
            root="data",
            limit=10,
        ),
        generator=EntiGraph(max_entities=20, max_triples=20, window_characters=6000),
        llm=ScriptedConfig(),
        items_per_document=100,
        evaluation=(NicheQuestions(root="data"),),
        run=RunConfig(workdir="runs/synth/entigraph_niche_smoke", num_shards=2),
    )
