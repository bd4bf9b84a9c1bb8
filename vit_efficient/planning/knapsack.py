"""The multiple-choice knapsack: one option for each layer, of least summed loss within a budget of summed cost."""

import numpy as np

# Partial sums that are carried from layer to layer. Where there are more, those of nearly equal cost become one.
MOST = 20_000


def choose(costs: np.ndarray, losses: np.ndarray, budget: float) -> tuple[int, ...] | None:
    """The assignment of least loss within the budget; of equal ones the cheapest.

    Dynamic programming over layers: of the partial assignments those are kept that no cheaper one beats (Nemhauser and
    Ullmann, 1969). It is exact while these are at most `MOST`; beyond, of each interval of costs the best is kept.

    Args:
        costs, losses: Of each option in each layer, (layers, options).
        budget: The most that the costs may sum up to.

    Returns:
        The number of the option of each layer, or None where nothing is cheap enough.
    """
    cheapest = costs.min(axis=1)
    to_come = np.append(np.cumsum(cheapest[::-1])[::-1][1:], 0)
    cost, loss, steps = np.zeros(1), np.zeros(1), []
    for layer, least in enumerate(to_come):
        new_cost, new_loss = ((now[:, None] + more[layer]).ravel() for now, more in ((cost, costs), (loss, losses)))
        fitting = np.flatnonzero(new_cost + least <= budget)
        if not fitting.size:
            return None
        kept = fitting[np.lexsort((new_loss[fitting], new_cost[fitting]))]
        best_before = np.append(np.inf, np.minimum.accumulate(new_loss[kept])[:-1])
        kept = _thinned(kept[new_loss[kept] < best_before], new_cost)
        steps.append(np.divmod(kept, costs.shape[1]))
        cost, loss = new_cost[kept], new_loss[kept]
    state, options = len(loss) - 1, []
    for parents, chosen in reversed(steps):
        options.append(int(chosen[state]))
        state = parents[state]
    return tuple(reversed(options))


def _thinned(kept: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """Of states in the order of their costs, the first, and the last of each of `MOST` intervals."""
    if len(kept) <= MOST:
        return kept
    of = cost[kept]
    interval = ((of - of[0]) / (of[-1] - of[0]) * MOST).astype(np.int64)
    is_last = np.append(interval[1:] != interval[:-1], True)
    is_last[0] = True
    return kept[is_last]
