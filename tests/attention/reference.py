"""Attention among compressed tokens, written out slowly: whole matrices, a head at a time, no algebra saved.

Everything in float64.
"""

import math

import torch
from torch import Tensor


def dct_rows(m: int, n: int) -> Tensor:
    """The definition, entry by entry: the first m rows of the orthonormal n × n DCT-II matrix."""
    rows = [
        [math.sqrt((1 if k == 0 else 2) / n) * math.cos(math.pi * k * (2 * i + 1) / (2 * n)) for i in range(n)]
        for k in range(m)
    ]
    return torch.tensor(rows, dtype=torch.float64)


def down_and_up(height: int, width: int, kept, axes: str, domain: str) -> tuple[Tensor, Tensor]:
    """The compressor as two matrices, m × N and N × m, for N = height · width patches."""
    if axes == '1d':
        n, m = height * width, kept
        low = dct_rows(m, n)
        back = dct_rows(m, m)
        gain = math.sqrt(m / n)
    else:
        n, m = height * width, kept[0] * kept[1]
        low = torch.kron(dct_rows(kept[0], height), dct_rows(kept[1], width))
        back = torch.kron(dct_rows(kept[0], kept[0]), dct_rows(kept[1], kept[1]))
        gain = math.sqrt(m / n)
    if domain == 'frequency':
        return low, low.T
    return gain * back.T @ low, (1 / gain) * low.T @ back


def with_prefix(matrix: Tensor, prefix: int) -> Tensor:
    """Prefix tokens pass: the identity beside the matrix."""
    return torch.block_diag(torch.eye(prefix, dtype=torch.float64), matrix)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, counts: Tensor | None = None) -> Tensor:
    """Each key weighs as many as `counts` says."""
    scores = q @ k.T / math.sqrt(q.shape[1])
    weights = torch.exp(scores - scores.max(dim=1, keepdim=True).values)
    if counts is not None:
        weights = weights * counts
    return (weights / weights.sum(dim=1, keepdim=True)) @ v


def reference(attention, x: Tensor, down: Tensor, up: Tensor, place: str, counts: Tensor | None = None) -> Tensor:
    """The equations, per image and head; `attention` lends its parameters.

    Place x (DCT-Former, section 3): x̂ = D x, attention among the rows of x̂, ŷ = Dᵀ y, output projection of ŷ.
    Place qkv (its second form): project, then transform q, k and v of each head; ŷ = Dᵀ y, output projection.
    Place kv: as qkv with whole queries, and nothing to bring up.
    """
    heads, dim = attention.num_heads, attention.head_dim
    images = []
    for image in x:
        seen = down @ image if place == 'x' else image
        qkv = seen @ attention.qkv.weight.T
        if attention.qkv.bias is not None:
            qkv = qkv + attention.qkv.bias
        outputs = []
        for head in range(heads):
            q, k, v = (qkv[:, (part * heads + head) * dim :][:, :dim] for part in range(3))
            if place in ('qkv', 'kv'):
                k, v = down @ k, down @ v
            if place == 'qkv':
                q = down @ q
            q, k = attention.q_norm(q), attention.k_norm(k)
            outputs.append(softmax_attention(q, k, v, counts))
        y = torch.cat(outputs, dim=1)

        gate = None
        if attention.gate is not None:
            gate = torch.sigmoid(attention.gate(seen if place == 'x' else image))
        if place == 'x':  # norm and gate belong to the attention, which runs on the kept tokens
            y = attention.norm(y)
            y = y * gate if gate is not None else y
        if place != 'kv':
            y = up @ y
        if place != 'x':
            y = attention.norm(y)
            y = y * gate if gate is not None else y
        y = y @ attention.proj.weight.T
        if attention.proj.bias is not None:
            y = y + attention.proj.bias
        images.append(y)
    return torch.stack(images)


