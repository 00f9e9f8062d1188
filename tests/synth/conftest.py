"""A local server that speaks the chat protocol, answers by rule and misbehaves on demand. For tests only."""

import asyncio
import json
import random
import threading
from collections import Counter
from collections.abc import Callable

import pytest

Fault = (
    str  # "ok", "429", "500", "400", "401", "hang", "cut", "half", "garbage", "empty", "latin1", "surrogate"
)


def _head(status: int, length: int, extra: str = "") -> bytes:
    reason = {
        200: "OK",
        400: "Bad Request",
        401: "Unauthorized",
        429: "Too Many Requests",
        500: "Server Error",
    }
    return (
        f"HTTP/1.1 {status} {reason[status]}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {length}\r\n{extra}\r\n"
    ).encode()


class ChatServer:
    """Runs in a thread of its own. `fault(n, body)` says how the n-th request fares; `requests` keeps the bodies."""

    def __init__(
        self,
        answer: Callable[[dict], str],
        fault: Callable[[int, dict], Fault] = lambda n, body: "ok",
        latency_s: float = 0.0,
        keep: bool = True,
        honors_keys: bool = False,
    ):
        self._answer = answer
        self._fault = fault
        self._latency_s = latency_s
        self._keep = keep
        self._honors_keys = honors_keys
        self.replies: dict[str, bytes] = {}  # by idempotency key, when those are honored
        self.charged: Counter[str] = Counter()
        self.requests: list[dict] = []
        self.keys: Counter[str] = Counter()
        self.num_requests = 0
        self.num_answered = 0
        self.most_at_once = 0
        self._now = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> "ChatServer":
        self._thread.start()
        future = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=1024), self._loop
        )
        self._server = future.result()
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1"
        return self

    def __exit__(self, *_) -> None:
        async def stop():
            self._server.close()
            tasks = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._one(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass  # the client went away, or the test is over
        finally:
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = int(head.split("content-length:")[1].split("\r\n")[0])
        body = json.loads(await reader.readexactly(length))
        number, self.num_requests = self.num_requests, self.num_requests + 1
        self._now += 1
        self.most_at_once = max(self.most_at_once, self._now)
        try:
            key = head.split("idempotency-key:")[1].split("\r\n")[0].strip()
            if self._keep:
                self.requests.append(body)
                self.keys[key] += 1
            if self._latency_s:
                await asyncio.sleep(self._latency_s)
            fault = self._fault(number, body)
            if fault == "hang":
                await asyncio.sleep(3600)
            payload, status, extra = self._payload(body, fault)
            if self._honors_keys and status == 200:
                payload = self.replies.get(key, payload)
                self.charged[key] += key not in self.replies
                self.replies[key] = payload
            if fault == "cut":
                return False
            if fault == "half":
                writer.write(_head(200, len(payload)) + payload[: len(payload) // 2])
                await writer.drain()
                return False
            writer.write(_head(status, len(payload), extra) + payload)
            await writer.drain()
            self.num_answered += 1
            return True
        finally:
            self._now -= 1

    def _payload(self, body: dict, fault: Fault) -> tuple[bytes, int, str]:
        if fault in ("429", "500", "400", "401"):
            error = {"error": {"message": f"planned {fault}", "type": "planned", "code": None}}
            extra = "Retry-After: 0.01\r\n" if fault == "429" else ""
            return json.dumps(error).encode(), int(fault), extra
        if fault == "garbage":
            return b"<html>gateway</html>", 200, ""
        if fault == "empty":
            return b"", 200, ""
        text = self._answer(body)
        message = {"role": "assistant", "content": text}
        usage = {"prompt_tokens": 7, "completion_tokens": len(text.split())}
        reply = {
            "id": "x",
            "object": "chat.completion",
            "model": "served-model-1",
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": usage,
        }
        if fault == "latin1":
            message["content"] = "caf\u00e9"
            return json.dumps(reply, ensure_ascii=False).encode("latin-1"), 200, ""
        if fault == "surrogate":
            message["content"] = "\ud800"
        return json.dumps(reply).encode(), 200, ""


def random_faults(seed: int, rates: dict[Fault, float]) -> Callable[[int, dict], Fault]:
    """Each request fares by chance: fault f with probability rates[f], else ok."""
    chance = random.Random(seed)

    def draw(number: int, body: dict) -> Fault:
        value = chance.random()
        for fault, rate in rates.items():
            value -= rate
            if value < 0:
                return fault
        return "ok"

    return draw


@pytest.fixture
def chat_server():
    """The class: `with chat_server(answer, fault) as server: ... server.url`."""
    return ChatServer


@pytest.fixture
def faults():
    """`faults(seed, {"429": 0.1})`: each request fares by chance."""
    return random_faults
