"""`python -m pretrain.sample --config FILE key=value ...`: texts from a model, for a file of prompts.

    output                 one JSON line for each prompt and sample, in the order of the prompts
    output.part            lines that are done while the job runs, in the order in which they ended

A killed job goes on from `output.part` with the same command; a part of another job is refused. `output` appears
whole or not at all.
"""

import dataclasses
import hashlib
import importlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from pretrain.allocator import keep_heap
from pretrain.checkpoint import AllCheckpointsBad, NoCheckpoint, params_sha256
from pretrain.config import (
    ConfigError,
    apply_overrides,
    fingerprint,
    load_config,
    local,
    parse_argv,
    stable_seed,
)
from pretrain.draw import draw_faults
from pretrain.generate import Completion, GenerateConfig, Generator, Progress, Request
from pretrain.pretrained import Pretrained, begins_with_bos, open_pretrained
from pretrain.rundir import storage_errors, write_atomic
from pretrain.sharding import MeshConfig, make_mesh

_REPORT_EVERY_S = 5.0
# What the output says of a sample, beside the fields of its prompt.
_OWN_FIELDS = ("sample", "text", "finish", "prompt_tokens", "new_tokens", "logprob")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleJob:
    """Texts to sample.

    model: a run folder, a checkpoint folder, a model folder, or another Pretrained. prompts, prompts_file: texts,
    and a JSONL file with a `prompt` in each line (its other fields are copied to the output, so they may not have the
    names of the output's own). bos: whether prompts
    begin with the token that begins a text; none is as the tokenizer asks, and for checkpoints of ours yes.
    end_at_eos: whether the token that ends a text ends the sample. The seed of a sample is derived from `seed`, the
    index of its prompt and its own: no sample depends on the others.
    """

    model: str | Pretrained
    output: str = local()
    prompts: tuple[str, ...] = ()
    prompts_file: str = ""
    samples_per_prompt: int = 1
    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    end_at_eos: bool = True
    bos: bool | None = None
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    generate: GenerateConfig = GenerateConfig(max_length=1024)
    mesh: MeshConfig = local(MeshConfig())

    def __post_init__(self):
        faults = draw_faults(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
        )
        if bool(self.prompts) == bool(self.prompts_file):
            faults.append("prompts come from exactly one of prompts and prompts_file; set one of them")
        for name in ("samples_per_prompt", "max_new_tokens"):
            if getattr(self, name) < 1:
                faults.append(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.output:
            faults.append("output must name the JSONL file to write, got nothing")
        if faults:
            raise ConfigError(*faults)


def sample(job: SampleJob, *, report: Callable[[Progress], None] | None = None) -> Path:
    """Write the samples of `job`; returns the path of the output. `report` replaces the printed progress.

    Raises:
      ConfigError: bad prompts, a model that cannot be read, an output that cannot be written, or a part of another job.
      NoCheckpoint, AllCheckpointsBad: see checkpoint.py.
    """
    output, part = Path(job.output), Path(f"{job.output}.part")
    if output.exists():
        raise ConfigError(f"output must not exist yet, got {output}; remove it or name another file")
    records = _records(job)
    generator, add_bos, sha256 = _open(job)
    keys = [(i, j) for i in range(len(records)) for j in range(job.samples_per_prompt)]
    all_requests = dict(zip(keys, _requests(job, records, generator, add_bos, keys), strict=True))
    # A part belongs to these settings, these prompts and these parameters.
    identity = hashlib.sha256(json.dumps([fingerprint(job), records, sha256]).encode()).hexdigest()
    done = _read_part(part, identity)
    missing = [key for key in keys if key not in done]
    completions = generator.stream(
        [all_requests[key] for key in missing], report=report or _printed(len(done))
    )
    with storage_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "a", encoding="utf-8") as file:
            if not done:
                _write_line(file, {"job": identity})
            for index, completion in completions:
                i, j = key = missing[index]
                done[key] = _line(records[i], j, all_requests[key], completion)
                _write_line(file, {"key": key, "line": done[key]})
        write_atomic(output, "".join(json.dumps(done[key], ensure_ascii=False) + "\n" for key in keys))
        part.unlink(missing_ok=True)
    print(f"{len(keys)} samples in {output}")
    return output


def _records(job: SampleJob) -> list[dict[str, Any]]:
    """One mapping with a `prompt` for each prompt."""
    if job.prompts:
        return [{"prompt": prompt} for prompt in job.prompts]
    path = Path(job.prompts_file)
    try:
        # Not splitlines: a text may hold other line ends, such as U+2028.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"prompts_file must be a readable text file, got {path}: {error}") from error
    records, faults = [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record["prompt"], str):
                raise ValueError("prompt is not a text")
            taken = [name for name in _OWN_FIELDS if name in record]
            if taken:
                raise ValueError(f"the output has fields {', '.join(taken)} of its own; rename them")
        except (ValueError, KeyError, TypeError) as error:
            faults.append(f"{path}:{number} must be a JSON object with a prompt, got {line[:60]!r} ({error})")
            continue
        records.append(record)
    if not records and not faults:
        faults.append(f"prompts_file must hold at least one prompt, got none in {path}")
    if faults:
        raise ConfigError(*faults[:20])
    return records


