"""The judge: mean squared error on points that no run has seen. It reads numbers and imports nothing of the candidate."""

import json
import math
import os

with open(os.path.join(os.environ["ARTIFACT"], "weights.json"), "rb") as file:
    data = file.read(10_000)
result = {"invalid": "weights.json must be a list of at most 16 finite numbers"}
try:
    weights = [float(value) for value in json.loads(data)]
    if 0 < len(weights) <= 16 and all(math.isfinite(weight) for weight in weights):
        with open("locked/points.csv") as file:
            points = [tuple(map(float, line.split(","))) for line in file]
        errors = [sum(w * x**power for power, w in enumerate(weights)) - y for x, y in points]
        result = {"metric": sum(e * e for e in errors) / len(errors)}
except (ValueError, TypeError, OverflowError, RecursionError):
    pass  # the result above says it
with open(os.environ["RESULT"], "w") as file:
    json.dump(result, file)
