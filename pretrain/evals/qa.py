"""Open questions by exact match: one greedy answer, up to what ends it in its task, against the answers that count.

Answers are compared as in SQuAD (arXiv 1606.05250): case, punctuation, articles and runs of blanks do not count. Where
nothing else is left of an answer ("The The", "!") they do: there every empty line would be right.
"""

import dataclasses
import re
import string
from collections.abc import Sequence
from typing import Protocol

from pretrain.evals.tasks import Question
from pretrain.generate import Completion, Request
from pretrain.tokenizer import Tokenizer

_PUNCTUATION = str.maketrans("", "", string.punctuation)


class Writer(Protocol):
    """What continues prompts; `generate.Generator` is one."""

    def generate(self, requests: Sequence[Request]) -> list[Completion]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class QaResult:
    """What came of one question."""

    id: str
    answer: str
    exact: bool

    @property
    def metrics(self) -> dict[str, float]:
        return {"exact_match": float(self.exact)}


def normal_form(answer: str) -> str:
    """What is compared of an answer; empty for blanks alone."""
    plain = answer.lower().translate(_PUNCTUATION)
    words = re.sub(r"\b(a|an|the)\b", " ", plain)
    return next((" ".join(t.split()) for t in (words, plain, answer.lower()) if t.strip()), "")


def answer_questions(
    writer: Writer,
    tokenizer: Tokenizer,
    items: Sequence[Question],
    *,
    prefix: str = "",
    add_bos: bool = False,
    max_new_tokens: int = 24,
) -> list[QaResult]:
    """One greedy answer for each question; `prefix` stands before every prompt."""
    begin = [tokenizer.bos_id] if add_bos else []
    requests = [
        Request(
            ids=tuple(begin + tokenizer.encode(prefix + item.prompt)),
            max_new_tokens=max_new_tokens,
            temperature=0.0,
            stop=item.stop,
            stop_ids=(tokenizer.eos_id,),
        )
        for item in items
    ]
    results = []
    for item, completion in zip(items, writer.generate(requests), strict=True):
        answer = completion.text.strip()
        right = bool(answer) and normal_form(answer) in {normal_form(a) for a in item.answers}
        results.append(QaResult(id=item.id, answer=answer, exact=right))
    return results
