"""The experiment from one config: texts, bases, gates, tunings, scores, table; every stage resumes.

    texts        every arm's recipe writes its corpus              <workdir>/texts/<replicate>-<arm>/
    bases        a base is pretrained, unless one is given         <workdir>/training/base-<replicate>/..
    base_scores  the gates: with the book closed, and with it open
    tunings      continued pretraining on corpus and replay        <workdir>/training/<replicate>-<arm>/..
    scores       the questions at every budget of tokens
    table        accuracy by kind with intervals                   results.json  results.md  results.png

All arms train on the same number of rows with the same schedule and share of replay, so at each checkpoint all
have read equally much of their own text. Training is `pretrain.train` in jobs of their own.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from pretrain.config import ConfigError, fingerprint, local, to_json
from pretrain.jobs.api import JobsConfig
from pretrain.jobs.pool import PoolConfig
from pretrain.rundir import write_atomic, write_json_atomic
from synth.arms.plan import Arm, Gates, Replicate, Tuning
from synth.arms.stages import Asked, Bases, BaseScores, Scores, Tunings
from synth.arms.table import Entry, Marks, accuracy_cell, gap_cell, marks_of, page, picture
from synth.document import Document
from synth.retrieval.rerank import AsFound
from synth.stage import RunConfig, StageFailed, StageResult, run_pipeline
from synth.tasks.open_book import open_books, passages_text


class GateFailed(StageFailed):
    """A base is not what the arms need; they were not run."""


@dataclass(frozen=True, kw_only=True)
class ArmsConfig:
    """The whole experiment. `kinds` are the tags of questions that have a column of their own.

    Options are chosen by log-probability, `per_byte` of the option where options differ in length.
    """

    replicates: tuple[Replicate, ...]
    kinds: tuple[str, ...]
    per_byte: bool = False
    gates: Gates = field(default_factory=Gates)
    run: RunConfig = field(default_factory=RunConfig)
    jobs: JobsConfig = local(PoolConfig())

    def __post_init__(self):
        faults = []
        names = [replicate.name for replicate in self.replicates]
        if not names or len(set(names)) < len(names):
            faults.append(f"replicates must have different names, got {', '.join(names) or 'none'}")
        if len({tuple((arm.name, arm.open_book) for arm in r.arms) for r in self.replicates}) > 1:
            faults.append("replicates must have the same arms in the same order, they differ")
        if len({_budgets(replicate.tuning) for replicate in self.replicates}) > 1:
            faults.append("replicates must have the same budgets of steps and tokens, they differ")
        if faults:
            raise ConfigError(*faults)

    def execute(self, echo: Callable[[str], None] = print) -> list[StageResult]:
        """Run everything that is not complete and write the results into the workdir.

        Raises:
          GateFailed: a base fails a gate and `gates.stop` is set.
        """
        workdir = Path(self.run.workdir)
        texts = {
            f"{replicate.name}-{arm.name}": self._write_texts(replicate, arm, echo)
            for replicate in self.replicates
            for arm in replicate.arms
            if arm.recipe is not None
        }
        write_json_atomic(
            workdir / "config.json", {"fingerprint": fingerprint(self), "config": to_json(self)}
        )
        asked = {replicate.name: self._asked(replicate, texts) for replicate in self.replicates}
        common = {"replicates": self.replicates, "jobs": self.jobs}
        stages = [
            Bases(**common),
            BaseScores(**common, asked=asked),
        ]
        *_, base_scores = run_pipeline(stages, self.run, echo)
        gates, failed = self._check_gates(list(base_scores.documents()), asked)
        for line in gates:
            echo(line)
        if failed and self.gates.stop:
            raise GateFailed(
                f"{'; '.join(failed)}; train the base longer, or write gates.stop=false to go on"
            )
        stages += [
            Tunings(
                **common,
                corpora={label: str(results[-2].paths[0].absolute()) for label, results in texts.items()},
                corpora_sha256={label: results[-2].content for label, results in texts.items()},
            ),
            Scores(**common, asked=asked),
        ]
        results = run_pipeline(stages, self.run, echo)
        self._write_results(gates, [list(result.documents()) for result in results[1:]], asked)
        echo(f"the page: {workdir / 'results.md'}; the picture: {workdir / 'results.png'}")
        return [*(result for found in texts.values() for result in found), *results]

    def _write_texts(self, replicate: Replicate, arm: Arm, echo: Callable[[str], None]) -> list[StageResult]:
        """Run the recipe of one arm in a folder of its own, with one line for its stages."""
        assert arm.recipe is not None
        label = f"{replicate.name}-{arm.name}"
        run = replace(arm.recipe.run, workdir=str(Path(self.run.workdir) / "texts" / label))
        results = replace(arm.recipe, run=run).execute(lambda line: None)
        echo(f"texts: {label}, {results[-2].counts['out']:,} texts")
        return results

    def _asked(self, replicate: Replicate, texts: Mapping[str, Sequence[StageResult]]) -> Asked:
        label = next(f"{replicate.name}-{arm.name}" for arm in replicate.arms if arm.recipe is not None)
        documents = {document.id: document.text for document in texts[label][0].documents()}
        questions = tuple(replicate.questions.load())
        missing = sorted({q.document for q in questions} - documents.keys())
        if missing:
            raise ConfigError(
                f"questions must be about documents of the sources, {replicate.name} asks about {', '.join(missing[:5])}"
            )
        if replicate.passages is None:
            books = {q.id: documents[q.document] for q in questions}
        else:
            folder = Path(self.run.workdir) / "passages" / replicate.name
            opened = asyncio.run(
                open_books(list(documents.items()), {}, questions, replicate.passages, AsFound(), folder)
            )
            books = {
                identity: passages_text(found, best_last=replicate.passages.best_last)
                for identity, found in opened.passages.items()
            }
        return Asked(
            questions=questions,
            background=tuple(replicate.background.load()) if replicate.background is not None else (),
            books=books,
            per_byte=self.per_byte,
        )

    def _check_gates(
        self, bases: Sequence[Document], asked: Mapping[str, Asked]
    ) -> tuple[list[str], list[str]]:
        """A line a base, and the faults."""
        lines, faults = [], []
        for base in bases:
            questions, choices = asked[base.id].questions, base.meta["choices"]
            closed = accuracy_cell(marks_of([(questions, choices["closed"])], None))
            opened = {
                kind: accuracy_cell(marks_of([(questions, choices["open"])], kind))
                for kind in (None, *self.kinds)
            }
            parts = [f"{kind or 'all'} {cell}" for kind, cell in opened.items()]
            line = f"base {base.id}: closed book {closed}, open book {', '.join(parts)}"
            if asked[base.id].background:
                known = accuracy_cell(marks_of([(asked[base.id].background, choices["background"])], None))
                line += f", its own background {known}"
            if not closed.low <= self.gates.chance <= closed.high:
                faults.append(
                    f"base {base.id} must be at chance with the book closed, {self.gates.chance} lies outside {closed}"
                )
            if opened[None].value < self.gates.open_book_at_least:
                faults.append(
                    f"base {base.id} must reach {self.gates.open_book_at_least} with the book open, got {opened[None]}"
                )
            lines.append(line)
        verdict = "the gates: passed" if not faults else f"the gates: FAILED ({'; '.join(faults)})"
        return [*lines, verdict], faults

    def _write_results(
        self,
        gates: Sequence[str],
        found: Sequence[Sequence[Document]],
        asked: Mapping[str, Asked],
    ) -> None:
        """`results.json`, `results.md` and `results.png` from what the stages after the bases found."""
        bases, tunings, scores = found
        names = [replicate.name for replicate in self.replicates]
        of_base = {base.id: base.meta["choices"] for base in bases}
        kinds = (None, *self.kinds)

        def marks(choices: Mapping[str, Sequence[int | None]]) -> dict[str, Marks]:
            answers = [(asked[name].questions, choices[name]) for name in names]
            return {kind or "all": marks_of(answers, kind) for kind in kinds}

        base = marks({name: of_base[name]["closed"] for name in names})
        ceiling = marks({name: of_base[name]["open"] for name in names})

        def entry(arm: str, tokens: int, by_kind: Mapping[str, Marks]) -> Entry:
            return Entry(
                arm=arm,
                tokens=tokens,
                cells={kind: accuracy_cell(of) for kind, of in by_kind.items()},
                gaps={kind: gap_cell(of, base[kind], ceiling[kind]) for kind, of in by_kind.items()},
            )

        levels = [entry("base", 0, base), entry("base, open book", 0, ceiling)]
        entries = []
        for arm in self.replicates[0].arms:
            for step, tokens in _budgets(self.replicates[0].tuning):
                for how, mark in (("closed", ""), ("open", ", open book")):
                    chosen = {
                        d.meta["replicate"]: d.meta["choices"][how]
                        for d in scores
                        if (d.meta["arm"], d.meta["step"]) == (arm.name, step) and how in d.meta["choices"]
                    }
                    if chosen:
                        entries.append(entry(arm.name + mark, tokens, marks(chosen)))
        workdir = Path(self.run.workdir)
        title = f"{sum(len(asked[n].questions) for n in names):,} questions, replicates: {', '.join(names)}"
        lines = [*levels, *entries]
        replay = {
            arm.name: _mean(
                [d.meta["bits_per_byte"] for d in tunings if d.id in {f"{name}-{arm.name}" for name in names}]
            )
            for arm in self.replicates[0].arms
        }
        write_json_atomic(
            workdir / "results.json",
            {
                "gates": list(gates),
                "entries": [line.to_json() for line in lines],
                "replay_bits_per_byte": replay,
            },
        )
        write_atomic(workdir / "results.md", page(lines, gates, self.kinds, replay))
        curves = [line for line in entries if not line.arm.endswith("open book")]
        write_atomic(workdir / "results.png", picture(curves, ("all", *self.kinds), levels, title))


def _budgets(tuning: Tuning) -> tuple[tuple[int, int], ...]:
    """Steps at which arms are asked, with the tokens of own text up to there."""
    return tuple((step, tuning.positions(step)) for step in tuning.budget_steps)


def _mean(by_source: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each source."""
    return {name: sum(values[name] for values in by_source) / len(by_source) for name in by_source[0]}
