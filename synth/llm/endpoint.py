"""Any server that speaks the OpenAI chat protocol (hosted, vLLM, SGLang, llama.cpp), through the `openai` client.

The client's own retries are off: errors are sorted by what they mean for the bill and for the next attempt,
and waiting is the business of `retrying`. The only file that imports `openai`; a config file imports it.
"""

import asyncio
import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx2
import openai

from pretrain.config import ConfigError, local
from synth.llm.api import (
    LLM,
    BadRequest,
    LostCall,
    OutOfBudget,
    Overloaded,
    Reply,
    Request,
    Usage,
    request_key,
)

_CONNECTIONS_PER_POOL = 32
_NEVER_SENT = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout)
_FINISH: Mapping[str | None, Literal["stop", "length", "refused"]] = {
    "length": "length",
    "content_filter": "refused",
}


@dataclass(frozen=True, kw_only=True)
class EndpointConfig:
    """A model behind a URL. Where it runs, how fast it is asked and what it costs are no part of its identity.

    `json_mode` is how a reply with a schema is asked for: "schema" (constrained by the server), "object" (any
    JSON) or "none" (the prompt alone); replies are parsed alike. `api_key_env=""` sends no key.
    """

    model: str
    json_mode: Literal["schema", "object", "none"] = "schema"
    extra_body: dict[str, Any] = field(default_factory=dict)
    base_url: str = local("https://api.openai.com/v1")
    api_key_env: str = local("OPENAI_API_KEY")
    concurrency: int = local(64)
    requests_per_minute: int | None = local(None)
    tokens_per_minute: int | None = local(None)
    timeout_s: float = local(300.0)
    prompt_usd_per_million: float = local(0.0)
    completion_usd_per_million: float = local(0.0)

    def __post_init__(self):
        faults = []
        if not self.model:
            faults.append("model must name what the server serves, got ''")
        if self.concurrency < 1:
            faults.append(f"concurrency must be at least 1, got {self.concurrency}")
        if self.timeout_s <= 0:
            faults.append(f"timeout_s must be above 0, got {self.timeout_s}")
        for name in ("requests_per_minute", "tokens_per_minute"):
            value = getattr(self, name)
            if value is not None and value < 1:
                faults.append(f"{name} must be at least 1 or none, got {value}")
        if faults:
            raise ConfigError(*faults)

    def identity(self) -> Mapping[str, Any]:
        """The model's name and what is sent with every request."""
        return {"model": self.model, "json_mode": self.json_mode, "extra_body": self.extra_body}

    def build(self) -> LLM:
        """The client.

        Raises:
          ConfigError: the environment variable that should hold the key is not set.
        """
        return EndpointLLM(self)


