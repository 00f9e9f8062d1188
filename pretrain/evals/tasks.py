"""Evaluation tasks as data: what is asked, in which words, from which file; each has a version.

A score belongs to a name and a version: whoever changes a prompt or a split raises the version. Prompts are those of
EleutherAI's lm-evaluation-harness for the tasks of the same name, so that figures can be compared. Files lie below
the folder that the caller names, plain or gzip; nothing is downloaded.
"""

import dataclasses
import gzip
import json
import random
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from pretrain.config import ConfigError, stable_seed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """Options to choose from by likelihood: continuation i is scored after context i."""

    id: str
    contexts: tuple[str, ...]
    continuations: tuple[str, ...]  # with the blank in front
    gold: int

    def __post_init__(self):
        if len(self.contexts) != len(self.continuations) or not 0 <= self.gold < len(self.contexts):
            raise ConfigError(
                f"{self.id} must have as many contexts as continuations and a gold one of them, got "
                f"{len(self.contexts)}, {len(self.continuations)} and {self.gold}"
            )

    def solved(self) -> str:
        """The text with its answer, as an example for others."""
        return self.contexts[self.gold] + self.continuations[self.gold]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LastWord:
    """A passage whose last word is to be predicted."""

    id: str
    context: str
    word: str  # with the blank in front

    def solved(self) -> str:
        return self.context + self.word


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """A question with the answers that count; the model writes until one of `stop`."""

    id: str
    prompt: str
    answers: tuple[str, ...]
    stop: tuple[str, ...] = ("\n",)

    def solved(self) -> str:
        return f"{self.prompt} {self.answers[0]}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Passage:
    """A text to be scored whole, in bits per byte."""

    id: str
    text: str


Item = Choice | LastWord | Question | Passage


