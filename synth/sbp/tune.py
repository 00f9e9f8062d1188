"""The models of the bootstrap: a tokenizer, the reference model, and synthesizers tuned on pairs of documents.

A synthesizer is the reference model trained on with loss on the second document of each pair only. Held-out pairs
are scored all the way in three forms: after their own first document, after another one, and alone. The gate
compares these numbers before anything is synthesized.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pretrain.config import from_json, local, stable_seed, to_json
from pretrain.jobs.api import Job, JobsConfig, JobsFailed
from pretrain.optim import OptimConfig
from pretrain.rundir import file_sha256
from pretrain.tokenizer import SPECIAL_TOKENS, Tokenizer, TokenizerConfig, TokenizerFileConfig
from synth.document import Document
from synth.sbp.pair import PAIR, RANDOM
from synth.sbp.parts import TEST, UNIQUE, VALIDATION, all_documents, only_document, workdir_of
from synth.shards import LineWriter
from synth.stage import Shard, StageFailed
from synth.training import Learner, Texts, checkpoint_with, in_order, train_in_job, training_config

TOKENIZER, REFERENCE = "tokenizer", "reference"
TRAINING = "training"  # the folder, beside those of the stages, in which all runs and their tables lie
HELDOUT_OWN, HELDOUT_OTHER, HELDOUT_ALONE = "after_own_first", "after_other_first", "alone"


@dataclass(frozen=True, kw_only=True)
class MakeTokenizer:
    """Stage: the tokenizer of all runs, trained on the unique documents if it is one that is trained.

    `root` is where the path of a given tokenizer starts; a copy of it is kept, so that nothing else is looked for.
    """

    tokenizer: TokenizerConfig
    root: str = local("")
    seed: int = 0
    name: str = TOKENIZER
    version: int = 1
    gather: bool = True
    needs: tuple[str, ...] = (UNIQUE,)

    def identity(self) -> Mapping[str, Any]:
        """The config."""
        return to_json(self, identity_only=True)

    def run(self, documents: Iterable[Document], *, shard: Shard) -> Iterator[Document]:
        """One document that says how to open it: with the file beside it, or from the config alone."""

        def texts(max_bytes: int) -> Iterator[str]:
            order = sorted(
                all_documents(shard, UNIQUE), key=lambda d: stable_seed("tokenizer", self.seed, d.id)
            )
            for document in order:
                max_bytes -= len(document.text.encode())
                yield document.text
                if max_bytes <= 0:
                    return

        built = self.tokenizer.build(self.root, texts)
        opened: TokenizerConfig = self.tokenizer
        if isinstance(self.tokenizer, TokenizerFileConfig) or self.tokenizer.trained:
            # Another tokenizer has another name, so no run with the old one is taken for a run with the new one.
            path = shard.scratch.parent / f"tokenizer-{built.sha256[:12]}.json"
            built.save(path)
            kept = str(path.relative_to(workdir_of(shard)))
            if isinstance(self.tokenizer, TokenizerFileConfig):
                opened = replace(self.tokenizer, path=kept)
            else:
                pad, bos, eos, sep = SPECIAL_TOKENS
                opened = TokenizerFileConfig(path=kept, pad=pad, bos=bos, eos=eos, sep=sep)
        meta = {
            "config": to_json(opened),
            "vocab_size": built.vocab_size,
            "tokenizer_sha256": built.sha256,
        }
        yield Document(id=TOKENIZER, text="", made_by=shard.recipe, meta=meta)


@dataclass(frozen=True, kw_only=True)
class TokenizerFile:
    """The tokenizer that the stage left: as a config for training, with the root of its path, and built."""

    config: TokenizerConfig
    root: Path

    @staticmethod
    def of(shard: Shard) -> "TokenizerFile":
        """From the document of the stage."""
        config = from_json(only_document(shard, TOKENIZER).meta["config"])
        return TokenizerFile(config=config, root=workdir_of(shard))

    def build(self) -> Tokenizer:
        """Load it."""
        return self.config.build(str(self.root), lambda max_bytes: iter(()))


def checkpoint_of(shard: Shard, stage: str) -> Path:
    """The checkpoint folder that a training stage left."""
    return checkpoint_with(
        workdir_of(shard) / TRAINING / stage, only_document(shard, stage).meta["params_sha256"]
    )


def part_texts(shard: Shard, part: str, **fields: Any) -> Texts:
    """The shards of a stage as texts for training, below a folder that is named by their content.

    A finished run with the same config is not looked at again, so under a fixed path texts that were made anew would
    count as learned already. The folder holds links to these shards alone: beside the shards of a stage may lie those
    of another number of shards.
    """
    paths = shard.needed[part]
    folder = workdir_of(shard) / TRAINING / "texts" / f"{part}-{_digest(map(file_sha256, paths))}"
    folder.mkdir(parents=True, exist_ok=True)
    for path in paths:
        link = folder / path.name
        if not link.is_symlink():
            link.symlink_to(os.path.relpath(path, folder))
    return Texts(name=part, path=f"{folder.relative_to(workdir_of(shard))}/*.jsonl.zst", **fields)


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:12]


def run_training(
    shard: Shard, jobs: JobsConfig, runs: Mapping[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, outcome) of training runs, in order; those that are complete cost nothing.

    Raises:
      StageFailed: a run failed, or was told to stop: the same command goes on from its last checkpoint.
    """
    folder = workdir_of(shard) / TRAINING / "jobs"
    listed = [
        Job(name=name, function=train_in_job, arguments=(config, name)) for name, config in runs.items()
    ]
    try:
        for job, outcome in zip(listed, in_order(jobs, folder, listed), strict=True):
            yield job.name, outcome
    except JobsFailed as error:
        raise StageFailed(f"{error}; what they printed is in {folder}") from error


