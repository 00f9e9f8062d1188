"""Multiple choice by likelihood: the option that the model finds likeliest, raw or per character of its text.

Characters, not bytes, since `acc_norm` of EleutherAI's lm-evaluation-harness, by which models are published, divides by
them (its `acc_bytes` does not); options with letters beyond ASCII would fall otherwise.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from pretrain.evals.likelihood import Scorer, continuation_scores
from pretrain.evals.tasks import Choice
from pretrain.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChoiceResult:
    """What came of one item; `chosen_per_character` divides by the length of the option, without the blank before it."""

    id: str
    gold: int
    logprobs: tuple[float, ...]
    chosen: int
    chosen_per_character: int

    @property
    def metrics(self) -> dict[str, float]:
        return {
            "accuracy": float(self.chosen == self.gold),
            "accuracy_per_character": float(self.chosen_per_character == self.gold),
        }


def score_choices(
    scorer: Scorer, tokenizer: Tokenizer, items: Sequence[Choice], *, prefix: str = "", add_bos: bool = False
) -> list[ChoiceResult]:
    """One result for each item; `prefix` stands before every context. Ties go to the first option."""
    pairs = [
        (prefix + context, continuation)
        for item in items
        for context, continuation in zip(item.contexts, item.continuations, strict=True)
    ]
    scores = iter(continuation_scores(scorer, tokenizer, pairs, add_bos))
    results = []
    for item in items:
        logprobs = np.array([next(scores)[0] for _ in item.continuations])
        lengths = np.array([max(1, len(text.removeprefix(" "))) for text in item.continuations])
        results.append(
            ChoiceResult(
                id=item.id,
                gold=item.gold,
                logprobs=tuple(logprobs.tolist()),
                chosen=int(np.argmax(logprobs)),
                chosen_per_character=int(np.argmax(logprobs / lengths)),
            )
        )
    return results
