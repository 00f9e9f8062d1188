"""`python -m pretrain.evaluate --config FILE key=value ...`: a model on evaluation tasks, with intervals.

    <workdir>/<config>/<fingerprint8>/<parameters8>/<task>.json     one a task, written when it is done
                                                    results.json    the table, and the comparison with `base`

A task that has its file is not computed again, so a killed evaluation goes on where it was. Another config is another
folder, and so are other parameters: a checkpoint folder that has grown is evaluated anew. A file states what was asked
in it, and is computed anew when that has changed: the path of a data folder says nothing about what lies there. With
`corpus`, the items that stand in a training corpus are counted first, and named in results.json.
"""

import collections
import dataclasses
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from pretrain import config as config_lib
from pretrain.allocator import keep_heap
from pretrain.checkpoint import AllCheckpointsBad, NoCheckpoint, params_sha256
from pretrain.config import ConfigError, apply_overrides, load_config, local, parse_argv
from pretrain.data.source import BadRecord, JsonlConfig, TextDocument
from pretrain.evals.choice import score_choices
from pretrain.evals.contamination import Contamination, find_contamination
from pretrain.evals.interval import Estimate, mean_interval, paired_difference, ratio_interval
from pretrain.evals.last_word import score_last_words
from pretrain.evals.likelihood import passage_scores
from pretrain.evals.qa import answer_questions
from pretrain.evals.scored_model import ScoredModel, load_scored_model
from pretrain.evals.tasks import (
    Choice,
    Item,
    Judge,
    LastWord,
    Passage,
    Question,
    Task,
    choose_items,
    few_shot_prefix,
)
from pretrain.pretrained import Pretrained
from pretrain.rundir import RunDir, write_json_atomic
from pretrain.sharding import MeshConfig

