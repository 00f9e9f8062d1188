"""Fit a polynomial to the points in $DATA by gradient descent; leave its coefficients in $OUT."""

import json
import os
import random

import settings

rng = random.Random(int(os.environ["SEED"]))
with open(os.path.join(os.environ["DATA"], "points.csv")) as file:
    points = [tuple(map(float, line.split(","))) for line in file]
weights = [0.0] * (settings.DEGREE + 1)
for step in range(int(settings.STEPS * float(os.environ["RUNG"]))):
    loss = 0.0
    for x, y in rng.sample(points, 16):
        error = sum(w * x**power for power, w in enumerate(weights)) - y
        loss += error * error / 16
        weights = [w - settings.LEARNING_RATE * error * x**power / 8 for power, w in enumerate(weights)]
    if step % 50 == 0:
        print(f"step {step} loss {loss:.4f}", flush=True)  # a line like this is drawn, and never scored
with open(os.path.join(os.environ["OUT"], "weights.json"), "w") as file:
    json.dump(weights, file)
