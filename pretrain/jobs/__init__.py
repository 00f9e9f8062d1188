"""Run a call for each shard, config or attempt: local processes, Ray or SLURM."""
