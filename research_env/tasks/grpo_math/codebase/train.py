"""Learn the format from a few solved problems, then from rewards alone: GRPO steps on problems whose answers are checked."""

import os

import grpo
import model
import numpy as np
import weights

STEPS = max(1, round(20 * float(os.environ["RUNG"])))
PROBLEMS = 256  # of a step
SAMPLES = 8  # of a problem
UPDATES = 2  # on the samples of a step
LEARNING_RATE = 0.002
BETA_ONE = 0.9
BETA_TWO = 0.99
TEMPERATURE = 1.0
WARMUP_STEPS = 250  # supervised, on the solved problems
WARMUP_BATCH = 128
WARMUP_RATE = 0.003


def read(name):
    """Pairs of a prompt and its answer."""
    with open(os.path.join(os.environ["DATA"], name)) as file:
        return [tuple(line.split()) for line in file]


def adam(params, moments, grads, step, rate):
    """One update; `moments` change in place."""
    for name, g in grads.items():
        first, second = moments[name]
        first += (1 - BETA_ONE) * (g - first)
        second += (1 - BETA_TWO) * (g * g - second)
        m, v = first / (1 - BETA_ONE**step), second / (1 - BETA_TWO**step)
        params[name] = (params[name] - rate * m / (np.sqrt(v) + 1e-8)).astype(np.float32)


def zeros(params):
    """Moments of Adam at the start."""
    return {name: (np.zeros_like(value), np.zeros_like(value)) for name, value in params.items()}


def main():
    """Warm up, learn from rewards, leave the weights in $OUT."""
    rng = np.random.default_rng(int(os.environ["SEED"]))
    solved, problems = read("solved.txt"), read("train.txt")
    params = model.init(rng)
    moments = zeros(params)
    for step in range(1, WARMUP_STEPS + 1):
        drawn = [solved[i] for i in rng.integers(0, len(solved), WARMUP_BATCH)]
        tokens_BT = model.encode([prompt + reply for prompt, reply in drawn])
        # Advantage 1 and ratio 1 make the surrogate the likelihood: cross-entropy on solved problems.
        old_BA = np.zeros((len(drawn), model.ANSWER), np.float32)
        for place in range(model.ANSWER):
            prefix_BT = tokens_BT.copy()
            at = model.LENGTH - model.ANSWER + place
            prefix_BT[:, at:] = model.PAD
            logp_BV = model.log_softmax(model.forward(params, prefix_BT)[0])
            old_BA[:, place] = logp_BV[np.arange(len(drawn)), tokens_BT[:, at]]
        adam(
            params, moments, grpo.gradient(params, tokens_BT, old_BA, np.ones(len(drawn))), step, WARMUP_RATE
        )
    moments, updates = zeros(params), 0
    for step in range(STEPS):
        drawn = [problems[i] for i in rng.integers(0, len(problems), PROBLEMS)]
        drawn = [item for item in drawn for _ in range(SAMPLES)]
        tokens_BT, logp_BA = model.answer(params, [prompt for prompt, _ in drawn], rng, TEMPERATURE)
        is_right = [text == reply for text, (_, reply) in zip(model.decode(tokens_BT), drawn, strict=True)]
        rewards_QP = np.array(is_right, float).reshape(PROBLEMS, SAMPLES)
        advantage_B = grpo.advantages(rewards_QP).reshape(-1)
        for _ in range(UPDATES):
            updates += 1
            adam(
                params,
                moments,
                grpo.gradient(params, tokens_BT, logp_BA, advantage_B),
                updates,
                LEARNING_RATE,
            )
        print(f"step {step} loss {1 - rewards_QP.mean():.4f}", flush=True)
    weights.save(os.path.join(os.environ["OUT"], "model.safetensors"), params)


if __name__ == "__main__":
    main()
