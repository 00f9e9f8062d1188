"""Seed documents to new documents: every unique document is a seed equally often, and each text says which.

The random number of a text comes from its seed document and the number of the sample, and a sampler gives a request
the same text whatever else is in its batch; so a shard that was killed makes the same bytes again, and no seed is
used twice. What is cut off, loops or copies its seed is left out and counted.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pretrain.config import ConfigError, stable_seed, to_json
from pretrain.tokenizer import Tokenizer
from synth.document import Document, Failure, derive_id
from synth.near_duplicates import jaccard, loops, shingles_of
from synth.sbp.parts import UNIQUE, own_documents
from synth.stage import Shard

_SEEDS_AT_ONCE = 512


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Token ids to continue until the end of the document, with the seed of the random numbers."""

    ids: tuple[int, ...]
    seed: int


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """The new ids, without the end mark, and whether it came."""

    ids: tuple[int, ...]
    ended: bool


class Sampler(Protocol):
    """A model that continues prompts. A prompt's text depends on the prompt alone, not on its company."""

    def sample(self, prompts: Sequence[Prompt]) -> list[Sampled]: ...


class SamplerConfig(Protocol):
    """Which sampler, and how it draws."""

    def build(self, checkpoint: Path, tokenizer: Tokenizer) -> Sampler: ...

    @property
    def max_prompt_tokens(self) -> int: ...

    def sampling(self) -> Mapping[str, Any]:
        """How texts are drawn, for the record."""
        ...


@dataclass(frozen=True, kw_only=True)
class SynthesisRule:
    """`samples_per_document` texts for each seed; a text with a Jaccard similarity of `copied_at` to its seed is a copy.

    `keep_truncated` keeps texts that came to the limit of tokens before their end. Leaving them out makes what is kept
    shorter than what is written: of a model that has not learned how long documents are, a third.
    """

    samples_per_document: int = 8
    keep_truncated: bool = False
    copied_at: float = 0.5
    shingle_words: int = 13

    def __post_init__(self):
        faults = []
        if self.samples_per_document < 1:
            faults.append(f"samples_per_document must be at least 1, got {self.samples_per_document}")
        if not 0 < self.copied_at <= 1:
            faults.append(f"copied_at must lie in (0, 1], got {self.copied_at}")
        if faults:
            raise ConfigError(*faults)


@dataclass(frozen=True, kw_only=True)
class Opened:
    """What a stage samples with: the model behind `made_by` a training stage, and the tokenizer of all."""

    checkpoint: Path
    params_sha256: str
    tokenizer: Tokenizer


class Opener(Protocol):
    """How a shard finds the model of a training stage."""

    def __call__(self, shard: Shard, stage: str) -> Opened: ...


@dataclass(frozen=True, kw_only=True)
class Synthesize:
    """Stage: texts by the model of `writer`, after each seed document, or after nothing when not `conditional`."""

    writer: str
    label: str
    conditional: bool
    sampler: SamplerConfig
    opener: Opener
    rule: SynthesisRule
    seed: int = 0
    version: int = 1
    gather: bool = False

    @property
    def name(self) -> str:
        """One for each kind of text."""
        return f"texts_{self.label}"

    @property
    def needs(self) -> tuple[str, ...]:
        """Seeds and model; nothing is synthesized before the gate."""
        return (UNIQUE, "tokenizer", self.writer, "gate")

    def identity(self) -> Mapping[str, Any]:
        """How texts are drawn and kept; the model is an input of the stage."""
        return {
            "writer": self.writer,
            "conditional": self.conditional,
            "sampler": to_json(self.sampler, identity_only=True),
            "rule": to_json(self.rule),
            "seed": self.seed,
        }

    def run(self, documents: Iterable[Document], *, shard: Shard) -> Iterator[Document | Failure]:
        """The texts, in the order of seeds and samples."""
        opened = self.opener(shard, self.writer)
        tokenizer = opened.tokenizer
        sampler = self.sampler.build(opened.checkpoint, tokenizer)
        counts = shard.tally.counts
        made = {
            "generator": f"sbp/{self.label}",
            "model": opened.params_sha256,
            "sampling": self.sampler.sampling(),
        }
        for seeds in _blocks(own_documents(shard, UNIQUE), _SEEDS_AT_ONCE):
            jobs = [(document, n) for document in seeds for n in range(self.rule.samples_per_document)]
            prompts = []
            for document, number in jobs:
                ids = (tokenizer.bos_id,)
                if self.conditional:
                    kept = tokenizer.encode(document.text)[-(self.sampler.max_prompt_tokens - 2) :]
                    ids = (tokenizer.bos_id, *kept, tokenizer.sep_id)
                key = stable_seed(self.seed, self.label, document.id, number)
                prompts.append(Prompt(ids=ids, seed=key))
            for (document, number), prompt, sampled in zip(
                jobs, prompts, sampler.sample(prompts), strict=True
            ):
                counts["prompt_tokens"] += len(prompt.ids)
                counts["new_tokens"] += len(sampled.ids) + 1
                text = tokenizer.decode(sampled.ids)
                reason = self._fault(document, text, sampled.ended)
                key = f"{self.label}:{document.id}:{number}"
                if reason:
                    yield Failure(document=document.id, item=key, reason=reason, dropped=True)
                    continue
                counts["kept_tokens"] += len(sampled.ids) + 1
                yield Document(
                    id=derive_id((document.id,), shard.recipe, key),
                    text=text,
                    parents=(document.id,) if self.conditional else (),
                    made_by=shard.recipe,
                    meta={**made, "seed_document": document.id, "sample": number, "key": prompt.seed},
                )

    def _fault(self, document: Document, text: str, ended: bool) -> str:
        if not ended and not self.rule.keep_truncated:
            return "truncated"
        if not text.strip():
            return "empty"
        if loops(text):
            return "looping"
        width = self.rule.shingle_words
        if self.conditional and (
            jaccard(shingles_of(text, width), shingles_of(document.text, width)) >= self.rule.copied_at
        ):
            return "copied"
        return ""


def _blocks(documents: Iterator[Document], size: int) -> Iterator[list[Document]]:
    block: list[Document] = []
    for document in documents:
        block.append(document)
        if len(block) == size:
            yield block
            block = []
    if block:
        yield block
