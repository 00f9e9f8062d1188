"""Budgets to runs: which sizes, how many steps, which seeds; each a TrainConfig that differs from its siblings in these only.

A ladder is IsoFLOP: at every budget C several sizes, nearest in log D/N to a prior optimum, so that the true optimum
lies inside. The peak rate is that of `train` for all sizes: width transfer (model.base_width) carries it, so no size
is tuned. Schedules end with their run: a loss in the middle of a longer schedule is not a loss at D.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Literal

from pretrain import flops
from pretrain.config import ConfigError, fingerprint, local
from pretrain.data.source import SourceConfig
from pretrain.jobs.api import JobsConfig, Resources
from pretrain.jobs.pool import PoolConfig
from pretrain.model.transformer import ModelConfig
from pretrain.optim import Constant, Schedule, Wsd
from pretrain.scaling.cells import HELD_OUT, LADDER, REPEAT
from pretrain.scaling.fit import FitConfig
from pretrain.scaling.slices import SliceConfig
from pretrain.train import TrainConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """A size on the ladder; heads, key-value heads and hidden width grow with the width."""

    width: int
    num_layers: int

    def model(self, like: ModelConfig) -> ModelConfig:
        """`like` at this size, head width unchanged.

        Raises:
          ConfigError: the width does not give whole numbers of heads.
        """
        scaled = {}
        for field in ("num_heads", "num_kv_heads", "hidden_width"):
            whole, rest = divmod(getattr(like, field) * self.width, like.width)
            if rest:
                raise ConfigError(
                    f"ladder.shapes width must make {field} a whole number, got width {self.width} where width "
                    f"{like.width} has {getattr(like, field)}; use multiples of {like.width // math.gcd(like.width, getattr(like, field))}"
                )
            scaled[field] = whole
        return dataclasses.replace(like, width=self.width, num_layers=self.num_layers, **scaled)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """A change under test: the same cells as the smallest budgets, trained its way."""

    name: str
    train: TrainConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class RepeatConfig:
    """The repetition curve: one shape, one number of steps, fewer and fewer different documents.

    Attributes:
      fractions: shares of the training slices that a run may read; 1 is the run that repeats least.
    """

    shape: Shape
    num_steps: int
    fractions: tuple[float, ...]

    def __post_init__(self):
        faults = []
        if self.num_steps < 1:
            faults.append(f"repeat.num_steps must be positive, got {self.num_steps}")
        if not self.fractions or not all(0 < f <= 1 for f in self.fractions):
            faults.append(f"repeat.fractions must lie in (0, 1], got {self.fractions}")
        if faults:
            raise ConfigError(*faults)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LadderConfig:
    """Budgets x sizes.

    Attributes:
      budgets_flops: C of each rung, rising.
      shapes: the sizes to choose from; each budget takes the `shapes_per_budget` whose D/N is nearest to the prior.
      tokens_per_param: the prior optimum D/N.
      seeds: every cell is run with each of these.
      noise_seeds: further seeds on the smallest budget; they tell noise from misfit.
      held_out_flops: the budget of one more run that no fit sees, at the shape nearest to the prior.
      num_arm_budgets: how many of the smallest budgets the arms repeat.
    """

    budgets_flops: tuple[float, ...]
    shapes: tuple[Shape, ...]
    shapes_per_budget: int = 5
    tokens_per_param: float = 20.0
    seeds: tuple[int, ...] = (0,)
    noise_seeds: tuple[int, ...] = ()
    held_out_flops: float | None = None
    arms: tuple[Arm, ...] = ()
    num_arm_budgets: int = 2
    repeat: RepeatConfig | None = None

    def __post_init__(self):
        faults = []
        budgets = self.budgets_flops
        if not budgets or any(b <= 0 for b in budgets) or list(budgets) != sorted(set(budgets)):
            faults.append(f"budgets_flops must be positive and rise, got {budgets}")
        if len(set(self.shapes)) < len(self.shapes):
            faults.append("shapes must be different")
        if not 1 <= self.shapes_per_budget <= len(self.shapes):
            faults.append(
                f"shapes_per_budget must lie in [1, {len(self.shapes)}], the number of shapes, got {self.shapes_per_budget}"
            )
        if self.tokens_per_param <= 0:
            faults.append(f"tokens_per_param must be positive, got {self.tokens_per_param}")
        if not self.seeds or set(self.seeds) & set(self.noise_seeds):
            faults.append(
                f"seeds must name one at least, noise_seeds others, got {self.seeds} and {self.noise_seeds}"
            )
        if self.held_out_flops is not None and budgets and self.held_out_flops <= budgets[-1]:
            faults.append(
                f"held_out_flops must exceed the largest budget {budgets[-1]:g}, got {self.held_out_flops:g}"
            )
        names = [arm.name for arm in self.arms]
        if len(set(names)) < len(names) or set(names) & {LADDER, HELD_OUT, REPEAT, ""}:
            faults.append(f"arms must have different names, none of them reserved, got {names}")
        if self.arms and not 1 <= self.num_arm_budgets <= max(1, len(budgets)):
            faults.append(f"num_arm_budgets must lie in [1, {len(budgets)}], got {self.num_arm_budgets}")
        if faults:
            raise ConfigError(*faults)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActionConfig:
    """What the verb does: `report` is all of it: run what is missing, fit, write the page; `check` is of coordinates."""

    action: Literal["plan", "check", "run", "fit", "report"] = local("report")
    retries: int = local(1)  # of a cell that was lost or crashed; it resumes from its checkpoint

    def __post_init__(self):
        if self.retries < 0:
            raise ConfigError(f"retries must be at least 0, got {self.retries}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScalingConfig:
    """A ladder: what all runs share, how they differ, what is fitted, where they run."""

    train: TrainConfig
    ladder: LadderConfig
    fit: FitConfig = FitConfig()
    scaling: ActionConfig = local(ActionConfig())
    jobs: JobsConfig = local(PoolConfig())
    resources: Resources = local(Resources())

    def __post_init__(self):
        faults = []
        for label, train in (("train", self.train), *((f"arms.{a.name}", a.train) for a in self.ladder.arms)):
            if train.model.base_width is None and len({s.width for s in self.ladder.shapes}) > 1:
                faults.append(
                    f"{label}.model.base_width must be set: one rate serves all widths only with width transfer, got none"
                )
            if train.data.batch_stages:
                faults.append(
                    f"{label}.data.batch_stages must be (): a ladder counts tokens with one batch size"
                )
            if train.run.stop_step is not None:
                faults.append(f"{label}.run.stop_step must be none: a cell is a finished schedule")
        if self.ladder.repeat is not None:
            data = self.train.data
            if data.tokenizer.trained:
                faults.append(
                    "ladder.repeat needs a tokenizer that is not trained on the documents it limits"
                )
            if not any(is_training_slice(source) for source in data.sources):
                faults.append(
                    "ladder.repeat needs a SliceConfig among train.data.sources, whose share it lowers"
                )
        if faults:
            raise ConfigError(*faults)


def is_training_slice(source: SourceConfig) -> bool:
    """Whether a repetition curve reads less of this source; one that is only evaluated stays whole."""
    return isinstance(source, SliceConfig) and source.heldout_percent != 100


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planned:
    """A cell before it is run."""

    name: str
    role: str
    budget_flops: float
    train: TrainConfig
    params: int
    params_total: int
    tokens: int
    flops: float


@dataclasses.dataclass(frozen=True)
class Branch:
    """Where a cell leaves a longer one of the same size, seed and role: after `step` steps of `trunk`."""

    trunk: str
    step: int


def branches(planned: Sequence[Planned]) -> dict[str, Branch]:
    """The cells that need not start from step 0, by name.

    While the rate is constant a run does not know how long it will be, so the shorter of two runs that are alike
    otherwise is the longer one up to its own decay, bit for bit (arXiv 2405.18392 trains ladders this way).
    """
    groups: dict[str, list[Planned]] = {}
    for cell in planned:
        alike = dataclasses.replace(cell.train, run=dataclasses.replace(cell.train.run, num_steps=1))
        groups.setdefault(f"{cell.role} {fingerprint(alike)}", []).append(cell)
    found = {}
    for cells in groups.values():
        *shorter, longest = sorted(cells, key=lambda cell: cell.train.run.num_steps)
        for cell in shorter:
            step = stable_steps(cell.train.optim.schedule, cell.train.run.num_steps)
            if step > 0:
                found[cell.name] = Branch(longest.name, step)
    return found


def stable_steps(schedule: Schedule, num_steps: int) -> int:
    """After how many steps a run's rates begin to depend on its length."""
    match schedule:
        case Wsd():
            return num_steps - max(round(schedule.decay_fraction * num_steps), 1)
        case Constant():
            return num_steps - 1
        case _:
            return 0


