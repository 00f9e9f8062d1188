"""A whole pipeline from one config: sources, prepare, write, decontaminate, corpus, report; and its price beforehand."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pretrain.config import ConfigError, fingerprint, local, to_json
from pretrain.rundir import write_atomic, write_json_atomic
from synth.document import Document
from synth.generator import PILOT, Generator, Item, Prepare, Write
from synth.llm.api import LLMConfig, Usage, cost_usd
from synth.llm.scripted import ScriptedConfig
from synth.quality.overlap import Decontaminate
from synth.quality.report import Report, report_page
from synth.question import Questions
from synth.stage import RunConfig, Stage, StageResult, run_pipeline
from synth.tokens import Corpus

_PILOT_ITEMS = 8  # calls a pilot document makes beyond its preparation


@dataclass(frozen=True, kw_only=True)
class RecipeConfig:
    """Documents become more documents. `evaluation` is only compared with the texts, to keep it out of them."""

    sources: Stage
    generator: Generator
    llm: LLMConfig
    seed: int = 0
    items_per_document: int | None = None
    evaluation: tuple[Questions, ...] = ()
    corpus: Corpus = field(default_factory=Corpus)
    report: Report = field(default_factory=Report)
    max_attempts: int = local(6)
    first_wait_s: float = local(1.0)
    run: RunConfig = field(default_factory=RunConfig)

    def stages(self) -> tuple[Stage, ...]:
        """The stages in order."""
        common: dict[str, Any] = {"generator": self.generator, "llm": self.llm, "seed": self.seed}
        common |= {"max_attempts": self.max_attempts, "first_wait_s": self.first_wait_s}
        stages: list[Stage] = [self.sources]
        stages.append(Prepare(**common))
        stages.append(Write(**common, items_per_document=self.items_per_document))
        if self.evaluation:
            stages.append(Decontaminate(questions=self.evaluation))
        return (*stages, self.corpus, self.report)

    def execute(self, echo: Callable[[str], None] = print) -> list[StageResult]:
        """Run everything that is not complete and write `report.md`, `report.json` and `config.json` into the workdir."""
        if self.run.dry_run != "no":
            for line in predict(self).lines():
                echo(line)
            return []
        results = run_pipeline(self.stages(), self.run, echo)
        workdir = Path(self.run.workdir)
        numbers = dict(next(results[-1].documents()).meta)
        write_json_atomic(
            workdir / "config.json", {"fingerprint": fingerprint(self), "config": to_json(self)}
        )
        write_json_atomic(workdir / "report.json", numbers)
        write_atomic(workdir / "report.md", report_page(self.generator.name, numbers, results))
        echo(f"the page: {workdir / 'report.md'}; the texts: {results[-2].paths[0]}")
        return results


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Calls, tokens and money of a recipe, from all documents and a pilot on a few of them."""

    num_documents: int
    num_pilot_documents: int
    calls: float
    usage: Usage
    cost_usd: float
    is_paid_pilot: bool

    def lines(self) -> list[str]:
        """What a dry run prints."""
        how = "asked the model" if self.is_paid_pilot else "scripted replies: the number of items is a guess"
        return [
            f"dry run on {self.num_pilot_documents} of {self.num_documents} documents ({how})",
            f"expected: {self.calls:,.0f} calls, {self.usage.prompt_tokens:,} tokens read, "
            f"{self.usage.completion_tokens:,} tokens written, ${self.cost_usd:,.4f}",
        ]


