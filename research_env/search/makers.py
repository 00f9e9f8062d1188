"""From a search's wish to a candidate: by mutation operators, or by models that have ideas and write diffs."""

import json
from collections.abc import Sequence
from typing import Any, Protocol

from research_env.env import AIResearchEnv, Candidate
from research_env.executor.implement import implement
from research_env.executor.repair import repair
from research_env.ideator.ask import Asker
from research_env.ideator.bandit import Bandit
from research_env.ideator.context import code_text, task_text
from research_env.ideator.llm import ModelIdeas, propose
from research_env.ideator.mutate import MutationIdeas
from research_env.records import Node, Result
from research_env.search.proposal import Proposal, Told


class Maker(Protocol):
    """Makes candidates; a pure function of the campaign's seed, the slot's key and what it was told."""

    def make(self, proposal: Proposal, key: str) -> Candidate:
        """A candidate, good or refused, for slot `key`."""
        ...

    def repair(self, proposal: Proposal, candidate: Candidate, result: Result, turn: int) -> Candidate | None:
        """Another try at a candidate that failed, or None."""
        ...

    def tell(self, told: Sequence[Told]) -> None:
        """The outcomes of the last candidates."""
        ...


class MutationMaker:
    """Operators on constants; nothing is repaired."""

    def __init__(self, env: AIResearchEnv, ideas: MutationIdeas, seed: int, arm: str):
        self._env, self._arm = env, arm
        self._ideator = ideas.build(seed)

    def make(self, proposal: Proposal, key: str) -> Candidate:
        """A mutation of the proposal's base, sometimes crossed with another parent."""
        env = self._env
        base_node = env.ledger.node(proposal.base) if proposal.base else None
        if base_node is not None and not (
            base_node.tree_digest and self._ideator.can_change(env.tree_of(base_node), env.task.policy)
        ):
            base_node = (
                None  # the failure to debug never applied or does not compile: start from the baseline
            )
        tree = env.task.baseline if base_node is None else env.tree_of(base_node)
        nodes = [env.ledger.node(name) for name in proposal.others]
        others = [env.tree_of(node) for node in nodes if node.tree_digest]
        idea = self._ideator.propose(key, tree, env.task.policy, env.task.baseline, others)
        assert idea.diff is not None
        base = "" if base_node is None else base_node.id
        return env.add(
            idea.diff, base=base, idea=idea.text, operator=idea.operator, parents=(base,) if base else (), arm=self._arm,
            key=f"{self._arm}:{key}",
        )  # fmt: skip

    def repair(self, proposal: Proposal, candidate: Candidate, result: Result, turn: int) -> Candidate | None:
        """Never."""
        return None

    def tell(self, told: Sequence[Told]) -> None:
        """Nothing is learned."""


class ModelMaker:
    """A model's idea, a model's diff, repairs by the same writer. Every diff is against the baseline, as in the paper."""

    def __init__(
        self, env: AIResearchEnv, ideas: ModelIdeas, seed: int, arm: str, baseline: float | None = None
    ):
        self._env, self._ideas, self._seed, self._arm = env, ideas, seed, arm
        wait = {"attempts": ideas.attempts, "first_wait_s": ideas.first_wait_s}
        self._askers = [Asker(env.ledger, model, env.budget, **wait) for model in ideas.models]
        self._writer = None if ideas.writer is None else Asker(env.ledger, ideas.writer, env.budget, **wait)
        prices = [m.prompt_usd_per_million + m.completion_usd_per_million for m in ideas.models]
        self._bandit = Bandit(prices)
        self._chosen: dict[str, int] = {}  # slot -> model
        self._task = task_text(env.task, baseline)
        self._code = code_text(env.task.baseline, env.task.policy, ideas.focus, ideas.max_code_characters)

    def make(self, proposal: Proposal, key: str) -> Candidate:
        """An idea from the sampled history, then a diff for it."""
        env = self._env
        name = f"{self._seed}:{self._arm}:{key}"
        if proposal.key not in self._chosen:
            self._chosen[proposal.key] = self._bandit.choose()
        asker = self._askers[self._chosen[proposal.key]]
        names = ((proposal.base,) if proposal.base else ()) + proposal.others
        answer = propose(
            asker, self._ideas, key=name, exploits=proposal.kind == "exploit", task=self._task, code=self._code,
            shown=self._results(names),
        )  # fmt: skip
        operator = json.loads(asker.identity).get("model", "model")
        common = {"operator": operator, "arm": self._arm, "parents": names[:1], "key": f"{self._arm}:{key}"}
        if answer.refusal or not answer.text.strip():
            reason = answer.refusal or "the model gave no idea"
            return self._add(f"no idea: {reason}", idea=reason, **common)
        written = implement(
            self._writer or asker, self._ideas, key=name, idea=answer.text, task=self._task, code=self._code,
            base=env.task.baseline, policy=env.task.policy,
        )  # fmt: skip
        return self._add(written.text or written.reason, idea=answer.text, **common)

    def repair(self, proposal: Proposal, candidate: Candidate, result: Result, turn: int) -> Candidate | None:
        """A new diff for a crash, up to `num_repairs` times; what never applied had its revisions already."""
        if turn >= self._ideas.num_repairs or not result.status.is_repairable or candidate.tree is None:
            return None
        asker = self._writer or self._askers[self._chosen[proposal.key]]
        node = candidate.node
        written = repair(
            asker, self._ideas, node, result, key=f"{self._seed}:{node.key}:{turn}", code=self._code,
            base=self._env.task.baseline, policy=self._env.task.policy,
        )  # fmt: skip
        return self._add(
            written.text or written.reason, idea=node.idea, operator=node.operator, parents=(node.id,), arm=self._arm,
            key=f"{node.key}/repair{turn}",
        )  # fmt: skip

    def tell(self, told: Sequence[Told]) -> None:
        """The bandit learns whose ideas improve."""
        for item in told:
            self._bandit.tell(self._chosen[item.proposal.key], float(item.gain is not None and item.gain > 0))

    def _add(self, text: str, **fields: Any) -> Candidate:
        """A candidate that carries what the calls for it cost."""
        askers = self._askers if self._writer is None else [*self._askers, self._writer]
        bills = [asker.bill() for asker in askers]
        tokens, usd = sum(tokens for tokens, _ in bills), sum(usd for _, usd in bills)
        return self._env.add(text, tokens=tokens, cost_usd=usd, **fields)

    def _results(self, names: Sequence[str]) -> list[tuple[Node, Result]]:
        wanted = set(names)
        found = {
            node: result
            for node, purpose, result in self._env.ledger.results()
            if node in wanted and purpose in ("screen", "repair")
        }
        return [(self._env.ledger.node(name), found[name]) for name in names if name in found]
