"""What stands for sets of patches in Combiner's attention; the table is in `vit_efficient.attention.combiner`."""

from typing import NamedTuple

import torch
from torch import Tensor

SUMMARIES = ('mean', 'local', 'tangent', 'max')


class Summaries(NamedTuple):
    """What stands for n sets of patches.

    Args:
        key, value: (B, H, n, D) and (B, H, n, E)
        bias: Added to their scores, (B, H, n) or (1, 1, n); None where there is none.
    """

    key: Tensor
    value: Tensor
    bias: Tensor | None


def summarise(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, scale: float, summary: str, count: bool
) -> Summaries:
    """The summaries of n sets of up to A patches, by the table of `vit_efficient.attention.combiner`.

    Args:
        q, k, v: (B, H, n, A, D or E)
        valid: (n, A), which of these are patches, at least one in a set; None if all are.
        scale: s
        summary: One of `SUMMARIES`.
        count: Whether there is a bias β.
    """
    lowest = torch.finfo(q.dtype).min
    counts, shares = q.new_full((k.shape[2],), k.shape[3]), None  # torch.compile has no closures over what is unset
    if valid is not None:
        counts = valid.sum(dim=1).to(q.dtype)
        shares = (valid / counts[:, None]).to(q.dtype)[:, None]  # (n, 1, A)

    def mean(t: Tensor) -> Tensor:
        return t.mean(dim=3) if shares is None else (shares @ t).squeeze(3)

    def largest(t: Tensor) -> Tensor:
        return (t if valid is None else t.masked_fill(~valid[..., None], lowest)).amax(dim=3)

    bias = counts.log()[None, None] if count else None
    if summary == 'mean':
        return Summaries(mean(k), mean(v), bias)
    k, v = k.contiguous(), v.contiguous()  # once, and not in each product
    pool = largest if summary == 'max' else mean
    scores = (k @ (pool(q) * scale).unsqueeze(4)).mT  # (B, H, n, 1, A)
    if valid is not None:
        scores = scores.masked_fill(~valid[:, None], lowest)
    log_weights = scores.to(torch.promote_types(scores.dtype, torch.float32)).log_softmax(dim=-1)
    weights = log_weights.exp()
    value = (weights.to(v.dtype) @ v).squeeze(3)
    if summary != 'tangent':
        return Summaries(pool(k), value, bias)
    if count:
        surprise = log_weights if valid is None else log_weights.masked_fill(~valid[:, None], 0)
        bias = -(weights * surprise).sum(dim=(3, 4)).to(q.dtype)
    return Summaries((weights.to(k.dtype) @ k).squeeze(3), value, bias)


def joined(parts: list[Summaries]) -> Summaries | None:
    """The summaries of several kinds of sets, one after the other; None if there are none."""
    if len(parts) < 2:
        return parts[0] if parts else None
    key, value, bias = zip(*parts, strict=True)
    return Summaries(
        torch.cat(key, dim=2), torch.cat(value, dim=2), None if bias[0] is None else torch.cat(bias, dim=2)
    )
