"""Which evaluation items stand in a training corpus: 13 words of an item in a row, as in GPT-3 (arXiv 2005.14165, appendix C).

An item is its text with its right answer, in lower case without punctuation or the marks of its prompt. One of less than
13 words is looked for as a whole; one of less than 8, too common to tell, is not looked for. A hit says that the
words were seen, not that they were learned.
"""

import collections
import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence

from pretrain.evals.tasks import Item, Passage

_NUM_WORDS, _FEWEST_WORDS = 13, 8
_WORD = re.compile(r"\w+")
# What prompts put in front of lines, and no corpus does.
_MARK = re.compile(r"^(question|answer|q|a):", re.MULTILINE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contamination:
    """What was found of the items of a task.

    found: id of each item that stands in the corpus -> the document that holds it first. too_short: items that were
    not looked for.
    """

    items: int
    too_short: int
    found: Mapping[str, str]


def find_contamination(
    items: Mapping[str, Sequence[Item]], documents: Iterable[tuple[str, str]]
) -> dict[str, Contamination]:
    """What of the items of each task stands in the corpus of (id, text) `documents`.

    Reads the corpus once, about half a million words a second; memory grows with the words of the items alone.
    """
    # The first words of a run -> (all its words, task, item): one look-up a word of the corpus, whatever the lengths.
    runs: dict[str, list[tuple[list[str], str, str]]] = collections.defaultdict(list)
    too_short = collections.Counter({task: 0 for task in items})
    for task, of_task in items.items():
        for item in of_task:
            words = _words(item.text if isinstance(item, Passage) else item.solved())
            if len(words) < _FEWEST_WORDS:
                too_short[task] += 1
                continue
            for start in range(max(1, len(words) - _NUM_WORDS + 1)):
                run = words[start : start + _NUM_WORDS]
                runs[" ".join(run[:_FEWEST_WORDS])].append((run, task, item.id))
    found: dict[str, dict[str, str]] = {task: {} for task in items}
    for document, text in documents:
        words = _words(text)
        for start in range(len(words) - _FEWEST_WORDS + 1):
            for run, task, item in runs.get(" ".join(words[start : start + _FEWEST_WORDS]), ()):
                if words[start : start + len(run)] == run:
                    found[task].setdefault(item, document)
    return {
        task: Contamination(items=len(of_task), too_short=too_short[task], found=found[task])
        for task, of_task in items.items()
    }


def _words(text: str) -> list[str]:
    return _WORD.findall(_MARK.sub(" ", text.lower()))
