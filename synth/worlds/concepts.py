"""Documents that share latent concepts: the world in which every loss an SBP run can reach is computable.

A concept is drawn (Zipf), a genre independently of it, and words from a Markov table that both decide. Given the
concept two documents are independent, so a synthesizer of the second from the first can do one thing only: infer
the concept (arXiv 2509.15248, section on the Bayesian view). Sums over concepts and genres give the exact
probability of a document, alone or after another one. `exact_information` does the same in closed form for the
smallest case, documents of independent words.

Shapes: K concepts, G genres, V words, N words of a document.
"""

import bisect
import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import models, pre_tokenizers

from pretrain.config import ConfigError, stable_seed, to_json
from pretrain.tokenizer import SPECIAL_TOKENS, JsonTokenizer, Tokenizer, TokenizerConfig
from synth.document import Document, Failure
from synth.stage import Shard, Stage

_CONSONANTS, _VOWELS = "bdfghklmnprstvwz", "aeiou"


# --- documents of independent words: closed form -----------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Information:
    """Nats per document: entropy alone, entropy after another document of the concept, and what is shared."""

    entropy: float  # H(d2)
    conditional_entropy: float  # H(d2 | d1)
    between_documents: float  # I(d1; d2)
    with_concept: float  # I(c; d)


def exact_information(words_KV: Sequence[Sequence[float]], num_words: int) -> Information:
    """Uniform concepts, documents of `num_words` independent words: the exact sums over count vectors.

    The order of words says nothing about the concept, so documents with equal counts are one term.
    """
    table_KV = np.asarray(words_KV, float)
    num_concepts, num_kinds = table_KV.shape
    rows, ways = [], []
    for counts in _compositions(num_words, num_kinds):
        rows.append(counts)
        ways.append(math.factorial(num_words) / math.prod(map(math.factorial, counts)))
    counts_CV, ways_C = np.array(rows), np.array(ways)
    # Of one ordered document with these counts, given each concept.
    given_KC = np.exp(np.log(table_KV) @ counts_CV.T)
    alone_C = given_KC.mean(axis=0)
    entropy = float(-(ways_C * alone_C * np.log(alone_C)).sum())
    of_concept = float(-(ways_C * given_KC * np.log(given_KC)).sum() / num_concepts)
    both_CC = given_KC.T @ given_KC / num_concepts
    joint = float(-(ways_C[:, None] * ways_C * both_CC * np.log(both_CC)).sum())
    return Information(
        entropy=entropy,
        conditional_entropy=joint - entropy,
        between_documents=2 * entropy - joint,
        with_concept=entropy - of_concept,
    )


def _compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """All ways to write `total` as an ordered sum of `parts` counts."""
    for bars in itertools.combinations(range(total + parts - 1), parts - 1):
        edges = (-1, *bars, total + parts - 1)
        yield tuple(b - a - 1 for a, b in zip(edges, edges[1:], strict=False))


