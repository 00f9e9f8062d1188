"""seqio for those who have it: a Task or Mixture as a text source, a SentencePiece vocabulary as a tokenizer.

Extra `[seqio]`, which brings TensorFlow; only a config file imports this module. Tasks are read at preparation
time, like every source, so training never sees TensorFlow.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import seqio
from google.protobuf.message import DecodeError

from pretrain.config import ConfigError
from pretrain.data.source import BadRecord, SourceConfig, TextDocument, TextSource, bad_record, decode_text
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
        try:
            return SeqioSource(self, seqio.get_mixture_or_task(self.task))
        except ValueError as error:
            names = sorted([*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()])
            raise ConfigError(
                f"data.sources.{self.name}.task must be a registered seqio task or mixture, got {self.task!r}; "
                f"registered: {', '.join(names[:10]) or 'none'}; import the module that registers it in the config file"
            ) from error


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
        if self.config.split not in self.task.splits:
            raise ConfigError(
                f"data.sources.{self.config.name}.split must be one of {', '.join(map(str, self.task.splits))}, "
                f"got {self.config.split!r}"
            )
        dataset = self.task.get_dataset(
            sequence_length=None, split=self.config.split, shuffle=False, seed=self.config.seed, num_epochs=1
        )
        for number, example in enumerate(dataset.as_numpy_iterator()):
            where = f"{self.config.task}/{self.config.split}:{number}"
            try:
                text = self._text(example, self.config.text_feature)
                first = self._text(example, self.config.first_feature) if self.config.first_feature else None
            except ValueError as error:
                yield bad_record(self.config, where, None, error)
                continue
            yield TextDocument(where, text, self.config.name, first)

    def _text(self, example: dict[str, Any], feature: str) -> str:
        value = example.get(f"{feature}_pretokenized", example.get(feature))
        if value is None:
            raise ValueError(f"the example has no feature {feature!r}; it has: {', '.join(sorted(example))}")
        if isinstance(value, bytes):
            return decode_text(value)
        return self.task.output_features[feature].vocabulary.decode([int(i) for i in value])
