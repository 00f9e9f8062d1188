"""One page of numbers per corpus: what was made, from what, how varied it is, and what it cost."""

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pretrain.config import to_json
from synth.document import Document, Failure
from synth.near_duplicates import loops, near_duplicate_rate, words_of
from synth.quality.diversity import copied_fraction, distinct_ngrams, quantiles, self_bleu
from synth.shards import read_documents
from synth.stage import Shard, StageResult


@dataclass(frozen=True, kw_only=True)
class Report:
    """Stage: one document whose `meta` holds the numbers; costly ones come from a seeded sample of `sample` texts."""

    sample: int = 2000
    seed: int = 0
    name: str = "report"
    version: int = 1
    gather: bool = True
    needs: tuple[str, ...] = ("sources",)

    def identity(self) -> Mapping[str, Any]:
        """The config."""
        return to_json(self, identity_only=True)

    def run(self, documents: Iterable[Document], *, shard: Shard) -> Iterator[Document | Failure]:
        """Lengths and kinds of all texts, the rest from the sample; memory holds the sample alone."""
        sources = {d.id: d for path in shard.needed["sources"] for d in read_documents(path)}
        chance = random.Random(self.seed)
        kinds: Counter[str] = Counter()
        lengths: dict[str, list[float]] = {}
        sampled: list[Document] = []
        seen = 0
        for document in documents:
            kind = f"{document.meta.get('generator', 'text')}/{document.meta.get('kind', 'text')}"
            kinds[kind] += 1
            lengths.setdefault(kind, []).append(float(len(words_of(document.text))))
            if len(sampled) < self.sample:
                sampled.append(document)
            elif (place := chance.randrange(seen + 1)) < self.sample:
                sampled[place] = document
            seen += 1
        numbers = self._measure(sampled, sources)
        numbers["texts"] = dict(sorted(kinds.items()))
        numbers["words_per_text"] = {kind: quantiles(values) for kind, values in sorted(lengths.items())}
        numbers["words"] = int(sum(sum(values) for values in lengths.values()))
        numbers["source_words"] = sum(len(words_of(d.text)) for d in sources.values())
        numbers["source_documents"] = len(sources)
        yield Document(id="report", text="numbers", made_by=shard.recipe, meta=numbers)

    def _measure(self, sampled: list[Document], sources: Mapping[str, Document]) -> dict[str, Any]:
        texts = [document.text for document in sampled]
        copied = [
            max((copied_fraction(d.text, sources[p].text) for p in d.parents if p in sources), default=0.0)
            for d in sampled
        ]
        naming = [d for d in sampled if d.meta.get("kind") in ("pair", "triple", "crossed")]
        all_named = [all(part.casefold() in d.text.casefold() for part in d.meta["parts"]) for d in naming]
        parents = {parent for d in sampled for parent in d.parents}
        return {
            "sampled": len(sampled),
            "near_duplicates": near_duplicate_rate(texts),
            "looping": sum(map(loops, texts)) / len(texts) if texts else 0.0,
            "distinct_2": distinct_ngrams(texts, 2),
            "distinct_4": distinct_ngrams(texts, 4),
            "self_bleu": self_bleu(texts, seed=self.seed),
            "copied_8gram": sum(copied) / len(copied) if copied else 0.0,
            "names_all_parts": sum(all_named) / len(all_named) if all_named else None,
            "parents_in_sample": len(parents),
        }


def report_page(name: str, numbers: Mapping[str, Any], results: Iterable[StageResult]) -> str:
    """The page in Markdown: the stages, then the corpus."""
    lines = [
        f"# {name}",
        "",
        "| stage | documents in | out | failed | calls | from cache | tokens written | paid, USD |",
    ]
    lines.append("|---|---|---|---|---|---|---|---|")
    failed: Counter[str] = Counter()
    for result in results:
        counts = result.counts
        cells = [
            counts.get(key, 0)
            for key in ("in", "out", "failed", "calls", "cached_calls", "completion_tokens")
        ]
        lines.append(f"| {result.name} | {' | '.join(f'{c:,}' for c in cells)} | {result.cost_usd:.4f} |")
        failed.update({k.removeprefix("failed_"): v for k, v in counts.items() if k.startswith("failed_")})
        failed.update(
            {k: v for k, v in counts.items() if k in ("contaminated", "lost_calls", "retries") and v}
        )
    lines += ["", f"Words: {numbers['words']:,} from {numbers['source_words']:,} words of "]
    lines[-1] += f"{numbers['source_documents']:,} source documents"
    if numbers["source_words"]:
        lines[-1] += f" ({numbers['words'] / numbers['source_words']:.1f} times the source)."
    lines += ["", "| kind | texts | words: median | 5 % | 95 % |", "|---|---|---|---|---|"]
    for kind, count in numbers["texts"].items():
        spread = numbers["words_per_text"][kind]
        lines.append(
            f"| {kind} | {count:,} | {spread['median']:.0f} | {spread['p05']:.0f} | {spread['p95']:.0f} |"
        )
    lines += ["", f"From a sample of {numbers['sampled']:,} texts:", "", "| measure | value |", "|---|---|"]
    for key, text in _MEASURES.items():
        value = numbers[key]
        lines.append(f"| {text} | {'-' if value is None else f'{value:.4f}'} |")
    if failed:
        lines += [
            "",
            "Rejected, dropped or repeated: "
            + ", ".join(f"{k} {v:,}" for k, v in failed.most_common())
            + ".",
        ]
    return "\n".join(lines) + "\n"


_MEASURES = {
    "near_duplicates": "near-duplicates of an earlier text (Jaccard of 13-word shingles at least 0.5)",
    "looping": "texts that loop (20 words three times)",
    "distinct_2": "distinct 2-grams",
    "distinct_4": "distinct 4-grams",
    "self_bleu": "self-BLEU (50 texts)",
    "copied_8gram": "8-grams that stand in the parent",
    "names_all_parts": "pair and triple texts that name all their entities",
}
