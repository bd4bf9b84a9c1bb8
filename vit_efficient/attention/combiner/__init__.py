"""Combiner: near exactly, far by summaries.

Source: Ren et al., "Combiner: Full Attention Transformer with Sparse Computation Cost", NeurIPS 2021, arXiv 2107.05768.
Attention is an expectation of values. A query takes the keys near it one by one, and of every other set R of keys a
summary, whose value is an expectation that does not depend on the query. One softmax goes over both:

    a_j = s q·k_j            of each near key j                        s = 1 / √D
    b_R = s q·k̄_R + β_R      of each other set R
    y   = Σ_j softmax(a, b)_j v_j + Σ_R softmax(a, b)_R v̄_R

The paper's patterns are those of sequences; here they are those of a grid. A prefix token attends to all N tokens, and
all see it exactly. For a patch there are two patterns:

- `cells`: the grid is cut into windows, and each window into cells. Near are the patches of the own window. Each cell
  of the other windows is a set; with a `reach`, of windows up to that many away, and each window beyond is one set.
  With reach 0 this is the paper's fixed pattern. In every second layer of a model the windows are shifted by half their
  sides, as Swin's are.
- `axial`: near are the patches of the own row and of the own column. The rest of every other column, without the patch
  in the own row, is a set. In every second layer of a model rows and columns change places. (The paper's own, for
  images without causality, is in an appendix that we have not seen, and its code covers the image twice.)

    summary   weights π_j           key k̄         value v̄      bias β
    mean                            mean of k     mean of v    log |R|
    local     softmax(s q̄·k_j)      mean of k     Σ π_j v_j    log |R|
    tangent   softmax(s q̄·k_j)      Σ π_j k_j     Σ π_j v_j    entropy of π
    max       softmax(s q̂·k_j)      maximum of k  Σ π_j v_j    log |R|

q̄ is the mean of the queries in the cell, q̂ their maximum, channel by channel, as is that of the keys. `max` without β
(`count_bias=False`) is the paper's summary. `tangent` is ours: s q·k̄ + β touches, at q = q̄, the logarithm of what the
keys of the cell weigh together, log Σ_j exp(s q·k_j). That is convex, so a cell never weighs more than its keys did.
"""

from vit_efficient.attention.combiner.mechanism import CombinerAttention

__all__ = ['CombinerAttention']
