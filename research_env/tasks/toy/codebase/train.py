"""Train the byte model with Adam for a budget of steps."""

import os

import model
import numpy as np
import weights

STEPS = int(1500 * float(os.environ["RUNG"]))
BATCH = 96
LEARNING_RATE = 0.004
WARMUP = 20
FINAL_FRACTION = 1.0  # learning rate at the end, as a share of the peak
BETA_ONE = 0.9
BETA_TWO = 0.95
WEIGHT_DECAY = 0.0
CLIP = 0.0  # largest norm of the gradient, 0 is off
AVERAGE = False  # score an average of the late weights


def rate(step):
    """Linear warm-up, then linear to FINAL_FRACTION."""
    warm = min(1.0, (step + 1) / WARMUP)
    return LEARNING_RATE * warm * (1 - (1 - FINAL_FRACTION) * step / STEPS)


def main():
    """Train and leave the weights in $OUT."""
    rng = np.random.default_rng(int(os.environ["SEED"]))
    data = np.fromfile(os.path.join(os.environ["DATA"], "train.bin"), np.uint8)
    params = model.init(rng)
    first = {name: np.zeros_like(value) for name, value in params.items()}
    second = {name: np.zeros_like(value) for name, value in params.items()}
    average = {name: np.zeros_like(value) for name, value in params.items()}
    num_averaged = 0
    for step in range(STEPS):
        starts = rng.integers(0, len(data) - model.CONTEXT - 1, BATCH)
        window = data[starts[:, None] + np.arange(model.CONTEXT)].astype(np.int64)
        target = data[starts + model.CONTEXT]
        logits, kept = model.forward(params, window)
        logits = logits - logits.max(1, keepdims=True)
        p = np.exp(logits)
        p /= p.sum(1, keepdims=True)
        loss = -np.log(p[np.arange(BATCH), target] + 1e-9).mean()
        p[np.arange(BATCH), target] -= 1
        grads = model.backward(params, window, kept, (p / BATCH).astype(np.float32))
        if CLIP:
            norm = sum(float((g * g).sum()) for g in grads.values()) ** 0.5
            grads = {name: g * min(1.0, CLIP / (norm + 1e-9)) for name, g in grads.items()}
        for name, g in grads.items():
            first[name] = BETA_ONE * first[name] + (1 - BETA_ONE) * g
            second[name] = BETA_TWO * second[name] + (1 - BETA_TWO) * g * g
            m = first[name] / (1 - BETA_ONE ** (step + 1))
            v = second[name] / (1 - BETA_TWO ** (step + 1))
            update = m / (np.sqrt(v) + 1e-8) + WEIGHT_DECAY * params[name]
            params[name] = (params[name] - rate(step) * update).astype(np.float32)
        if step >= STEPS * 3 // 4:
            num_averaged += 1
            for name, value in params.items():
                average[name] += (value - average[name]) / num_averaged
        if step % 50 == 0:
            print(f"step {step} loss {loss:.4f}", flush=True)
    weights.save(os.path.join(os.environ["OUT"], "model.safetensors"), average if AVERAGE else params)


if __name__ == "__main__":
    main()
