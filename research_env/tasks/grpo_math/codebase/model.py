"""The policy, locked: the next character of `12+34=` from all characters before it, two hidden layers.

B rows, T characters, E embedding, F hidden width, V vocabulary. The judge runs a copy of this file on the weights that a run
leaves, so no code of a candidate takes part in its score.
"""

import numpy as np

CHARACTERS = "0123456789+="
VOCAB = len(CHARACTERS) + 1
PAD = VOCAB - 1
LENGTH = 9  # six characters of a problem, three of its answer
ANSWER = 3
EMBED, HIDDEN = 16, 192
SHAPES = {
    "embed": (LENGTH, VOCAB, EMBED),
    "w1": (LENGTH * EMBED, HIDDEN),
    "b1": (HIDDEN,),
    "w2": (HIDDEN, HIDDEN),
    "b2": (HIDDEN,),
    "w3": (HIDDEN, VOCAB),
    "b3": (VOCAB,),
}


def init(rng):
    """Parameters as float32 arrays."""
    params = {}
    for name, shape in SHAPES.items():
        scale = 0.0 if name[0] == "b" else (1.0 if name == "embed" else (2.0 / shape[0]) ** 0.5)
        params[name] = (scale * rng.normal(0, 1, shape)).astype(np.float32)
    return params


def encode(texts):
    """int64 [B, LENGTH], padded at the end."""
    tokens_BT = np.full((len(texts), LENGTH), PAD)
    for row, text in enumerate(texts):
        tokens_BT[row, : len(text)] = [CHARACTERS.index(c) for c in text]
    return tokens_BT


def forward(params, tokens_BT):
    """Logits [B, V] of the character that fills the first place of padding, and what `backward` needs."""
    x = params["embed"][np.arange(LENGTH), tokens_BT].reshape(len(tokens_BT), -1)
    h1 = np.maximum(x @ params["w1"] + params["b1"], 0)
    h2 = np.maximum(h1 @ params["w2"] + params["b2"], 0)
    return h2 @ params["w3"] + params["b3"], (tokens_BT, x, h1, h2)


def backward(params, kept, d_logits_BV):
    """Gradients of all parameters."""
    tokens_BT, x, h1, h2 = kept
    grads = {"w3": h2.T @ d_logits_BV, "b3": d_logits_BV.sum(0)}
    d2 = (d_logits_BV @ params["w3"].T) * (h2 > 0)
    grads["w2"], grads["b2"] = h1.T @ d2, d2.sum(0)
    d1 = (d2 @ params["w2"].T) * (h1 > 0)
    grads["w1"], grads["b1"] = x.T @ d1, d1.sum(0)
    d_x = (d1 @ params["w1"].T).reshape(len(tokens_BT), LENGTH, EMBED)
    grads["embed"] = np.zeros_like(params["embed"])
    np.add.at(grads["embed"], (np.arange(LENGTH), tokens_BT), d_x)
    return grads


def log_softmax(logits_BV):
    """Logarithms of the chances of each character."""
    shifted = logits_BV - logits_BV.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def answer(params, prompts, rng=None, temperature=1.0):
    """Complete each problem by ANSWER characters: the likeliest ones, or sampled ones when there is an `rng`.

    Returns tokens [B, LENGTH] and the log-probabilities of the new ones [B, ANSWER].
    """
    tokens_BT = encode(prompts)
    logp_BA = np.zeros((len(prompts), ANSWER), np.float32)
    rows = np.arange(len(prompts))
    for place in range(ANSWER):
        logp_BV = log_softmax(forward(params, tokens_BT)[0])
        if rng is None:
            chosen = logp_BV.argmax(-1)
        else:
            gumbel_BV = -np.log(-np.log(rng.uniform(1e-12, 1.0, logp_BV.shape)))
            chosen = (logp_BV / temperature + gumbel_BV).argmax(-1)
        tokens_BT[:, LENGTH - ANSWER + place] = chosen
        logp_BA[:, place] = logp_BV[rows, chosen]
    return tokens_BT, logp_BA


def decode(tokens_BT):
    """The answers as text; padding is a space."""
    return ["".join((CHARACTERS + " ")[t] for t in row[LENGTH - ANSWER :]) for row in tokens_BT.tolist()]