def _open(job: SampleJob) -> tuple[Generator, bool, str]:
    """The model ready to generate, whether its prompts begin with bos, the hash of its parameters."""
    source = open_pretrained(job.model) if isinstance(job.model, str) else job.model
    model = dataclasses.replace(source.model_config(), dtype=job.dtype)
    tokenizer = source.tokenizer()
    mesh = make_mesh(job.mesh)
    add_bos = begins_with_bos(source, tokenizer) if job.bos is None else job.bos
    params = source.params(model, None if mesh.size == 1 else mesh)
    return (
        Generator(params, model, job.generate, tokenizer=tokenizer, mesh=mesh),
        add_bos,
        params_sha256(params),
    )


def _requests(
    job: SampleJob,
    records: Sequence[dict[str, Any]],
    generator: Generator,
    add_bos: bool,
    keys: Sequence[tuple[int, int]],
) -> list[Request]:
    tokenizer = generator.tokenizer
    assert tokenizer is not None
    ids_of = [
        (tokenizer.bos_id,) * add_bos + tuple(ids)
        for ids in tokenizer.encode_batch([r["prompt"] for r in records])
    ]
    longest = job.generate.max_length - job.max_new_tokens
    faults = [f"prompt {i} must hold at least one token, got {records[i]['prompt']!r}; set bos=true"
              for i, ids in enumerate(ids_of) if not ids]  # fmt: skip
    faults += [
        f"prompt {i} must fit generate.max_length={job.generate.max_length} with its max_new_tokens="
        f"{job.max_new_tokens}, got {len(ids)} tokens; shorten it or raise generate.max_length"
        for i, ids in enumerate(ids_of)
        if len(ids) > longest
    ]
    if faults:
        raise ConfigError(*faults[:20])
    return [
        Request(
            ids=ids_of[i],
            max_new_tokens=job.max_new_tokens,
            temperature=job.temperature,
            top_k=job.top_k,
            top_p=job.top_p,
            min_p=job.min_p,
            repetition_penalty=job.repetition_penalty,
            stop_ids=(tokenizer.eos_id,) if job.end_at_eos else (),
            stop=job.stop,
            seed=stable_seed(job.seed, i, j),
        )
        for i, j in keys
    ]


def _line(
    record: dict[str, Any], sample_index: int, request: Request, completion: Completion
) -> dict[str, Any]:
    """What the output says about one sample."""
    own = {
        "sample": sample_index,
        "text": completion.text,
        "finish": completion.finish,
        "prompt_tokens": len(request.ids),
        "new_tokens": len(completion.ids),
        "logprob": sum(completion.logprobs),
    }
    assert tuple(own) == _OWN_FIELDS, tuple(own)
    return {**record, **own}


def _read_part(path: Path, identity: str) -> dict[tuple[int, int], dict[str, Any]]:
    """The samples that a killed run of the same job left; a last line that was cut is removed."""
    if not path.exists():
        return {}
    whole = path.read_bytes()
    whole = whole[: whole.rfind(b"\n") + 1]
    try:
        lines = [json.loads(line) for line in whole.splitlines()]
        owner = lines[0]["job"] if lines else identity
        done = {(line["key"][0], line["key"][1]): line["line"] for line in lines[1:]}
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is damaged ({error!r}); remove it to start anew") from error
    if owner != identity:
        raise ConfigError(
            f"{path} is of a job with other settings, prompts or parameters; remove it to start anew, or name another output"
        )
    if done:
        write_atomic(path, whole)
    else:
        path.unlink()
    return done


def _write_line(file: Any, value: dict[str, Any]) -> None:
    file.write(json.dumps(value, ensure_ascii=False) + "\n")
    file.flush()
    os.fsync(file.fileno())


def _printed(done_before: int) -> Callable[[Progress], None]:
    """Prints a line now and then, and the last."""
    printed_s = -math.inf

    def report(progress: Progress) -> None:
        nonlocal printed_s
        now_s = time.monotonic()
        if now_s - printed_s < _REPORT_EVERY_S and progress.done < progress.total:
            return
        printed_s = now_s
        print(
            f"{done_before + progress.done}/{done_before + progress.total} samples  {progress.new_tokens:,} tokens  "
            f"{progress.tokens_per_second:,.0f} tokens/s",
            flush=True,
        )

    return report


def main(argv: Sequence[str]) -> int:
    """Run one job; the return value is the process' exit code (2: bad input)."""
    keep_heap()
    try:
        path, overrides = parse_argv(argv)
        job = apply_overrides(load_config(path), overrides)
        if not isinstance(job, SampleJob):
            raise ConfigError(f"{path} must return a SampleJob for pretrain.sample, got {type(job).__name__}")
        sample(job)
    except ConfigError as error:
        for fault in error.faults:
            print(f"error: {fault}", file=sys.stderr)
        return 2
    except (NoCheckpoint, AllCheckpointsBad) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    # A config names this module as pretrain.sample; run as a script it would have classes of its own.
    sys.exit(importlib.import_module("pretrain.sample").main(sys.argv[1:]))