def plan_cells(config: ScalingConfig, vocab_size: int) -> list[Planned]:
    """Every cell, ladder first, smallest budgets first.

    Raises:
      ConfigError: a budget is too small or too large for the shapes; all faults at once.
    """
    found: dict[str, Planned] = {}
    faults: list[str] = []
    for cell in _cells(config, vocab_size, faults):
        # Two budgets may round to one run; it is trained once and counts for the first.
        found.setdefault(f"{cell.role} {fingerprint(cell.train)}", cell)
    if faults:
        raise ConfigError(*dict.fromkeys(faults))
    return list(found.values())


def _cells(config: ScalingConfig, vocab_size: int, faults: list[str]) -> Iterator[Planned]:
    ladder = config.ladder
    for index, budget in enumerate(ladder.budgets_flops):
        seeds = ladder.seeds + (ladder.noise_seeds if index == 0 else ())
        for shape in nearest_shapes(config, vocab_size, budget, ladder.shapes_per_budget):
            for seed in seeds:
                yield from _cell(config.train, LADDER, shape, budget, seed, vocab_size, faults)
            if index < ladder.num_arm_budgets:
                for arm in ladder.arms:
                    for seed in seeds:
                        yield from _cell(arm.train, arm.name, shape, budget, seed, vocab_size, faults)
    if ladder.held_out_flops is not None:
        (shape,) = nearest_shapes(config, vocab_size, ladder.held_out_flops, 1)
        yield from _cell(
            config.train, HELD_OUT, shape, ladder.held_out_flops, ladder.seeds[0], vocab_size, faults
        )
    if ladder.repeat is not None:
        yield from _repeats(config.train, ladder.repeat, ladder.seeds, vocab_size)


