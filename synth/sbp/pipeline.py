"""The whole bootstrap and its experiment from one config: stage by stage, seed by seed, then one table and one picture.

    sources, parts    documents, and what is learned, measured, or kept for the oracle
    tokenizer         of all runs of a seed
    reference         pretrained on the unique documents               <workdir>/seed0/training/..
    embed, pair       neighbors above a threshold; random pairs of the same lengths
    tune_pair, tune_random                                             synthesizers, from the reference
    gate              no synthesis unless pairs have taught something
    texts_sbp, texts_random, texts_self                                texts with the seed document of each
    quality           what the texts are like; with a judge, to_judge and judge
    trials            all arms                                         results.json  results.md  results.png

A seed repeats all of it with other unique documents, other initial weights and other orders.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from pretrain.config import ConfigError, fingerprint, local, to_json
from pretrain.jobs.api import JobsConfig
from pretrain.rundir import write_atomic, write_json_atomic
from pretrain.tokenizer import TokenizerConfig
from synth.generator import Write
from synth.llm.api import LLMConfig
from synth.neighbors import Exact, IndexConfig
from synth.sbp.account import account_lines, count_flops
from synth.sbp.embed import Embed, EmbedderConfig, OwnStatesConfig
from synth.sbp.judge import PairJudge, ToJudge
from synth.sbp.page import gate_lines, judge_lines, pair_lines, quality_lines
from synth.sbp.pair import Pair, PairRule
from synth.sbp.parts import TEST, Split
from synth.sbp.quality import Quality
from synth.sbp.sampler import OwnSamplerConfig, open_model
from synth.sbp.synthesize import SynthesisRule, Synthesize
from synth.sbp.table import Outcome, compare, comparison_lines, picture
from synth.sbp.trials import SYNTHETIC, RunTrials, Trials
from synth.sbp.tune import CheckGate, Gate, MakeTokenizer, Pretrain, Tune, Tuning
from synth.stage import RunConfig, Stage, StageResult, run_pipeline
from synth.training import HereConfig, Learner

_WRITERS = {
    "texts_sbp": ("tune_pair", "sbp"),
    "texts_random": ("tune_random", "random"),
    "texts_self": ("reference", "self"),
}


class Floor(Protocol):
    """What the best possible model would reach on some texts, where that can be computed."""

    def faults(self, data: Stage, tokenizer: TokenizerConfig) -> list[str]:
        """Why it is not the floor of what this stage makes, in these tokens; none if it is."""
        ...

    def nats_per_token(self, texts: Sequence[str]) -> Mapping[str, float]:
        """By name, the end mark of each text counted as a token."""
        ...


@dataclass(frozen=True, kw_only=True)
class SbpConfig:
    """Documents, how they are split, the learner, and every step between them and the table.

    `data` is a stage of the name "sources". `learner` pretrains the reference for `reference_steps` and every arm; the seeds are repetitions of everything.
    """

    data: Stage
    tokenizer: TokenizerConfig
    learner: Learner
    reference_steps: int
    tuning: Tuning
    sampler: OwnSamplerConfig
    trials: Trials
    split: Split = field(default_factory=Split)
    embedder: EmbedderConfig = field(default_factory=OwnStatesConfig)
    index: IndexConfig = field(default_factory=Exact)
    rule: PairRule = field(default_factory=PairRule)
    gate: Gate = field(default_factory=Gate)
    synthesis: SynthesisRule = field(default_factory=SynthesisRule)
    quality_sample: int = 2000
    judge: LLMConfig | None = None
    judge_sample: int = 200
    floor: Floor | None = None
    seeds: tuple[int, ...] = (0,)
    run: RunConfig = field(default_factory=RunConfig)
    tokenizer_root: str = local("")
    jobs: JobsConfig = local(HereConfig())

    def __post_init__(self):
        faults = []
        if self.data.name != "sources":
            faults.append(f'data must be a stage of the name "sources", got {self.data.name!r}')
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            faults.append(f"seeds must be different and at least one, got {self.seeds}")
        if self.sampler.model != self.learner.model:
            faults.append(
                "sampler.model must be learner.model, it samples from what was trained; change both"
            )
        needed = self.sampler.max_prompt_tokens + self.sampler.max_new_tokens
        if self.tuning.row_length + 1 < needed:
            faults.append(
                f"tuning.row_length must hold what is sampled, max_prompt_tokens + max_new_tokens = {needed}, "
                f"got {self.tuning.row_length}"
            )
        if self.floor is not None:
            faults += self.floor.faults(self.data, self.tokenizer)
        if faults:
            raise ConfigError(*faults)

    def stages(self, seed: int) -> tuple[Stage, ...]:
        """The stages of one seed, in order."""
        training: dict[str, Any] = {"learner": self.learner, "jobs": self.jobs, "seed": seed}
        texts = [SYNTHETIC[arm] for arm in self.trials.synthetic_arms]
        labels = [_WRITERS[stage][1] for stage in texts]
        return (
            self.data,
            *self.split.stages(seed),
            MakeTokenizer(tokenizer=self.tokenizer, root=self.tokenizer_root, seed=seed),
            Pretrain(**training, num_steps=self.reference_steps),
            Embed(embedder=self.embedder, model=self.learner.model),
            Pair(rule=self.rule, index=self.index, seed=seed),
            *(Tune(**training, tuning=self.tuning, kind=kind) for kind in ("pair", "random")),
            CheckGate(gate=self.gate),
            *(
                Synthesize(
                    writer=_WRITERS[stage][0],
                    label=_WRITERS[stage][1],
                    conditional=stage != "texts_self",
                    sampler=self.sampler,
                    opener=open_model,
                    rule=self.synthesis,
                    seed=seed,
                )
                for stage in texts
            ),
            Quality(labels=tuple(labels), sample=self.quality_sample, seed=seed),
            *self._judging(labels, seed),
            RunTrials(**training, trials=self.trials),
        )

    def _judging(self, labels: Sequence[str], seed: int) -> tuple[Stage, ...]:
        if self.judge is None:
            return ()
        conditional = tuple(label for label in labels if label != "self")
        return (
            ToJudge(labels=conditional, sample=self.judge_sample, seed=seed),
            Write(generator=PairJudge(), llm=self.judge, seed=seed),
        )

    def execute(self, echo: Callable[[str], None] = print) -> list[StageResult]:
        """Run everything that is not complete and write the results into the workdir.

        Raises:
          GateFailed: the synthesizer has not learned from its pairs and `gate.min_gain_nats` is set.
        """
        workdir = Path(self.run.workdir)
        found: dict[int, dict[str, StageResult]] = {}
        for seed in self.seeds:
            echo(f"seed {seed}")
            run = replace(self.run, workdir=str(workdir / f"seed{seed}"))
            results = run_pipeline(self.stages(seed), run, echo)
            found[seed] = {result.name: result for result in results}
        outcomes = [
            Outcome(seed=seed, trial=d.meta["trial"], run=d.meta)
            for seed, results in found.items()
            for d in results["trials"].documents()
        ]
        comparison = compare(outcomes)
        floors = {} if self.floor is None else mean_floors(self.floor, found.values())
        flops = [count_flops(self, results) for results in found.values()]
        write_json_atomic(
            workdir / "config.json", {"fingerprint": fingerprint(self), "config": to_json(self)}
        )
        numbers = {**comparison.to_json(), "floors": floors, "flops": flops[0]}
        write_json_atomic(workdir / "results.json", numbers)
        first = found[self.seeds[0]]
        lines = [
            "# Synthetic bootstrapped pretraining",
            "",
            *comparison_lines(comparison, floors),
            "",
            *gate_lines(found),
            "",
            *pair_lines(found),
            "",
            *quality_lines(first["quality"].documents()),
            "",
            *(judge_lines(first["judge"].documents()) if self.judge is not None else ()),
            *account_lines(flops),
        ]
        write_atomic(workdir / "results.md", "\n".join(lines) + "\n")
        title = f"{len(self.seeds)} seeds, {outcomes[0].run['params']:,} parameters"
        write_atomic(workdir / "results.png", picture(outcomes, floors, self.learner.tokens_per_step, title))
        for line in comparison_lines(comparison, floors)[: len(comparison.loss) + 2]:
            echo(line)
        echo(f"the page: {workdir / 'results.md'}; the picture: {workdir / 'results.png'}")
        return [result for results in found.values() for result in results.values()]


def mean_floors(floor: Floor, seeds: Iterable[Mapping[str, StageResult]]) -> dict[str, float]:
    """The floors on all test documents of each seed, averaged: what the losses beside them are measured on.

    A part of the documents would not do: of 500 texts of the worlds the floor is off by 0.008 nats a token.
    """
    found = [floor.nats_per_token([d.text for d in results[TEST].documents()]) for results in seeds]
    return {name: sum(values[name] for values in found) / len(found) for name in found[0]}
