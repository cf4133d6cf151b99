"""How often a drafted token is accepted, by the match before it and by how often history went that way."""

import numpy as np

from databus.codec import Array
from rollout.drafting.compiled import compiled

LENGTHS = 7
RATIOS = 8
CELLS = 2 * LENGTHS * RATIOS
PRIOR_TRIALS = 8.0
KEEP = 0.9995
"""What a round leaves of earlier evidence, so that a cell that is never tried drifts back to its prior."""


def new_calibration() -> Array:
    """float64 [CELLS, 3]: accepted, tried, and the prior chance, per cell."""
    table = np.zeros((CELLS, 3))
    ratios = (np.arange(RATIOS) + 0.5) / RATIOS
    table[:, 2] = np.tile(ratios, CELLS // RATIOS)
    return table


@compiled
def cell_of(common, length, best, total):
    """The cell of a continuation that was seen `best` times out of `total` after a match of `length` tokens.

    common: 1 where the automaton is the one that all problems share. The ratio is best / (total + 1): one
    of one says less than ten of ten.
    """
    bucket = 0
    while bucket < LENGTHS - 1 and length > 1 << bucket:
        bucket += 1
    ratio = min(RATIOS - 1, best * RATIOS // (total + 1))
    return (common * LENGTHS + bucket) * RATIOS + ratio


@compiled
def chance(table, cell):
    return (table[cell, 0] + PRIOR_TRIALS * table[cell, 2]) / (table[cell, 1] + PRIOR_TRIALS)


@compiled
def learn(table, cell, accepted):
    table[cell, 1] += 1.0
    if accepted:
        table[cell, 0] += 1.0


@compiled
def forget(table):
    for cell in range(len(table)):
        table[cell, 0] *= KEEP
        table[cell, 1] *= KEEP
