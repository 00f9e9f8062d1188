"""A run is what it learned from: other texts, pairs or tokenizers under the same stage are another run."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pretrain.config import fingerprint, load_config
from pretrain.data.source import BadRecord
from pretrain.jobs.api import Done, Job, Outcome
from pretrain.rundir import write_json_atomic
from pretrain.tokenizer import BpeConfig
from synth.document import Document
from synth.sbp.trials import RunTrials
from synth.sbp.tune import MakeTokenizer, Pretrain, Tune, part_texts, workdir_of
from synth.shards import SUFFIX, LineWriter, shard_stem

SMOKE = load_config(Path(__file__).parents[3] / "configs/synth/sbp_smoke.py")
PARAMS = "0" * 64


class Asked:
    """Jobs that are written down and not run."""

    def __init__(self):
        self.configs = {}

    def build(self, folder: Path) -> "Asked":
        return self

    def run(self, jobs: Iterable[Job]) -> Iterator[Outcome]:
        for job in jobs:
            self.configs[job.name] = job.arguments[0]
            yield Done(name=job.name, value={"params_sha256": PARAMS}, wall_s=0.0)


@dataclass(frozen=True)
class Inputs:
    """Documents of the stages before; each may say something else."""

    make_shard: object
    tmp_path: Path

    def shard(self, **other):
        def part(name, says):
            return [Document(id=f"{name}{i}", text=f"{name} {says} {i} " + "word " * 200) for i in range(6)]

        names = ("unique", "oracle", "validation", "test", "texts_sbp", "texts_random", "texts_self")
        given = {name: part(name, other.get(name, "says")) for name in names}
        pairs = [
            Document(id=f"{p}{k}", text="", parents=(f"{p}0", f"{p}1"), meta={"kind": k, "part": p})
            for p in ("unique", "validation")
            for k in ("pair", "random")
        ]
        (self.tmp_path / "tokenizer").mkdir(exist_ok=True)
        first = self.make_shard(stage="tokenizer", unique=given["unique"])
        made = MakeTokenizer(tokenizer=SMOKE.tokenizer).run((), shard=first)
        reference = [Document(id="reference", text="", meta={"params_sha256": PARAMS})]
        write_json_atomic(self.tmp_path / "training/reference/run/summary.json", {"params_sha256": PARAMS})
        return self.make_shard(tokenizer=list(made), reference=reference, pair=pairs, **given)

    def runs(self, **other):
        """The fingerprint of every run that the stages ask for."""
        shard, asked = self.shard(**other), Asked()
        common = {"learner": SMOKE.learner, "jobs": asked}
        stages = (
            Pretrain(**common, num_steps=5),
            *(Tune(**common, tuning=SMOKE.tuning, kind=kind) for kind in ("pair", "random")),
            RunTrials(**common, trials=SMOKE.trials),
        )
        for stage in stages:
            list(stage.run((), shard=shard))
        return {name: fingerprint(config) for name, config in asked.configs.items()}


@pytest.fixture
def inputs(make_shard, tmp_path):
    (tmp_path / "training/reference/run").mkdir(parents=True)
    return Inputs(make_shard, tmp_path)


ALL = {"reference", "tune_pair", "tune_random", "repetition", "sbp", "random_pair", "self_samples", "oracle"}


@pytest.mark.parametrize(
    ("part", "concerned"),
    [
        ("texts_sbp", {"sbp"}),
        ("oracle", {"oracle"}),
        ("unique", ALL - {"oracle"}),
        ("validation", ALL),
        ("test", ALL - {"tune_pair", "tune_random"}),
    ],
)
def test_texts_made_anew_are_another_run_for_whom_they_concern_and_the_same_texts_the_same(
    inputs, part, concerned
):
    before, after = inputs.runs(), inputs.runs(**{part: "says something else"})
    assert {name.split("-")[0] for name in before} == ALL
    assert {name.split("-")[0] for name in before if before[name] != after[name]} == concerned
    assert inputs.runs() == before


def test_another_tokenizer_has_another_name(make_shard):
    paths = set()
    for says in ("one thing", "something else", "one thing"):
        unique = [Document(id="d", text=f"it says {says} and no more")]
        (made,) = MakeTokenizer(tokenizer=BpeConfig(vocab_size=300)).run((), shard=make_shard(unique=unique))
        paths.add(made.meta["config"]["path"])
    assert len(paths) == 2


def test_what_is_read_are_the_shards_needed_and_no_others(inputs):
    shard = inputs.shard()
    beside = shard.needed["unique"][0].with_name(shard_stem(0, 7) + SUFFIX)
    with LineWriter(beside) as writer:
        writer.write(Document(id="old", text="of another number of shards").to_line())
        writer.commit()
    source = part_texts(shard, "unique").source().build(str(workdir_of(shard)))
    found = list(source.documents())
    assert not any(isinstance(d, BadRecord) for d in found)
    assert [d.id for d in found] == [f"unique{i}" for i in range(6)]
