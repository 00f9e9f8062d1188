"""Text to token ids and back, without loss for any valid UTF-8, and special ids that no text can spell.

Every tokenizer has four special ids (bos, eos, pad, sep) that `encode` never returns: text that reads
"<eos>" is seven or fewer ordinary tokens. `JsonTokenizer` wraps the `tokenizers` library and serves both a BPE
trained here (byte level, Sennrich et al. 2016 over bytes as in GPT-2) and an existing tokenizer.json.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

from tokenizers import Tokenizer as HfTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from pretrain.config import ConfigError
from pretrain.rundir import write_atomic

_GEMMA3_VOCAB_SIZE = 262_208
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<sep>")

# Text that lossy tokenizers are known to change: normal forms, case, runs of blanks, controls, spelled specials.
LOSSLESS_PROBES = (
    "Plain words, 1234567890 digits.\n",
    " leading and trailing ",
    "runs   of\t\tblanks \n\n\n and\r\nline ends\r",
    "e\u0301 \u00e9 \ufb01 \u2126 \u212b CASE case \u0130",
    "\x00\x01\x7f\x85\u00a0\u200b\u2028\ufeff\ufffd\ufffe",
    "\u4f60\u597d \U0001f469\u200d\U0001f680 \U0010ffff \u05d0\u0628",
    "<pad><bos><eos><sep><s></s><unk><|endoftext|><0x41>[CLS]",
    "\u2581 \u0120 \u010a don't we'll",
    "",
)


class Tokenizer(Protocol):
    """What the rest of the project asks of a tokenizer; values of it can be pickled."""

    @property
    def vocab_size(self) -> int: ...  # ids are below it, special ids included
    @property
    def bos_id(self) -> int: ...
    @property
    def eos_id(self) -> int: ...
    @property
    def pad_id(self) -> int: ...
    @property
    def sep_id(self) -> int: ...
    @property
    def sha256(self) -> str: ...  # of everything that decides the ids

    def encode(self, text: str) -> list[int]: ...
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...
    def decode(self, ids: Iterable[int]) -> str: ...
    def token_bytes(self, token_id: int) -> int: ...  # UTF-8 bytes the token stands for, 0 for special ids
    def save(self, path: str | Path) -> None: ...


class TokenizerConfig(Protocol):
    """Which tokenizer: the class is the choice. `trained` says whether `build` reads the corpus."""

    trained: ClassVar[bool]

    def build(self, root: str, texts: Callable[[int], Iterator[str]]) -> Tokenizer:
        """Make it. `texts(max_bytes)` yields train documents in random order; `root` resolves paths."""
        ...


# --- bytes -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
    """A token is a byte of UTF-8; the special ids follow the 256 bytes."""

    vocab_size: int = 260
    pad_id: int = 256
    bos_id: int = 257
    eos_id: int = 258
    sep_id: int = 259

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self._json().encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Special ids vanish; bytes that are no UTF-8 (a sample cut inside a character) become U+FFFD."""
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def token_bytes(self, token_id: int) -> int:
        return int(token_id < 256)

    def save(self, path: str | Path) -> None:
        write_atomic(path, self._json())

    def _json(self) -> str:
        return json.dumps({"bytes": dataclasses.asdict(self)}, sort_keys=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BytesConfig:
    """`ByteTokenizer`."""

    trained: ClassVar[bool] = False

    def build(self, root: str, texts: Callable[[int], Iterator[str]]) -> Tokenizer:
        return ByteTokenizer()


# --- the `tokenizers` library ------------------------------------------------------------------------


class JsonTokenizer:
    """A tokenizer.json, read so that special tokens are never found in text."""

    def __init__(self, text: str, *, pad: str, bos: str, eos: str, sep: str, vocab_size: int | None = None):
        """`text` is the content of tokenizer.json; the others name its special tokens.

        `vocab_size` is that of the model, whose embedding may have more rows than there are tokens.

        Raises:
          ConfigError: not a tokenizer.json, it lacks one of these tokens, or it has more tokens than the model.
        """
        self._text, self._model_vocab_size = text, vocab_size
        self._names = {"pad": pad, "bos": bos, "eos": eos, "sep": sep}
        try:
            self._tokenizer = HfTokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception, with the reason as its text
            raise ConfigError(
                f"a tokenizer file must be a tokenizer.json, got one that fails: {error}"
            ) from error
        # Not stored in the file and lost by the library's own pickling: set on every load.
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        faults = []
        ids = {}
        for role, name in self._names.items():
            found = self._tokenizer.token_to_id(name)
            if found is None:
                special = [
                    t.content for t in self._tokenizer.get_added_tokens_decoder().values() if t.special
                ]
                known = ", ".join(special[:12]) or "none"
                faults.append(
                    f"data.tokenizer.{role} must be a token of the file, got {name!r}; its special tokens: {known}"
                )
            ids[role] = found
        if faults:
            raise ConfigError(*faults)
        self.pad_id, self.bos_id, self.eos_id, self.sep_id = ids["pad"], ids["bos"], ids["eos"], ids["sep"]
        added = self._tokenizer.get_added_tokens_decoder()
        known = set(self._tokenizer.get_vocab(with_added_tokens=True).values())
        if vocab_size is not None:
            # Published text models keep special tokens of their multimodal siblings behind their vocabulary (Gemma 3:
            # <image_soft_token>). No text is encoded to one, so they need no row.
            known -= {i for i, token in added.items() if token.special and i >= vocab_size} - set(
                ids.values()
            )
        # Ids may have holes: the table of embeddings is as long as the largest id asks.
        needed = 1 + max(known)
        self.vocab_size = needed if vocab_size is None else vocab_size
        if self.vocab_size < needed:
            raise ConfigError(
                f"a tokenizer must belong to its model, got one with {needed} ids for an embedding of {vocab_size} rows"
            )
        self._special = frozenset({*ids.values(), *(i for i, token in added.items() if token.special)})
        self._byte_level = isinstance(self._tokenizer.decoder, decoders.ByteLevel)

    def __getstate__(self) -> tuple[str, dict[str, Any]]:
        return self._text, {**self._names, "vocab_size": self._model_vocab_size}

    def __setstate__(self, state: tuple[str, dict[str, Any]]) -> None:
        text, arguments = state
        self.__init__(text, **arguments)

    @property
    def names(self) -> dict[str, str]:
        """The special tokens, by role: pad, bos, eos, sep."""
        return dict(self._names)

    @property
    def adds_bos(self) -> bool:
        """Whether the file asks for a bos token in front of every text."""
        return self._tokenizer.encode("a", add_special_tokens=True).ids[:1] == [self.bos_id]

    def adding_bos(self, add_bos: bool) -> "JsonTokenizer":
        """The same tokenizer, its file asking for a bos token in front of every text, or for none; ids here are the same.

        Whatever else the file puts around a text goes; of a byte-level one that is the trimming of offsets.
        """
        if self.adds_bos == add_bos:
            return self
        other, bos = HfTokenizer.from_str(self._text), self._names["bos"]
        other.post_processor = (
            processors.TemplateProcessing(
                single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, self.bos_id)]
            )
            if add_bos
            else None
        )
        found = JsonTokenizer(other.to_str(pretty=True), vocab_size=self._model_vocab_size, **self._names)
        assert found.adds_bos == add_bos, (self._names, add_bos)
        return found

    @property
    def sha256(self) -> str:
        size = [] if self._model_vocab_size is None else [str(self._model_vocab_size)]
        return hashlib.sha256("\x1f".join([self._text, *self._names.values(), *size]).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """In threads of the library, unless the process disables them."""
        return [e.ids for e in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """Special ids vanish; bytes that are no UTF-8 (a sample cut inside a character) become U+FFFD."""
        return self._tokenizer.decode(
            [int(i) for i in ids if i not in self._special], skip_special_tokens=False
        )

    def token_bytes(self, token_id: int) -> int:
        token = self._tokenizer.id_to_token(int(token_id))
        if token is None or token_id in self._special:
            return 0
        if self._byte_level:
            return len(token)  # the alphabet of byte-level BPE has one character for each byte
        if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            return 1
        return len(token.replace("\u2581", " ").encode())

    def save(self, path: str | Path) -> None:
        """Write tokenizer.json; other programs of the ecosystem read it too."""
        write_atomic(path, self._text)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BpeConfig:
    """A byte-level BPE trained on the train split; the same text gives the same tokenizer.

    Training reads at most `max_train_bytes` of random documents and holds them in memory.
    """

    vocab_size: int  # the four special ids included
    max_train_bytes: int = 1 << 26
    trained: ClassVar[bool] = True

    def __post_init__(self):
        if self.vocab_size < 256 + len(SPECIAL_TOKENS):
            raise ValueError(
                f"vocab_size must be at least 260 (256 bytes and 4 special tokens), got {self.vocab_size}; "
                "raise it or use BytesConfig()"
            )
        if self.max_train_bytes < 1:
            raise ValueError(f"max_train_bytes must be positive, got {self.max_train_bytes}")

    def build(self, root: str, texts: Callable[[int], Iterator[str]]) -> Tokenizer:
        tokenizer = HfTokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab_size - len(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=[],
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts(self.max_train_bytes), trainer)
        # Added after the merges, so that the special ids come last.
        tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
        return self.load(tokenizer.to_str(pretty=True))

    def load(self, text: str) -> Tokenizer:
        """The tokenizer from what its `save` wrote."""
        pad, bos, eos, sep = SPECIAL_TOKENS
        return JsonTokenizer(text, pad=pad, bos=bos, eos=eos, sep=sep)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerFileConfig:
    """An existing tokenizer.json and the names of its special tokens; one token may have several roles."""

    path: str  # below data.root
    bos: str = "<bos>"
    eos: str = "<eos>"
    pad: str = "<pad>"
    sep: str = "<sep>"
    require_lossless: bool = True
    trained: ClassVar[bool] = False

    def build(self, root: str, texts: Callable[[int], Iterator[str]]) -> Tokenizer:
        path = Path(root, self.path)
        tokenizer = JsonTokenizer(
            read_tokenizer_file(path).decode(errors="replace"),
            pad=self.pad,
            bos=self.bos,
            eos=self.eos,
            sep=self.sep,
        )
        if self.require_lossless:
            check_lossless(tokenizer, str(path))
        return tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class FolderTokenizerConfig:
    """The tokenizer of a model folder, roles as its tokenizer_config.json says where none are given here.

    A model without a token for a role uses its end-of-text token for it. Imported tokenizers often change text
    (normal forms, blanks); scores in bits per byte then count the bytes of the text before the change.
    """

    path: str  # a folder below data.root
    bos: str | None = None
    eos: str | None = None
    pad: str | None = None
    sep: str | None = None
    require_lossless: bool = False
    trained: ClassVar[bool] = False

    def build(self, root: str, texts: Callable[[int], Iterator[str]]) -> Tokenizer:
        folder = Path(root, self.path)
        text = read_tokenizer_file(folder / "tokenizer.json").decode(errors="replace")
        stated = _json_object(folder / "tokenizer_config.json")
        eos = self.eos or _token_name(stated.get("eos_token"))
        if eos is None:
            raise ConfigError(f"{folder} names no eos token; set data.tokenizer.eos to a token of the file")
        tokenizer = JsonTokenizer(
            text,
            eos=eos,
            bos=self.bos or _token_name(stated.get("bos_token")) or eos,
            pad=self.pad or _token_name(stated.get("pad_token")) or eos,
            sep=self.sep or _token_name(stated.get("sep_token")) or eos,
            vocab_size=stated_vocab_size(_json_object(folder / "config.json")),
        )
        if self.require_lossless:
            check_lossless(tokenizer, str(folder))
        return tokenizer


def stated_vocab_size(config: Mapping[str, Any]) -> int | None:
    """Rows of the embedding as a config.json states them, of its text part where it is of several models.

    Raises:
      ConfigError: as what is no number of rows.
    """
    text = config.get("text_config")
    size = text.get("vocab_size") if isinstance(text, Mapping) else None
    size = config.get("vocab_size") if size is None else size
    if size is None:
        # Published Gemma 3 of several modalities leave it to the default of transformers.
        return _GEMMA3_VOCAB_SIZE if config.get("model_type") in ("gemma3", "gemma3_text") else None
    if type(size) is not int or size < 1:
        raise ConfigError(f"config.json must state vocab_size as a positive whole number, got {size!r}")
    return size


def _json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file, empty without the file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} must hold JSON, got what fails: {error}") from error
    return value if isinstance(value, dict) else {}


def read_chat_templates(folder: Path) -> dict[str, str]:
    """The chat templates of a model folder by name, from tokenizer_config.json or files of their own, which win."""
    stated = _json_object(folder / "tokenizer_config.json").get("chat_template")
    found = {"default": stated} if isinstance(stated, str) else {}
    if isinstance(stated, list):
        found = {
            entry["name"]: entry["template"]
            for entry in stated
            if isinstance(entry, dict)
            and isinstance(entry.get("name"), str)
            and isinstance(entry.get("template"), str)
        }
    files = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        files["default"] = folder / "chat_template.jinja"
    return found | {name: read_tokenizer_file(path).decode(errors="replace") for name, path in files.items()}


def _token_name(value: Any) -> str | None:
    """A token in tokenizer_config.json: its text, or an object with its text; None where it is neither."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def export_tokenizer(
    tokenizer: Tokenizer,
    folder: Path,
    max_length: int,
    *,
    add_bos: bool | None = None,
    chat_templates: Mapping[str, str] | None = None,
) -> None:
    """Write tokenizer.json and tokenizer_config.json, which `transformers` reads and `FolderTokenizerConfig` too.

    `add_bos`: whether texts shall begin with bos; none is as the file of the tokenizer asks. `chat_templates`: Jinja
    sources by name, "default" among them.

    Raises:
      ConfigError: a kind of tokenizer that has no tokenizer.json.
    """
    if isinstance(tokenizer, ByteTokenizer):
        tokenizer = _bytes_as_json(tokenizer)
    if not isinstance(tokenizer, JsonTokenizer):
        raise ConfigError(
            f"an exported model needs a tokenizer.json, and {type(tokenizer).__name__} has none; train with BpeConfig, "
            "BytesConfig or a tokenizer file"
        )
    if add_bos is not None:
        tokenizer = tokenizer.adding_bos(add_bos)
    tokenizer.save(folder / "tokenizer.json")
    roles = {f"{role}_token": name for role, name in tokenizer.names.items()}
    stated: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    if chat_templates:
        several = [{"name": name, "template": text} for name, text in chat_templates.items()]
        stated["chat_template"] = (
            chat_templates["default"] if list(chat_templates) == ["default"] else several
        )
    write_atomic(folder / "tokenizer_config.json", json.dumps({**stated, **roles}, indent=1) + "\n")


def _bytes_as_json(tokenizer: ByteTokenizer) -> JsonTokenizer:
    """The same ids from a BPE without merges over the byte alphabet of GPT-2."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    letters = {byte: chr(byte) for byte in shown} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}
    bpe = HfTokenizer(models.BPE(vocab={letter: byte for byte, letter in letters.items()}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(list(SPECIAL_TOKENS))
    pad, bos, eos, sep = SPECIAL_TOKENS
    found = JsonTokenizer(bpe.to_str(pretty=True), pad=pad, bos=bos, eos=eos, sep=sep)
    assert (found.pad_id, found.bos_id, found.eos_id, found.sep_id) == (
        tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.sep_id,
    )  # fmt: skip
    return found


def read_tokenizer_file(path: Path) -> bytes:
    """The bytes of a tokenizer file; ConfigError when it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"data.tokenizer.path must name a readable file, got {path}: {error.strerror}"
        ) from error


def check_lossless(tokenizer: Tokenizer, name: str) -> None:
    """Refuse a tokenizer that changes text.

    Raises:
      ConfigError: a probe does not come back as it was.
    """
    for probe in LOSSLESS_PROBES:
        back = tokenizer.decode(tokenizer.encode(probe))
        if back != probe:
            raise ConfigError(
                f"a tokenizer must give back the text it was given, got {back!r} for {probe!r} from {name}; "
                "set data.tokenizer.require_lossless=false to train with it anyway"
            )