def cells(height: int, width: int, kept: tuple[int, int]) -> list[list[int]]:
    """The patches of each of the h × w cells, in row-major order of the cells."""

    def side(n: int, m: int) -> list[range]:
        return [range(i * n // m, (i + 1) * n // m) for i in range(m)]

    return [
        [row * width + column for row in rows for column in columns]
        for rows in side(height, kept[0])
        for columns in side(width, kept[1])
    ]


def pooling(height: int, width: int, kept: tuple[int, int]) -> Tensor:
    """The mean of each cell, as a matrix m × N."""
    matrix = torch.zeros(kept[0] * kept[1], height * width, dtype=torch.float64)
    for i, patches in enumerate(cells(height, width, kept)):
        matrix[i, patches] = 1 / len(patches)
    return matrix


def interpolation(nodes: list[float], n: int) -> Tensor:
    """Linear interpolation at 0 … n − 1 between values at nodes, n × m; constant beyond the first and the last."""
    matrix = torch.zeros(n, len(nodes), dtype=torch.float64)
    for at in range(n):
        if at <= nodes[0]:
            matrix[at, 0] = 1
        elif at >= nodes[-1]:
            matrix[at, -1] = 1
        else:
            right = next(i for i, node in enumerate(nodes) if node >= at)
            share = (at - nodes[right - 1]) / (nodes[right] - nodes[right - 1])
            matrix[at, right], matrix[at, right - 1] = share, 1 - share
    return matrix


def pool_down_and_up(height: int, width: int, kept: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Pooling as two matrices: means of the cells, and bilinear interpolation between their centres."""

    def up(n: int, m: int) -> Tensor:
        return interpolation([(i * n // m + (i + 1) * n // m - 1) / 2 for i in range(m)], n)

    return pooling(height, width, kept), torch.kron(up(height, kept[0]), up(width, kept[1]))


def subsample_down_and_up(height: int, width: int, kept: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Subsampling as two matrices: the middle patch of each cell, and bilinear interpolation between them."""

    def middles(n: int, m: int) -> list[int]:
        return [(i * n // m + (i + 1) * n // m) // 2 for i in range(m)]

    rows, columns = middles(height, kept[0]), middles(width, kept[1])
    down = torch.zeros(kept[0] * kept[1], height * width, dtype=torch.float64)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            down[i * kept[1] + j, row * width + column] = 1
    return down, torch.kron(interpolation(rows, height), interpolation(columns, width))


def local_expectations(q: Tensor, k: Tensor, v: Tensor, grid, kept: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Of each cell the mean key, and the values as its mean query reads them; prefix tokens before; (N, D) each."""
    keys, values = list(k[: grid.prefix]), list(v[: grid.prefix])
    for patches in cells(grid.height, grid.width, kept):
        of_cell = [grid.prefix + patch for patch in patches]
        keys.append(sum(k[i] for i in of_cell) / len(of_cell))
        query = sum(q[i] for i in of_cell) / len(of_cell)
        weights = torch.softmax(torch.stack([query @ k[i] / math.sqrt(k.shape[1]) for i in of_cell]), dim=0)
        values.append(sum(weight * v[i] for weight, i in zip(weights, of_cell, strict=True)))
    return torch.stack(keys), torch.stack(values)


def medoids(q: Tensor, k: Tensor, v: Tensor, grid, kept: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Of each cell the patch whose key has the largest cosine with the mean key; prefix tokens before; (N, D) each."""
    chosen = list(range(grid.prefix))
    for patches in cells(grid.height, grid.width, kept):
        of_cell = [grid.prefix + patch for patch in patches]
        mean = sum(k[i] for i in of_cell) / len(of_cell)
        chosen.append(max(of_cell, key=lambda i: float(k[i] @ mean / (k[i].norm() * mean.norm()))))
    return k[chosen], v[chosen]


SUMMARIES = {'local': local_expectations, 'medoid': medoids}


def linformer(attention, x: Tensor, prefix: int, project) -> Tensor:
    """Linformer's attention, eq. 7: softmax(Q (E K)ᵀ / √d) · (F V) in each head, the prefix tokens beside E K and F V.

    `project(part, head, patches)` is E or F of a head ('k' or 'v'), applied to its (N, D) keys or values.
    """
    heads, dim = attention.num_heads, attention.head_dim
    images = []
    for image in x:
        qkv = image @ attention.qkv.weight.T
        if attention.qkv.bias is not None:
            qkv = qkv + attention.qkv.bias
        outputs = []
        for head in range(heads):
            q, k, v = (qkv[:, (part * heads + head) * dim :][:, :dim] for part in range(3))
            k, v = (torch.cat([t[:prefix], project(part, head, t[prefix:])]) for part, t in (('k', k), ('v', v)))
            outputs.append(softmax_attention(attention.q_norm(q), attention.k_norm(k), v))
        y = attention.norm(torch.cat(outputs, dim=1))
        if attention.gate is not None:
            y = y * torch.sigmoid(attention.gate(image))
        y = y @ attention.proj.weight.T
        images.append(y if attention.proj.bias is None else y + attention.proj.bias)
    return torch.stack(images)


def dct_former_code_form(attention, x: Tensor, m: int) -> Tensor:
    """Place x as the paper's public code computes it: the whole transform and then a slice; zeros appended, and the
    whole inverse; every head at once."""
    n = x.shape[1]
    whole = dct_rows(n, n)
    seen = torch.einsum('kn,bnc->bkc', whole, x)[:, :m]
    q, k, v = (
        (seen @ w.T + b).unflatten(-1, (attention.num_heads, attention.head_dim)).transpose(1, 2)
        for w, b in zip(attention.qkv.weight.chunk(3), attention.qkv.bias.chunk(3), strict=True)
    )
    weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(attention.head_dim), dim=-1)
    y = (weights @ v).transpose(1, 2).flatten(2)
    y = torch.cat([y, y.new_zeros(y.shape[0], n - m, y.shape[2])], dim=1)
    y = torch.einsum('kn,bkc->bnc', whole, y)
    return y @ attention.proj.weight.T + attention.proj.bias
