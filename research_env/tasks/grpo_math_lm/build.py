"""The paper's post-training environment on this repository's trainer: `python -m research_env.tasks.grpo_math_lm.build TARGET key=value`

GRPO on mathematics problems, 20 steps on one accelerator in at most an hour (arXiv 2601.14525, section 2). The paper's model and
problems are `model=` a folder of Qwen2.5-Math-1.5B and `train=`, `heldout=` files of MATH; a model of a few hundred thousand
parameters and sums of two numbers are the same codebase with other settings. Unlike there the held-out problems are
behind the lock, and the judge answers them with its own copy of the sampler.

Tested on a CPU with a tiny model; of the paper's only the shapes were checked. It has not been run on an accelerator.

  model=         a run folder, or a model folder with config.json and model.safetensors
  train=, heldout=, final=   lines of JSON with a question and an answer, plain or compressed; final is the last split
  question_key=, answer_key=, template=, place=   see QuestionFileConfig and ExpressionReward; "\\n" in template is a new line
  stop=          a text that ends an answer, beside the model's end token
  heldout_problems=, practice_problems=   how many the judge asks, and how many of `train` a run keeps to look at itself
  max_prompt_tokens=, max_new_tokens=, dtype=   sizes that no change may move
  prompts=, samples=, microbatches=, slots=, learning_rate=   where the recipe starts
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from pretrain import config as pretrain_config
from pretrain.checkpoint import AllCheckpointsBad, NoCheckpoint
from pretrain.config import ConfigError
from pretrain.hf import export_model
from pretrain.pretrained import Pretrained, open_pretrained
from pretrain.rl.problem import Problem, QuestionFileConfig
from pretrain.rl.reward import ExpressionReward
from pretrain.rl.rollout import encode_prompt
from pretrain.tokenizer import Tokenizer
from research_env.words import read_words, refuse

FILES = Path(__file__).parent / "files"
OPTIONS = {
    "model": "", "train": "", "heldout": "", "final": "", "question_key": "problem", "answer_key": "answer",
    "template": r"{question}\nPlease reason step by step, and put your final answer within \boxed{}.\n", "place": "boxed",
    "stop": "", "heldout_problems": "200", "practice_problems": "32", "max_prompt_tokens": "512", "max_new_tokens": "1024",
    "dtype": "bfloat16", "prompts": "64", "samples": "8", "microbatches": "64", "slots": "256", "learning_rate": "1e-06",
}  # fmt: skip
_NUMBERS = (
    "heldout_problems", "practice_problems", "max_prompt_tokens", "max_new_tokens", "prompts", "samples", "microbatches", "slots",
)  # fmt: skip
# What the recipe says, as the files have it.
_RECIPE = {
    "prompts": "PROMPTS = ", "samples": "SAMPLES = ", "microbatches": "MICROBATCHES = ", "slots": "SLOTS = ",
    "learning_rate": "peak_lr=",
}  # fmt: skip


def main(argv: list[str]) -> int:
    """Write the codebase; exit code 2 and one line for each fault, with nothing written."""
    words = read_words(argv, OPTIONS, "TARGET")
    options, faults = words.options, words.faults
    faults += [f"{name}= must be given" for name in ("model", "train", "heldout") if not options[name]]
    faults += [
        f"{name}= must be a positive whole number, got {options[name]!r}"
        for name in _NUMBERS
        if not options[name].isdecimal() or int(options[name]) < 1
    ]
    if options["dtype"] not in ("float32", "bfloat16"):
        faults.append(f"dtype= must be float32 or bfloat16, got {options['dtype']!r}")
    try:
        if not 0 < float(options["learning_rate"]) < 1:
            raise ValueError
    except ValueError:
        faults.append(f"learning_rate= must be a number in (0, 1), got {options['learning_rate']!r}")
    if not faults:
        try:
            build(words.folders[0], options)
        except ConfigError as error:
            faults += error.faults
        except (NoCheckpoint, AllCheckpointsBad) as error:
            faults.append(str(error))
    if faults:
        return refuse(faults)
    print(f"codebase={words.folders[0]} is ready")
    return 0


def build(target: Path, options: dict[str, str]) -> None:
    """The trainer and the recipe as the tree, model and problems in data/, what the judge has in locked/ and final/.

    Raises:
      ConfigError, NoCheckpoint, AllCheckpointsBad: no such model or problems, or problems that are in two parts or too long.
    """
    source = open_pretrained(options["model"])
    settings = {
        "template": options["template"].replace("\\n", "\n"),
        "place": options["place"],
        "stop": [options["stop"].replace("\\n", "\n")] if options["stop"] else [],
        "max_prompt_tokens": int(options["max_prompt_tokens"]),
        "max_new_tokens": int(options["max_new_tokens"]),
        "dtype": options["dtype"],
    }
    parts = _parts(source, options, settings)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as building:
        tree = Path(building) / "tree"
        shutil.copytree(FILES, tree, ignore=shutil.ignore_patterns("__pycache__"))
        for folder in (tree, tree / "locked"):
            shutil.copytree(
                Path(pretrain_config.__file__).parent, folder / "pretrain", ignore=shutil.ignore_patterns("__pycache__", ".*")
            )  # fmt: skip
            (folder / "settings.json").write_text(json.dumps(settings, indent=2) + "\n")
        _set_recipe(tree / "recipe.py", options)
        (tree / "data").mkdir()
        for name, problems in parts.items():
            (tree / name).parent.mkdir(exist_ok=True)
            lines = [json.dumps({"question": q, "answer": a}) + "\n" for q, a in problems]
            (tree / name).write_text("".join(lines))
        model = source.model_config()
        start = export_model(
            tree / "data" / "start", source.params(model), model, source.tokenizer(),
            dtype="float32" if options["dtype"] == "float32" else "bfloat16",
            stated=source.stated(), max_file_bytes=1 << 40,
        )  # fmt: skip
        shutil.copytree(start, tree / "locked" / "start", ignore=shutil.ignore_patterns("*.safetensors"))
        tree.rename(target)


def _parts(
    source: Pretrained, options: dict[str, str], settings: dict[str, Any]
) -> dict[str, list[tuple[str, str]]]:
    """(question, answer) of each file that the tree gets."""
    ExpressionReward(place=settings["place"])  # a place that there is
    tokenizer, limit = source.tokenizer(), settings["max_prompt_tokens"]

    def read(path: str, count: int | None) -> list[tuple[str, str]]:
        # Questions as they stand: the template is the codebase's.
        found = QuestionFileConfig(
            train_path=path, heldout_path=path, question_key=options["question_key"], answer_key=options["answer_key"],
            template="{question}",
        ).train()  # fmt: skip
        fits = [p for p in found if _fits(p, settings["template"], tokenizer, limit)]
        if len(fits) < (count or 1):
            raise ConfigError(
                f"{path} must hold at least {count or 1} problems of at most max_prompt_tokens={limit} tokens, got {len(fits)}"
            )
        return [(p.prompt, p.answer) for p in fits[:count]]

    if "{question}" not in settings["template"]:
        raise ConfigError(f"template= must hold {{question}}, got {settings['template']!r}")
    train, kept = read(options["train"], None), int(options["practice_problems"])
    if len(train) <= kept:
        raise ConfigError(f"train= must hold more than practice_problems={kept} problems, got {len(train)}")
    parts = {
        "data/practice.jsonl": train[:kept],
        "data/train.jsonl": train[kept:],
        "locked/heldout.jsonl": read(options["heldout"], int(options["heldout_problems"])),
    }
    if options["final"]:
        parts["final/test.jsonl"] = read(options["final"], None)
    names = list(parts)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            both = {q for q, _ in parts[first]} & {q for q, _ in parts[second]}
            if both:
                raise ConfigError(
                    f"no question may be in two parts, got {len(both)} in {first} and {second}, such as {min(both)[:60]!r}"
                )
    return parts


def _fits(problem: Problem, template: str, tokenizer: Tokenizer, limit: int) -> bool:
    prompt = template.replace("{question}", problem.prompt)
    return len(encode_prompt(tokenizer, Problem(id="", prompt=prompt, answer=""), 1 << 30)) <= limit


def _set_recipe(path: Path, options: dict[str, str]) -> None:
    text = path.read_text()
    for name, before in _RECIPE.items():
        old = before + OPTIONS[name]
        assert text.count(old) == 1, f"{old} stands once in the recipe"
        text = text.replace(old, before + options[name])
    path.write_text(text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
