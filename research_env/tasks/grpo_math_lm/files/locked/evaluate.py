"""The judge: greedy answers to held-out problems by its own copy of the sampler and the checker, with a run's weights."""

import dataclasses
import json
import os
import shutil
import sys
import tempfile

sys.path[:0] = ["locked", os.environ["JUDGE"]]
import jax  # noqa: E402
import judge  # noqa: E402
import numpy as np  # noqa: E402

from pretrain.config import ConfigError  # noqa: E402
from pretrain.generate import GenerateConfig, Generator, Request  # noqa: E402
from pretrain.hf import HfFolder  # noqa: E402
from pretrain.rl.problem import QuestionFileConfig  # noqa: E402
from pretrain.rl.reward import ExpressionReward  # noqa: E402
from pretrain.rl.rollout import encode_prompt  # noqa: E402

SLOTS = 32


def read_model():
    """The locked folder with the artifact's tensors: (parameters, config, tokenizer)."""
    folder = tempfile.mkdtemp()
    shutil.copytree("locked/start", folder, dirs_exist_ok=True)
    os.symlink(
        os.path.abspath(os.path.join(os.environ["ARTIFACT"], "model.safetensors")),
        f"{folder}/model.safetensors",
    )
    source = HfFolder(path=folder)
    model = source.model_config()
    try:
        params = source.params(model)
    except (ConfigError, RecursionError) as error:
        raise judge.Invalid("model.safetensors must hold the model's tensors in their shapes") from error
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(params))):
        raise judge.Invalid("weights must be finite")
    return params, model, source.tokenizer()


def evaluate():
    """Accuracy in [0, 1]."""
    with open("locked/settings.json") as file:
        fixed = json.load(file)
    params, model, tokenizer = read_model()
    path = {"search": "locked/heldout.jsonl", "final": "final/test.jsonl"}[os.environ["SPLIT"]]
    problems = QuestionFileConfig(
        train_path=path, heldout_path=path, template=fixed["template"], num_heldout=None
    ).heldout()
    sizes = GenerateConfig(max_length=fixed["max_prompt_tokens"] + fixed["max_new_tokens"], slots=SLOTS)
    generator = Generator(
        params, dataclasses.replace(model, dtype=fixed["dtype"]), sizes, tokenizer=tokenizer
    )
    requests = [
        Request(
            ids=encode_prompt(tokenizer, problem, fixed["max_prompt_tokens"]),
            max_new_tokens=fixed["max_new_tokens"],
            temperature=0.0,
            stop=tuple(fixed["stop"]),
            stop_ids=(tokenizer.eos_id,),
        )
        for problem in problems
    ]
    reward = ExpressionReward(place=fixed["place"])
    answers = generator.generate(requests)
    return sum(reward(p, c.text) == 1.0 for p, c in zip(problems, answers, strict=True)) / len(problems)


judge.main(evaluate)
