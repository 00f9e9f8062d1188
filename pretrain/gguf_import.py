"""Models in GGUF files, quantized or not (extra `[hf]`; a config imports this file).

Tensors are dequantized row by row on the way to their devices. Files of architecture llama store queries and keys
for interleaved rotary embedding: their rows are put back (llama.cpp issue 7481: perplexity in the thousands where it
was forgotten). Gemma norms are stored with the one that the model adds.
"""

import dataclasses
import functools
import importlib.util
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import gguf
import numpy as np
from jax.sharding import Mesh
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as HfTokenizer

from pretrain import families
from pretrain.config import ConfigError, local
from pretrain.families import Names
from pretrain.hf import Stated, check_same_model
from pretrain.model.layers import LinearScaling, Llama3Scaling, Rope
from pretrain.model.transformer import LayerKind, ModelConfig, Params
from pretrain.tokenizer import JsonTokenizer, Tokenizer, check_lossless, read_tokenizer_file

_NAMES: Names = {
    "embed.embedding": "token_embd.weight",
    "head.kernel": "output.weight",
    "final_norm.scale": "output_norm.weight",
    "blocks.attention_norm.scale": "blk.{}.attn_norm.weight",
    "blocks.attention.query": "blk.{}.attn_q.weight",
    "blocks.attention.key": "blk.{}.attn_k.weight",
    "blocks.attention.value": "blk.{}.attn_v.weight",
    "blocks.attention.out": "blk.{}.attn_output.weight",
    "blocks.attention.query_bias": "blk.{}.attn_q.bias",
    "blocks.attention.key_bias": "blk.{}.attn_k.bias",
    "blocks.attention.value_bias": "blk.{}.attn_v.bias",
    "blocks.attention.query_norm.scale": "blk.{}.attn_q_norm.weight",
    "blocks.attention.key_norm.scale": "blk.{}.attn_k_norm.weight",
    "blocks.post_attention_norm.scale": "blk.{}.post_attention_norm.weight",
    "blocks.mlp_norm.scale": "blk.{}.ffn_norm.weight",
    "blocks.mlp.gate_up": ("blk.{}.ffn_gate.weight", "blk.{}.ffn_up.weight"),
    "blocks.mlp.down": "blk.{}.ffn_down.weight",
    "blocks.post_mlp_norm.scale": "blk.{}.post_ffw_norm.weight",
}
_ROPE_FACTORS = "rope_freqs.weight"
_EOS_KEYS = tuple(f"tokenizer.ggml.{role}_token_id" for role in ("eos", "eot", "eom"))
# Rotary embedding of Gemma 3's windowed layers; the file states the base of the others only.
_GEMMA3_LOCAL_THETA, _GEMMA3_PERIOD = 10_000.0, 6
# The 27B alone scales scores by the width of the model over its heads instead of the width of a head; the file does
# not say so, and llama.cpp too knows it by its number of layers.
_GEMMA3_27B_LAYERS = 62


@dataclasses.dataclass(frozen=True)
class _Architecture:
    """What the name of an architecture implies."""

    family: str  # model_type in families.py
    interleaved: bool = False
    # Files of this architecture state everything but what is fixed here.
    default_theta: float = 10_000.0


