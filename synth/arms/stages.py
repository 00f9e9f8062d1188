"""The stages of an experiment with arms: bases, gates, tunings, scores. Training and scoring are jobs of their own.

Their documents carry no text: `meta` holds what a run has reached, or which options were chosen.
"""

import asyncio
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pretrain.config import local, to_json
from pretrain.data.mixture import MixtureStage, replay_stages
from pretrain.data.source import JsonlConfig
from pretrain.jobs.api import Job, JobsConfig
from pretrain.pretrained import Checkpoint, Pretrained
from pretrain.train import TrainConfig
from synth.arms.plan import Replicate, Tuning
from synth.document import Document
from synth.llm.local import LocalConfig
from synth.question import Graded, Question
from synth.shards import read_documents
from synth.stage import Shard
from synth.tasks.closed_book import grade_by_likelihood
from synth.training import checkpoint_with, in_order, train_in_job

OWN_TEXT = "own_text"  # the source of an arm's rows; the others are replay


def choose_in_job(
    models: Sequence[LocalConfig],
    sets: Mapping[str, tuple[Sequence[Question], Mapping[str, str] | None]],
    per_byte: bool,
) -> list[dict[str, list[int | None]]]:
    """For each model the options that it chooses in each set of questions, with its contexts if there are any."""
    return [
        {name: _choices(model, questions, contexts, per_byte) for name, (questions, contexts) in sets.items()}
        for model in models
    ]


def _choices(
    model: LocalConfig, questions: Sequence[Question], contexts: Mapping[str, str] | None, per_byte: bool
) -> list[int | None]:
    async def grade() -> list[Graded]:
        llm = model.build()
        graded = await grade_by_likelihood(llm, questions, context=contexts, per_byte=per_byte)
        await llm.close()
        return graded

    return [g.choice for g in asyncio.run(grade())]