@dataclass(frozen=True, kw_only=True)
class Pretrain:
    """Stage: the reference model, trained on the unique documents alone."""

    learner: Learner
    num_steps: int
    jobs: JobsConfig
    seed: int = 0
    name: str = REFERENCE
    version: int = 1
    gather: bool = True
    needs: tuple[str, ...] = (UNIQUE, VALIDATION, TEST, TOKENIZER)

    def identity(self) -> Mapping[str, Any]:
        """Learner, steps, seed."""
        return {
            "learner": to_json(self.learner, identity_only=True),
            "num_steps": self.num_steps,
            "seed": self.seed,
        }

    def run(self, documents: Iterable[Document], *, shard: Shard) -> Iterator[Document]:
        """One document with the run's outcome."""
        config = training_config(
            self.learner,
            [
                part_texts(shard, UNIQUE),
                part_texts(shard, VALIDATION, share=0.0),
                part_texts(shard, TEST, share=0.0),
            ],
            tokenizer=TokenizerFile.of(shard).config,
            num_steps=self.num_steps,
            seed=self.seed,
            workdir=workdir_of(shard) / TRAINING,
            root=workdir_of(shard),
        )
        for name, outcome in run_training(shard, self.jobs, {self.name: config}):
            yield Document(id=name, text="", made_by=shard.recipe, meta=outcome)


# --- synthesizers ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How the reference becomes a synthesizer: rows hold both documents, so they are longer than in pretraining."""

    optim: OptimConfig
    num_steps: int
    row_length: int
    batch_rows: int

    def learner(self, learner: Learner) -> Learner:
        """The learner that tunes. Held-out pairs are scored in three forms, more than is learned: twice is enough."""
        return replace(
            learner, optim=self.optim, row_length=self.row_length, batch_rows=self.batch_rows, num_evals=2
        )


