"""Our own model as the language model: weights, a tokenizer, and batches made of whatever is waiting.

Calls come one by one and a device wants many rows at once, so calls that are awaited together are collected for
a moment and run as one batch. What is computed blocks the event loop, as there is nothing else to do meanwhile.

Letters: B rows of a batch, T positions, T1 = T + 1.
"""

import asyncio
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pretrain import generate
from pretrain.checkpoint import params_sha256
from pretrain.config import ConfigError, local, to_json
from pretrain.loss import token_logprobs
from pretrain.model.transformer import ModelConfig, Params, forward, head_DV
from pretrain.pretrained import Pretrained
from pretrain.tokenizer import Tokenizer, TokenizerConfig
from synth.llm.api import LLM, BadRequest, Finish, Reply, Request, Usage

_GATHER_S = 0.003  # calls that come within it run together
_LENGTH_STEP = 32  # scored rows are padded to multiples of it, so a few shapes are compiled
_TOKENS_A_BATCH = 8192


@dataclass(frozen=True, kw_only=True)
class LocalConfig:
    """`words` is a tokenizer to use in place of the one that belongs to `weights`, its path below `root`: the marks
    of a chat are often not those of a document.

    `form` says how a request is spelled: "plain" is bos and the messages, "pair" has sep behind them, as pair
    rows do, and "chat" is ChatML with bos and eos as its two marks.

    `max_length` bounds prompt and reply together, `slots` is how many texts are decoded together.
    """

    weights: Pretrained
    words: TokenizerConfig | None = None
    root: str = local("")
    form: Literal["plain", "pair", "chat"] = "plain"
    max_length: int = 2048
    slots: int = local(16)
    concurrency: int = local(64)
    prompt_usd_per_million: float = local(0.0)
    completion_usd_per_million: float = local(0.0)

    def __post_init__(self):
        if self.form not in ("plain", "pair", "chat"):
            raise ConfigError(f"form must be plain, pair or chat, got {self.form!r}")
        if self.words is not None and self.words.trained:
            raise ConfigError(
                "words must be a tokenizer that exists, got one trained on a corpus; name its file"
            )

    def identity(self) -> Mapping[str, Any]:
        """The bits of the parameters, what they are run as, and the tokenizer."""
        model = self.weights.model_config()
        return {
            "model": f"local:{params_sha256(self.weights.params(model))}",
            "config": to_json(model, identity_only=True),
            "tokenizer": self.tokenizer().sha256,
            "form": self.form,
            "max_length": self.max_length,
        }

    def tokenizer(self) -> Tokenizer:
        """`words`, or what belongs to the weights."""
        if self.words is None:
            return self.weights.tokenizer()
        return self.words.build(self.root, lambda max_bytes: iter(()))

    def build(self) -> LLM:
        """Load it."""
        return LocalLLM(self)


@dataclass(frozen=True)
class _Call:
    """A row of token ids, what is wanted of it, and who waits."""

    ids: tuple[int, ...]
    wanted: Any  # the first token to score, or the request of a text
    answer: "asyncio.Future[Any]"


@dataclass
class _Gathered:
    """Calls of one kind that will run together."""

    run: Callable[[list[_Call]], None]
    calls: list[_Call] = field(default_factory=list)

    async def result(self, ids: Sequence[int], wanted: Any) -> Any:
        """What `run` answers."""
        loop = asyncio.get_running_loop()
        if not self.calls:
            loop.call_later(_GATHER_S, self._go)
        call = _Call(tuple(ids), wanted, loop.create_future())
        self.calls.append(call)
        return await call.answer

    def _go(self) -> None:
        calls, self.calls = [call for call in self.calls if not call.answer.done()], []
        try:
            self.run(calls)
        except BaseException as error:
            for call in calls:
                if not call.answer.done():
                    call.answer.set_exception(error)
            if not isinstance(error, Exception):
                raise


