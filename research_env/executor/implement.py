"""From an idea to a diff that applies: several samples at once, then revisions that see the exact error.

The first sample that applies wins (arXiv 2601.14525: ten samples, two revisions). Only whether a diff is accepted decides;
what it does is the environment's business.
"""

import dataclasses
from collections.abc import Mapping

from research_env.diff import DiffFailed, DiffRefused, PathPolicy, read_change
from research_env.ideator.ask import Answer, Asker
from research_env.ideator.context import MAX_IDEA_CHARACTERS, PROMPTS, quote
from research_env.ideator.llm import ModelIdeas, make_request
from synth.prompt import load_prompt

MAX_REASON_CHARACTERS = 2000
MAX_DIFF_CHARACTERS = 20_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Written:
    """A reply that holds a diff, or the best that came: then `reason` says what is wrong with it."""

    text: str
    reason: str
    num_calls: int


def implement(
    asker: Asker,
    config: ModelIdeas,
    *,
    key: str,
    idea: str,
    task: str,
    code: str,
    base: Mapping[str, bytes],
    policy: PathPolicy,
) -> Written:
    """Sample, then revise what was not accepted."""
    system, user = load_prompt("implement", PROMPTS).fill(
        task=task, code=code, idea=quote(idea, 4 * MAX_IDEA_CHARACTERS)
    )
    requests = [
        make_request(config, system, user, key, "implement", number) for number in range(config.num_samples)
    ]
    return revise(asker, config, asker.ask(requests), key=key, idea=idea, code=code, base=base, policy=policy)


def revise(
    asker: Asker,
    config: ModelIdeas,
    answers: list[Answer],
    *,
    key: str,
    idea: str,
    code: str,
    base: Mapping[str, bytes],
    policy: PathPolicy,
) -> Written:
    """The first answer that is accepted, after at most `num_revisions` rounds in which all are corrected."""
    prompt = load_prompt("revise", PROMPTS)
    num_calls = len(answers)
    for turn in range(config.num_revisions + 1):
        reasons = [refusal(answer, base, policy) for answer in answers]
        for answer, reason in zip(answers, reasons, strict=True):
            if not reason:
                return Written(text=answer.text, reason="", num_calls=num_calls)
        if turn == config.num_revisions:
            break
        requests = []
        for number, (answer, reason) in enumerate(zip(answers, reasons, strict=True)):
            system, user = prompt.fill(
                code=code,
                idea=quote(idea, 4 * MAX_IDEA_CHARACTERS),
                diff=quote(answer.text, MAX_DIFF_CHARACTERS),
                reason=quote(reason, MAX_REASON_CHARACTERS),
            )
            requests.append(make_request(config, system, user, key, "revise", turn, number))
        answers = asker.ask(requests)
        num_calls += len(answers)
    return Written(text=answers[0].text, reason=reasons[0], num_calls=num_calls)


def refusal(answer: Answer, base: Mapping[str, bytes], policy: PathPolicy) -> str:
    """Why this answer is no change of `base`, or nothing."""
    if answer.refusal:
        return answer.refusal
    try:
        tree, _ = read_change(answer.text, base, policy)
    except (DiffRefused, DiffFailed) as error:
        return str(error)
    return "the diff changes nothing" if tree == dict(base) else ""
