"""Twenty constants. Some matter, most do not; only the judge knows which."""

RATE = 0.1
DECAY = 0.01
WIDTH = 64
DEPTH = 4
CLIP = 1.0
WARMUP = 100
BETA_ONE = 0.9
BETA_TWO = 0.99
DROPOUT = 0.1
SMOOTHING = 0.05
NULL_A = 1.0
NULL_B = 1.0
NULL_C = 1.0
NULL_D = 1.0
NULL_E = 1.0
NULL_F = 1.0
NULL_G = 1.0
NULL_H = 1.0
NULL_I = 1.0
NULL_J = 1.0