_REPORT_EVERY_S = 20.0
# Raised when other metrics, or the same ones in another way, are made of the same items.
_SCORING = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What is scored, on what.

    model, base: a checkpoint folder, a model folder, or another Pretrained; with `base` every score is compared with
    its own, item by item. bos: whether texts begin with the token that begins a text; none is as the tokenizer of
    `model` asks, and for checkpoints of ours yes, since that is how they were trained. The base reads the same texts.
    only: names of the tasks to run. corpus: JSONL files of texts, by their path or a glob, absolute or below
    data_root, in which the items are looked for; see evals/contamination.py.
    """

    model: str | Pretrained
    tasks: tuple[Any, ...]
    base: str | Pretrained | None = None
    only: tuple[str, ...] = local(())
    data_root: str = local("")
    corpus: str = local("")
    max_items: int | None = None
    num_shots: int = 0
    seed: int = 0
    bos: bool | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    row_length: int = 512
    batch_rows: int = local(8)
    max_new_tokens: int = 24
    workdir: str = local("runs")
    mesh: MeshConfig = local(MeshConfig())

    def __post_init__(self):
        faults = []
        names = [task.name for task in self.tasks]
        if not names:
            faults.append("tasks must name at least one task, got none")
        for name in sorted({name for name in names if names.count(name) > 1}):
            faults.append(f"tasks must have different names, got {name!r} more than once")
        for name in self.only:
            if name not in names:
                faults.append(f"only must name tasks of the config ({', '.join(names)}), got {name!r}")
        for field, least in (("row_length", 2), ("batch_rows", 1), ("max_new_tokens", 1), ("num_shots", 0)):
            if getattr(self, field) < least:
                faults.append(f"{field} must be at least {least}, got {getattr(self, field)}")
        if self.max_items is not None and self.max_items < 1:
            faults.append(f"max_items must be at least 1 or none, got {self.max_items}")
        if faults:
            raise ConfigError(*faults)

    def run(self, *, name: str) -> Mapping[str, Any]:
        """See `evaluate`."""
        return evaluate(self, name=name)


class Evaluation(Protocol):
    """What a config of this verb returns: `EvaluateConfig`, and `LmEvalConfig` of lm_eval_bridge.py."""

    def run(self, *, name: str) -> Mapping[str, Any]: ...


# Per-item results of a task: id and metrics, and for passages the nats and bytes of each.
Records = list[dict[str, Any]]


def evaluate(config: EvaluateConfig, *, name: str) -> dict[str, Any]:
    """Score the model (and the base) on every task; print the table; return what results.json holds.

    Raises:
      ConfigError: a task's file or the model cannot be read, or a prompt does not fit a row.
      NoCheckpoint, AllCheckpointsBad: see checkpoint.py.
    """
    tasks = [task for task in config.tasks if not config.only or task.name in config.only]
    items = {
        task.name: choose_items(task.items(config.data_root), config.max_items, config.seed) for task in tasks
    }
    empty = [name for name, found in items.items() if not found]
    if empty:
        raise ConfigError(
            *[f"task {name} must have items, got none below {config.data_root!r}" for name in empty]
        )
    contamination = _contamination(config, items) if config.corpus else {}
    run = RunDir(Path(config.workdir) / name / config_lib.fingerprint(config)[:8])
    run.create()
    with run.lock():
        write_json_atomic(run.config_json, config_lib.to_json(config))
        records, bos = _all_records(config, config.model, config.bos, run.root, tasks, items)
        base = None
        if config.base is not None:
            base, _ = _all_records(config, config.base, bos, run.root, tasks, items)
        results: dict[str, Any] = {"bos": bos, "tasks": {}}
        for task in tasks:
            entry = {"version": task.version, "metrics": _summary(records[task.name], config.seed)}
            own = _judged(config, task, records[task.name])
            entry["metrics"] |= own
            if base is not None:
                own_base = _judged(config, task, base[task.name])
                entry["base"] = _summary(base[task.name], config.seed) | own_base
                entry["change"] = _changes(base[task.name], records[task.name], config.seed) | {
                    name: _whole(own[name]["value"] - own_base[name]["value"], own[name]["items"])
                    for name in own
                }
            if task.name in contamination:
                entry["contamination"] = dataclasses.asdict(contamination[task.name])
            results["tasks"][task.name] = entry
        results["config"] = config_lib.to_json(config)
        write_json_atomic(run.root / "results.json", results)
    print(table_text(results))
    return results


def _contamination(config: EvaluateConfig, items: Mapping[str, Sequence[Item]]) -> dict[str, Contamination]:
    """The items that stand in the corpus; says how many, before any score is made."""
    source = JsonlConfig(name="corpus", path=config.corpus, on_bad_record="count").build(config.data_root)
    counts = collections.Counter[str]()

    def texts() -> Iterator[tuple[str, str]]:
        for document in source.documents():
            counts[type(document).__name__] += 1
            if isinstance(document, TextDocument):
                yield document.id, document.text

    report = find_contamination(items, texts())
    read, bad = counts[TextDocument.__name__], counts[BadRecord.__name__]
    if not read:
        raise ConfigError(
            f"corpus must hold texts under the key 'text', got none in {config.corpus} ({bad} other records)"
        )
    print(f"corpus {config.corpus}: {read:,} texts" + (f", {bad:,} records without one" if bad else ""))
    for name, of_task in report.items():
        print(
            f"{name:18} {len(of_task.found):,} of {of_task.items - of_task.too_short:,} items stand in the corpus"
            + (f"; {of_task.too_short:,} are too short to tell" if of_task.too_short else "")
        )
    return report


def _all_records(
    config: EvaluateConfig,
    source: str | Pretrained,
    bos: bool | None,
    root: Path,
    tasks: Sequence[Task],
    items: Mapping[str, list[Item]],
) -> tuple[dict[str, Records], bool]:
    """The records of every task, and whether its texts began with bos."""
    loaded = load_scored_model(
        source, dtype=config.dtype, bos=bos, row_length=config.row_length, batch_rows=config.batch_rows,
        mesh=config.mesh,
    )  # fmt: skip
    sha256 = params_sha256(loaded.params)
    folder = root / sha256[:8]
    folder.mkdir(exist_ok=True)
    found = {}
    for task in tasks:
        path = folder / f"{task.name}.json"
        prefix = few_shot_prefix(task, config.data_root, config.num_shots, config.seed)
        asked = _asked_sha256(loaded, task, items[task.name], prefix)
        if path.exists():
            stored = json.loads(path.read_text())
            if stored.get("asked_sha256") == asked:
                found[task.name] = stored["records"]
                continue
            print(
                f"{task.name}: scored anew, {path} holds scores of other items, prompts or another tokenizer",
                file=sys.stderr,
                flush=True,
            )
        began = time.monotonic()
        records = _records(config, loaded, task.name, items[task.name], prefix)
        stored = {
            "version": task.version,
            "asked_sha256": asked,
            "model": str(source),
            "parameters_sha256": sha256,
            "seconds": time.monotonic() - began,
            "records": records,
        }
        write_json_atomic(path, stored)
        found[task.name] = records
    return found, loaded.add_bos


def _asked_sha256(loaded: ScoredModel, task: Task, items: Sequence[Item], prefix: str) -> str:
    """Hash of all that decides a task's records besides the config and the parameters."""
    asked = {
        "scoring": _SCORING,
        "version": task.version,
        "items": [[type(item).__name__, dataclasses.asdict(item)] for item in items],
        "prefix": prefix,
        "tokenizer": loaded.tokenizer.sha256,
        "add_bos": loaded.add_bos,
        "model": config_lib.to_json(loaded.model),
    }
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def _records(
    config: EvaluateConfig, loaded: ScoredModel, name: str, items: Sequence[Item], prefix: str
) -> Records:
    """What came of every item; all items of a task are of one kind."""
    scorer = loaded.scorer(_progress(name))
    how = {"prefix": prefix, "add_bos": loaded.add_bos}
    results: Sequence[Any]
    match items[0]:
        case Choice():
            results = score_choices(scorer, loaded.tokenizer, _only(items, Choice), **how)
        case LastWord():
            results = score_last_words(scorer, loaded.tokenizer, _only(items, LastWord), **how)
        case Question():
            results = answer_questions(
                loaded.generator(),
                loaded.tokenizer,
                _only(items, Question),
                **how,
                max_new_tokens=config.max_new_tokens,
            )
        case Passage():
            passages = _only(items, Passage)
            scores = passage_scores(scorer, loaded.tokenizer, [p.text for p in passages], config.row_length)
            return [
                {"id": passage.id, "nats": -score, "bytes": len(passage.text.encode())}
                for passage, score in zip(passages, scores, strict=True)
            ]
    return [{**_plain(result), "metrics": result.metrics} for result in results]


