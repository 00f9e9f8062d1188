"""seqio for those who have it: a Task or Mixture as a text source or an evaluation task, a SentencePiece vocabulary as a tokenizer.

Extra `[seqio]`, which brings TensorFlow; only a config file imports this module. Sources are read at preparation
time and tasks at evaluation, so training never sees TensorFlow.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import seqio
from google.protobuf.message import DecodeError

from pretrain.config import ConfigError
from pretrain.data.source import BadRecord, SourceConfig, TextDocument, TextSource, bad_record, decode_text
from pretrain.evals.tasks import Choice, Item, LastWord, Passage, Question
from pretrain.rundir import write_atomic
from pretrain.tokenizer import Tokenizer, check_lossless, read_tokenizer_file

# --- tokenizer ---------------------------------------------------------------------------------------


class SentencePieceTokenizer:
    """A seqio SentencePiece vocabulary; special ids that the model lacks follow its own."""

    def __init__(self, path: str):
        """Raises ConfigError when `path` is no SentencePiece model."""
        self._path = path
        self._model = read_tokenizer_file(Path(path))
        self._vocabulary = seqio.SentencePieceVocabulary(path)
        try:
            size = self._vocabulary.vocab_size
        except (DecodeError, RuntimeError, OSError, ValueError) as error:
            raise ConfigError(
                f"data.tokenizer.path must be a SentencePiece model, got {path}: {error}"
            ) from error
        processor = self._vocabulary.tokenizer
        self._processor = processor
        self._base_size = size
        ids = []
        for own in (processor.pad_id(), processor.bos_id(), processor.eos_id(), -1):
            if own < 0:
                own, size = size, size + 1
            ids.append(own)
        self.pad_id, self.bos_id, self.eos_id, self.sep_id = ids
        self.vocab_size = size
        self._special = frozenset(ids)

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return SentencePieceTokenizer, (self._path,)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self._model).hexdigest()

    def encode(self, text: str) -> list[int]:
        return self._vocabulary.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Special ids vanish."""
        return self._vocabulary.decode([int(i) for i in ids if i not in self._special])

    def token_bytes(self, token_id: int) -> int:
        if token_id in self._special or token_id >= self._base_size or self._processor.is_control(token_id):
            return 0
        if self._processor.is_byte(token_id):
            return 1
        return len(self._processor.id_to_piece(int(token_id)).replace("\u2581", " ").encode())

    def save(self, path: str | Path) -> None:
        """Write the SentencePiece model."""
        write_atomic(path, self._model)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SentencePieceConfig:
    """A SentencePiece model file.

    No SentencePiece model tells U+2581 from a blank, and most change blanks and accents: `require_lossless` is
    refused then, and a score in bits per byte counts the bytes of the text before the change.
    """

    path: str  # below data.root
    require_lossless: bool = True
    trained: ClassVar[bool] = False

    def build(self, root: str, texts: Callable[[int], Iterator[str]]) -> Tokenizer:
        tokenizer = SentencePieceTokenizer(str(Path(root, self.path)))
        if self.require_lossless:
            check_lossless(tokenizer, self.path)
        return tokenizer


# --- source ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeqioConfig(SourceConfig):
    """A registered Task or Mixture; the config file imports the module that registers it.

    The text is `<text_feature>_pretokenized` where preprocessing keeps it, else the feature itself: text as it is, ids
    through the vocabulary of the feature. With `first_feature`, documents are pairs. What a task yields is read when a
    table is built and not looked at again: give a changed task another `revision`.
    """

    task: str
    split: str = "train"
    text_feature: str = "targets"
    first_feature: str | None = None
    seed: int = 0
    revision: str = ""

    def build(self, root: str) -> TextSource:
        return SeqioSource(self, _registered(self.task, f"data.sources.{self.name}"))


@dataclasses.dataclass(frozen=True)
class SeqioSource:
    """See `SeqioConfig`."""

    config: SeqioConfig
    task: Any
    identity: str = f"seqio {seqio.__version__}"

    def content_files(self) -> list[tuple[str, Path]]:
        return []

    def content_fingerprint(self) -> str:
        digest = hashlib.sha256()
        for document in self.documents():
            digest.update(json.dumps(dataclasses.astuple(document)).encode())
        return digest.hexdigest()

    def documents(self) -> Iterator[TextDocument | BadRecord]:
        examples = _examples(
            self.task, self.config.split, self.config.seed, f"data.sources.{self.config.name}"
        )
        for number, example in enumerate(examples):
            where = f"{self.config.task}/{self.config.split}:{number}"
            try:
                text = _text(self.task, example, self.config.text_feature)
                first = (
                    _text(self.task, example, self.config.first_feature)
                    if self.config.first_feature
                    else None
                )
            except ValueError as error:
                yield bad_record(self.config, where, None, error)
                continue
            yield TextDocument(where, text, self.config.name, first)


