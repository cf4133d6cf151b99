"""Difficulty-aware scheduling: what is known of each problem, and what follows from it. No torch, no vLLM."""
