"""The parts of the page beside the table of arms: the gate, the pairs, the texts; in Markdown."""

from collections.abc import Iterable, Mapping
from typing import Any

from synth.document import Document
from synth.sbp.judge import judged_rates
from synth.sbp.pair import PAIR, RANDOM, REPORT
from synth.sbp.quality import PAPER, PAPER_COLUMNS, PAPER_DUPLICATES_IN, PAPER_JUDGED
from synth.sbp.tune import HELDOUT_ALONE, HELDOUT_OTHER, HELDOUT_OWN
from synth.stage import StageResult

_FORMS = {HELDOUT_OWN: "after its own first", HELDOUT_OTHER: "after another first", HELDOUT_ALONE: "alone"}


def gate_lines(found: Mapping[int, Mapping[str, StageResult]]) -> list[str]:
    """Loss on held-out second documents, in three forms, of both synthesizers."""
    head = " | ".join(f"{form}" for form in _FORMS.values())
    lines = [f"| seed | tuned on | {head} |", "|---|---|---|---|---|"]
    for seed, results in found.items():
        nats = next(results["gate"].documents()).meta["nats_per_token"]
        for kind in (PAIR, RANDOM):
            cells = " | ".join(f"{nats[kind][form]:.4f}" for form in _FORMS)
            lines.append(f"| {seed} | {kind} | {cells} |")
    return lines


def pair_lines(found: Mapping[int, Mapping[str, StageResult]]) -> list[str]:
    """What was paired."""
    lines = [
        "| seed | part | documents | pairs | threshold | neighbors above | recall | same label | by chance |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for seed, results in found.items():
        for document in results["pair"].documents():
            if document.meta["kind"] == REPORT:
                m = document.meta
                same = [
                    f"{m[key]:.3f}" if key in m else "-" for key in ("same_label", "same_label_by_chance")
                ]
                lines.append(
                    f"| {seed} | {m['part']} | {m['documents']:,} | {m['pairs']:,} | {m['threshold']:.3f} | "
                    f"{m['neighbors_above']:.1f} | {m['recall']:.3f} | {' | '.join(same)} |"
                )
    return lines


def quality_lines(documents: Iterable[Document]) -> list[str]:
    """Rates in percent of each kind of text, beside the paper's."""
    found = {d.id: d.meta for d in documents}
    keys = ("repetition", "duplicate", "seed_copy", "corpus_copy", "novel", "distinct_4")
    # The share of duplicates grows with the texts looked at, so their number stands beside it.
    lines = [f"| text | sampled | {' | '.join(f'{k}, %' for k in keys)} | words: median |"]
    lines.append("|---|" + "---|" * (len(keys) + 2))
    for name, measured in found.items():
        cells = [_cell(measured[key]) for key in keys]
        row = [name, f"{measured['sampled']:,}", *cells, f"{measured['words']['median']:.0f}"]
        lines.append(f"| {' | '.join(row)} |")
    for number, name in enumerate(PAPER_COLUMNS):
        cells = [_percent(PAPER[key][number]) if key in PAPER else "-" for key in keys]
        lines.append(f"| {name} | duplicates in {PAPER_DUPLICATES_IN:,} | {' | '.join(cells)} | - |")
    return lines


def judge_lines(grades: Iterable[Document]) -> list[str]:
    """What the judge found, in percent, beside the paper's."""
    lines = ["| judged text | graded | irrelevant, % | not factual, % |", "|---|---|---|---|"]
    for label, found in judged_rates(grades).items():
        rates = " | ".join(_cell(found[key]) for key in ("irrelevant", "not_factual"))
        lines.append(f"| {label} | {found['graded']} | {rates} |")
    for name, irrelevant, wrong in zip(PAPER_COLUMNS, *PAPER_JUDGED, strict=True):
        lines.append(f"| {name} | - | {_percent(irrelevant)} | {_percent(wrong)} |")
    return [*lines, ""]


def _cell(share: Any) -> str:
    return "-" if share is None else _percent(100 * share)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
