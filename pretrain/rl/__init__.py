"""Reinforcement learning from verifiable rewards: problems, rewards, samples, advantages, a loss on the one loop."""
