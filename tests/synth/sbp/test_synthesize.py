"""Synthesis: every seed equally often and once, the same text whatever the shard, bad texts counted and left out."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from pretrain.config import ConfigError
from pretrain.tokenizer import ByteTokenizer
from synth.document import Document, Failure
from synth.sbp.synthesize import Opened, Sampled, SynthesisRule, Synthesize

TOKENIZER = ByteTokenizer()
SEEDS = [
    Document(id=f"d{i}", text=f"document {i} says " + " ".join(f"w{i}x{j}" for j in range(20)))
    for i in range(10)
]


@dataclass(frozen=True, kw_only=True)
class RuleSamplerConfig:
    """A sampler by rule: the random seed and the prompt's length decide the text; every fifth is bad in some way."""

    max_prompt_tokens: int = 500

    def sampling(self):
        return {"temperature": 1.0}

    def build(self, checkpoint, tokenizer):
        return self

    def sample(self, prompts):
        return [self._one(prompt) for prompt in prompts]

    def _one(self, prompt):
        fate = prompt.seed % 5
        text = f"{prompt.seed} after {len(prompt.ids)}"
        if fate == 0:
            text = TOKENIZER.decode(prompt.ids)  # a copy of the seed, or nothing without one
        if fate == 1:
            text = "a b c d e f g h i j k l m n o p q r s t " * 4
        return Sampled(ids=tuple(TOKENIZER.encode(text)), ended=fate != 2)


def opened(shard, stage):
    return Opened(checkpoint=Path("nowhere"), params_sha256="0" * 64, tokenizer=TOKENIZER)


def stage(*, conditional=True, **rule):
    return Synthesize(
        writer="tune_pair",
        label="sbp" if conditional else "self",
        conditional=conditional,
        sampler=RuleSamplerConfig(),
        opener=opened,
        rule=SynthesisRule(samples_per_document=6, **rule),
    )


def test_every_seed_is_used_exactly_as_often_as_asked(make_shard):
    made = list(stage().run((), shard=make_shard(unique=SEEDS)))
    keys = [
        m.item if isinstance(m, Failure) else f"sbp:{m.meta['seed_document']}:{m.meta['sample']}"
        for m in made
    ]
    assert sorted(keys) == sorted(f"sbp:d{i}:{n}" for i in range(10) for n in range(6))


def test_bad_texts_are_left_out_with_their_reason(make_shard):
    shard = make_shard(unique=SEEDS)
    made = list(stage().run((), shard=shard))
    reasons = Counter(m.reason for m in made if isinstance(m, Failure))
    assert set(reasons) == {"copied", "looping", "truncated"}
    assert all(m.dropped for m in made if isinstance(m, Failure))
    alone = list(stage(conditional=False).run((), shard=make_shard(unique=SEEDS)))
    assert "empty" in {m.reason for m in alone if isinstance(m, Failure)}


def test_texts_that_came_to_the_limit_are_kept_where_asked(make_shard):
    def made(**rule):
        return list(stage(**rule).run((), shard=make_shard(unique=SEEDS)))

    cut = {m.item for m in made() if isinstance(m, Failure) and m.reason == "truncated"}
    kept = made(keep_truncated=True)
    assert cut
    assert {m.reason for m in kept if isinstance(m, Failure)} == {"copied", "looping"}
    assert cut <= {
        f"sbp:{m.meta['seed_document']}:{m.meta['sample']}" for m in kept if isinstance(m, Document)
    }


def test_every_text_names_its_seed_its_model_and_its_draw(make_shard):
    texts = [m for m in stage().run((), shard=make_shard(unique=SEEDS)) if isinstance(m, Document)]
    assert len({t.id for t in texts}) == len(texts)
    assert len({t.meta["key"] for t in texts}) == len(texts)
    for text in texts:
        assert text.parents == (text.meta["seed_document"],)
        assert text.made_by == "recipe"
        assert text.meta["model"] == "0" * 64
        assert str(text.meta["key"]) in text.text


def test_texts_without_a_first_document_have_no_parent(make_shard):
    texts = list(stage(conditional=False).run((), shard=make_shard(unique=SEEDS)))
    assert all(t.parents == () for t in texts if isinstance(t, Document))
    assert all(t.text.endswith("after 1") for t in texts if isinstance(t, Document))


def test_texts_are_the_same_in_any_number_of_shards(make_shard):
    def by_key(count):
        found = {}
        for index in range(count):
            for made in stage().run((), shard=make_shard(index, count, unique=SEEDS)):
                if isinstance(made, Document):
                    found[made.meta["seed_document"], made.meta["sample"]] = (made.id, made.text)
        return found

    assert by_key(1) == by_key(2) == by_key(7)


def test_a_long_seed_keeps_its_end(make_shard):
    long = [Document(id="long", text="x" * 600 + "the end")]
    prompts = []

    class Watching(RuleSamplerConfig):
        def sample(self, given):
            prompts.extend(given)
            return super().sample(given)

    synthesize = Synthesize(
        writer="tune_pair",
        label="sbp",
        conditional=True,
        sampler=Watching(),
        opener=opened,
        rule=SynthesisRule(),
    )
    list(synthesize.run((), shard=make_shard(unique=long)))
    assert all(len(p.ids) == 500 and TOKENIZER.decode(p.ids).endswith("the end") for p in prompts)


def test_a_rule_refuses_what_it_cannot_be():
    with pytest.raises(ConfigError) as error:
        SynthesisRule(samples_per_document=0, copied_at=0.0)
    assert len(error.value.faults) == 2