class LocalLLM:
    """See `LocalConfig`."""

    def __init__(self, config: LocalConfig):
        self._config = config
        self._model = config.weights.model_config()
        self._params = config.weights.params(self._model)
        self._tokenizer = config.tokenizer()
        self._generator: generate.Generator | None = None  # its cache is made when a text is asked for
        self._texts = _Gathered(self._write)
        self._scores = _Gathered(self._score)

    @property
    def identity(self) -> Mapping[str, Any]:
        """See `LocalConfig.identity`."""
        return self._config.identity()

    async def generate(self, request: Request) -> Reply:
        """Sample a reply, a function of the request alone. A JSON schema is not enforced.

        Raises:
          BadRequest: prompt and `max_tokens` do not fit `max_length`.
        """
        ids = self._spell(request.system, request.user)
        room = self._config.max_length - len(ids)
        if room < request.max_tokens:
            raise BadRequest(
                f"prompt and reply must fit max_length={self._config.max_length} tokens, got {len(ids)} and "
                f"{request.max_tokens}"
            )
        completion: generate.Completion = await self._texts.result(ids, request)
        finish: Finish = "stop" if completion.finish == "stop" else "length"
        usage = Usage(prompt_tokens=len(ids), completion_tokens=len(completion.ids))
        return Reply(text=completion.text.strip(), finish=finish, usage=usage, model="local")

    async def score(self, prompt: str, continuation: str) -> float:
        """Log-probability in nats of the tokens that `continuation` adds to `prompt`."""
        start = self._spell("", prompt)
        return await self._scores.result([*start, *self._tokenizer.encode(continuation)], len(start))

    async def close(self) -> None:
        """Nothing to release."""

    def _spell(self, system: str, user: str) -> list[int]:
        t = self._tokenizer
        if self._config.form != "chat":
            end = [t.sep_id] if self._config.form == "pair" else []
            return [t.bos_id, *t.encode(f"{system}\n\n{user}" if system else user), *end]
        ids: list[int] = []
        for role, text in (("system", system), ("user", user)):
            if text:
                ids += [t.bos_id, *t.encode(f"{role}\n{text}"), t.eos_id, *t.encode("\n")]
        return [*ids, t.bos_id, *t.encode("assistant\n")]

    def _write(self, calls: list[_Call]) -> None:
        if self._generator is None:
            sizes = generate.GenerateConfig(max_length=self._config.max_length, slots=self._config.slots)
            self._generator = generate.Generator(self._params, self._model, sizes, tokenizer=self._tokenizer)
        wanted = [
            generate.Request(
                ids=call.ids,
                max_new_tokens=call.wanted.max_tokens,
                temperature=call.wanted.temperature,
                top_p=call.wanted.top_p,
                stop_ids=(self._tokenizer.eos_id,),
                stop=call.wanted.stop,
                seed=call.wanted.seed,
            )
            for call in calls
        ]
        for index, completion in self._generator.stream(wanted):
            calls[index].answer.set_result(completion)

    def _score(self, calls: list[_Call]) -> None:
        """Longest first, so that the rows of a batch are about equally long."""
        calls = sorted(calls, key=lambda call: -len(call.ids))
        while calls:
            length = -(-len(calls[0].ids) // _LENGTH_STEP) * _LENGTH_STEP
            num_rows = max(1, _TOKENS_A_BATCH // length)
            rows, calls = calls[:num_rows], calls[num_rows:]
            tokens_BT1 = np.full((num_rows, length + 1), self._tokenizer.pad_id, np.int32)
            counted_BT = np.zeros((num_rows, length), np.float32)
            for i, row in enumerate(rows):
                tokens_BT1[i, : len(row.ids)] = row.ids
                counted_BT[i, row.wanted - 1 : len(row.ids) - 1] = 1.0
            sums_B = np.asarray(_sum_logprobs(self._params, tokens_BT1, counted_BT, self._model))
            for row, total in zip(rows, sums_B.tolist(), strict=False):
                row.answer.set_result(total)


@functools.partial(jax.jit, static_argnames="model")
def _sum_logprobs(
    params: Params, tokens_BT1: Int[Array, "B T1"], counted_BT: Float[Array, "B T"], model: ModelConfig
) -> Float[Array, " B"]:
    """Summed log-probability of the counted targets of each row. Padding stands behind them and changes nothing."""
    positions_BT = jnp.broadcast_to(jnp.arange(counted_BT.shape[1], dtype=jnp.int32), counted_BT.shape)
    hidden_BTD = forward(params, model, tokens_BT1[:, :-1], positions_BT, None)
    logprobs_BT = token_logprobs(
        hidden_BTD, head_DV(params, model), tokens_BT1[:, 1:], softcap=model.final_softcap
    )
    return jnp.sum(jnp.where(counted_BT > 0, logprobs_BT, 0.0), axis=1)
