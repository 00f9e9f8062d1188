"""What is compared: replicates, each with questions, a base and arms that train alike; and what a base must pass."""

from dataclasses import dataclass

from pretrain.config import ConfigError, local
from pretrain.pretrained import Pretrained
from pretrain.train import TrainConfig
from synth.question import Questions
from synth.recipe import RecipeConfig
from synth.tasks.open_book import OpenBookConfig


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A corpus to continue on; with no recipe, replay in every row. `open_book` also asks it with the document."""

    name: str
    recipe: RecipeConfig | None
    open_book: bool = False


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How every arm continues. The sources of `train` are the replay, which fills the share `replay` of all rows.

    An arm is asked at `budget_steps`: one run gives all budgets, and the text of a smaller budget is a part of that
    of a larger one. The rate of `train` should not fall before its end, or small budgets never see the low rate.
    """

    train: TrainConfig
    replay: float
    budget_steps: tuple[int, ...]

    def __post_init__(self):
        faults = []
        steps = self.budget_steps
        if not steps or steps[0] < 1 or list(steps) != sorted(set(steps)):
            faults.append(f"budget_steps must rise from 1 or more, got {steps}")
        elif steps[-1] != self.train.run.num_steps:
            faults.append(
                f"the last of budget_steps must be train.run.num_steps, got {steps[-1]} and {self.train.run.num_steps}"
            )
        if not 0 < self.replay < 1:
            faults.append(f"replay must lie in (0, 1), got {self.replay}")
        if faults:
            raise ConfigError(*faults)

    def positions(self, step: int) -> int:
        """Positions of rows with an arm's own text in the first `step` steps, padding included."""
        data = self.train.data
        return round(step * data.batch_rows * data.row_length * (1 - self.replay))


@dataclass(frozen=True, kw_only=True)
class Replicate:
    """One repetition: questions, a base (a run to make, or a model that exists), how its arms train, the arms.

    `background` are questions that the base should answer from memory, for the record; none asks no such. With the
    book open a question follows its whole document, or the passages that `passages` finds in all documents.
    """

    name: str
    questions: Questions
    background: Questions | None = None
    passages: OpenBookConfig | None = None
    base: TrainConfig | Pretrained
    tuning: Tuning
    arms: tuple[Arm, ...]

    def __post_init__(self):
        names = [arm.name for arm in self.arms]
        faults = []
        if len(set(names)) < len(names):
            faults.append(f"arms must have different names, got {', '.join(names)}")
        sources = [arm.recipe.sources for arm in self.arms if arm.recipe is not None]
        if not sources or any(source != sources[0] for source in sources):
            faults.append("arms must have recipes, all from the same sources; they have none or several")
        if faults:
            raise ConfigError(*faults)


@dataclass(frozen=True, kw_only=True)
class Gates:
    """What a base must be before its arms mean anything: at chance with the book closed, good with it open.

    At chance is `chance` inside the 95 % interval of its accuracy. `stop` ends the run when a base fails.
    """

    chance: float = 0.25
    open_book_at_least: float = 0.85
    stop: bool = local(True)