# --- the world ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ConceptWorldConfig:
    """How many concepts and genres, and how a document's words follow from them.

    A word comes from the genre with probability `genre_share`, else from the concept; either source prefers one
    successor of the word before with probability `successor_share` and draws from its own words otherwise.
    """

    seed: int = 0
    num_concepts: int = 200
    num_genres: int = 4
    num_words: int = 256
    words_per_concept: int = 16
    words_per_genre: int = 16
    genre_share: float = 0.3
    successor_share: float = 0.5
    zipf_exponent: float = 1.0
    min_length: int = 32
    max_length: int = 96

    def __post_init__(self):
        faults = []
        for name in ("num_concepts", "num_genres", "words_per_concept", "words_per_genre", "min_length"):
            if getattr(self, name) < 1:
                faults.append(f"{name} must be at least 1, got {getattr(self, name)}")
        limit = (len(_CONSONANTS) * len(_VOWELS)) ** 2
        if not max(self.words_per_concept, self.words_per_genre) <= self.num_words <= limit:
            faults.append(
                f"num_words must hold the words of a concept and of a genre and be at most {limit}, got {self.num_words}"
            )
        if self.max_length < self.min_length:
            faults.append(f"max_length must be at least min_length={self.min_length}, got {self.max_length}")
        for name in ("genre_share", "successor_share"):
            if not 0 <= getattr(self, name) <= 1:
                faults.append(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if faults:
            raise ConfigError(*faults)

    def words(self) -> tuple[str, ...]:
        """The spelling of every word: two syllables."""
        syllables = [c + v for c in _CONSONANTS for v in _VOWELS]
        pairs = itertools.product(syllables, syllables)
        return tuple(a + b for a, b in itertools.islice(pairs, self.num_words))


@dataclass(frozen=True, eq=False)
class ConceptWorld:
    """The tables of a world, drawn once from its seed; see `make_concept_world`."""

    config: ConceptWorldConfig
    concept_K: np.ndarray  # probability of each concept
    concept_words: tuple["_WordSource", ...]
    genre_words: tuple["_WordSource", ...]

    def document(self, index: int) -> tuple[int, int, list[int]]:
        """(concept, genre, words) of document `index`; it depends on the seed and the index only."""
        return self._draw(None, stable_seed("concepts", self.config.seed, "document", index))

    def document_of(self, concept: int, key: int) -> tuple[int, int, list[int]]:
        """A document of a given concept, as `document` gives them; `key` names the draw."""
        return self._draw(concept, stable_seed("concepts", self.config.seed, "of", concept, key))

    def _draw(self, concept: int | None, seed: int) -> tuple[int, int, list[int]]:
        c = self.config
        chance = _uniforms(seed, 3 + 3 * c.max_length)
        if concept is None:
            concept = min(bisect.bisect_right(self._cumulative, chance[0]), c.num_concepts - 1)
        genre = int(chance[1] * c.num_genres)
        length = c.min_length + int(chance[2] * (c.max_length - c.min_length + 1))
        words: list[int] = []
        before = c.num_words  # stands for the start
        for i in range(3, 3 + 3 * length, 3):
            source = self.genre_words[genre] if chance[i] < c.genre_share else self.concept_words[concept]
            before = source.draw(before, chance[i + 1], chance[i + 2], c.successor_share)
            words.append(before)
        return concept, genre, words

    @functools.cached_property
    def _cumulative(self) -> list[float]:
        return np.cumsum(self.concept_K).tolist()

    @functools.cached_property
    def _tables(self) -> tuple[np.ndarray, np.ndarray]:
        """Probability of each word after each word (the last row: at the start), by concept and by genre."""
        c = self.config
        return tuple(  # type: ignore[return-value]
            np.stack([s.table(c.num_words, c.successor_share) for s in sources])
            for sources in (self.concept_words, self.genre_words)
        )

    def log_probability(self, words: Sequence[int]) -> np.ndarray:
        """[K]: log p(document | concept), its length included, genres summed out.

        Raises:
          ValueError: a word or a length that the world does not have.
        """
        c = self.config
        if not c.min_length <= len(words) <= c.max_length:
            raise ValueError(f"a document has {c.min_length} to {c.max_length} words, got {len(words)}")
        after_N = np.asarray(words)
        before_N = np.concatenate([[c.num_words], after_N[:-1]])
        concepts_KVV, genres_GVV = self._tables
        concept_KN = concepts_KVV[:, before_N, after_N].astype(float)
        genre_GN = genres_GVV[:, before_N, after_N].astype(float)
        mixed_KGN = (1 - c.genre_share) * concept_KN[:, None] + c.genre_share * genre_GN
        with np.errstate(divide="ignore"):  # a concept without the word: probability 0
            log_KG = np.log(mixed_KGN).sum(axis=-1)
        log_length = -math.log(c.max_length - c.min_length + 1)
        return _log_sum(log_KG, axis=1) - math.log(c.num_genres) + log_length

    def alone_nats(self, words: Sequence[int]) -> float:
        """-log p(document): what the best model of single documents pays; its mean is H(d)."""
        return float(-_log_sum(np.log(self.concept_K) + self.log_probability(words)))

    def after_nats(self, first: Sequence[int], second: Sequence[int]) -> float:
        """-log p(second | first), two documents of one concept; its mean is H(d2 | d1)."""
        prior_K = np.log(self.concept_K) + self.log_probability(first)
        return float(_log_sum(prior_K) - _log_sum(prior_K + self.log_probability(second)))

    def read(self, text: str) -> list[int]:
        """The words of a text of this world.

        Raises:
          KeyError: another word.
        """
        return [self._index[word] for word in text.split()]

    def write(self, words: Iterable[int]) -> str:
        """The text of these words."""
        spelled = self._spelled
        return " ".join(spelled[word] for word in words)

    @functools.cached_property
    def _spelled(self) -> tuple[str, ...]:
        return self.config.words()

    @functools.cached_property
    def _index(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self._spelled)}


@dataclass(frozen=True, eq=False)
class _WordSource:
    """The words of one concept or genre: how often, and which follows which."""

    words: tuple[int, ...]
    probability: tuple[float, ...]
    successor: Mapping[int, int]  # of its own words

    @functools.cached_property
    def _cumulative(self) -> list[float]:
        return list(itertools.accumulate(self.probability))

    def draw(self, before: int, follow: float, which: float, successor_share: float) -> int:
        if follow < successor_share and before in self.successor:
            return self.successor[before]
        return self.words[min(bisect.bisect_right(self._cumulative, which), len(self.words) - 1)]

    def table(self, num_words: int, successor_share: float) -> np.ndarray:
        own_V = np.zeros(num_words)
        own_V[list(self.words)] = self.probability
        table = np.tile(own_V, (num_words + 1, 1))
        for before, after in self.successor.items():
            table[before] *= 1 - successor_share
            table[before, after] += successor_share
        return table.astype(np.float32)


