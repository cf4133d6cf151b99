"""How many draft tokens each request gets in a round."""

import math

from rollout.drafting.compiled import compiled

BINS = 64
LEAST_GAIN = 1.02
"""A round is drafted for only where that promises at least so many times the tokens a second of a plain one."""


@compiled
def allocate(slots, survival, weight, num_drafts, base_s, request_s, token_s, counts, sums):
    """Shorten drafts to where one more token no longer raises the expected tokens a second of the round.

    A round of T tokens, E of them expected to be kept, takes base + request * R + token * T seconds. A draft token with
    survival s adds s to E and 1 to T, which raises E / t as long as s > token * E / t. Tokens are taken from the
    largest weighted survival down, in BINS classes. num_drafts [N] is changed in place; counts, sums [BINS]: scratch.
    Source: the greedy marginal rule of DESIGN 6; optimal, because both E and t grow by single tokens and survivals fall
    along a draft.
    """
    num_requests = len(slots)
    counts[:] = 0
    sums[:] = 0.0
    for slot in slots:
        for place in range(num_drafts[slot]):
            worth = survival[slot, place] * weight[slot]
            level = min(BINS - 1, int(worth * BINS))
            counts[level] += 1
            sums[level] += worth
    fixed_s = base_s + request_s * num_requests
    expected = 0.0
    for slot in slots:
        expected += weight[slot]
    seconds = fixed_s + token_s * num_requests
    plain = expected / seconds
    cut = BINS
    while cut > 0:
        level = cut - 1
        if counts[level] > 0:
            if sums[level] / counts[level] <= token_s * expected / seconds:
                break
            expected += sums[level]
            seconds += token_s * counts[level]
        cut = level
    if expected / seconds < LEAST_GAIN * plain:
        cut = BINS
    for slot in slots:
        kept = 0
        while kept < num_drafts[slot] and min(BINS - 1, int(survival[slot, kept] * weight[slot] * BINS)) >= cut:
            kept += 1
        num_drafts[slot] = kept


def logarithmic_budget(predicted_tokens: int, typical_tokens: float, max_drafts: int) -> int:
    """Draft tokens a round for a request that is predicted to become so long.

    None for requests of at most half the typical length, then more by the logarithm of the length: the longest hold up
    the batch, and every round that is saved for them counts.
    Source: the length-aware budget of arXiv:2511.13841, whose optimum grows with the logarithm of the length.
    """
    if predicted_tokens <= 0 or typical_tokens <= 0:
        return max_drafts // 2
    share = math.log2(2.0 * predicted_tokens / typical_tokens) / 3.0  # all of it at four times the typical length
    return round(max_drafts * min(1.0, max(0.0, share)))
