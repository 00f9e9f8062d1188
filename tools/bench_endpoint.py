"""How close does the endpoint come to the ideal rate of a server that answers in a fixed time, and does memory stay flat?

    python -m tools.bench_endpoint concurrency=500 latency_s=0.1 calls=5000 memory_calls=100000

The server runs in a process of its own and answers every chat completion `latency_s` after it came. The ideal rate
is concurrency / latency. Seconds of processor time a call stand beside it: one process cannot pass their inverse,
and where others use the machine too they are the fairer measure. Needs the extra [endpoint].
"""

import asyncio
import dataclasses
import json
import resource
import subprocess
import sys
import time

from pretrain.config import ConfigError, apply_overrides
from synth.llm.api import Request
from synth.llm.endpoint import EndpointConfig

_REPLY = json.dumps(
    {
        "id": "x",
        "object": "chat.completion",
        "model": "fixed",
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": "word " * 200}, "finish_reason": "stop"}
        ],
        "usage": {"prompt_tokens": 100, "completion_tokens": 200},
    }
).encode()
_HEAD = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(_REPLY)}\r\n\r\n".encode()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line may say, `key=value`."""

    concurrency: int = 500
    latency_s: float = 0.1
    calls: int = 5000
    memory_calls: int = 100_000
    serve: bool = False  # for the tool itself: be the server

    def __post_init__(self):
        if min(self.concurrency, self.calls) < 1 or self.latency_s <= 0 or self.memory_calls < 0:
            raise ConfigError(
                f"concurrency and calls must be at least 1, latency_s positive and memory_calls not negative, got {self}"
            )


async def serve(latency_s: float) -> None:
    """Answer until standard input ends; the first line of output is the port."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                await reader.readexactly(int(head.split(b"content-length:")[1].split(b"\r\n")[0]))
                await asyncio.sleep(latency_s)
                writer.write(_HEAD + _REPLY)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0, backlog=2048)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


async def call_many(config: EndpointConfig, count: int) -> tuple[float, float]:
    """Make `count` calls, `config.concurrency` at a time: seconds of the clock and of the processor."""
    llm = config.build()
    numbers = iter(range(count))

    async def worker() -> None:
        for number in numbers:
            await llm.generate(
                Request(system="s", user=f"question {number} " * 20, max_tokens=256, seed=number)
            )

    await asyncio.gather(*(llm.generate(Request(system="s", user="warm up", max_tokens=8)) for _ in range(8)))
    began, began_cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(worker() for _ in range(config.concurrency)))
    spent = time.perf_counter() - began, time.process_time() - began_cpu
    await llm.close()
    return spent


def resident_mib() -> float:
    """Memory that this process holds now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


def main() -> int:
    try:
        options = apply_overrides(Options(), sys.argv[1:])
    except ConfigError as error:
        for fault in error.faults:
            print(f"error: {fault}", file=sys.stderr)
        return 2
    if options.serve:
        asyncio.run(serve(options.latency_s))
        return 0
    command = [sys.executable, __file__, "serve=true", f"latency_s={options.latency_s}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        config = EndpointConfig(
            model="fixed",
            base_url=f"http://127.0.0.1:{int(server.stdout.readline())}/v1",
            api_key_env="",
            concurrency=options.concurrency,
        )
        seconds, cpu_s = asyncio.run(call_many(config, options.calls))
        rate, ideal = options.calls / seconds, options.concurrency / options.latency_s
        print(
            f"{options.calls:,} calls, {options.concurrency} at once, replies after {options.latency_s:g} s"
        )
        print(f"rate {rate:,.0f} calls/s, {rate / ideal:.1%} of the ideal {ideal:,.0f}")
        print(
            f"processor {1e3 * cpu_s / options.calls:.3f} ms a call: at most {options.calls / cpu_s:,.0f} calls/s a core"
        )
        if options.memory_calls:
            marks = [resident_mib()]
            for _ in range(10):
                asyncio.run(call_many(config, -(-options.memory_calls // 10)))
                marks.append(resident_mib())
            print(
                f"resident MiB every {options.memory_calls // 10:,} calls: {', '.join(f'{m:.0f}' for m in marks)}"
            )
        assert server.stdin is not None
        server.stdin.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
