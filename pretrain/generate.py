"""Text from a model: prompts are prefilled in chunks, then slots decode together, refilled as texts end.

A request's text is a function of the request alone at given `GenerateConfig`, model and device kind: chunks begin
at multiples of `chunk_tokens` of its own prompt, attention gives a row the same bits whatever else is in the batch,
and the random number of a token is `fold_in(key(seed), position)`. Requests with a common beginning share its
prefill, and still get the bits that they would get alone.

P rows prefilled together, S slots, T time, V vocabulary.
"""

import collections
import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from pretrain.config import ConfigError, stable_seed
from pretrain.draw import Settings, draw, draw_faults, seed_words
from pretrain.model.cache import (
    Cache,
    CacheConfig,
    copy_row,
    decoding_params,
    empty_cache,
    extend,
    get_row,
    next_logits,
    set_row,
)
from pretrain.model.transformer import ModelConfig, Params
from pretrain.sharding import DATA_AXES, activation_spec, axis_size, current_mesh, place
from pretrain.tokenizer import Tokenizer

Finish = Literal["stop", "length"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One text to continue: its token ids, and how.

    temperature: 0 is greedy. top_k, top_p, min_p: filters in this order, after temperature; None, 1 and 0 are off.
    repetition_penalty: divides the (positive) logits of tokens in the prompt and the text so far; 1 is off.
    stop_ids: tokens that end the text; the one that came is the last of `Completion.ids`.
    stop: strings that end the text; `Completion.text` is cut before the first of them.
    """

    ids: tuple[int, ...]
    max_new_tokens: int
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self):
        faults = draw_faults(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
        )
        if not self.ids:
            faults.append(
                "a prompt must hold at least one token, got none; begin it with the tokenizer's bos_id"
            )
        if self.max_new_tokens < 1:
            faults.append(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if "" in self.stop:
            faults.append("a stop string must not be empty; leave it out")
        if faults:
            raise ConfigError(*faults)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
    """What a request got: new ids, their log-probabilities (nats, under the model itself), why it ended.

    `text` is decoded where the generator has a tokenizer, without the prompt, special ids and the stop string.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: Finish
    text: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """Log-probability (nats) of each scored token, and whether it was the likeliest."""

    logprobs: tuple[float, ...]
    greedy: tuple[bool, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Sizes of the compiled programs; none depends on the requests, so nothing is compiled twice.

    max_length: tokens of a text, prompt included. slots: texts decoded together. chunk_tokens: a prompt is
    prefilled in chunks of this many tokens, the last one padded to a power of two; prefixes are shared at chunk
    boundaries, and whole prompts at any length. look_every_tokens: how often the host looks at what came out.
    prefill_rows: prompts prefilled together; none is one, or on a mesh one for each part of the data axes.
    prefix_entries: prefilled beginnings that are kept, each the size of `prefill_rows` rows of the cache.
    """

    max_length: int
    slots: int = 16
    chunk_tokens: int = 128
    look_every_tokens: int = 8
    prefill_rows: int | None = None
    prefix_entries: int = 4
    cache_dtype: Literal["float32", "bfloat16"] | None = None  # None: the compute dtype
    attention_impl: str = "auto"  # see kernels/attention/decode.py

    def __post_init__(self):
        faults = []
        for name in (
            "max_length",
            "slots",
            "chunk_tokens",
            "look_every_tokens",
            "prefill_rows",
            "prefix_entries",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                faults.append(f"{name} must be at least 1, got {value}")
        if self.chunk_tokens & (self.chunk_tokens - 1):
            faults.append(f"chunk_tokens must be a power of two, got {self.chunk_tokens}")
        if self.cache_dtype not in (None, "float32", "bfloat16"):
            faults.append(f"cache_dtype must be none, float32 or bfloat16, got {self.cache_dtype!r}")
        if faults:
            raise ConfigError(*faults)


@dataclasses.dataclass
class Stats:
    """What a generator did so far. Seconds include compilation."""

    prompt_tokens: int = 0
    prefilled_tokens: int = 0  # the rest was shared
    new_tokens: int = 0  # of texts, without what was drawn behind their ends
    decode_steps: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a call of `generate` is."""

    done: int
    total: int
    new_tokens: int
    tokens_per_second: float


class Generator:
    """A model ready to generate and score: parameters laid out for decoding, a cache for its slots.

    Programs are compiled once a process for a model and a config. On a mesh slots lie over the data axes and heads
    over tensor; every device holds the whole model or its part of the tensor axis. Not safe for several threads.
    """

    def __init__(
        self,
        params: Params,
        model: ModelConfig,
        config: GenerateConfig,
        *,
        tokenizer: Tokenizer | None = None,
        mesh: Mesh | None = None,
    ):
        self.model, self.config, self.tokenizer = model, config, tokenizer
        self.stats = Stats()
        self.vocab_size = params["embed"]["embedding"].shape[0]
        self._mesh = mesh
        self._prefill_rows = _prefill_rows(self._mesh, config)
        self._statics = (model, config.max_length, config.attention_impl)
        sizes = CacheConfig(
            rows=self._prefill_rows,
            max_length=config.max_length,
            max_extend=config.chunk_tokens,
            dtype=config.cache_dtype or model.dtype,
        )
        with self._scope():
            self._fresh = _empty_cache(model, sizes)
            self._slots = _empty_slots(model, dataclasses.replace(sizes, rows=config.slots), self.vocab_size)
        self._prefixes: collections.OrderedDict[tuple[int, ...], _Prefix] = collections.OrderedDict()
        self.load(params)

    def load(self, params: Params) -> None:
        """Go on with other parameters of the same shapes."""
        with self._scope():
            self._params = decoding_params(params, self.model)
        self._prefixes.clear()

    def generate(
        self, requests: Sequence[Request], *, report: Callable[[Progress], None] | None = None
    ) -> list[Completion]:
        """One completion for each request, in their order.

        Raises:
          ConfigError: a prompt does not fit `max_length`, an id is outside the vocabulary, or stop strings are given
            to a generator without a tokenizer; all faults at once, before anything is computed.
        """
        found: dict[int, Completion] = dict(self.stream(requests, report=report))
        assert len(found) == len(requests), "a request was lost"
        return [found[i] for i in range(len(requests))]

    def stream(
        self, requests: Sequence[Request], *, report: Callable[[Progress], None] | None = None
    ) -> Iterator[tuple[int, Completion]]:
        """(index of a request, its completion) as texts end; refuses what `generate` refuses."""
        self._check(requests)
        return self._run(requests, report)

    def score(self, rows: Sequence[Sequence[int]], starts: Sequence[int]) -> list[Score]:
        """How likely each token of rows[i][starts[i]:] is after what stands before it.

        Raises:
          ConfigError: a start outside [1, length of its row], a row longer than `max_length`, an id out of range.
        """
        faults = []
        for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
            if not 1 <= start <= len(row):
                faults.append(f"row {i}: a start must lie in [1, {len(row)}], got {start}")
            faults += self._id_faults(f"row {i}", row)
            if len(row) > self.config.max_length:
                faults.append(
                    f"row {i} must hold at most max_length={self.config.max_length} tokens, got {len(row)}"
                )
        if faults:
            raise ConfigError(*faults)
        found: dict[int, Score] = {}
        order = sorted(range(len(rows)), key=lambda i: tuple(rows[i]))
        prompts = [tuple(rows[i]) for i in order]
        with self._scope():
            for group in self._groups(prompts):
                scored = self._prefill([prompts[j] for j in group], _branches(prompts, group, self.config.chunk_tokens),
                                       starts=[starts[order[j]] for j in group])  # fmt: skip
                found |= {order[j]: score for j, (_, score) in zip(group, scored, strict=True)}
        return [found[i] for i in range(len(rows))]

    # --- checks ----------------------------------------------------------------------------------------

    def _check(self, requests: Sequence[Request]) -> None:
        faults = []
        for i, request in enumerate(requests):
            length, limit = len(request.ids), self.config.max_length
            if length + request.max_new_tokens > limit:
                faults.append(
                    f"request {i}: prompt and new tokens must fit max_length={limit}, got {length} and "
                    f"max_new_tokens={request.max_new_tokens}; shorten the prompt or raise max_length"
                )
            faults += self._id_faults(f"request {i}", request.ids)
            if request.stop and self.tokenizer is None:
                faults.append(f"request {i}: stop strings need a generator with a tokenizer; give it one")
        if faults:
            raise ConfigError(*faults)

    def _id_faults(self, name: str, ids: Sequence[int]) -> list[str]:
        bad = next((t for t in ids if not 0 <= t < self.vocab_size), None)
        if bad is None:
            return []
        return [
            f"{name}: token ids must lie in [0, {self.vocab_size}), got {bad}; is it this model's tokenizer?"
        ]

    def _scope(self) -> Any:
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)

    # --- prefill ---------------------------------------------------------------------------------------

    def _groups(self, prompts: Sequence[tuple[int, ...]]) -> Iterator[list[int]]:
        """Indices of (sorted) prompts to prefill together: one does not wait for a beginning that another makes."""
        group: list[int] = []
        for j in range(len(prompts)):
            alone = group and _common(prompts[j - 1], prompts[j]) >= self.config.chunk_tokens
            if group and (alone or len(group) == self._prefill_rows):
                yield group
                group = []
            group.append(j)
        if group:
            yield group

    def _longest_prefix(self, prompt: tuple[int, ...], limit: int) -> tuple[int, ...]:
        """The longest kept beginning that ends where a chunk of `prompt` ends."""
        found: tuple[int, ...] = ()
        for ids in self._prefixes:
            whole = len(ids) % self.config.chunk_tokens == 0
            if whole and len(found) < len(ids) <= limit and prompt[: len(ids)] == ids:
                found = ids
        return found

    def _keep(self, ids: tuple[int, ...], prefix: "_Prefix") -> None:
        self._prefixes[ids] = prefix
        self._prefixes.move_to_end(ids)
        while len(self._prefixes) > self.config.prefix_entries:
            self._prefixes.popitem(last=False)

    def _prefill(
        self,
        prompts: Sequence[tuple[int, ...]],
        branches: Sequence[set[int]],
        starts: Sequence[int] | None = None,
    ) -> list[tuple["_Prefix", Score]]:
        """Run up to `prefill_rows` prompts, from the longest beginnings that are kept; keep those at `branches`.

        With `starts` tokens are scored from there on; without, no score is made.
        """
        began = time.perf_counter()
        rows = range(len(prompts))
        # The programs write in place, so a cache that others hold is copied before the first of them.
        cache, private, done = self._fresh, False, [0] * len(prompts)
        last_logits: dict[int, Array] = {}
        scores: list[tuple[list[float], list[bool]]] = [([], []) for _ in rows]
        for r, prompt in enumerate(prompts):
            limit = len(prompt) - 1 if starts is None else starts[r] - 1
            ids = self._longest_prefix(prompt, limit)
            if ids:
                self._prefixes.move_to_end(ids)
                kept = self._prefixes[ids]
                cache = kept.cache if self._prefill_rows == 1 else _copy_row(cache, r, kept.cache, kept.row)
                done[r] = len(ids)
            self.stats.prompt_tokens += len(prompt)
            self.stats.prefilled_tokens += len(prompt) - done[r]
        while any(done[r] < len(prompts[r]) for r in rows):
            sizes = [self._chunk(len(prompts[r]) - done[r]) for r in rows]
            size = next(size for size in sizes if size)
            tokens_PT = np.zeros((self._prefill_rows, size), np.int32)
            next_PT = np.zeros_like(tokens_PT)
            num_new_P = np.zeros(self._prefill_rows, np.int32)
            for r in rows:
                if sizes[r] == size:
                    part = prompts[r][done[r] : done[r] + size]
                    after = prompts[r][done[r] + 1 : done[r] + 1 + size]
                    tokens_PT[r, : len(part)], next_PT[r, : len(after)] = part, after
                    num_new_P[r] = len(part)
            arguments = (self._params, cache if private else _copy(cache), tokens_PT, num_new_P)
            private = True
            if starts is None:
                cache, logits_PV = _prefill(*arguments, *self._statics)
            else:
                cache, logits_PV, found = _score(*arguments, next_PT, *self._statics)
                logprob_PT, greedy_PT = jax.device_get(found)
            for r in rows:
                if not num_new_P[r]:
                    continue
                if starts is not None:
                    # The token at position p is scored by the row of position p - 1.
                    first = max(starts[r] - 1 - done[r], 0)
                    last = min(size, len(prompts[r]) - 1 - done[r])
                    scores[r][0].extend(logprob_PT[r, first:last].tolist())
                    scores[r][1].extend(greedy_PT[r, first:last].tolist())
                done[r] += int(num_new_P[r])
                last_logits[r] = logits_PV
                if done[r] in branches[r]:
                    self._keep(prompts[r][: done[r]], _Prefix(cache, logits_PV, r))
                    private = False
        self.stats.prefill_s += time.perf_counter() - began
        return [
            (_Prefix(cache, last_logits[r], r), Score(logprobs=tuple(logprobs), greedy=tuple(greedy)))
            for r, (logprobs, greedy) in zip(rows, scores, strict=True)
        ]

    def _chunk(self, remaining: int) -> int:
        """The size of the next program: a chunk, or the power of two that holds the rest."""
        if remaining <= 0:
            return 0
        return min(self.config.chunk_tokens, max(_MIN_CHUNK, 1 << (remaining - 1).bit_length()))

    # --- the loop --------------------------------------------------------------------------------------

    def _run(
        self, requests: Sequence[Request], report: Callable[[Progress], None] | None
    ) -> Iterator[tuple[int, Completion]]:
        began = time.perf_counter()
        # Sorted, so that prompts with a common beginning follow one another.
        queue = collections.deque(sorted(range(len(requests)), key=lambda i: requests[i].ids))
        slots: list[_Slot | None] = [None] * self.config.slots
        done = new_tokens = 0
        while queue or any(slots):
            with self._scope():
                admitted = self._admit(requests, queue, slots)
                came = self._first_tokens(slots, admitted) if admitted else self._decode(slots, bool(queue))
            for s, (ids, logprobs) in came.items():
                slot = slots[s]
                assert slot is not None
                before = len(slot.ids)
                slot.ids.extend(ids)
                slot.logprobs.extend(logprobs)
                completion = _completion(slot, self.tokenizer)
                # What was drawn behind the end of a text is nobody's: no rate may count it.
                delivered = len(slot.ids if completion is None else completion.ids) - before
                new_tokens += delivered
                self.stats.new_tokens += delivered
                if completion is not None:
                    slots[s] = None
                    done += 1
                    yield slot.index, completion
            if report is not None:
                elapsed_s = time.perf_counter() - began
                report(
                    Progress(
                        done=done,
                        total=len(requests),
                        new_tokens=new_tokens,
                        tokens_per_second=new_tokens / elapsed_s,
                    )
                )

    def _admit(
        self, requests: Sequence[Request], queue: "collections.deque[int]", slots: "list[_Slot | None]"
    ) -> list[int]:
        """Fill free slots from the queue; returns those filled."""
        free = [s for s, slot in enumerate(slots) if slot is None]
        batch = [queue.popleft() for _ in range(min(len(free), len(queue)))]
        if not batch:
            return []
        ahead = [requests[queue[j]].ids for j in range(min(len(queue), _LOOK_AHEAD))]
        prompts = list(dict.fromkeys([*(requests[i].ids for i in batch), *ahead]))
        of_prompt = collections.defaultdict(list)
        for i in batch:
            of_prompt[requests[i].ids].append(i)
        admitted = []
        kept = {ids: self._prefixes[ids] for ids in of_prompt if ids in self._prefixes}
        for ids in kept:
            self._prefixes.move_to_end(ids)
        missing = [ids for ids in prompts[: len(of_prompt)] if ids not in kept]
        for group in self._groups(missing):
            members = [missing[j] for j in group]
            branches = _branches(prompts, [prompts.index(m) for m in members], self.config.chunk_tokens)
            if ahead and ahead[0] == members[-1]:
                branches[-1].add(len(members[-1]))  # more of the same prompt are waiting
            for ids, (end, _) in zip(members, self._prefill(members, branches), strict=True):
                admitted += self._place(requests, of_prompt[ids], end, free, slots)
        for ids, end in kept.items():
            self.stats.prompt_tokens += len(ids)
            admitted += self._place(requests, of_prompt[ids], end, free, slots)
        return admitted

    def _place(self, requests, indices: Sequence[int], end: "_Prefix", free: list[int], slots) -> list[int]:
        placed = []
        for i in indices:
            s = free.pop(0)
            self._slots = _admit(
                self._slots, s, end.cache, end.logits_PV, end.row, _seen(requests[i].ids, self.vocab_size)
            )
            slots[s] = _Slot(index=i, request=requests[i])
            placed.append(s)
        self.stats.prompt_tokens += (len(indices) - 1) * len(requests[indices[0]].ids)
        return placed

    def _first_tokens(self, slots: "Sequence[_Slot | None]", admitted: Sequence[int]) -> "dict[int, _Came]":
        """The token after the prompt of each slot just filled."""
        token_S, logprob_S = jax.device_get(_first_tokens(self._slots, _settings(slots)))
        return {s: ([int(token_S[s])], [float(logprob_S[s])]) for s in admitted}

    def _decode(self, slots: "Sequence[_Slot | None]", waiting: bool) -> "dict[int, _Came]":
        """A few tokens for every slot: up to the first end when requests wait for a slot, else to the last."""
        began = time.perf_counter()
        remaining_S = np.array([0 if s is None else s.remaining for s in slots], np.int32)
        token_S = np.array([0 if s is None else s.ids[-1] for s in slots], np.int32)
        bound = remaining_S[remaining_S > 0].min() if waiting else remaining_S.max()
        num_steps = int(min(bound, self.config.look_every_tokens))
        self._slots, out = _decode(
            self._params, self._slots, token_S, remaining_S, _settings(slots), num_steps, *self._statics,
            self.config.look_every_tokens,
        )  # fmt: skip
        tokens_IS, logprobs_IS = jax.device_get(out)
        self.stats.decode_steps += num_steps
        self.stats.decode_s += time.perf_counter() - began
        came = {}
        for s, slot in enumerate(slots):
            if slot is not None:
                count = min(num_steps, slot.remaining)
                came[s] = (tokens_IS[:count, s].tolist(), logprobs_IS[:count, s].tolist())
        return came


# --- what the host keeps -----------------------------------------------------------------------------

_Came = tuple[list[int], list[float]]

# The smallest chunk of a prompt, and how many waiting prompts are looked at for common beginnings.
_MIN_CHUNK = 16
_LOOK_AHEAD = 64


@dataclasses.dataclass(frozen=True)
class _Prefix:
    """A prefilled beginning: row `row` of a cache, and of the logits after it."""

    cache: Cache
    logits_PV: Array | None
    row: int


@dataclasses.dataclass
class _Slot:
    """A text on its way."""

    index: int
    request: Request
    ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)

    @property
    def remaining(self) -> int:
        return self.request.max_new_tokens - len(self.ids)


