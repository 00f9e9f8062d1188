"""What a model is worth: held-out bits per byte, and the baselines that it has to beat."""