@dataclass(frozen=True, kw_only=True)
class Tune:
    """Stage: a synthesizer from pairs of one `kind`; both kinds are scored on the same held-out pairs."""

    learner: Learner
    tuning: Tuning
    kind: str
    jobs: JobsConfig
    seed: int = 0
    version: int = 1
    gather: bool = True
    needs: tuple[str, ...] = (UNIQUE, VALIDATION, TOKENIZER, REFERENCE, "pair")

    @property
    def name(self) -> str:
        """One for each kind of pair."""
        return f"tune_{self.kind}"

    def identity(self) -> Mapping[str, Any]:
        """Learner, tuning, kind, seed."""
        fields = {"learner": to_json(self.learner, identity_only=True), "tuning": to_json(self.tuning)}
        return {**fields, "kind": self.kind, "seed": self.seed}

    def run(self, documents: Iterable[Document], *, shard: Shard) -> Iterator[Document]:
        """Write the pairs as texts, train, yield one document with the run's outcome."""
        folder = shard.scratch.parent
        text = {part: {d.id: d.text for d in all_documents(shard, part)} for part in (UNIQUE, VALIDATION)}
        pairs = [d for d in all_documents(shard, "pair") if d.meta["kind"] in (PAIR, RANDOM)]

        def write(name: str, part: str, kind: str, *, with_first: bool = True) -> str:
            path = folder / f"{name}.jsonl.zst"
            with LineWriter(path) as writer:
                chosen = (d for d in pairs if (d.meta["part"], d.meta["kind"]) == (part, kind))
                for number, pair in enumerate(chosen):
                    first, second = (text[part][parent] for parent in pair.parents)
                    record = {"id": f"{name}-{number}", "text": second}
                    writer.write(line_of({**record, "first": first} if with_first else record))
                writer.commit()
            # Named by content for the reason that `part_texts` gives.
            named = folder / f"{name}-{file_sha256(path)[:12]}.jsonl.zst"
            os.replace(path, named)
            return str(named.relative_to(workdir_of(shard)))

        texts = [
            Texts(name="pairs", path=write("pairs", UNIQUE, self.kind), pairs=True),
            Texts(name=HELDOUT_OWN, path=write(HELDOUT_OWN, VALIDATION, PAIR), pairs=True, share=0.0),
            Texts(name=HELDOUT_OTHER, path=write(HELDOUT_OTHER, VALIDATION, RANDOM), pairs=True, share=0.0),
            Texts(
                name=HELDOUT_ALONE, path=write(HELDOUT_ALONE, VALIDATION, PAIR, with_first=False), share=0.0
            ),
        ]
        config = training_config(
            self.tuning.learner(self.learner),
            texts,
            tokenizer=TokenizerFile.of(shard).config,
            num_steps=self.tuning.num_steps,
            seed=self.seed,
            workdir=workdir_of(shard) / TRAINING,
            root=workdir_of(shard),
            init=checkpoint_of(shard, REFERENCE),
        )
        for name, outcome in run_training(shard, self.jobs, {self.name: config}):
            yield Document(id=name, text="", made_by=shard.recipe, meta=outcome)


def line_of(record: Mapping[str, Any]) -> bytes:
    """One line of JSON."""
    return (json.dumps(dict(record), ensure_ascii=False, separators=(",", ":")) + "\n").encode()


# --- the gate ----------------------------------------------------------------------------------------


class GateFailed(StageFailed):
    """The synthesizer has learned nothing from its pairs; nothing was synthesized."""


@dataclass(frozen=True, kw_only=True)
class Gate:
    """What must hold before anything is synthesized; `min_gain_nats` of None only reports.

    The gain is that of the synthesizer over the one tuned on random pairs, in nats per token of held-out second
    documents, each after its own first document.
    """

    min_gain_nats: float | None = 0.0


@dataclass(frozen=True, kw_only=True)
class CheckGate:
    """Stage: one document with the losses that decide."""

    gate: Gate = field(default_factory=Gate)
    name: str = "gate"
    version: int = 1
    gather: bool = True
    needs: tuple[str, ...] = ("tune_pair", "tune_random")

    def identity(self) -> Mapping[str, Any]:
        """The gate."""
        return to_json(self.gate)

    def run(self, documents: Iterable[Document], *, shard: Shard) -> Iterator[Document]:
        """Compare.

        Raises:
          GateFailed: the gain is not above the bound.
        """
        nats = {kind: only_document(shard, f"tune_{kind}").meta["nats_per_token"] for kind in (PAIR, RANDOM)}
        gain = nats[RANDOM][HELDOUT_OWN] - nats[PAIR][HELDOUT_OWN]
        bound = self.gate.min_gain_nats
        if bound is not None and not gain > bound:
            raise GateFailed(
                f"the synthesizer must beat the one tuned on random pairs by more than {bound} nats a token on held-out "
                f"pairs before anything is synthesized, its gain is {gain:.4f} ({nats[PAIR][HELDOUT_OWN]:.4f} against "
                f"{nats[RANDOM][HELDOUT_OWN]:.4f}); tune longer, pair otherwise, or write gate.min_gain_nats=none"
            )
        yield Document(
            id="gate",
            text="",
            made_by=shard.recipe,
            meta={
                "gain_over_random_pairs": gain,
                "gain_over_another_first": nats[PAIR][HELDOUT_OTHER] - nats[PAIR][HELDOUT_OWN],
                "nats_per_token": nats,
                "bound": bound,
            },
        )