def _completion(slot: _Slot, tokenizer: Tokenizer | None) -> Completion | None:
    """The completion when the text has ended; what was drawn behind its end is dropped."""
    request, ids = slot.request, slot.ids
    end = next((j + 1 for j, token in enumerate(ids) if token in request.stop_ids), None)
    finish: Finish = "length" if end is None else "stop"
    shown = ids[:end] if end is None else ids[: end - 1]
    text = ""
    if tokenizer is not None and request.stop:
        text, cut = _cut(tokenizer, shown, request.stop)
        if cut is not None:
            end, finish = cut, "stop"
    if finish == "length" and slot.remaining > 0:
        return None
    if tokenizer is not None and not request.stop:
        text = tokenizer.decode(shown)
    return Completion(ids=tuple(ids[:end]), logprobs=tuple(slot.logprobs[:end]), finish=finish, text=text)


def _cut(tokenizer: Tokenizer, ids: Sequence[int], stop: Sequence[str]) -> tuple[str, int | None]:
    """The text before the first stop string, and how many tokens complete it (None: it has not come)."""
    text = tokenizer.decode(ids)
    places = [place for place in (text.find(s) for s in stop) if place >= 0]
    if not places:
        return text, None
    low, high = 1, len(ids)
    while low < high:  # the fewest tokens whose text holds a stop string
        middle = (low + high) // 2
        shorter = tokenizer.decode(ids[:middle])
        if any(s in shorter for s in stop):
            high = middle
        else:
            low = middle + 1
    return text[: min(places)], low


