"""A byte model: embed the last CONTEXT bytes, one hidden layer, logits over the next byte."""

import numpy as np
import weights

VOCAB = 128
CONTEXT = 6
EMBED = 12
HIDDEN = 96
ACTIVATION = "tanh"  # tanh, relu, silu
INIT_SCALE = 0.5
SKIP = False  # add a linear path from the embedding to the logits


def init(rng):
    """Parameters as float32 arrays."""
    width = CONTEXT * EMBED
    params = {
        "embed": rng.normal(0, 1.0, (VOCAB, EMBED)),
        "w1": rng.normal(0, INIT_SCALE / width**0.5, (width, HIDDEN)),
        "b1": np.zeros(HIDDEN),
        "w2": rng.normal(0, INIT_SCALE / HIDDEN**0.5, (HIDDEN, VOCAB)),
        "b2": np.zeros(VOCAB),
    }
    if SKIP:
        params["w3"] = rng.normal(0, INIT_SCALE / width**0.5, (width, VOCAB))
    return {name: value.astype(np.float32) for name, value in params.items()}


def activate(x):
    """The hidden activation and its derivative."""
    if ACTIVATION == "relu":
        return np.maximum(x, 0), (x > 0).astype(np.float32)
    if ACTIVATION == "silu":
        gate = 1 / (1 + np.exp(-x))
        return x * gate, gate * (1 + x * (1 - gate))
    y = np.tanh(x)
    return y, 1 - y * y


def forward(params, window_NC):
    """Logits [N, V] for windows of the last CONTEXT bytes [N, C], and what backward needs."""
    x = params["embed"][window_NC].reshape(len(window_NC), -1)
    h, slope = activate(x @ params["w1"] + params["b1"])
    logits = h @ params["w2"] + params["b2"]
    if SKIP:
        logits = logits + x @ params["w3"]
    return logits, (x, h, slope)


def backward(params, window_NC, kept, d_logits):
    """Gradients of all parameters."""
    x, h, slope = kept
    grads = {"w2": h.T @ d_logits, "b2": d_logits.sum(0)}
    d_h = (d_logits @ params["w2"].T) * slope
    grads["w1"], grads["b1"] = x.T @ d_h, d_h.sum(0)
    d_x = d_h @ params["w1"].T
    if SKIP:
        grads["w3"] = x.T @ d_logits
        d_x = d_x + d_logits @ params["w3"].T
    grads["embed"] = np.zeros_like(params["embed"])
    np.add.at(grads["embed"], window_NC, d_x.reshape(*window_NC.shape, EMBED))
    return grads


def windows(tokens_BT):
    """[B * T, C]: the last CONTEXT tokens up to and including each position, zeros before the start."""
    padded = np.pad(tokens_BT, ((0, 0), (CONTEXT - 1, 0)))
    stacked = np.stack([padded[:, i : i + tokens_BT.shape[1]] for i in range(CONTEXT)], axis=-1)
    return stacked.reshape(-1, CONTEXT)


def load(folder):
    """The function that the judge's questions go to: int32 [B, T] -> logits [B, T, V]."""
    params = weights.load(folder + "/model.safetensors")

    def logits(tokens_BT):
        rows, length = tokens_BT.shape
        return forward(params, windows(tokens_BT))[0].reshape(rows, length, VOCAB)

    return logits
