"""Rollout workers: engines, the worker loop, weights in."""
