"""The thesis' loop, literally: idea from context, diff from idea, value of the diff, learn from it.

env = AIResearchEnv(codebase="toy", resource="1xCPU")
researcher = Researcher(env, seed=0)
for _ in range(20):
    idea = researcher.ideator(env.context())
    diff = researcher.executor(idea)
    value = env.value(diff)
    researcher.learn(idea, diff, value)
print(researcher.best)
"""

from collections.abc import Callable

from research_env.choose import gain
from research_env.env import AIResearchEnv, Context
from research_env.ideator.mutate import MutationIdeator
from research_env.records import Idea, Result
from research_env.search.explore_exploit import ExploreExploit
from research_env.search.proposal import Proposal, Search, Told


class Researcher:
    """An ideator, an executor and a learner that fit together; each can be replaced by a function of the same shape.

    By default ideas are mutations, the executor returns the diff an idea came with, and learning is the explore/exploit
    schedule with epochs of eight.
    """

    def __init__(
        self,
        env: AIResearchEnv,
        *,
        seed: int = 0,
        search: Search | None = None,
        mutations: MutationIdeator | None = None,
        write_diff: Callable[[Idea], str] | None = None,
    ):
        self._env = env
        self._search = search or ExploreExploit(seed, 8, floor_to=1)
        self._mutations = mutations or MutationIdeator(seed)
        self._write_diff = write_diff
        self._asked: dict[str, Proposal] = {}
        self.best: Result | None = None
        self.history: list[tuple[Idea, Result]] = []

    def ideator(self, context: Context) -> Idea:
        """The next idea, for the place in the lineage that the search wants changed."""
        (proposal,) = self._search.ask(1)
        self._asked[proposal.key] = proposal
        nodes = {node.id: node for node, _ in context.history}
        tree = self._env.tree_of(nodes[proposal.base]) if proposal.base else context.tree
        others = [self._env.tree_of(nodes[name]) for name in proposal.others if name in nodes]
        idea = self._mutations.propose(proposal.key, tree, context.task.policy, context.tree, others)
        return Idea(
            text=idea.text, diff=idea.diff, operator=idea.operator, base=proposal.base, key=proposal.key
        )

    def executor(self, idea: Idea) -> str:
        """A diff against the baseline for the idea; a refused diff is returned as it is, and `value` says why."""
        text = idea.diff if idea.diff is not None else (self._write_diff or _no_writer)(idea)
        candidate = self._env.add(text, base=idea.base, idea=idea.text, operator=idea.operator)
        return candidate.node.diff

    def learn(self, idea: Idea, diff: str, value: Result) -> None:
        """Tell the search what came of it."""
        baseline = self._env.value("")
        assert baseline.metric is not None, "the baseline has a metric, or nothing can be compared"
        better_by = (
            None if value.metric is None else gain(value.metric, baseline.metric, value.higher_is_better)
        )
        node = self._env.add(diff, idea=idea.text, operator=idea.operator).node
        self._search.tell([Told(self._asked[idea.key], node, value, better_by)])
        if value.better_than(self.best):
            self.best = value
        self.history.append((idea, value))


def _no_writer(idea: Idea) -> str:
    raise ValueError(
        "the idea has no diff; give the Researcher write_diff, a function from an idea to a diff"
    )