def _settings(slots: Sequence[_Slot | None]) -> Settings:
    """Settings of the slots' requests; neutral and greedy where a slot is free."""

    def column(value: Callable[[Request], Any], neutral: Any, dtype: Any) -> np.ndarray:
        return np.array([neutral if s is None else value(s.request) for s in slots], dtype)

    return Settings(
        temperature_S=column(lambda r: r.temperature, 0, np.float32),
        top_k_S=column(lambda r: r.top_k or 0, 0, np.int32),
        top_p_S=column(lambda r: r.top_p, 1, np.float32),
        min_p_S=column(lambda r: r.min_p, 0, np.float32),
        penalty_S=column(lambda r: r.repetition_penalty, 1, np.float32),
        seed_S2=np.stack([seed_words(0 if s is None else s.request.seed) for s in slots]),
    )


def _seen(ids: Sequence[int], vocab_size: int) -> np.ndarray:
    seen_V = np.zeros(vocab_size, bool)
    seen_V[list(ids)] = True
    return seen_V


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    return next((j for j, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _branches(prompts: Sequence[tuple[int, ...]], group: Sequence[int], chunk: int) -> list[set[int]]:
    """For each prompt of a group the chunk ends up to which one of the next (sorted) prompts goes along."""
    branches = []
    for j in group:
        ends: set[int] = set()
        for later in prompts[j + 1 : j + 1 + _LOOK_AHEAD]:
            end = _common(prompts[j], later) // chunk * chunk
            if not end:
                break  # the further a prompt is in the order, the less they have in common
            ends.add(end)
        branches.append(ends)
    return branches


def _prefill_rows(mesh: Mesh | None, config: GenerateConfig) -> int:
    """Prompts prefilled together; refuses sizes that the mesh does not divide."""
    if mesh is None or mesh.size == 1:
        return config.prefill_rows or 1
    parts, faults = axis_size(mesh, DATA_AXES), []
    rows = config.prefill_rows or parts
    if mesh.shape["context"] > 1:
        faults.append(f"generation splits no text: mesh.context must be 1, got {mesh.shape['context']}")
    for name, value in (("slots", config.slots), ("prefill_rows", rows)):
        if value % parts:
            faults.append(f"{name} must be a multiple of the {parts} parts of the data axes, got {value}")
    if faults:
        raise ConfigError(*faults)
    return rows


# --- the compiled programs ---------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Slots:
    """The slots on the device: cache, the logits after each prompt, the tokens that each text holds."""

    cache: Cache
    logits_SV: Array
    seen_SV: Array


_ROWS = ("batch", None)


@functools.partial(jax.jit, static_argnames=("model", "config"))
def _empty_cache(model: ModelConfig, config: CacheConfig) -> Cache:
    return empty_cache(model, config)


@functools.partial(jax.jit, static_argnames=("model", "config", "vocab_size"))
def _empty_slots(model: ModelConfig, config: CacheConfig, vocab_size: int) -> _Slots:
    shape = (config.rows, vocab_size)
    layout = activation_spec(_ROWS, shape)
    return _Slots(
        empty_cache(model, config),
        jnp.zeros(shape, jnp.float32, out_sharding=layout),
        jnp.zeros(shape, bool, out_sharding=layout),
    )


_STATICS = ("model", "max_length", "impl")


@functools.partial(jax.jit, static_argnames=_STATICS, donate_argnames="cache")
def _prefill(
    params: Params,
    cache: Cache,
    tokens_PT: Int[Array, "P T"],
    num_new_P: Int[Array, " P"],
    model: ModelConfig,
    max_length: int,
    impl: str,
) -> tuple[Cache, Float[Array, "P V"]]:
    """Rows extended, and the logits after each."""
    hidden_PTD, cache = _extend(params, cache, tokens_PT, num_new_P, model, max_length, impl)
    return cache, _last_logits(params, hidden_PTD, num_new_P, model)


@functools.partial(jax.jit, static_argnames=_STATICS, donate_argnames="cache")
def _score(
    params: Params,
    cache: Cache,
    tokens_PT: Int[Array, "P T"],
    num_new_P: Int[Array, " P"],
    next_PT: Int[Array, "P T"],
    model: ModelConfig,
    max_length: int,
    impl: str,
) -> tuple[Cache, Float[Array, "P V"], tuple[Array, Array]]:
    """`_prefill`, and for every token whose successor is known that one's log-probability and whether it leads."""
    hidden_PTD, cache = _extend(params, cache, tokens_PT, num_new_P, model, max_length, impl)
    logits_PTV = place(next_logits(hidden_PTD, params, model), ("batch", None, None))
    top_PT1 = logits_PTV.max(axis=2, keepdims=True)
    lse_PT = top_PT1[:, :, 0] + jnp.log(jnp.exp(logits_PTV - top_PT1).sum(axis=2))
    hit_PTV = place(next_PT, ("batch", None))[:, :, None] == jnp.arange(logits_PTV.shape[2])[None, None]
    found_PT = jnp.where(hit_PTV, logits_PTV, 0.0).sum(axis=2)
    scores = (found_PT - lse_PT, found_PT >= top_PT1[:, :, 0])
    last_PV = _last_logits(params, hidden_PTD, num_new_P, model)
    return cache, last_PV, jax.tree.map(lambda x: place(x, (None, None)), scores)


def _extend(params, cache, tokens_PT, num_new_P, model, max_length, impl):
    tokens_PT, num_new_P = place(tokens_PT, ("batch", "time")), place(num_new_P, ("batch",))
    return extend(params, model, tokens_PT, num_new_P, cache, max_length=max_length, attention_impl=impl)


def _last_logits(
    params: Params, hidden_PTD: Array, num_new_P: Array, model: ModelConfig
) -> Float[Array, "P V"]:
    last_P1 = jnp.maximum(place(num_new_P, ("batch",)) - 1, 0)[:, None]
    here_PT = jnp.arange(hidden_PTD.shape[1])[None] == last_P1
    hidden_P1D = (
        jnp.where(here_PT[:, :, None], hidden_PTD, 0).sum(axis=1, keepdims=True).astype(hidden_PTD.dtype)
    )
    return place(next_logits(hidden_P1D, params, model), ("batch", None, None))[:, 0]


@jax.jit
def _copy(cache: Cache) -> Cache:
    return jax.tree.map(jnp.copy, cache)


@jax.jit
def _copy_row(target: Cache, slot: int, source: Cache, row: int) -> Cache:
    return copy_row(target, jnp.asarray(slot), source, jnp.asarray(row))


@functools.partial(jax.jit, donate_argnames="slots")
def _admit(slots: _Slots, slot: int, source: Cache, logits_PV: Array, row: int, seen_V: Array) -> _Slots:
    """A prefilled row moves into a slot."""
    slot, row = jnp.asarray(slot), jnp.asarray(row)
    return _Slots(
        copy_row(slots.cache, slot, source, row),
        set_row(slots.logits_SV, slot, get_row(logits_PV, row, _ROWS), _ROWS),
        set_row(slots.seen_SV, slot, jnp.asarray(seen_V), _ROWS),
    )


@jax.jit
def _first_tokens(slots: _Slots, settings: Settings) -> tuple[Array, Array]:
    return _drawn(slots.logits_SV, slots.seen_SV, slots.cache.lengths_B, settings)


@functools.partial(jax.jit, static_argnames=(*_STATICS, "look_every_tokens"), donate_argnames="slots")
def _decode(
    params: Params,
    slots: _Slots,
    token_S: Int[Array, " S"],
    remaining_S: Int[Array, " S"],
    settings: Settings,
    num_steps: Int[Array, ""],
    model: ModelConfig,
    max_length: int,
    impl: str,
    look_every_tokens: int,
) -> tuple[_Slots, tuple[Int[Array, "I S"], Float[Array, "I S"]]]:
    """`num_steps` tokens for each slot that has as many remaining; `token_S` are the last ones, not yet cached."""
    vocab_V = jnp.arange(slots.seen_SV.shape[1])[None]

    def step(i: Array, state: Any) -> Any:
        slots, token_S, tokens_IS, logprobs_IS = state
        num_new_S = (i < remaining_S).astype(jnp.int32)
        hidden_S1D, cache = _extend(params, slots.cache, token_S[:, None], num_new_S, model, max_length, impl)
        seen_SV = slots.seen_SV | (place(token_S, ("batch",))[:, None] == vocab_V)
        logits_SV = place(next_logits(hidden_S1D, params, model), ("batch", None, None))[:, 0]
        token_S, logprob_S = _drawn(logits_SV, seen_SV, cache.lengths_B, settings)
        return (
            _Slots(cache, slots.logits_SV, seen_SV),
            token_S,
            tokens_IS.at[i].set(token_S),
            logprobs_IS.at[i].set(logprob_S),
        )

    shape = (look_every_tokens, token_S.shape[0])
    state = (slots, token_S, jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32))
    slots, _, tokens_IS, logprobs_IS = jax.lax.fori_loop(0, num_steps, step, state)
    return slots, (tokens_IS, logprobs_IS)


def _drawn(logits_SV: Array, seen_SV: Array, position_S: Array, settings: Settings) -> tuple[Array, Array]:
    """`draw`; on a mesh each device for its slots, and the result on every device."""
    if current_mesh() is None:
        return draw(logits_SV, seen_SV, position_S, settings)
    rows = activation_spec(("batch",), position_S.shape)
    arguments = (logits_SV, seen_SV, position_S, settings)
    arguments = jax.tree.map(lambda x: place(x, ("batch", *(None,) * (x.ndim - 1))), arguments)
    drawn = jax.shard_map(draw, in_specs=rows, out_specs=rows)(*arguments)
    return jax.tree.map(lambda x: place(x, (None,)), drawn)


# --- samples during training -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """What a run writes at each evaluation, to be read by a person."""

    prompts: tuple[str, ...] = ("",)
    max_new_tokens: int = 96
    temperature: float = 0.8
    seed: int = 0

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if self.temperature < 0:
            raise ConfigError(f"temperature must be at least 0 (0 is greedy), got {self.temperature}")


def sample_texts(params: Params, model: ModelConfig, tokenizer: Tokenizer, config: SampleConfig) -> list[str]:
    """One continuation for each prompt, the prompt included; it ends at the end of the document."""
    if not config.prompts:
        return []
    prompts = [tokenizer.encode(prompt) for prompt in config.prompts]
    requests = [
        Request(
            ids=(tokenizer.bos_id, *ids),
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            stop_ids=(tokenizer.eos_id,),
            seed=stable_seed(config.seed, i),
        )
        for i, ids in enumerate(prompts)
    ]
    # A few short texts: one device is enough, and whole parameters there need no mesh in scope.
    params = jax.device_put(jax.device_get(params), jax.local_devices()[0])
    sizes = GenerateConfig(
        max_length=max(len(r.ids) for r in requests) + config.max_new_tokens, slots=len(requests)
    )
    generator = Generator(params, model, sizes, tokenizer=tokenizer)
    completions = generator.generate(requests)
    return [tokenizer.decode([*ids, *c.ids]) for ids, c in zip(prompts, completions, strict=True)]
