"""The whole: what is not a config is refused before anything runs, and numbers side by side are of the same texts."""

from pathlib import Path

import pytest

from pretrain.config import ConfigError, apply_overrides, load_config
from synth.document import Document
from synth.sbp.parts import TEST
from synth.sbp.pipeline import mean_floors
from synth.shards import SUFFIX, LineWriter, shard_stem
from synth.stage import StageResult
from synth.worlds.concepts import ConceptFloor, make_concept_world

SMOKE = load_config(Path(__file__).parents[3] / "configs/synth/sbp_smoke.py")


def test_a_sampler_of_another_model_is_refused_before_anything_is_trained():
    with pytest.raises(ConfigError, match="sampler.model must be learner.model"):
        apply_overrides(SMOKE, ["learner.model.hidden_width=64"])
    both = apply_overrides(SMOKE, ["learner.model.hidden_width=64", "sampler.model.hidden_width=64"])
    assert both.sampler.model == both.learner.model


def test_a_floor_of_another_world_is_refused():
    with pytest.raises(ConfigError, match="floor.world must be data.world"):
        apply_overrides(SMOKE, ["data.world.genre_share=0.4"])
    apply_overrides(SMOKE, ["data.world.genre_share=0.4", "floor.world.genre_share=0.4"])
    with pytest.raises(ConfigError, match="tokenizer.words must be"):
        apply_overrides(SMOKE, ["data.world.num_words=70", "floor.world.num_words=70"])


def test_the_floor_is_that_of_all_test_documents_of_all_seeds(tmp_path):
    world = make_concept_world(SMOKE.data.world)
    found, per_seed = [], []
    for seed in range(2):
        indices = range(1000 * seed, 1000 * seed + 700)
        words = [world.document(index)[2] for index in indices]
        per_seed.append(sum(map(world.alone_nats, words)) / sum(len(w) + 1 for w in words))
        folder = tmp_path / f"seed{seed}"
        with LineWriter(folder / (shard_stem(0, 1) + SUFFIX)) as writer:
            for index, own in zip(indices, words, strict=True):
                writer.write(Document(id=str(index), text=world.write(own)).to_line())
            writer.commit()
        result = StageResult(
            name=TEST, folder=folder, recipe="", content="", shard_count=1, counts={}, cost_usd=0.0, partial="", num_run=0
        )  # fmt: skip
        found.append({TEST: result})
    floors = mean_floors(ConceptFloor(world=SMOKE.data.world), found)
    assert floors == {"best possible": pytest.approx(sum(per_seed) / 2, abs=1e-9)}
