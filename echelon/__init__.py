"""Composition: CLI, recipes, supervisor, run folder, metrics."""