@dataclass(frozen=True, kw_only=True)
class Bases:
    """Stage: one document a replicate, with what its base has reached."""

    replicates: tuple[Replicate, ...]
    jobs: JobsConfig = local()
    name: str = "bases"
    version: int = 1
    gather: bool = True
    needs: tuple[str, ...] = ()

    def identity(self) -> Mapping[str, Any]:
        """The configs of the bases."""
        return {replicate.name: to_json(replicate.base, identity_only=True) for replicate in self.replicates}

    def run(self, documents: Iterable[Document], *, shard: Shard) -> Iterator[Document]:
        """Train what is to be trained."""
        jobs = [
            Job(
                name=replicate.name,
                function=train_in_job,
                arguments=(_in_workdir(replicate.base, _training(shard)), f"base-{replicate.name}"),
            )
            for replicate in self.replicates
            if isinstance(replicate.base, TrainConfig)
        ]
        trained = in_order(self.jobs, shard.scratch.parent / "jobs", jobs)
        for replicate in self.replicates:
            made = next(trained) if isinstance(replicate.base, TrainConfig) else {}
            yield Document(id=replicate.name, text="", meta=made)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The questions of a replicate, and what is open before each, by its id; `per_byte` as `grade_by_likelihood`."""

    questions: tuple[Question, ...]
    background: tuple[Question, ...]
    books: Mapping[str, str]
    per_byte: bool = False

    @property
    def sha256(self) -> str:
        """Of everything that is asked and shown."""
        return hashlib.sha256(json.dumps(to_json(self), sort_keys=True).encode()).hexdigest()

    def sets(self, *, open_book: bool) -> dict[str, tuple[Sequence[Question], Mapping[str, str] | None]]:
        """The sets to ask an arm."""
        found: dict[str, Any] = {"closed": (self.questions, None)}
        if open_book:
            found["open"] = (self.questions, self.books)
        return found


@dataclass(frozen=True, kw_only=True)
class BaseScores:
    """Stage: what every base chooses with the book closed, with it open, and about its own background."""

    replicates: tuple[Replicate, ...]
    asked: Mapping[str, Asked]
    jobs: JobsConfig = local()
    name: str = "base_scores"
    version: int = 1
    gather: bool = True
    needs: tuple[str, ...] = ()

    def identity(self) -> Mapping[str, Any]:
        """The questions and the books."""
        return {"asked": {name: asked.sha256 for name, asked in self.asked.items()}}

    def run(self, documents: Iterable[Document], *, shard: Shard) -> Iterator[Document]:
        """One document a base."""
        jobs = []
        for replicate, made in zip(self.replicates, documents, strict=True):
            asked = self.asked[replicate.name]
            sets = {**asked.sets(open_book=True), "background": (asked.background, None)}
            model = _model(_base(replicate, made, shard))
            jobs.append(
                Job(name=replicate.name, function=choose_in_job, arguments=([model], sets, asked.per_byte))
            )
        for job, (choices,) in zip(
            jobs, in_order(self.jobs, shard.scratch.parent / "jobs", jobs), strict=True
        ):
            yield Document(id=job.name, text="", meta={"choices": choices})


@dataclass(frozen=True, kw_only=True)
class Tunings:
    """Stage: one document an arm and replicate, with what it has reached. `corpora` are the files of texts."""

    replicates: tuple[Replicate, ...]
    corpora: Mapping[str, str] = local()
    corpora_sha256: Mapping[str, str]
    jobs: JobsConfig = local()
    name: str = "tunings"
    version: int = 1
    gather: bool = True
    needs: tuple[str, ...] = ("bases",)

    def identity(self) -> Mapping[str, Any]:
        """How all continue, and on what."""
        return {
            "tuning": {r.name: to_json(r.tuning, identity_only=True) for r in self.replicates},
            "corpora": dict(self.corpora_sha256),
        }

    def run(self, documents: Iterable[Document], *, shard: Shard) -> Iterator[Document]:
        """Train all arms."""
        training = _training(shard)
        bases = {d.id: d for path in shard.needed["bases"] for d in read_documents(path)}
        jobs = []
        for replicate in self.replicates:
            base = _base(replicate, bases[replicate.name], shard)
            for arm in replicate.arms:
                label = f"{replicate.name}-{arm.name}"
                config = arm_config(replicate.tuning, base, self.corpus(label, training), training)
                jobs.append(Job(name=label, function=train_in_job, arguments=(config, label)))
        for job, made in zip(jobs, in_order(self.jobs, shard.scratch.parent / "jobs", jobs), strict=True):
            yield Document(id=job.name, text="", meta=made)

    def corpus(self, label: str, training: Path) -> str | None:
        """A link to the texts of an arm that is named by their content.

        A finished run with the same config is not looked at again, so under a fixed path texts that were made anew
        would count as learned already.
        """
        if label not in self.corpora:
            return None
        path = Path(self.corpora[label])
        link = training / "texts" / f"{label}-{self.corpora_sha256[label][:12]}{''.join(path.suffixes)}"
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(os.path.relpath(path, link.parent))
        return str(link.absolute())


def arm_config(tuning: Tuning, base: Pretrained | Path, corpus: str | None, workdir: Path) -> TrainConfig:
    """The run of one arm: its text and the replay in fixed shares, a checkpoint at every budget."""
    train, data = tuning.train, tuning.train.data
    replay = {source.name: 1.0 for source in data.sources}
    if corpus is None:
        stages = (MixtureStage(start_step=0, weights=replay),)
    else:
        stages = replay_stages({OWN_TEXT: 1.0}, replay, ((0, tuning.replay),))
        own = JsonlConfig(name=OWN_TEXT, path=corpus, heldout_percent=0.0)
        data = replace(data, sources=(own, *data.sources))
    return replace(
        train,
        data=replace(data, stages=stages),
        run=replace(train.run, workdir=str(workdir)),
        checkpoint=replace(train.checkpoint, keep_steps=tuning.budget_steps),
        init=str(base) if isinstance(base, Path) else base,
    )


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Stage: one document an arm, replicate and budget, with the options it chooses."""

    replicates: tuple[Replicate, ...]
    asked: Mapping[str, Asked]
    jobs: JobsConfig = local()
    name: str = "scores"
    version: int = 1
    gather: bool = True
    needs: tuple[str, ...] = ()

    def identity(self) -> Mapping[str, Any]:
        """The questions and the books."""
        return {
            "asked": {name: asked.sha256 for name, asked in self.asked.items()},
            "open_book": sorted({arm.name for r in self.replicates for arm in r.arms if arm.open_book}),
        }

    def run(self, documents: Iterable[Document], *, shard: Shard) -> Iterator[Document]:
        """Ask every arm at every budget; with the book open at the last one only."""
        training = _training(shard)
        checkpoints = {d.id: checkpoint_with(training / d.id, d.meta["params_sha256"]) for d in documents}
        jobs, places = [], []
        for replicate in self.replicates:
            steps = replicate.tuning.budget_steps
            for arm in replicate.arms:
                label = f"{replicate.name}-{arm.name}"
                models = [_model(checkpoints[label], step) for step in steps]
                asked = self.asked[replicate.name]
                sets = asked.sets(open_book=False)
                jobs.append(Job(name=label, function=choose_in_job, arguments=(models, sets, asked.per_byte)))
                places.append((replicate, arm))
                if arm.open_book:
                    sets = {"open": (asked.questions, asked.books)}
                    jobs.append(
                        Job(
                            name=f"{label}-open",
                            function=choose_in_job,
                            arguments=(models[-1:], sets, asked.per_byte),
                        )
                    )
                    places.append((replicate, arm))
        for (replicate, arm), found in zip(
            places, in_order(self.jobs, shard.scratch.parent / "jobs", jobs), strict=True
        ):
            steps = replicate.tuning.budget_steps
            for step, choices in zip(steps[-len(found) :], found, strict=True):
                meta = {"replicate": replicate.name, "arm": arm.name, "step": step, "choices": choices}
                mark = "-open" if "open" in choices else ""
                yield Document(id=f"{replicate.name}-{arm.name}-{step}{mark}", text="", meta=meta)


# --- jobs --------------------------------------------------------------------------------------------


def _training(shard: Shard) -> Path:
    """Where the run folders of this pipeline are."""
    return shard.scratch.parent.parent / "training"


def _in_workdir(config: TrainConfig, workdir: Path) -> TrainConfig:
    return replace(config, run=replace(config.run, workdir=str(workdir)))


def _model(base: Pretrained | Path, step: int | None = None) -> LocalConfig:
    """What a base or a run of ours, at one of its steps, says to a question."""
    if isinstance(base, Path):
        base = Checkpoint(path=str(base if step is None else base / str(step)))
    return LocalConfig(weights=base)


def _base(replicate: Replicate, made: Document, shard: Shard) -> Pretrained | Path:
    """The base of a replicate: what the config names, or the checkpoints of its run."""
    if not isinstance(replicate.base, TrainConfig):
        return replicate.base
    return checkpoint_with(_training(shard) / f"base-{replicate.name}", made.meta["params_sha256"])
