"""GRPO from the start model on the problems in $DATA, rewards in another process, then leave the weights in $OUT."""

import dataclasses
import json
import os

import jax
import recipe

from pretrain.hf import HfFolder, export_model
from pretrain.model.transformer import abstract_params
from pretrain.optim import make_optimizer
from pretrain.pretrained import load_init
from pretrain.rl.grpo import RlConfig
from pretrain.rl.problem import QuestionFileConfig
from pretrain.rl.reward import ExpressionReward
from pretrain.rl.rollout import RolloutConfig
from pretrain.sharding import make_mesh
from pretrain.step import init_state, make_train_step
from pretrain.tokenizer import FolderTokenizerConfig
from pretrain.train import RunConfig


def config(data, seed):
    """The run: what settings.json fixes, and what the recipe chooses."""
    with open("settings.json") as file:
        fixed = json.load(file)
    start = HfFolder(path=os.path.join(data, "start"))
    model = dataclasses.replace(start.model_config(), dtype=fixed["dtype"], remat="full")
    return RlConfig(
        init=start,
        model=model,
        data=RolloutConfig(
            problems=QuestionFileConfig(
                train_path=os.path.join(data, "train.jsonl"),
                heldout_path=os.path.join(data, "practice.jsonl"),
                template=fixed["template"],
            ),
            reward=ExpressionReward(place=fixed["place"], format_reward=recipe.FORMAT_REWARD),
            tokenizer=FolderTokenizerConfig(path=os.path.join(data, "start")),
            prompts_per_step=recipe.PROMPTS,
            samples_per_prompt=recipe.SAMPLES,
            updates_per_rollout=recipe.UPDATES,
            estimator=recipe.ESTIMATOR,
            max_prompt_tokens=fixed["max_prompt_tokens"],
            max_new_tokens=fixed["max_new_tokens"],
            stop=tuple(fixed["stop"]),
            slots=recipe.SLOTS,
        ),
        optim=recipe.OPTIM,
        loss=recipe.LOSS,
        run=RunConfig(num_steps=recipe.STEPS, num_microbatches=recipe.MICROBATCHES, seed=seed % 2**31),
    )


def main():
    """`recipe.STEPS` steps; practice problems show the accuracy before and after."""
    c = config(os.environ["DATA"], int(os.environ["SEED"]))
    mesh = make_mesh(c.mesh)
    objective = c.objective()
    batches = objective.open(mesh)
    try:
        vocab_size = objective.tokenizer.vocab_size
        optimizer = make_optimizer(c.optim, recipe.STEPS, abstract_params(c.model, vocab_size), c.model)
        params = load_init(c.init, c.model, objective.tokenizer, mesh)
        state = init_state(c.model, vocab_size, optimizer, c.run.seed, mesh, c.health, params)
        step = make_train_step(
            objective.loss, optimizer, mesh=mesh, num_microbatches=recipe.MICROBATCHES, health=c.health
        )
        print(f"start: {objective.evaluate(state.params).headline}", flush=True)
        for number in range(recipe.STEPS):
            state, metrics = step(state, batches.next(number, state.params))
            reward = batches.report()["reward_mean"]
            print(f"step {number} loss {float(metrics['loss']):.4f} reward {reward:.4f}", flush=True)
        print(f"end: {objective.evaluate(state.params).headline}", flush=True)
    finally:
        batches.close()
    out = os.environ["OUT"]
    folder = export_model(
        os.path.join(out, "exported"), jax.device_get(state.params), c.model, objective.tokenizer,
        dtype=c.model.dtype, max_file_bytes=1 << 40,
    )  # fmt: skip
    os.replace(folder / "model.safetensors", os.path.join(out, "model.safetensors"))


if __name__ == "__main__":
    main()