class EndpointLLM:
    """Clients of one server, each with a small pool of connections.

    The pool of the HTTP library looks at all its connections for every request: with 500 in one pool a call
    costs four times the processor time of a call in a pool of 32.
    """

    def __init__(self, config: EndpointConfig):
        self._config = config
        key = os.environ.get(config.api_key_env, "") if config.api_key_env else "none"
        if not key:
            raise ConfigError(
                f"api_key_env must name a variable that holds the key, {config.api_key_env} is not set; "
                'export it, or write llm.api_key_env="" for a server without keys'
            )
        num_pools = -(-config.concurrency // _CONNECTIONS_PER_POOL)
        limits = httpx2.Limits(
            max_connections=_CONNECTIONS_PER_POOL, max_keepalive_connections=_CONNECTIONS_PER_POOL
        )
        timeout = httpx2.Timeout(config.timeout_s, connect=min(30.0, config.timeout_s))
        self._clients = [
            openai.AsyncOpenAI(
                api_key=key,
                base_url=config.base_url,
                max_retries=0,
                http_client=openai.DefaultAsyncHttpxClient(limits=limits, timeout=timeout),
            )
            for _ in range(num_pools)
        ]
        self._busy = [0] * num_pools
        self._requests = _Pace(config.requests_per_minute)
        self._tokens = _Pace(config.tokens_per_minute)

    @property
    def identity(self) -> Mapping[str, Any]:
        """The model's name and what is sent with every request."""
        return self._config.identity()

    async def generate(self, request: Request) -> Reply:
        """One attempt.

        Raises:
          Overloaded: busy (429, 5xx) or not reachable. LostCall: sent, and no whole reply came back.
          BadRequest: refused for what it says (400, 413, 422). OutOfBudget: the account's quota is used up.
          ConfigError: wrong key, model or address (401, 403, 404); no call of this run can succeed.
        """
        await self._requests.wait(1)
        await self._tokens.wait(len(request.system + request.user) // 4 + request.max_tokens)
        body: dict[str, Any] = {
            "model": self._config.model,
            "messages": [
                {"role": "system", "content": request.system},
                {"role": "user", "content": request.user},
            ],
            "max_tokens": request.max_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "seed": request.seed,
        }
        if request.stop:
            body["stop"] = list(request.stop)
        if request.json_schema is not None and self._config.json_mode != "none":
            body["response_format"] = self._response_format(request.json_schema)
        key = request_key(self.identity, request)
        return _read_reply(await self._post("/chat/completions", body, key), request)

    def _response_format(self, schema: Mapping[str, Any]) -> dict[str, Any]:
        if self._config.json_mode == "object":
            return {"type": "json_object"}
        return {
            "type": "json_schema",
            "json_schema": {"name": "reply", "schema": dict(schema), "strict": True},
        }

    async def _post(self, path: str, body: dict[str, Any], key: str) -> Any:
        """The JSON of a reply with status 200.

        `key` depends on the request alone, so that what is asked again after a lost reply, or by a process that was started
        again, is charged once by a server that honors such headers.
        """
        pool = self._busy.index(min(self._busy))
        self._busy[pool] += 1
        try:
            response = await asyncio.wait_for(
                self._clients[pool].post(
                    path,
                    body={**body, **self._config.extra_body},
                    options={"headers": {"Idempotency-Key": key}},
                    cast_to=httpx2.Response,
                ),
                timeout=self._config.timeout_s,  # the client's own limit is one between two bytes
            )
        except openai.APIStatusError as error:
            raise _sort_status(error) from error
        except TimeoutError as error:
            raise LostCall(f"no reply within {self._config.timeout_s:g} s") from error
        except openai.APIConnectionError as error:
            if isinstance(error.__cause__, _NEVER_SENT):
                raise Overloaded(f"no connection to {self._config.base_url}: {error.__cause__}") from error
            raise LostCall(f"connection lost: {error.__cause__ or error}") from error
        except httpx2.HTTPError as error:
            raise LostCall(f"connection lost: {error}") from error
        finally:
            self._busy[pool] -= 1
        try:
            return json.loads(response.content)
        except ValueError as error:  # also bytes that are no UTF-8
            raise LostCall(f"the body of the reply is not JSON: {response.content[:60]!r}") from error

    async def score(self, prompt: str, continuation: str) -> float:
        """Sum of the log-probabilities of the continuation's tokens, by the completions route with `echo`.

        Raises:
          NotImplementedError: the server does not echo log-probabilities.
        """
        body = {
            "model": self._config.model,
            "prompt": prompt + continuation,
            "max_tokens": 1,
            "temperature": 0.0,
            "echo": True,
            "logprobs": 1,
        }
        try:
            data = await self._post("/completions", body, _body_key("/completions", body))
            found = data["choices"][0]["logprobs"]
            pairs = list(zip(found["text_offset"], found["token_logprobs"], strict=True))
        except (BadRequest, ConfigError, KeyError, TypeError, IndexError) as error:
            raise NotImplementedError(
                f"{self._config.base_url} gives no log-probabilities of a prompt ({error}); "
                "evaluate by sampled answers, or use a server that supports echo"
            ) from error
        end = len(prompt) + len(continuation)
        return float(sum(value for offset, value in pairs if len(prompt) <= offset < end))

    async def embed(self, texts: Sequence[str]) -> list[list[float]]:
        """A vector for each text, by the embeddings route.

        Raises:
          As `generate`; LostCall also when the reply holds other than one vector a text.
        """
        body = {"model": self._config.model, "input": list(texts), "encoding_format": "float"}
        data = await self._post("/embeddings", body, _body_key("/embeddings", body))
        try:
            found = sorted(data["data"], key=lambda item: item["index"])
            vectors = [[float(x) for x in item["embedding"]] for item in found]
        except (KeyError, TypeError, ValueError) as error:
            raise LostCall(f"the reply holds no embeddings: {str(data)[:80]}") from error
        if len(vectors) != len(texts) or len({len(v) for v in vectors}) != 1:
            raise LostCall(f"the reply must hold {len(texts)} vectors of one width, got {len(vectors)}")
        return vectors

    async def close(self) -> None:
        """Close the connections."""
        for client in self._clients:
            await client.close()


class _Pace:
    """Lets `per_minute` units through a minute, evenly; None lets everything through."""

    def __init__(self, per_minute: int | None):
        self._interval_s = 60.0 / per_minute if per_minute else 0.0
        self._next_s = 0.0

    async def wait(self, units: int) -> None:
        if not self._interval_s:
            return
        now = time.monotonic()
        start = max(now, self._next_s)
        self._next_s = start + units * self._interval_s
        await asyncio.sleep(start - now)


def _body_key(path: str, body: Mapping[str, Any]) -> str:
    """The key of a call that has no `Request`; an empty one would make all such calls one."""
    return hashlib.sha256(json.dumps([path, body], sort_keys=True).encode()).hexdigest()


def _sort_status(error: openai.APIStatusError) -> Exception:
    """What an HTTP error means for us."""
    status, text = error.status_code, f"{error.status_code}: {str(error)[:200]}"
    if status in (401, 403, 404):
        return ConfigError(
            f"the server refuses every call ({text}); check llm.model, llm.base_url and the key"
        )
    if status == 429 and error.code == "insufficient_quota":
        return OutOfBudget(f"the account has no quota left ({text})")
    if status in (408, 409, 425, 429) or status >= 500:
        return Overloaded(text, retry_after_s=_retry_after_s(error.response.headers.get("retry-after")))
    return BadRequest(text)


def _retry_after_s(header: str | None) -> float | None:
    """Seconds from a Retry-After header; None when it is absent or a date."""
    try:
        return max(float(header), 0.0) if header else None
    except ValueError:
        return None


def _read_reply(data: Any, request: Request) -> Reply:
    """The first choice of a chat completion.

    Raises:
      LostCall: it has another shape, or text that is not valid Unicode.
    """
    try:
        choice = data["choices"][0]
        message = choice["message"]
        text = message["content"] or ""
        text.encode()  # lone surrogates would break every file they enter
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise LostCall(f"the reply is no chat completion: {str(data)[:80]}") from error
    except UnicodeEncodeError as error:
        raise LostCall("the text of the reply is not valid Unicode") from error
    finish = _FINISH.get(choice.get("finish_reason"), "stop")
    if message.get("refusal"):
        text, finish = str(message["refusal"]), "refused"
    usage = data.get("usage") or {}
    return Reply(
        text=text,
        finish=finish,
        model=str(data.get("model", "")),
        usage=Usage(
            prompt_tokens=int(usage.get("prompt_tokens") or len(request.system + request.user) // 4),
            completion_tokens=int(usage.get("completion_tokens") or len(text) // 4),
        ),
    )
