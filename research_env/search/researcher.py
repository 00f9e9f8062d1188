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

from research_env.choose import gain
from research_env.env import AIResearchEnv, Context
from research_env.executor.implement import implement
from research_env.ideator.ask import Asker
from research_env.ideator.context import code_text, task_text
from research_env.ideator.llm import ModelIdeas, propose
from research_env.ideator.mutate import MutationIdeas
from research_env.records import Idea, Result
from research_env.search.explore_exploit import ExploreExploit
from research_env.search.proposal import Proposal, Search, Told


class Researcher:
    """An ideator, an executor and a learner that fit together; each can be replaced by a function of the same shape.

    By default ideas are mutations that bring their diff. With `ideas=ModelIdeas(models=(...,))` the first model has the ideas
    and writes the diffs. Learning is the explore/exploit schedule with epochs of eight, or any other `search`.
    """

    def __init__(
        self,
        env: AIResearchEnv,
        *,
        seed: int = 0,
        ideas: MutationIdeas | ModelIdeas = MutationIdeas(),
        search: Search | None = None,
    ):
        self._env, self._seed, self._ideas = env, seed, ideas
        is_offline = isinstance(ideas, MutationIdeas)
        self._search = search or ExploreExploit(seed, 8, floor_to=1, mutates_winners=is_offline)
        self._asked: dict[str, Proposal] = {}
        self.best: Result | None = None
        self.history: list[tuple[Idea, Result]] = []

    def ideator(self, context: Context) -> Idea:
        """The next idea, for the place in the lineage that the search wants changed."""
        (proposal,) = self._search.ask(1)
        self._asked[proposal.key] = proposal
        results = {node.id: (node, result) for node, result in context.history}
        if isinstance(self._ideas, ModelIdeas):
            answer = propose(
                self._asker(), self._ideas, key=proposal.key, exploits=proposal.kind == "exploit", task=self._task(context),
                code=self._code(), shown=[results[name] for name in proposal.others if name in results],
            )  # fmt: skip
            return Idea(text=answer.text or answer.refusal, key=proposal.key, operator=self._asker().identity)
        tree = self._env.tree_of(results[proposal.base][0]) if proposal.base else context.tree
        others = [self._env.tree_of(results[name][0]) for name in proposal.others if name in results]
        ideator = self._ideas.build(self._seed)
        idea = ideator.propose(proposal.key, tree, context.task.policy, context.tree, others)
        return Idea(
            text=idea.text, diff=idea.diff, operator=idea.operator, base=proposal.base, key=proposal.key
        )

    def executor(self, idea: Idea) -> str:
        """A diff against the baseline for the idea; a refused diff is returned as it is, and `value` says why."""
        text = idea.diff
        if text is None:
            assert isinstance(self._ideas, ModelIdeas), "mutations bring their diff"
            text = implement(
                self._asker(), self._ideas, key=idea.key, idea=idea.text, task=self._task(self._env.context()),
                code=self._code(), base=self._env.task.baseline, policy=self._env.task.policy,
            ).text  # fmt: skip
        candidate = self._env.add(text, base=idea.base, idea=idea.text, operator=idea.operator)
        return text if candidate.tree is None else candidate.node.diff

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

    def _asker(self) -> Asker:
        assert isinstance(self._ideas, ModelIdeas), "only models are asked"
        return Asker(
            self._env.ledger, self._ideas.models[0], self._env.budget, attempts=self._ideas.attempts,
            first_wait_s=self._ideas.first_wait_s,
        )  # fmt: skip

    def _task(self, context: Context) -> str:
        return task_text(self._env.task, context.baseline.metric)

    def _code(self) -> str:
        assert isinstance(self._ideas, ModelIdeas), "only models read the code"
        task, ideas = self._env.task, self._ideas
        return code_text(task.baseline, task.policy, ideas.focus, ideas.max_code_characters)
