"""A word is a token: the vocabulary of all texts about worlds, small enough for models that a laptop trains in minutes."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from pretrain.config import ConfigError
from pretrain.tokenizer import SPECIAL_TOKENS, JsonTokenizer, Tokenizer
from synth.worlds.render import words_in_use
from synth.worlds.world import spell

_UNKNOWN = "<unk>"


@dataclass(frozen=True, kw_only=True)
class WordsConfig:
    """The words of the frames, `num_names` names and the four special tokens; decoding puts spaces between words."""

    num_names: int
    trained: ClassVar[bool] = False

    def __post_init__(self):
        if self.num_names < 1:
            raise ConfigError(f"num_names must be at least 1, got {self.num_names}")

    def build(self, root: str, texts: Callable[[int], Iterator[str]]) -> Tokenizer:
        """The tokenizer; it reads no text."""
        names = (spell(i) for i in range(self.num_names))
        words = dict.fromkeys([_UNKNOWN, *words_in_use(), ".", ",", ":", "?", *names])
        vocabulary = {word: i for i, word in enumerate([*words, *SPECIAL_TOKENS])}
        added = [
            {
                "id": vocabulary[token],
                "content": token,
                "special": True,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
            }
            for token in SPECIAL_TOKENS
        ]
        body = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": None,
            "pre_tokenizer": {"type": "Whitespace"},
            "post_processor": None,
            "decoder": None,
            "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": _UNKNOWN},
        }
        return self.load(json.dumps(body))

    def load(self, text: str) -> Tokenizer:
        """The tokenizer from what its `save` wrote."""
        pad, bos, eos, sep = SPECIAL_TOKENS
        return JsonTokenizer(text, pad=pad, bos=bos, eos=eos, sep=sep)