def predict(config: RecipeConfig) -> Prediction:
    """Expected calls, tokens and cost: all sources, and a few calls for `run.dry_run_documents` of them.

    `run.dry_run="scripted"` costs nothing, "pilot" asks the recipe's own model; its replies are kept in the
    workdir, so that the run does not pay for them again.
    """
    is_pilot = config.run.dry_run == "pilot"
    common: dict[str, Any] = {
        "generator": config.generator,
        "llm": config.llm if is_pilot else ScriptedConfig(),
        "seed": config.seed,
        "max_attempts": config.max_attempts,
    }
    with TemporaryDirectory() as scratch:
        run = replace(
            config.run, workdir=scratch, num_shards=1, num_processes=1, fresh=(), max_failed_fraction=1.0
        )
        run_sources = run_pipeline((config.sources,), run, _silent)
        documents = sorted(run_sources[0].documents(), key=lambda d: (len(d.text), d.id))
        if not documents:
            raise ConfigError("the sources hold no documents; nothing can be predicted")
        chosen = _spread(documents, run.dry_run_documents)
        limit = config.items_per_document
        pilot = Path(config.run.workdir) / PILOT if is_pilot else Path(scratch) / PILOT
        given = _Given(documents=tuple(chosen))
        thinned = {**common, "generator": _Thinned(inner=config.generator, limit=limit)}
        fresh = ("sources",) if pilot.exists() else ()
        pilot_run = replace(run, workdir=str(pilot), fresh=fresh)
        stages = (given, Prepare(**common), Write(**thinned, items_per_document=limit))
        _, prepared, written = run_pipeline(stages, pilot_run, _silent)
        planned = [
            _length(config.generator.plan(d, d.meta["prepared"], seed=0), limit) for d in prepared.documents()
        ]
    prepare, write = prepared.counts, written.counts
    if not planned:
        raise ConfigError(
            "every pilot document failed in preparation; see what the model answers before a full run"
        )
    scale = len(documents) / len(chosen)
    longer = sum(len(d.text) for d in documents) / max(sum(len(d.text) for d in chosen), 1)
    writes = sum(planned) / len(planned) * len(documents)
    per_write = max(write.get("calls", 0), 1)
    usage = Usage(
        prompt_tokens=round(
            prepare.get("prompt_tokens", 0) * longer
            + writes * write.get("prompt_tokens", 0) / per_write * longer / scale
        ),
        completion_tokens=round(
            prepare.get("completion_tokens", 0) * scale
            + writes * write.get("completion_tokens", 0) / per_write
        ),
    )
    return Prediction(
        num_documents=len(documents),
        num_pilot_documents=len(chosen),
        calls=prepare.get("calls", 0) * scale + writes,
        usage=usage,
        cost_usd=cost_usd(config.llm, usage),
        is_paid_pilot=is_pilot,
    )


@dataclass(frozen=True, kw_only=True)
class _Given:
    """Stage: documents that are there already."""

    documents: tuple[Document, ...]
    name: str = "sources"
    version: int = 1
    gather: bool = True
    needs: tuple[str, ...] = ()

    def identity(self) -> Mapping[str, Any]:
        return {"documents": [document.id for document in self.documents]}

    def run(self, documents: Any, *, shard: Any) -> Any:
        yield from self.documents


@dataclass(frozen=True, kw_only=True)
class _Thinned:
    """A generator with a few items at even distances of its plan: pairs and triples cost differently."""

    inner: Generator
    limit: int | None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def plan(self, document: Document, prepared: Any, *, seed: int) -> Iterator[Item]:
        count = _length(self.inner.plan(document, prepared, seed=seed), self.limit)
        calls = (item for item in self.inner.plan(document, prepared, seed=seed) if item.text is None)
        wanted = {(2 * i + 1) * count // (2 * _PILOT_ITEMS) for i in range(_PILOT_ITEMS)}
        yield from (item for number, item in enumerate(calls) if number in wanted)


def _spread(documents: list[Document], count: int) -> list[Document]:
    """`count` documents at even distances of the list."""
    count = min(count, len(documents))
    return [documents[(2 * i + 1) * len(documents) // (2 * count)] for i in range(count)]


def _length(items: Any, limit: int | None) -> int:
    """Items that need a call, at most `limit` items being taken."""
    return sum(item.text is None for number, item in enumerate(items) if limit is None or number < limit)


def _silent(line: str) -> None:
    pass
