"""Our generation beside that of peers, on the same weights: interleaved runs, medians and ranges, one table.

    python -m tools.bench_generate folder=MODEL_FOLDER out=bench.json
    python -m tools.bench_generate peers=tools.peer_transformers:factory peer_python=/path/to/python folder=...

`folder` holds a model that `transformers` loads (`pretrain.hf.export_model` writes one). A peer is a function
`factory(folder, prompts, num_new_tokens) -> generate`; `generate()` continues all prompts as one batch, greedily,
by exactly that many tokens, and returns the new ids. Ours is one of them. Nothing of a peer lies in this repository
but the call of it.

Every entrant lives in a process of its own and only one works at a time; turns are interleaved, in one order and
then in the other. Tokens per second count new tokens over the seconds of a whole call, prefill included. Seconds of
processor time stand beside those of the clock: where others use the machine too, they are the fairer measure.
"""

import dataclasses
import importlib
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.config import ConfigError, apply_overrides
from pretrain.hf import HfFolder
from pretrain.origin import origin
from pretrain.rundir import write_json_atomic

OURS = "tools.our_generation:factory"

Generate = Callable[[], list[list[int]]]
Factory = Callable[[str, list[list[int]], int], Generate]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line may say, `key=value`."""

    folder: str
    peers: str = "tools.peer_transformers:factory"  # module:function, separated by commas; empty: ours alone
    peer_python: str = sys.executable  # where the peers' packages are installed
    batch: int = 16
    prompt_tokens: int = 64
    new_tokens: int = 96
    pairs: int = 5
    cores: int = 0  # processors that an entrant may use; 0: all
    out: str = ""  # JSON file
    worker: str = ""  # for the tool itself: the entrant that this process is

    def __post_init__(self):
        faults = [f"a peer must be module:function, got {p!r}" for p in self.factories if p.count(":") != 1]
        if not (Path(self.folder) / "config.json").is_file():
            faults.append(f"folder must hold a model with a config.json, got {self.folder!r}")
        for name in ("batch", "prompt_tokens", "new_tokens", "pairs"):
            if getattr(self, name) < 1:
                faults.append(f"{name} must be at least 1, got {getattr(self, name)}")
        if faults:
            raise ConfigError(*faults)

    @property
    def factories(self) -> list[str]:
        return [OURS, *(p for p in self.peers.split(",") if p)]


def prompts_of(options: Options) -> list[list[int]]:
    """Random ids: the time does not depend on what they say."""
    vocab_size = HfFolder(path=options.folder).vocab_size()
    rng = np.random.default_rng(0)
    return rng.integers(0, vocab_size, (options.batch, options.prompt_tokens)).tolist()


# --- an entrant --------------------------------------------------------------------------------------


def serve(options: Options) -> None:
    """Generate whenever a line comes in; answer with seconds and ids."""
    if options.cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    # Whatever a library prints must not meet the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    module, _, function = options.worker.partition(":")
    factory: Factory = getattr(importlib.import_module(module), function)
    generate = factory(options.folder, json.loads(sys.stdin.readline()), options.new_tokens)
    for _ in sys.stdin:
        clock, processor = time.perf_counter(), _processor_s()
        ids = generate()
        answer = {
            "seconds": time.perf_counter() - clock,
            "processor_s": _processor_s() - processor,
            "ids": ids,
        }
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _processor_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


class Entrant:
    """A process that generates when told to."""

    def __init__(self, name: str, options: Options, prompts: list[list[int]]):
        self.name = name
        python = sys.executable if name == OURS else options.peer_python
        arguments = [
            f"{f.name}={getattr(options, f.name)}" for f in dataclasses.fields(options) if f.name != "worker"
        ]
        root = str(Path(__file__).parent.parent)
        self._process = subprocess.Popen(
            [python, __file__, *arguments, f"worker={name}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": root},
        )
        self._send(json.dumps(prompts))

    def _send(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def run(self) -> dict[str, Any]:
        """One call of `generate`."""
        self._send("run")
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ConfigError(f"{self.name} ended with code {self._process.wait()}; its last words are above")
        return json.loads(line)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


# --- the table ---------------------------------------------------------------------------------------


def compare(options: Options) -> dict[str, Any]:
    """Run all entrants in turn; returns what the JSON file holds."""
    prompts = prompts_of(options)
    entrants = [Entrant(name, options, prompts) for name in options.factories]
    try:
        first = {e.name: e.run() for e in entrants}
        turns: dict[str, list[dict[str, Any]]] = {e.name: [] for e in entrants}
        for pair in range(options.pairs):
            for entrant in entrants if pair % 2 == 0 else entrants[::-1]:
                answer = entrant.run()
                assert answer["ids"] == first[entrant.name]["ids"], f"{entrant.name} does not repeat itself"
                turns[entrant.name].append(answer)
                print(f"{pair + 1}/{options.pairs} {entrant.name}: {answer['seconds']:.2f} s", flush=True)
    finally:
        for entrant in entrants:
            entrant.close()
    tokens = options.batch * options.new_tokens
    ours = np.array(first[OURS]["ids"])
    table = {}
    for name, answers in turns.items():
        table[name] = {
            "tokens_per_second": _spread([tokens / a["seconds"] for a in answers]),
            "tokens_per_processor_second": _spread([tokens / a["processor_s"] for a in answers]),
            "first_call_s": first[name]["seconds"],
            # Greedy texts part for good where two logits are closer than rounding.
            "same_ids_as_ours": float((np.array(first[name]["ids"]) == ours).mean()),
        }
        if name != OURS:
            pairs = list(zip(turns[OURS], answers, strict=True))
            table[name]["our_speed"] = _spread([b["seconds"] / a["seconds"] for a, b in pairs])
            table[name]["our_processor_speed"] = _spread(
                [b["processor_s"] / a["processor_s"] for a, b in pairs]
            )
    return {"options": dataclasses.asdict(options), "origin": origin(), "entrants": table}


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "greatest": max(values)}


def _text(results: dict[str, Any]) -> str:
    o = results["options"]
    lines = [
        f"batch {o['batch']}, prompts of {o['prompt_tokens']}, {o['new_tokens']} new tokens, float32, greedy"
    ]
    for name, entry in results["entrants"].items():
        speed, processor = entry["tokens_per_second"], entry["tokens_per_processor_second"]
        lines.append(
            f"{name}: {speed['median']:.1f} tokens/s [{speed['least']:.1f}, {speed['greatest']:.1f}], "
            f"{processor['median']:.1f} a processor second [{processor['least']:.1f}, {processor['greatest']:.1f}], "
            f"first call {entry['first_call_s']:.1f} s, same ids as ours {entry['same_ids_as_ours']:.1%}"
        )
        if "our_speed" in entry:
            ratio, processor = entry["our_speed"], entry["our_processor_speed"]
            lines.append(
                f"  ours is {ratio['median']:.2f} times as fast [{ratio['least']:.2f}, {ratio['greatest']:.2f}], "
                f"by processor time {processor['median']:.2f} [{processor['least']:.2f}, {processor['greatest']:.2f}]"
            )
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Exit code 2: bad input."""
    try:
        given = dict(argument.partition("=")[::2] for argument in argv)
        options = apply_overrides(Options(folder=given.get("folder", "")), argv)
        if options.worker:
            serve(options)
            return 0
        results = compare(options)
    except ConfigError as error:
        for fault in error.faults:
            print(f"error: {fault}", file=sys.stderr)
        return 2
    print(_text(results))
    if options.out:
        write_json_atomic(options.out, results)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
