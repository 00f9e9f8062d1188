"""Last-word prediction (LAMBADA): would greedy decoding write the word, and how likely is it."""

import dataclasses
from collections.abc import Sequence

from pretrain.evals.likelihood import Scorer, continuation_scores
from pretrain.evals.tasks import LastWord
from pretrain.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class LastWordResult:
    """What came of one passage."""

    id: str
    logprob: float
    greedy: bool

    @property
    def metrics(self) -> dict[str, float]:
        return {"accuracy": float(self.greedy), "nats_per_word": -self.logprob}


def score_last_words(
    scorer: Scorer,
    tokenizer: Tokenizer,
    items: Sequence[LastWord],
    *,
    prefix: str = "",
    add_bos: bool = False,
) -> list[LastWordResult]:
    """One result for each passage; `prefix` stands before every context."""
    pairs = [(prefix + item.context, item.word) for item in items]
    scores = continuation_scores(scorer, tokenizer, pairs, add_bos)
    return [
        LastWordResult(id=item.id, logprob=logprob, greedy=greedy)
        for item, (logprob, greedy) in zip(items, scores, strict=True)
    ]
