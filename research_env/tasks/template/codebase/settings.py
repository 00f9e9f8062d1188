"""What ideas change first: constants of the training run."""

STEPS = 200
LEARNING_RATE = 0.05
DEGREE = 1
