"""From a crash to a new diff: the idea, the diff, the status and the end of the log go back to the model.

The paper repairs patches only; most of its failures were crashes. The new diff is against the original code, and a child of
the node that crashed.
"""

from collections.abc import Mapping

from research_env.diff import PathPolicy
from research_env.executor.implement import MAX_DIFF_CHARACTERS, MAX_REASON_CHARACTERS, Written, revise
from research_env.ideator.ask import Asker
from research_env.ideator.context import MAX_IDEA_CHARACTERS, MAX_LOG_CHARACTERS, PROMPTS, quote
from research_env.ideator.llm import ModelIdeas, make_request
from research_env.records import Node, Result
from synth.prompt import load_prompt


def repair(
    asker: Asker,
    config: ModelIdeas,
    node: Node,
    result: Result,
    *,
    key: str,
    code: str,
    base: Mapping[str, bytes],
    policy: PathPolicy,
) -> Written:
    """One corrected diff, revised until it applies."""
    log = result.log_tail[-MAX_LOG_CHARACTERS:] if result.status.shows_log else ""
    system, user = load_prompt("repair", PROMPTS).fill(
        code=code,
        idea=quote(node.idea, 4 * MAX_IDEA_CHARACTERS),
        diff=quote(node.diff, MAX_DIFF_CHARACTERS),
        status=result.status.value,
        reason=quote(result.reason, MAX_REASON_CHARACTERS),
        log=quote(log, MAX_LOG_CHARACTERS),
    )
    answers = asker.ask([make_request(config, system, user, key, "repair")])
    return revise(
        asker, config, answers, key=f"{key}/repair", idea=node.idea, code=code, base=base, policy=policy
    )
