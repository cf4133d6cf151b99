"""Proves a run from what it left on disk: journal, checkpoints, rows. Shares no state machine with the broker."""
