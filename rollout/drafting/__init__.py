"""Drafting: suffix automata of earlier completions, and how many of their tokens are worth verifying."""
