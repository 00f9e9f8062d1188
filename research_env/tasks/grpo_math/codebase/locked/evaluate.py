"""The judge: the share of held-out sums that the locked model gets right, greedily, with the weights that a run left."""

import os
import sys

sys.path[:0] = ["locked", os.environ["JUDGE"]]
import judge  # noqa: E402
import model  # noqa: E402
import numpy as np  # noqa: E402
import weights  # noqa: E402


def read_weights(path):
    """Arrays of exactly the model's names and shapes, all finite."""
    try:
        params = weights.load(path)
        shapes = {name: value.shape for name, value in params.items()}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise judge.Invalid("model.safetensors must hold the model's arrays") from error
    if shapes != model.SHAPES:
        raise judge.Invalid("model.safetensors must hold the model's arrays in their shapes")
    if not all(np.isfinite(value).all() for value in params.values()):
        raise judge.Invalid("weights must be finite")
    return params


def evaluate():
    """Accuracy in [0, 1]. An answer is right when it is the right three digits and nothing else."""
    params = read_weights(os.path.join(os.environ["ARTIFACT"], "model.safetensors"))
    with open("locked/heldout.txt") as file:
        problems = [line.split() for line in file]
    answers = model.decode(model.answer(params, [prompt for prompt, _ in problems])[0])
    return sum(a == reply for a, (_, reply) in zip(answers, problems, strict=True)) / len(problems)


judge.main(evaluate)
