"""A shard of a stage whose inputs are given as documents."""

import pytest

from synth.llm.budget import Budget
from synth.shards import SUFFIX, LineWriter, shard_stem
from synth.stage import Shard, Tally


@pytest.fixture
def make_shard(tmp_path):
    """`make_shard(index, count, unique=documents, ..)`: files as the stages would have left them."""

    def make(index=0, count=1, *, stage="stage", **inputs):
        needed = {}
        for name, documents in inputs.items():
            paths = []
            for part in range(count):
                paths.append(tmp_path / name / (shard_stem(part, count) + SUFFIX))
                with LineWriter(paths[-1]) as writer:
                    for document in documents[part::count]:
                        writer.write(document.to_line())
                    writer.commit()
            needed[name] = tuple(paths)
        (tmp_path / stage).mkdir(exist_ok=True)
        return Shard(
            index=index,
            count=count,
            recipe="recipe",
            scratch=tmp_path / stage / shard_stem(index, count),
            needed=needed,
            budget=Budget(),
            tally=Tally(),
        )

    return make
