"""EleutherAI's lm-evaluation-harness drives a model of ours (extra `[harness]`; a config imports this file).

The harness brings the tasks, the prompts and the metrics; the model answers its three kinds of requests:
log-likelihoods of continuations, of whole texts, and greedy or sampled text until a stop string.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import lm_eval
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from pretrain import config as config_lib
from pretrain.config import ConfigError, local
from pretrain.evals.likelihood import Scorer, continuation_scores, passage_scores
from pretrain.evals.scored_model import ScoredModel, load_scored_model
from pretrain.evals.tasks import Choice, Item, LastWord, Task, choose_items
from pretrain.generate import Generator, Request
from pretrain.pretrained import Pretrained
from pretrain.rundir import RunDir, write_atomic, write_json_atomic
from pretrain.sharding import MeshConfig
from pretrain.tokenizer import Tokenizer


class HarnessModel(LM):
    """A model of ours as the harness asks for it."""

    def __init__(
        self, scorer: Scorer, generator: Generator, tokenizer: Tokenizer, *, add_bos: bool, row_length: int
    ):
        super().__init__()
        self._scorer, self._generator, self._words = scorer, generator, tokenizer
        self._add_bos, self._row_length = add_bos, row_length

    @property
    def tokenizer_name(self) -> str:
        """Part of the key under which the harness keeps requests."""
        return self._words.sha256[:12]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """(log-probability, whether greedy decoding gives it) of each continuation after its context."""
        return continuation_scores(self._scorer, self._words, [r.args for r in requests], self._add_bos)

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """The log-probability of each whole text."""
        texts = [r.args[0] for r in requests]
        return passage_scores(self._scorer, self._words, texts, self._row_length)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """A text for each (prompt, settings): until one of its stop strings, or its number of tokens."""
        begin = [self._words.bos_id] if self._add_bos else []
        asked = []
        for number, request in enumerate(requests):
            prompt, settings = request.args
            until = settings.get("until") or []
            length = int(settings.get("max_gen_toks", 256))
            ids = begin + self._words.encode(prompt)
            # As other models of the harness do: a prompt that is too long loses its beginning.
            ids = ids[-max(1, self._generator.config.max_length - length) :]
            asked.append(
                Request(
                    ids=tuple(ids),
                    max_new_tokens=length,
                    temperature=float(settings.get("temperature", 0.0)) if settings.get("do_sample") else 0.0,
                    top_p=float(settings.get("top_p", 1.0)),
                    stop=(until,) if isinstance(until, str) else tuple(u for u in until if u),
                    stop_ids=(self._words.eos_id,),
                    seed=number,
                )
            )
        return [completion.text for completion in self._generator.generate(asked)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LmEvalConfig:
    """Tasks of the harness on a model of ours.

    tasks: names that the harness knows (it fetches their data sets from the hub), and tasks of evals/tasks.py, which
    are handed to it with their own items and prompts.
    """

    model: str | Pretrained
    tasks: tuple[Any, ...]
    data_root: str = local("")
    seed: int = 0
    max_items: int | None = None
    num_shots: int | None = None
    bos: bool | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    row_length: int = 1024
    batch_rows: int = local(8)
    workdir: str = local("runs")
    mesh: MeshConfig = local(MeshConfig())

    def __post_init__(self):
        if not self.tasks:
            raise ConfigError("tasks must name at least one task, got none")

    def run(self, *, name: str) -> Mapping[str, Any]:
        """Score the model on the tasks, print the harness' table, write results.json."""
        manager = TaskManager()
        known = set(manager.all_tasks)
        unknown = [task for task in self.tasks if isinstance(task, str) and task not in known]
        if unknown:
            raise ConfigError(
                f"tasks must be known to the harness, got {', '.join(unknown)}; see its own list"
            )
        run = RunDir(Path(self.workdir) / name / config_lib.fingerprint(self)[:8])
        run.create()
        with run.lock():
            write_json_atomic(run.config_json, config_lib.to_json(self))
            model = load_scored_model(
                self.model, dtype=self.dtype, bos=self.bos, row_length=self.row_length, batch_rows=self.batch_rows,
                mesh=self.mesh,
            )  # fmt: skip
            found = lm_eval.simple_evaluate(
                model=harness_model(model),
                tasks=[t if isinstance(t, str) else self._handed_over(t, run.root) for t in self.tasks],
                task_manager=manager,
                limit=self.max_items,
                num_fewshot=self.num_shots,
                log_samples=False,
                bootstrap_iters=1000,
            )
            assert found is not None
            results = {"results": found["results"], "versions": found["versions"]}
            write_json_atomic(run.root / "results.json", results)
        for task, metrics in results["results"].items():
            for metric, value in metrics.items():
                if isinstance(value, float):
                    print(f"{task:24} {metric:28} {value:.4f}")
        return results

    def _handed_over(self, task: Task, folder: Path) -> dict[str, Any]:
        """A task of ours as the harness' own kind of config, its items in a file."""
        items = choose_items(task.items(self.data_root), self.max_items, self.seed)
        path = folder / f"{task.name}.jsonl"
        write_atomic(path, "".join(json.dumps(_document(item)) + "\n" for item in items))
        return {
            "task": f"local_{task.name}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(path.absolute())}},
            "test_split": "test",
            "metadata": {"version": task.version},
            **_form(items),
        }


def _document(item: Item) -> dict[str, Any]:
    """An item as the harness keeps it: without the blank before a continuation, which its normalized metric leaves out."""
    match item:
        case Choice() if len(set(item.contexts)) == 1:
            options = [_without_blank(text) for text in item.continuations]
            return {"text": item.contexts[0], "options": options, "target": item.gold}
        case Choice():
            return {
                "text": item.gold,
                "options": item.contexts,
                "target": _without_blank(item.continuations[0]),
            }
        case LastWord():
            # Here the harness joins the two without the delimiter.
            return {"text": item.context, "target": item.word}
    raise ConfigError(f"the harness is handed choices and last words, got {type(item).__name__}")


def _without_blank(continuation: str) -> str:
    if not continuation.startswith(" "):
        raise ConfigError(f"a continuation must begin with a blank for the harness, got {continuation!r}")
    return continuation[1:]


def _form(items: Sequence[Item]) -> dict[str, Any]:
    """How the harness reads such documents. Where contexts differ, its text is the index of the right one."""
    metrics = [{"metric": "acc"}]
    form: dict[str, Any] = {
        "doc_to_text": "text",
        "doc_to_target": "target",
        "target_delimiter": " ",
        "metric_list": metrics,
    }
    if isinstance(items[0], LastWord):
        return {**form, "output_type": "loglikelihood", "target_delimiter": ""}
    if isinstance(items[0], Choice) and len(set(items[0].contexts)) == 1:
        metrics.append({"metric": "acc_norm"})
    return {**form, "output_type": "multiple_choice", "doc_to_choice": "options"}


def harness_model(model: ScoredModel) -> HarnessModel:
    """The harness' view of a loaded model."""
    return HarnessModel(
        model.scorer(), model.generator(), model.tokenizer, add_bos=model.add_bos, row_length=model.row_length
    )
