"""The page: what is measured in samples says of how many."""

from synth.document import Document
from synth.sbp.page import quality_lines
from synth.sbp.quality import Quality


def test_rates_stand_beside_the_number_of_texts_they_are_of(make_shard):
    def texts(name, count):
        return [Document(id=f"{name}{i}", text=f"{name} {i} " + "word " * 20) for i in range(count)]

    shard = make_shard(unique=texts("u", 4), test=texts("t", 9), texts_sbp=texts("s", 3))
    lines = quality_lines(Quality(labels=("sbp",), sample=5).run((), shard=shard))
    assert {line.count("|") for line in lines} == {lines[0].count("|")}
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert rows[0][:2] == ["text", "sampled"]
    assert rows[2][:2] == ["test", "5"]
    assert rows[3][:2] == ["texts_sbp", "3"]
    assert all(row[1] == "duplicates in 1,000,000" for row in rows[4:])
