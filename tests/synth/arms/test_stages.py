"""How an arm is trained: fixed shares of its own text, a checkpoint at every budget, the seed of its replicate; and what no experiment may be."""

from dataclasses import replace
from pathlib import Path

import pytest

from pretrain.config import ConfigError, load_config
from synth.arms.experiment import ArmsConfig
from synth.arms.plan import Arm, Replicate
from synth.arms.stages import OWN_TEXT, Tunings, arm_config

SMOKE = str(Path(__file__).parents[3] / "configs/synth/entigraph_worlds_smoke.py")


@pytest.fixture(scope="module")
def experiment() -> ArmsConfig:
    return load_config(SMOKE)


def test_own_text_and_replay_fill_their_shares_of_the_rows(experiment):
    tuning = experiment.replicates[0].tuning
    config = arm_config(tuning, Path("base"), "corpus.jsonl", Path("work"))
    (stage,) = config.data.stages
    assert stage.weights[OWN_TEXT] == pytest.approx(1 - tuning.replay)
    assert sum(stage.weights.values()) == pytest.approx(1.0)
    assert (config.init, config.run.seed, config.checkpoint.keep_steps) == ("base", 1, (1, 2))


def test_an_arm_without_text_reads_replay_alone(experiment):
    config = arm_config(experiment.replicates[0].tuning, Path("base"), None, Path("work"))
    assert OWN_TEXT not in [source.name for source in config.data.sources]
    assert OWN_TEXT not in config.data.stages[0].weights


def test_texts_made_anew_have_another_path_and_so_another_run(experiment, tmp_path):
    """A finished run of the same config is not looked at again: under one path, new texts would count as learned."""
    (tmp_path / "texts.jsonl.zst").write_bytes(b"some")
    paths = []
    for content in ("a" * 64, "b" * 64, "a" * 64):
        tunings = Tunings(
            replicates=experiment.replicates,
            jobs=experiment.jobs,
            corpora={"seed1-raw": str(tmp_path / "texts.jsonl.zst")},
            corpora_sha256={"seed1-raw": content},
        )
        paths.append(tunings.corpus("seed1-raw", tmp_path / "training"))
        assert Path(paths[-1]).read_bytes() == b"some"
        assert tunings.corpus("seed1-replay_only", tmp_path / "training") is None
    assert paths[0] == paths[2] != paths[1]


def test_a_budget_counts_positions_of_own_text(experiment):
    data, tuning = experiment.replicates[0].tuning.train.data, experiment.replicates[0].tuning
    assert tuning.positions(2) == round(2 * data.batch_rows * data.row_length * 0.75)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget_steps": (0, 2)}, "must rise from 1"),
        ({"budget_steps": (2, 1)}, "must rise from 1"),
        ({"budget_steps": (1, 3)}, "num_steps"),
        ({"replay": 0.0}, "replay must lie"),
    ],
)
def test_a_tuning_that_cannot_be_is_refused(experiment, change, message):
    with pytest.raises(ConfigError, match=message):
        replace(experiment.replicates[0].tuning, **change)


def test_replicates_must_have_the_same_arms(experiment):
    (one,) = experiment.replicates
    other = replace(one, name="other", arms=one.arms[:1])
    with pytest.raises(ConfigError, match="same arms"):
        replace(experiment, replicates=(one, other))


def test_arms_of_a_replicate_must_share_their_sources(experiment):
    (one,) = experiment.replicates
    recipe = one.arms[0].recipe
    assert recipe is not None
    moved = replace(recipe, sources=replace(recipe.sources, scenery=0.5))
    with pytest.raises(ConfigError, match="same sources"):
        Replicate(
            name="x",
            questions=one.questions,
            base=one.base,
            tuning=one.tuning,
            arms=(one.arms[0], Arm(name="y", recipe=moved)),
        )


def test_replay_of_recurring_worlds_shares_no_name_with_the_niche_of_its_seed(experiment):
    (one,) = experiment.replicates
    sources = one.arms[0].recipe
    assert sources is not None
    niche = {name for world, _, _ in sources.sources.tell() for name in world.entities}
    for train in (one.base, one.tuning.train):
        (recurring,) = [s for s in train.data.sources if s.name == "recurring"]
        assert recurring.world.seed == train.run.seed == 1
        assert not niche & {name for world in recurring.worlds() for name in world.entities}