def _repeats(
    train: TrainConfig, repeat: RepeatConfig, seeds: tuple[int, ...], vocab_size: int
) -> Iterator[Planned]:
    model = repeat.shape.model(train.model)
    tokens = repeat.num_steps * train.data.batch_rows * train.data.row_length
    budget = tokens * flops.flops_per_token(model, vocab_size, train.data.row_length)
    for fraction in repeat.fractions:
        sources = tuple(
            s.share(fraction) if isinstance(s, SliceConfig) and is_training_slice(s) else s
            for s in train.data.sources
        )
        limited = dataclasses.replace(train, data=dataclasses.replace(train.data, sources=sources))
        for seed in seeds:
            cell = make_cell(limited, REPEAT, model, repeat.num_steps, seed, budget, vocab_size)
            yield dataclasses.replace(cell, name=f"{cell.name}-f{fraction:.4f}")


def nearest_shapes(config: ScalingConfig, vocab_size: int, budget: float, count: int) -> list[Shape]:
    """The `count` shapes whose D/N at this budget is nearest to the prior, smallest first."""

    def distance(shape: Shape) -> float:
        model = shape.model(config.train.model)
        params = flops.count_params(model, vocab_size).matmul
        tokens = budget / flops.flops_per_token(model, vocab_size, config.train.data.row_length)
        return abs(math.log(tokens / params / config.ladder.tokens_per_param))

    chosen = set(sorted(config.ladder.shapes, key=distance)[:count])
    return [shape for shape in config.ladder.shapes if shape in chosen]


def _cell(
    train: TrainConfig,
    role: str,
    shape: Shape,
    budget: float,
    seed: int,
    vocab_size: int,
    faults: list[str],
) -> Iterator[Planned]:
    model = shape.model(train.model)
    per_token = flops.flops_per_token(model, vocab_size, train.data.row_length)
    tokens_per_step = train.data.batch_rows * train.data.row_length
    num_steps = round(budget / per_token / tokens_per_step)
    where = f"width {shape.width} x {shape.num_layers} layers at {budget:.3g} FLOPs"
    warmup = train.optim.schedule.num_warmup_steps
    if num_steps < max(2 * warmup, 1):
        faults.append(
            f"ladder.budgets_flops must give every shape at least twice its warmup, {2 * warmup} steps, got {num_steps} for "
            f"{where}; raise the budget, or lower data.batch_rows or the warmup"
        )
        return
    yield make_cell(train, role, model, num_steps, seed, budget, vocab_size)


def make_cell(
    train: TrainConfig,
    role: str,
    model: ModelConfig,
    num_steps: int,
    seed: int,
    budget: float,
    vocab_size: int,
) -> Planned:
    """One run of `train` at this size, length and seed."""
    run = dataclasses.replace(train.run, num_steps=num_steps, seed=seed)
    config = dataclasses.replace(train, model=model, run=run)
    tokens = num_steps * train.data.batch_rows * train.data.row_length
    counts = flops.count_params(model, vocab_size)
    prefix = "" if role == LADDER else f"{role}-"
    return Planned(
        name=f"{prefix}w{model.width:04d}-l{model.num_layers}-s{num_steps:06d}-seed{seed}",
        role=role,
        budget_flops=budget,
        train=config,
        params=counts.matmul,
        params_total=counts.total,
        tokens=tokens,
        flops=tokens * flops.flops_per_token(model, vocab_size, train.data.row_length),
    )