_ARCHITECTURES = {
    "llama": _Architecture(family="llama", interleaved=True),
    "qwen2": _Architecture(family="qwen2"),
    "qwen3": _Architecture(family="qwen3"),
    "gemma3": _Architecture(family="gemma3_text", default_theta=1_000_000.0),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GgufFile:
    """A model in one GGUF file.

    tokenizer_path: a folder with the model's tokenizer.json, for files whose own tokenizer is not read here, such as
    those of SentencePiece (Llama 2, Gemma).
    """

    path: str
    tokenizer_path: str = local("")

    def model_config(self) -> ModelConfig:
        """The mathematics of the model.

        Raises:
          ConfigError: no GGUF file, a file cut short, or an architecture that is not known.
        """
        return _model_config(self._content())

    def vocab_size(self) -> int:
        """Rows of the embedding."""
        content = self._content()
        if "token_embd.weight" not in content.tensors:
            raise ConfigError(f"{self.path} must hold the tensor token_embd.weight, and does not")
        return content.tensors["token_embd.weight"].shape[0]

    def tokenizer(self) -> Tokenizer:
        """The tokenizer in the file, or the one at `tokenizer_path`."""
        config = GgufTokenizerConfig(path=self.path, tokenizer_path=self.tokenizer_path)
        return config.build("", lambda max_bytes: iter(()))

    def stated(self) -> Stated:
        """What the header says besides; a chat model names the end of a turn apart from the end of a text."""
        content = self._content()
        ends = [content.get(key) for key in _EOS_KEYS if content.has(key)]
        length, chat = "{arch}.context_length", "tokenizer.chat_template"
        return Stated(
            max_length=int(content.get(length)) if content.has(length) else None,
            eos_ids=tuple(dict.fromkeys(int(end) for end in ends)),
            chat_templates={"default": content.get(chat)} if content.has(chat) else {},
        )

    def params(self, model: ModelConfig, mesh: Mesh | None = None) -> Params:
        """Its parameters in float32, laid out for `mesh`.

        Raises:
          ConfigError: tensors do not belong to the model, or `model` is another.
        """
        content = self._content()
        theirs = _model_config(content)
        check_same_model(theirs, model, self.path)

        def adjust(parameter: str, block: np.ndarray, dims: str) -> np.ndarray:
            if content.architecture.interleaved and parameter in (
                "blocks.attention.query",
                "blocks.attention.key",
            ):
                return _half_split(block, dims.index("H"))
            if model.norm_plus_one and parameter.endswith(".scale"):
                return block - 1.0
            return block

        return families.load_params(
            model, self.vocab_size(), _NAMES, content.tensors, mesh,
            where=self.path, ignore=[_ROPE_FACTORS], adjust=adjust,
        )  # fmt: skip

    def _content(self) -> "_Content":
        return _read(str(Path(self.path).absolute()), _stamp(self.path))


def _half_split(block: np.ndarray, dim: int) -> np.ndarray:
    """Head width from (pair, member) order to (member, pair) order."""
    width = block.shape[dim]
    return block.take(np.arange(width).reshape(width // 2, 2).T.reshape(-1), axis=dim)


def packaged_file(package: str, name: str) -> str:
    """The path of a file in an installed package, or its bare name, for the caller of a config to override."""
    found = importlib.util.find_spec(package)
    return name if found is None or found.origin is None else str(Path(found.origin).with_name(name))


# --- the file ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class QuantizedTensor:
    """A tensor of any type that the `gguf` package knows; rows are dequantized when asked for."""

    shape: tuple[int, ...]
    data: np.ndarray  # rows of blocks, or of numbers
    kind: Any

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows of the first dim, in float32."""
        rows = np.asarray(self.data[start:stop])
        return np.asarray(gguf.quants.dequantize(rows, self.kind), np.float32).reshape(-1, *self.shape[1:])


@dataclasses.dataclass(frozen=True)
class _Content:
    path: str
    fields: Mapping[str, Any]  # of the `gguf` reader
    tensors: Mapping[str, QuantizedTensor]

    def get(self, key: str, default: Any = None) -> Any:
        """A value of the header; {arch} in its name is the architecture. Without a default it must be there."""
        name = key.replace("{arch}", self.fields["general.architecture"].contents())
        if name in self.fields:
            return self.fields[name].contents()
        if default is None:
            raise ConfigError(f"{self.path} must state {name}, and does not")
        return default

    def has(self, key: str) -> bool:
        return key.replace("{arch}", self.fields["general.architecture"].contents()) in self.fields

    @property
    def architecture(self) -> _Architecture:
        name = self.fields["general.architecture"].contents()
        if name not in _ARCHITECTURES:
            raise ConfigError(
                f"{self.path} must be of a known architecture ({', '.join(_ARCHITECTURES)}), got {name!r}"
            )
        return _ARCHITECTURES[name]


def _stamp(path: str) -> tuple[int, int]:
    """Size and date: the same stamp is the same file."""
    try:
        status = Path(path).stat()
    except OSError as error:
        raise ConfigError(f"a GGUF file must be readable, got {path}: {error.strerror}") from error
    return status.st_size, status.st_mtime_ns


# Opening a file takes seconds, because the package reads the vocabulary token by token.
@functools.lru_cache(maxsize=2)
def _read(path: str, stamp: tuple[int, int]) -> _Content:
    try:
        reader = gguf.GGUFReader(path)
        tensors = {
            t.name: QuantizedTensor(tuple(int(n) for n in reversed(t.shape)), t.data, t.tensor_type)
            for t in reader.tensors
        }
        if "general.architecture" not in reader.fields:
            raise ValueError("it names no architecture")
    except (ValueError, IndexError, KeyError, struct.error) as error:
        raise ConfigError(
            f"{path} must be a whole GGUF file, got what fails: {error}; fetch it again"
        ) from error
    return _Content(path, reader.fields, tensors)


def _model_config(content: _Content) -> ModelConfig:
    architecture = content.architecture
    family = next(f for f in families.FAMILIES if f.model_type == architecture.family)
    num_layers = int(content.get("{arch}.block_count"))
    num_heads = int(content.get("{arch}.attention.head_count"))
    width = int(content.get("{arch}.embedding_length"))
    head_width = int(content.get("{arch}.attention.key_length", width // num_heads))
    rope = _rope(content, head_width)
    kinds = [LayerKind(rope=rope)] * num_layers
    if architecture.family == "gemma3_text":
        window = int(content.get("{arch}.attention.sliding_window"))
        local = LayerKind(window=window, rope=Rope(theta=_GEMMA3_LOCAL_THETA))
        kinds = [kinds[0] if (i + 1) % _GEMMA3_PERIOD == 0 else local for i in range(num_layers)]
    scale = (
        (width / num_heads) ** -0.5
        if architecture.family == "gemma3_text" and num_layers == _GEMMA3_27B_LAYERS
        else None
    )
    softcaps = {
        field: float(content.get(key)) if content.has(key) else None
        for field, key in (
            ("attention_softcap", "{arch}.attn_logit_softcapping"),
            ("final_softcap", "{arch}.final_logit_softcapping"),
        )
    }
    return ModelConfig(
        num_layers=num_layers,
        width=width,
        num_heads=num_heads,
        num_kv_heads=int(content.get("{arch}.attention.head_count_kv", num_heads)),
        head_width=head_width,
        hidden_width=int(content.get("{arch}.feed_forward_length")),
        layer_pattern=families.shortest_period(kinds),
        tied_head="output.weight" not in content.tensors,
        attention_scale=scale,
        # The file holds a float32: 1e-5 is meant by the number nearest to it.
        norm_eps=float(
            np.format_float_positional(np.float32(content.get("{arch}.attention.layer_norm_rms_epsilon")))
        ),
        dtype="float32",
        **softcaps,
        **family.fixed,
    )


def _rope(content: _Content, head_width: int) -> Rope:
    theta = float(content.get("{arch}.rope.freq_base", content.architecture.default_theta))
    turned = int(content.get("{arch}.rope.dimension_count", head_width))
    kind = content.get("{arch}.rope.scaling.type", "none")
    if turned != head_width or kind not in ("none", "linear"):
        raise ConfigError(
            f"{content.path} asks for what this model does not do: rotary embedding of {turned} in {head_width} dims, scaling {kind!r}"
        )
    if kind == "linear":
        return Rope(
            theta=theta, scaling=LinearScaling(factor=float(content.get("{arch}.rope.scaling.factor")))
        )
    if _ROPE_FACTORS not in content.tensors:
        return Rope(theta=theta)
    # Llama 3.1 and later: the file holds the factors, not what they were made from.
    stored = content.tensors[_ROPE_FACTORS].read(0, head_width // 2)
    plain = Rope(theta=theta).frequencies(np, head_width)
    for factor in (8.0, 32.0):
        rope = Rope(theta=theta, scaling=Llama3Scaling(factor=factor))
        if np.allclose(plain / rope.frequencies(np, head_width), stored, rtol=1e-4):
            return rope
    raise ConfigError(f"{content.path} scales rotary embedding by factors that no known Llama 3 rule gives")


# --- the tokenizer -----------------------------------------------------------------------------------

_LETTERS_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LETTERS_QWEN2 = _LETTERS_LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # types of tokens
_MAX_DIFFERENT_TOKENS = 0.01


def _split(pattern: str) -> list[Any]:
    return [
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


# How text is cut before merging, by the name in the file.
_PRE_TOKENIZERS: Mapping[str, Callable[[], list[Any]]] = {
    "gpt-2": lambda: [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "smollm": lambda: [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ],
    "llama-bpe": lambda: _split(_LETTERS_LLAMA3),
    "qwen2": lambda: _split(_LETTERS_QWEN2),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GgufTokenizerConfig:
    """The byte-level BPE in a GGUF file; roles as the file says where none are given here.

    tokenizer_path: a folder whose tokenizer.json is read instead; its tokens must be those of the file.
    """

    path: str  # below data.root
    # Where the same tokens lie in another form: what they are is proven, and the run knows them by their hash.
    tokenizer_path: str = local("")  # below data.root
    bos: str | None = None
    eos: str | None = None
    pad: str | None = None
    sep: str | None = None
    require_lossless: bool = False
    trained: ClassVar[bool] = False

    def build(self, root: str, texts: Callable[[int], Iterator[str]]) -> Tokenizer:
        path = str(Path(root, self.path))
        content = _read(str(Path(path).absolute()), _stamp(path))
        if self.tokenizer_path:
            tokens, text = _other_tokenizer(content, Path(root, self.tokenizer_path) / "tokenizer.json")
        else:
            tokens, text = _tokenizer_json(content.path, _stamp(path))

        def stated(role: str) -> str | None:
            key = f"tokenizer.ggml.{role}_token_id"
            return tokens[content.get(key)] if content.has(key) else None

        eos = self.eos or stated("eos")
        if eos is None:
            raise ConfigError(f"{path} names no eos token; set data.tokenizer.eos to a token of the file")
        rows = (
            content.tensors["token_embd.weight"].shape[0] if "token_embd.weight" in content.tensors else None
        )
        tokenizer = JsonTokenizer(
            text,
            eos=eos,
            bos=self.bos or stated("bos") or eos,
            pad=self.pad or stated("padding") or eos,
            sep=self.sep or eos,
            vocab_size=rows,
        )
        if self.require_lossless:
            check_lossless(tokenizer, path)
        return tokenizer


def _other_tokenizer(content: _Content, path: Path) -> tuple[list[str], str]:
    """All tokens of a GGUF file, and a tokenizer.json that has the same.

    Raises:
      ConfigError: it cannot be read, or its tokens are others.
    """
    text = read_tokenizer_file(path).decode(errors="replace")
    tokens: list[str] = content.get("tokenizer.ggml.tokens")
    kinds = content.get("tokenizer.ggml.token_type")
    try:
        other = HfTokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception, with the reason as its text
        raise ConfigError(
            f"tokenizer_path must hold a tokenizer.json, got {path}, which fails: {error}"
        ) from error
    normal = [i for i, kind in enumerate(kinds) if kind == _NORMAL]
    differ = [i for i in normal if other.id_to_token(i) != tokens[i]]
    # Of one tokenizer a few tokens may be spelled in two ways; of two nearly all differ.
    if len(differ) > _MAX_DIFFERENT_TOKENS * len(normal):
        i = differ[0]
        raise ConfigError(
            f"tokenizer_path must hold the tokenizer of {content.path}, got {path} with {len(differ)} of {len(normal)} other "
            f"tokens, the first {other.id_to_token(i)!r} for {tokens[i]!r} as id {i}"
        )
    return tokens, text


@functools.lru_cache(maxsize=2)
def _tokenizer_json(path: str, stamp: tuple[int, int]) -> tuple[list[str], str]:
    """All tokens, and the tokenizer.json that does what the file says."""
    content = _read(path, stamp)
    kind, pre = content.get("tokenizer.ggml.model"), content.get("tokenizer.ggml.pre", "default")
    if kind != "gpt2" or pre not in _PRE_TOKENIZERS:
        raise ConfigError(
            f"the tokenizer of a GGUF file must be a byte-level BPE of a known kind ({', '.join(_PRE_TOKENIZERS)}), got "
            f"{kind!r} with {pre!r} in {path}; set tokenizer_path of GgufFile and GgufTokenizerConfig to a folder with "
            "the model's tokenizer.json"
        )
    tokens: list[str] = content.get("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ", 1)) for merge in content.get("tokenizer.ggml.merges")]
    model = models.BPE(
        vocab={token: i for i, token in enumerate(tokens)}, merges=merges, ignore_merges=pre == "llama-bpe"
    )
    tokenizer = HfTokenizer(model)
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(_PRE_TOKENIZERS[pre]())
    tokenizer.decoder = decoders.ByteLevel()
    kinds = content.get("tokenizer.ggml.token_type")
    special = [t for t, k in zip(tokens, kinds, strict=True) if k == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    defined = [t for t, k in zip(tokens, kinds, strict=True) if k == _USER_DEFINED]
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in defined])
    # Llama 3 files that do not say are meant to begin with bos.
    if content.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe"):
        bos = int(content.get("tokenizer.ggml.bos_token_id"))
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]} $A", special_tokens=[(tokens[bos], bos)]
        )
    return tokens, tokenizer.to_str(pretty=True)