def _only(items: Sequence[Item], kind: type) -> list[Any]:
    assert all(isinstance(item, kind) for item in items), "a task has items of one kind"
    return list(items)


def _plain(result: Any) -> dict[str, Any]:
    return dataclasses.asdict(result)


def _progress(name: str) -> Callable[[int, int], None]:
    began = last = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _REPORT_EVERY_S or done == total:
            last = now
            rate = done / max(now - began, 1e-9)
            print(f"{name}: {done:,} of {total:,} tokens, {rate:,.0f} tokens/s", file=sys.stderr, flush=True)

    return report


def _metric_names(records: Records) -> list[str]:
    return ["bits_per_byte"] if "nats" in records[0] else list(records[0]["metrics"])


def _summary(records: Records, seed: int) -> dict[str, Any]:
    if "nats" in records[0]:
        bits = [record["nats"] / math.log(2) for record in records]
        return {"bits_per_byte": _json(ratio_interval(bits, [record["bytes"] for record in records], seed))}
    return {
        name: _json(mean_interval([record["metrics"][name] for record in records], seed))
        for name in _metric_names(records)
    }


def _changes(before: Records, after: Records, seed: int) -> dict[str, Any]:
    """Model minus base, paired by item."""
    assert [r["id"] for r in before] == [r["id"] for r in after], "both models are scored on the same items"
    if "nats" in after[0]:
        bits = [(a["nats"] - b["nats"]) / math.log(2) for a, b in zip(after, before, strict=True)]
        return {"bits_per_byte": _json(ratio_interval(bits, [a["bytes"] for a in after], seed))}
    return {
        name: _json(
            paired_difference([b["metrics"][name] for b in before], [a["metrics"][name] for a in after], seed)
        )
        for name in _metric_names(after)
    }


def _judged(config: EvaluateConfig, task: Task, records: Records) -> dict[str, Any]:
    """The metrics of a task that judges all answers together, which leaves nothing to resample."""
    if not isinstance(task, Judge) or "answer" not in records[0]:
        return {}
    values = task.judge(config.data_root, {record["id"]: record["answer"] for record in records})
    return {name: _whole(value, len(records)) for name, value in values.items()}


def _whole(value: float, items: int) -> dict[str, Any]:
    return {"value": value, "low": None, "high": None, "items": items}


def _json(estimate: Estimate) -> dict[str, Any]:
    low, high = estimate.interval or (None, None)
    return {"value": estimate.value, "low": low, "high": high, "items": estimate.items}


def table_text(results: Mapping[str, Any]) -> str:
    """A line a metric: value with its 95% interval where there is one, and with a base its value and the change."""
    lines = []
    for task, entry in results["tasks"].items():
        for metric, e in entry["metrics"].items():
            line = f"{task + ' v' + str(entry['version']):18} {metric:18} {e['value']:8.4f} {_range(e, '')}  n={e['items']}"
            if "change" in entry:
                c = entry["change"][metric]
                line += (
                    f"   base {entry['base'][metric]['value']:.4f}, change {c['value']:+.4f} {_range(c, '+')}"
                )
            lines.append(line)
    return "\n".join(lines)


def _range(entry: Mapping[str, Any], sign: str) -> str:
    if entry["low"] is None:
        return "[no interval]"
    return f"[{entry['low']:{sign}.4f}, {entry['high']:{sign}.4f}]"


def main(argv: Sequence[str]) -> int:
    """Run one evaluation; the return value is the process' exit code (2: bad input)."""
    keep_heap()
    try:
        path, overrides = parse_argv(argv)
        config = apply_overrides(load_config(path), overrides)
        if not hasattr(config, "run") or not hasattr(config, "tasks"):
            raise ConfigError(
                f"{path} must return an EvaluateConfig for pretrain.evaluate, got {type(config).__name__}"
            )
        evaluation: Evaluation = config
        evaluation.run(name=Path(path).stem)
        return 0
    except ConfigError as error:
        for fault in error.faults:
            print(f"error: {fault}", file=sys.stderr)
        return 2
    except (NoCheckpoint, AllCheckpointsBad) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
