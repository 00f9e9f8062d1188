"""Reinforcement learning on the ideator: a policy over ideas learns from what their execution was worth."""