class Task(Protocol):
    """A named set of items, all of one kind, in a fixed order."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> int: ...

    def items(self, root: str) -> Sequence[Item]: ...

    def examples(self, root: str) -> Sequence[Item]:  # for few-shot prompts, never scored
        ...


@runtime_checkable
class Judge(Protocol):
    """A task of questions that has metrics of its own, of all answers together."""

    def judge(
        self, root: str, answers: Mapping[str, str]
    ) -> Mapping[str, float]:  # answers by id of the item
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Questions with options inside one `instruction`, as in the LLM-Adapters collection of reasoning sets.

    `style` "question" is the harness' form for ARC, "plain" continues the bare question as its OpenBookQA does.
    """

    name: str
    file: str
    examples_file: str | None = None
    style: Literal["question", "plain"] = "question"
    version: int = 1

    def items(self, root: str) -> Sequence[Choice]:
        return [self._item(i, r) for i, r in enumerate(read_records(root, self.file, self.name))]

    def examples(self, root: str) -> Sequence[Choice]:
        if self.examples_file is None:
            return []
        return [self._item(i, r) for i, r in enumerate(read_records(root, self.examples_file, self.name))]

    def _item(self, number: int, record: Mapping[str, Any]) -> Choice:
        question, options, gold = _options(record, f"{self.name} {number}", "answer")
        context = f"Question: {question}\nAnswer:" if self.style == "question" else question
        return Choice(
            id=str(number),
            contexts=(context,) * len(options),
            continuations=tuple(f" {option}" for option in options),
            gold=gold,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Winogrande:
    """A blank to fill: the text behind it is scored after each option (the harness' partial evaluation)."""

    name: str = "winogrande"
    file: str = "llmadapters_winogrande_test.json.gz"
    version: int = 1

    def items(self, root: str) -> Sequence[Choice]:
        found = []
        for number, record in enumerate(read_records(root, self.file, self.name)):
            sentence, options, gold = _options(record, f"{self.name} {number}", "option")
            before, blank, after = sentence.partition("_")
            if not blank:
                raise ConfigError(f"{self.name} {number} must hold a blank, got {sentence!r}")
            found.append(
                Choice(
                    id=str(number),
                    contexts=tuple(before + option for option in options),
                    continuations=(f" {after.strip()}",) * len(options),
                    gold=gold,
                )
            )
        return found

    def examples(self, root: str) -> Sequence[Choice]:
        return []


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piqa:
    """Which of two ways reaches a goal (arXiv 1911.11641)."""

    name: str = "piqa"
    file: str = "piqa_valid.jsonl.gz"
    labels_file: str = "piqa_valid-labels.lst.gz"
    version: int = 1

    def items(self, root: str) -> Sequence[Choice]:
        records = read_records(root, self.file, self.name)
        labels = read_text(root, self.labels_file, self.name).split()
        if len(labels) != len(records):
            raise ConfigError(
                f"{self.name} must have a label for each record, got {len(labels)} for {len(records)}"
            )
        found = []
        for i, (record, label) in enumerate(zip(records, labels, strict=True)):
            goal, *ways = (_text(record, key, f"{self.name} {i}") for key in ("goal", "sol1", "sol2"))
            if label not in ("0", "1"):
                raise ConfigError(f"{self.name} {i} must have the label 0 or 1, got {label!r}")
            found.append(
                Choice(
                    id=str(i),
                    contexts=(f"Question: {goal}\nAnswer:",) * 2,
                    continuations=tuple(f" {way}" for way in ways),
                    gold=int(label),
                )
            )
        return found

    def examples(self, root: str) -> Sequence[Choice]:
        return []


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lambada:
    """The last word of a passage that needs the whole of it (arXiv 1606.06031)."""

    name: str = "lambada"
    file: str = "lambada_test.jsonl.gz"
    version: int = 1

    def items(self, root: str) -> Sequence[LastWord]:
        found = []
        for number, record in enumerate(read_records(root, self.file, self.name)):
            context, blank, word = _text(record, "text", f"{self.name} {number}").rpartition(" ")
            found.append(LastWord(id=str(number), context=context, word=blank + word))
        return found

    def examples(self, root: str) -> Sequence[LastWord]:
        return []


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpenQuestions:
    """Questions answered from memory; keys of the records are data.

    form: how a question is put, {} being the question without its mark. stop: what ends an answer. description: what
    stands before all of it, once.
    """

    name: str
    file: str
    question_key: str
    answers_key: str
    examples_file: str | None = None
    form: str = "Question: {}?\nAnswer:"
    stop: tuple[str, ...] = ("\n",)
    description: str = ""
    version: int = 1

    def items(self, root: str) -> Sequence[Question]:
        return self._read(root, self.file)

    def examples(self, root: str) -> Sequence[Question]:
        return [] if self.examples_file is None else self._read(root, self.examples_file)

    def _read(self, root: str, file: str) -> list[Question]:
        found = []
        for number, record in enumerate(read_records(root, file, self.name)):
            where = f"{self.name} {number}"
            question = _text(record, self.question_key, where).strip().rstrip("?")
            answers = _value(record, self.answers_key, where)
            if not isinstance(answers, list) or not answers or not all(isinstance(a, str) for a in answers):
                raise ConfigError(
                    f"{where} must hold a list of texts under {self.answers_key!r}, got {answers!r}"
                )
            prompt = self.form.format(question)
            found.append(Question(id=str(number), prompt=prompt, answers=tuple(answers), stop=self.stop))
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Passages:
    """Texts scored in bits per byte: the records of a JSONL file, or a whole plain text."""

    name: str
    file: str
    text_key: str = "text"
    version: int = 2  # 2: long texts in windows like those of the harness

    def items(self, root: str) -> Sequence[Passage]:
        if ".json" not in self.file:
            return [Passage(id="0", text=read_text(root, self.file, self.name))]
        records = read_records(root, self.file, self.name)
        texts = [_text(r, self.text_key, f"{self.name} {i}") for i, r in enumerate(records)]
        return [Passage(id=str(i), text=text) for i, text in enumerate(texts) if text]

    def examples(self, root: str) -> Sequence[Passage]:
        return []


LAMBADA = Lambada()
PIQA = Piqa()
ARC_EASY = Options(
    name="arc_easy",
    file="llmadapters_ARC-Easy_test.json.gz",
    examples_file="llmadapters_ARC-Easy_train.json.gz",
)
ARC_CHALLENGE = Options(
    name="arc_challenge",
    file="llmadapters_ARC-Challenge_test.json.gz",
    examples_file="llmadapters_ARC-Challenge_train.json.gz",
)
OPENBOOKQA = Options(
    name="openbookqa",
    file="llmadapters_openbookqa_test.json.gz",
    examples_file="llmadapters_openbookqa_train.json.gz",
    style="plain",
)
WINOGRANDE = Winogrande()
# As nq_open 4.0 of the harness; its answers end at a full stop or a comma too.
NATURAL_QUESTIONS = OpenQuestions(
    name="nq_open",
    file="nq_open_dev.jsonl.gz",
    question_key="question",
    answers_key="answer",
    form="Q: {}?\nA:",
    stop=("\n", ".", ","),
    description="Answer these questions:\n\n",
    version=2,
)
WEB_QUESTIONS = OpenQuestions(
    name="webquestions",
    file="webquestions_test.json.gz",
    question_key="qText",
    answers_key="answers",
    examples_file="webquestions_trainmodel.json.gz",
)
LIKELIHOOD_TASKS = (LAMBADA, PIQA, ARC_EASY, ARC_CHALLENGE, OPENBOOKQA, WINOGRANDE)


# --- choosing and prompting --------------------------------------------------------------------------


def choose_items(items: Sequence[Item], max_items: int | None, seed: int) -> list[Item]:
    """At most `max_items` of them, drawn once by `seed`, in their order."""
    if max_items is None or max_items >= len(items):
        return list(items)
    return [
        items[i]
        for i in sorted(random.Random(stable_seed("items", seed)).sample(range(len(items)), max_items))
    ]


def few_shot_prefix(task: Task, root: str, num_shots: int, seed: int) -> str:
    """What stands before every prompt of a task: its description and solved examples, the same for all items.

    Raises:
      ConfigError: the task has too few.
    """
    description = task.description if isinstance(task, OpenQuestions) else ""
    if num_shots == 0:
        return description
    examples = task.examples(root)
    if len(examples) < num_shots:
        raise ConfigError(
            f"{task.name} must have {num_shots} solved examples for its prompt, got {len(examples)}; set num_shots to fewer"
        )
    chosen = random.Random(stable_seed("shots", task.name, seed)).sample(list(examples), num_shots)
    return description + "".join(
        f"{example.solved()}\n\n" for example in chosen if not isinstance(example, Passage)
    )


# --- files -------------------------------------------------------------------------------------------


def read_text(root: str, file: str, name: str) -> str:
    """The text of a file below `root` (a glob must name one); ConfigError when it cannot be read."""
    path = Path(root, file)
    if "*" in file:
        found = sorted(Path(root).glob(file))
        if len(found) != 1:
            raise ConfigError(f"task {name} must find one file for {file!r} below {root!r}, got {len(found)}")
        path = found[0]
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ConfigError(
            f"task {name} must find its file below data_root, got {path}: {getattr(error, 'strerror', None) or error}"
        ) from error


def read_records(root: str, file: str, name: str) -> list[dict[str, Any]]:
    """The objects of a JSON array or of JSON lines."""
    text = read_text(root, file, name)
    try:
        if text.lstrip().startswith("["):
            return list(json.loads(text))
        return list(_lines(text))
    except ValueError as error:
        raise ConfigError(
            f"task {name} must find JSON in {Path(root, file)}, got what fails: {error}"
        ) from error


def _lines(text: str) -> Iterator[dict[str, Any]]:
    # Not splitlines: a text may hold other line ends.
    for line in text.split("\n"):
        if line.strip():
            yield json.loads(line)


def _value(record: Any, key: str, where: str) -> Any:
    """What a record holds under `key`; ConfigError where it has no such key."""
    if not isinstance(record, dict) or key not in record:
        has = f"the keys {', '.join(map(repr, record))}" if isinstance(record, dict) else repr(record)[:60]
        raise ConfigError(f"{where} must be an object with {key!r}, got {has}; is it this task's file?")
    return record[key]


def _text(record: Any, key: str, where: str) -> str:
    value = _value(record, key, where)
    if not isinstance(value, str):
        raise ConfigError(f"{where} must hold a text under {key!r}, got {value!r}")
    return value


def _options(record: Mapping[str, Any], where: str, word: str) -> tuple[str, list[str], int]:
    """The question, its options and the index of the right one, from an `instruction` that holds them all."""
    instruction, answer = _text(record, "instruction", where), _text(record, "answer", where)
    text = instruction.partition(": ")[2]
    text = re.split(r"\s*Answer format:", text)[0]
    question, _, listed = text.rpartition(f"\n\n{word.title()}1: ")
    parts = re.split(rf"\s+{word.title()}\d+: ", listed)
    gold = answer.removeprefix(word)
    if not question or not gold.isdecimal() or not 1 <= int(gold) <= len(parts) or len(parts) < 2:
        raise ConfigError(f"{where} must list options and name one of them, got {instruction!r}")
    return question.strip(), [part.strip() for part in parts], int(gold) - 1