def make_concept_world(config: ConceptWorldConfig) -> ConceptWorld:
    """Draw the tables of a world."""
    weights_K = 1 / np.arange(1, config.num_concepts + 1) ** config.zipf_exponent
    return ConceptWorld(
        config=config,
        concept_K=weights_K / weights_K.sum(),
        concept_words=tuple(
            _word_source(config.num_words, config.words_per_concept, config.seed, "concept", k)
            for k in range(config.num_concepts)
        ),
        genre_words=tuple(
            _word_source(config.num_words, config.words_per_genre, config.seed, "genre", g)
            for g in range(config.num_genres)
        ),
    )


def _word_source(num_words: int, count: int, *key: object) -> _WordSource:
    chance = np.array(_uniforms(stable_seed("concepts", *key), num_words + 2 * count))
    words = np.argsort(chance[:num_words], kind="stable")[:count]
    weight = -np.log1p(-chance[num_words : num_words + count])  # a flat Dirichlet, normalized below
    after = words[(chance[num_words + count :] * count).astype(int)]
    return _WordSource(
        words=tuple(words.tolist()),
        probability=tuple((weight / weight.sum()).tolist()),
        successor=dict(zip(words.tolist(), after.tolist(), strict=True)),
    )


def _uniforms(seed: int, count: int) -> list[float]:
    """Numbers in [0, 1) from the raw stream of Philox, which numpy keeps the same for ever."""
    raw = np.random.Philox(key=seed).random_raw(count)
    return ((raw >> np.uint64(11)).astype(float) * 2.0**-53).tolist()


def _log_sum(values: np.ndarray, axis: int | None = None) -> Any:
    """log of the sum of exponentials; -inf where all are."""
    top = np.max(values, axis=axis, keepdims=True)
    top = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        total = np.log(np.sum(np.exp(values - top), axis=axis, keepdims=True)) + top
    return total.reshape(()) if axis is None else np.squeeze(total, axis=axis)


# --- as a source of documents, and its tokenizer -----------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ConceptDocuments:
    """Stage: `num_documents` documents of a world; what made them stays in `meta` for the reports, not the text."""

    world: ConceptWorldConfig
    num_documents: int
    name: str = "sources"
    version: int = 1
    gather: bool = False
    needs: tuple[str, ...] = ()

    def identity(self) -> Mapping[str, Any]:
        """The config."""
        return to_json(self, identity_only=True)

    def run(self, documents: Iterable[Document], *, shard: Shard) -> Iterator[Document | Failure]:
        """Every `shard.count`-th document."""
        world = make_concept_world(self.world)
        for index in range(shard.index, self.num_documents, shard.count):
            concept, genre, words = world.document(index)
            yield Document(
                id=f"concept-{index:07d}",
                text=world.write(words),
                meta={"source": "concepts", "concept": concept, "genre": genre},
            )


@dataclass(frozen=True, kw_only=True)
class WordTokenizerConfig:
    """A token is a word of the world, so nats per token are comparable with its entropies."""

    words: tuple[str, ...]
    trained: ClassVar[bool] = False

    def build(self, root: str, texts: Any) -> Tokenizer:
        """The tokenizer; `texts` are not looked at."""
        inner = HfTokenizer(
            models.WordLevel({w: i for i, w in enumerate(self.words)}, unk_token=self.words[0])
        )
        inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        inner.add_special_tokens(list(SPECIAL_TOKENS))
        pad, bos, eos, sep = SPECIAL_TOKENS
        return JsonTokenizer(inner.to_str(), pad=pad, bos=bos, eos=eos, sep=sep)


@dataclass(frozen=True, kw_only=True)
class ConceptFloor:
    """The loss of the best possible model on documents of a world, for the table of an experiment."""

    world: ConceptWorldConfig

    def faults(self, data: Stage, tokenizer: TokenizerConfig) -> list[str]:
        """Texts of another world have another floor, and only where tokens are its words is a floor that of a token."""
        found = []
        if not isinstance(data, ConceptDocuments) or data.world != self.world:
            found.append("floor.world must be data.world, the floor is that of its documents; change both")
        if not isinstance(tokenizer, WordTokenizerConfig) or tokenizer.words != self.world.words():
            # A word that the tokenizer lacks would be learned as the first one.
            found.append(
                "tokenizer.words must be the words of floor.world: WordTokenizerConfig(words=WORLD.words())"
            )
        return found

    def nats_per_token(self, texts: Sequence[str]) -> Mapping[str, float]:
        """Exact, per word with one end mark a text."""
        world = make_concept_world(self.world)
        read = [world.read(text) for text in texts]
        nats = sum(world.alone_nats(words) for words in read)
        return {"best possible": nats / sum(len(words) + 1 for words in read)}