def _registered(name: str, field: str) -> Any:
    """The Task or Mixture of this name; ConfigError lists those that there are."""
    try:
        return seqio.get_mixture_or_task(name)
    except ValueError as error:
        names = sorted([*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()])
        raise ConfigError(
            f"{field}.task must be a registered seqio task or mixture, got {name!r}; "
            f"registered: {', '.join(names[:10]) or 'none'}; import the module that registers it in the config file"
        ) from error


def _examples(task: Any, split: str, seed: int, field: str) -> Iterator[dict[str, Any]]:
    """The examples of a split in their order, preprocessed and not trimmed."""
    if split not in task.splits:
        raise ConfigError(f"{field}.split must be one of {', '.join(map(str, task.splits))}, got {split!r}")
    dataset = task.get_dataset(sequence_length=None, split=split, shuffle=False, seed=seed, num_epochs=1)
    return dataset.as_numpy_iterator()


def _text(task: Any, example: dict[str, Any], feature: str) -> str:
    """A feature before it was made into ids, or ids as text; ValueError when the example has neither."""
    value = example.get(f"{feature}_pretokenized", example.get(feature))
    if value is None:
        raise ValueError(f"the example has no feature {feature!r}; it has: {', '.join(sorted(example))}")
    if isinstance(value, bytes):
        return decode_text(value)
    return task.output_features[feature].vocabulary.decode([int(i) for i in value])


# --- evaluation --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeqioTask:
    """A registered Task (or Mixture) as a task of `pretrain.evaluate`; the config file imports the module that registers it.

    kind: what is made of an example.
      question: `inputs_feature` is the prompt as it is, `targets_feature` the answer. Beside exact match there are the
        Task's own metrics of predictions, called seqio_<name>, after its own postprocessing.
      choice: each text of `options_feature` is scored after the inputs; the target is the text of one of them.
      last_word: the target is scored after the inputs. passage: the target is scored alone.
    Metrics of seqio that want scores are not asked: `choice` and `passage` are what this project has for them.
    """

    name: str
    task: str
    kind: Literal["question", "choice", "last_word", "passage"] = "question"
    split: str = "validation"
    examples_split: str | None = None  # for few-shot prompts
    inputs_feature: str = "inputs"
    targets_feature: str = "targets"
    options_feature: str = "options"
    stop: tuple[str, ...] = ("\n",)
    version: int = 1

    def items(self, root: str) -> Sequence[Item]:
        return self._items(self.split)

    def examples(self, root: str) -> Sequence[Item]:
        return [] if self.examples_split is None else self._items(self.examples_split)

    def judge(self, root: str, answers: Mapping[str, str]) -> Mapping[str, float]:
        """The Task's metrics of predictions over the answered items; none for a Mixture, which has none."""
        task = _registered(self.task, f"tasks.{self.name}")
        if not isinstance(task, seqio.Task):
            return {}
        targets, predictions = [], []
        for number, example in enumerate(_examples(task, self.split, 0, f"tasks.{self.name}")):
            answer = answers.get(str(number))
            if answer is not None:
                target = _text(task, example, self.targets_feature)
                targets.append(task.postprocess_fn(target, example=example, is_target=True))
                predictions.append(task.postprocess_fn(answer, example=example, is_target=False))
        found = {}
        for metric in task.predict_metric_fns:
            for name, value in metric(targets, predictions).items():
                number = value.value if isinstance(value, seqio.metrics.Scalar) else value
                if isinstance(number, (int, float, np.number)):  # texts and histograms are for a dashboard
                    found[f"seqio_{name}"] = float(number)
        return found

    def _items(self, split: str) -> list[Item]:
        field = f"tasks.{self.name}"
        task, found = _registered(self.task, field), []
        for number, example in enumerate(_examples(task, split, 0, field)):
            try:
                found.append(self._item(task, str(number), example))
            except ValueError as error:
                raise ConfigError(f"{self.task}/{split}:{number}: {error}") from error
        return found

    def _item(self, task: Any, number: str, example: dict[str, Any]) -> Item:
        target = _text(task, example, self.targets_feature)
        if self.kind == "passage":
            return Passage(id=number, text=target)
        prompt = _text(task, example, self.inputs_feature)
        if self.kind == "question":
            return Question(id=number, prompt=prompt, answers=(target,), stop=self.stop)
        if self.kind == "last_word":
            return LastWord(id=number, context=prompt, word=f" {target}")
        if self.options_feature not in example:
            raise ValueError(
                f"the example has no feature {self.options_feature!r}; it has: {', '.join(sorted(example))}"
            )
        options = [decode_text(option) for option in example[self.options_feature]]
        if target not in options:
            raise ValueError(f"the target must be one of the options, got {target!r} of {options}")
        return Choice(
            id=number,
            contexts=(prompt,) * len(options),
            continuations=tuple(f" {option}" for option in options),
            gold=options.index(target),
        )
