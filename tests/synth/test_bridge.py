"""What synth writes is what pretrain reads, and no question of the evaluation is in it."""

import pytest

from pretrain.config import ConfigError
from pretrain.data.source import JsonlConfig
from synth.document import Document, Failure
from synth.entigraph.relations import EntiGraph
from synth.llm.budget import Budget
from synth.quality.overlap import Contamination, Decontaminate
from synth.question import Question
from synth.recipe import RecipeConfig
from synth.shards import LineWriter, read_documents
from synth.stage import RunConfig, Shard, Tally
from synth.tokens import write_prefix
from synth.worlds.niche import WorldDocuments
from synth.worlds.reader import ReaderConfig
from synth.worlds.world import WorldConfig

PLANTED = Question(
    id="q7",
    document="d",
    text="Which of the seven lanterns did the old harbor master light on the night of the flood",
    options=("the red one", "the green one"),
    gold=0,
)


class Words:
    """A tokenizer of spaces."""

    def encode(self, text):
        return text.split()


def test_pretrain_reads_the_corpus_with_every_text_once(tmp_path):
    RecipeConfig(
        sources=WorldDocuments(world=WorldConfig(per_type=(3, 2, 2, 2))),
        generator=EntiGraph(),
        llm=ReaderConfig(),
        run=RunConfig(workdir=str(tmp_path)),
    ).execute(lambda line: None)
    source = JsonlConfig(name="entigraph", path="corpus/*.jsonl.zst").build(str(tmp_path))
    read = [(d.id, d.text) for d in source.documents()]
    written = [(d.id, d.text) for d in read_documents(tmp_path / "corpus" / "00000-of-00001.jsonl.zst")]
    assert read == written
    assert len(read) == 2 * (1 + 36)


def test_budgets_are_exact_and_nest(tmp_path):
    documents = [Document(id=str(i), text="word " * (i % 7 + 1)) for i in range(60)]
    kept = []
    for budget in (10, 40, 160):
        path = tmp_path / f"{budget}.jsonl.zst"
        count, tokens = write_prefix(documents, path, Words(), budget)
        assert tokens <= budget < tokens + len(documents[count].text.split()) + 1
        kept.append([d.id for d in read_documents(path)])
    assert kept[0] == kept[1][: len(kept[0])]
    assert kept[1] == kept[2][: len(kept[1])]
    with pytest.raises(ConfigError, match="write more texts or lower the budget"):
        write_prefix(documents, tmp_path / "more.jsonl.zst", Words(), 10**6)
    assert not list(tmp_path.glob("more*"))


def test_a_planted_question_is_found_and_a_quotation_of_the_parent_is_not():
    search = Contamination([PLANTED])
    leak = f"A quiz! {PLANTED.text.upper()}: the red one?"
    assert search.first_hit(leak, ["The harbor was quiet."])[0] == "q7"
    quotation = f"As the book says: {PLANTED.text}."
    assert search.first_hit(quotation, ["The harbor was quiet."]) is not None
    assert search.first_hit(quotation, [f"It says: {PLANTED.text} and more."]) is None
    assert search.first_hit("The old harbor master lit the red one.", []) is None


class Planted:
    """One question."""

    def load(self):
        return [PLANTED]


def test_decontamination_removes_reports_and_is_idempotent(tmp_path):
    with LineWriter(tmp_path / "s.jsonl.zst") as writer:
        writer.write(Document(id="d", text="The harbor was quiet.").to_line())
        writer.commit()
    shard = Shard(
        index=0,
        count=1,
        recipe="r",
        scratch=tmp_path / "x",
        needed={"sources": (tmp_path / "s.jsonl.zst",)},
        budget=Budget(),
        tally=Tally(),
    )
    stage = Decontaminate(questions=(Planted(),))
    texts = [Document(id="a", text="A clean text.", parents=("d",))]
    texts.append(Document(id="b", text=f"Quiz: {PLANTED.text}? The red one.", parents=("d",)))
    once = list(stage.run(texts, shard=shard))
    assert once[0] == texts[0]
    assert isinstance(once[1], Failure)
    assert (once[1].document, once[1].item, once[1].reason) == ("b", "q7", "contaminated")
    assert list(stage.run(once[:1], shard=shard)) == once[:1]
