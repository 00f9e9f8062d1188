"""Every claim has one verdict, a human summary is its own unit, and a judge that guesses is marked."""

import asyncio
import json
import random

import pytest

from synth.llm.api import Reply
from synth.tasks.claims import ClaimsConfig, Judged, compare, judge_summaries, kappa, write_summaries

SOURCES = {"d": "red blue", "e": "green"}
CONFIG = ClaimsConfig(twice=1.0)


class Judge:
    """A claim is its words: salient if its last word is in the source, cosmetic if another is, else false."""

    identity = {"model": "judge"}

    def __init__(self, *, noise=0.0, broken=()):
        self._noise, self._broken, self._calls = noise, set(broken), 0
        self.seen: list[str] = []

    async def generate(self, request):
        self._calls += 1
        self.seen.append(request.system + request.user)
        if self._calls in self._broken:
            return Reply(text="no JSON at all", finish="stop")
        if "Summary:" in request.user:
            claims = request.user.rpartition("Summary:\n")[2].split(". ")
            return Reply(text=json.dumps({"claims": claims}), finish="stop")
        source, _, claim = request.user.rpartition("Text:\n")[2].partition("\n\nClaim:\n")
        words = claim.strip().strip(".").split()
        verdict = "salient" if words[-1] in source else "cosmetic" if words[0] in source else "false"
        chance = random.Random(request.seed)
        if chance.random() < self._noise:
            verdict = chance.choice(("false", "cosmetic", "salient"))
        return Reply(text=json.dumps({"verdict": verdict}), finish="stop")


def judged(summaries, judge=None):
    return asyncio.run(judge_summaries(judge or Judge(), summaries, SOURCES, CONFIG))


def test_every_claim_gets_one_verdict():
    (one, two) = judged({"d": "it is red. blue it isn't. it is pink", "e": "it is green"})
    assert one.verdicts == ("salient", "cosmetic", "false")
    assert two.verdicts == ("salient",)
    assert sum(one.count(verdict) for verdict in ("false", "cosmetic", "salient")) == 3


def test_a_human_summary_is_its_own_unit():
    human = judged({"d": "it is red. it is blue. red it isn't", "e": "it is green"})
    score = compare(human, human)
    assert (score.salient, score.false, score.num_claims, score.kappa) == (1.0, 0.0, 4, 1.0)
    assert not score.is_marked


def test_a_longer_false_summary_scores_more_false_and_not_more_salient_claims():
    human = judged({"d": "it is red", "e": "it is green"})
    model = judged({"d": "it is red. it is black. it is white", "e": "it is grey"})
    score = compare(model, human)
    assert (score.salient, score.false) == (0.5, 1.5)


def test_a_judge_that_guesses_is_marked():
    summary = ". ".join(["it is red", "it is pink", "red it isn't"] * 20)
    noisy = judged({"d": summary, "e": "it is green"}, Judge(noise=1.0))
    score = compare(noisy, judged({"d": "it is red", "e": "it is green"}))
    assert score.kappa is not None
    assert abs(score.kappa) < 0.5
    assert score.is_marked


def test_the_judge_reads_no_name_of_an_arm_and_what_it_garbles_is_counted():
    judge = Judge(broken=(1, 4, 5, 6))
    (one,) = asyncio.run(
        judge_summaries(judge, {"d": "it is red. it is blue"}, SOURCES, ClaimsConfig(twice=0.0))
    )
    assert (one.verdicts, one.unread) in {(("salient",), 1), (("salient", "salient"), 0)}
    assert not any("entigraph" in text or "arm" in text.split() for text in judge.seen)


def test_a_summary_that_cannot_be_split_is_unread():
    (one,) = asyncio.run(judge_summaries(Judge(broken=(1, 2, 3)), {"d": "x"}, SOURCES, CONFIG))
    assert (one.verdicts, one.unread) == ((), 1)


@pytest.mark.parametrize(
    ("pairs", "value"),
    [
        ([("false", "false"), ("salient", "salient")], 1.0),
        ([("false", "salient"), ("salient", "false")], -1.0),
        ([("false", "false"), ("false", "salient"), ("salient", "false"), ("salient", "salient")], 0.0),
        ([("false", "false")], 1.0),
    ],
)
def test_kappa(pairs, value):
    assert kappa(pairs) == pytest.approx(value)
    assert kappa([]) is None


def test_other_documents_cannot_be_compared():
    with pytest.raises(ValueError, match="same documents"):
        compare([Judged(document="d", verdicts=("salient",))], [Judged(document="e", verdicts=("salient",))])


def test_a_summary_is_asked_for_at_every_length_by_name_alone():
    class Writer:
        identity = {"model": "writer"}

        async def generate(self, request):
            return Reply(text=request.user, finish="stop")

    found = asyncio.run(write_summaries(Writer(), {"d": '"D" by E'}, ClaimsConfig(words=(5, 50))))
    assert {words: texts["d"] for words, texts in found.items()} == {
        5: 'Write a summary of "D" by E in about 5 words.',
        50: 'Write a summary of "D" by E in about 50 words.',
    }
