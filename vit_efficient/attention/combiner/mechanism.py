"""The attention called `combiner`."""

from typing import Any

from timm.layers import to_2tuple
from torch import Tensor

from vit_efficient.attention.base import GridAttention
from vit_efficient.attention.combiner.axial import attend_axially
from vit_efficient.attention.combiner.cells import Cut, attend_near_and_far, count_seen, reorder
from vit_efficient.attention.combiner.summaries import SUMMARIES
from vit_efficient.attention.registry import register_attention
from vit_efficient.attention.rotary import table_of
from vit_efficient.grid import PatchGrid, smaller
from vit_efficient.utils.checks import as_integer, as_sides, check_choice, check_flag
from vit_efficient.utils.errors import UserError

PATTERNS = ('cells', 'axial')


@register_attention('combiner')
class CombinerAttention(GridAttention):
    """Attention to the patches that are near exactly, and to summaries of all others.

    This is exact attention where all patches are near, with cells of one patch (`reach` None) and, unless
    `count_bias=False`, where the keys of each set are equal.

    With rotary positions queries and keys are turned first, and summaries are of what is turned: frequencies that turn
    far within a cell count less in its key.

    Attention dropout drops weights, of patches and of sets, where the pattern is 'cells', and keys where it is 'axial'
    (`drop_keys`), each from all queries of its head.

    Args:
        dim, num_heads, **kwargs: As timm's `Attention`.
        pattern: What is near, and what is summarised: 'cells' or 'axial', as in `vit_efficient.attention.combiner`.
        summary: What stands for a set, 'mean', 'local', 'tangent' or 'max', as there.
        count_bias: Whether the bias β is added to the score of a set, so that it weighs as many patches as it has, or
            with 'tangent' as many as its weights are spread over.
        window_size: With 'cells', the side of the windows in patches, or the pair (rows, columns); 12 by default. A
            side that is not smaller than the grid's is taken to be the grid's, and is not shifted. Windows at the
            border are smaller where it does not divide the grid.
        cell_size: With 'cells', the side of the cells in patches, or the pair; 4 by default. They begin at the upper
            left corner of each window, also where that is beyond the border; the last ones are smaller where it does
            not divide the window. It has no place with reach 0.
        reach: With 'cells', up to how many windows away, along either axis, a window is seen by its cells. Beyond, it
            is seen by one summary. None: each by its cells.
        shift: With 'cells', whether windows are shifted: the first one along an axis has half the side, rounded down,
            and the next begin from there. In a model, those of odd layers are, unless it is given.
        transpose: With 'axial', whether sets are rows instead of columns. In a model, those of odd layers are, unless
            it is given.
    """

    can_be_differential = True

    def configure(
        self,
        *,
        pattern: str = 'cells',
        summary: str = 'tangent',
        count_bias: bool = True,
        window_size: int | tuple[int, int] | None = None,
        cell_size: int | tuple[int, int] | None = None,
        reach: int | None = None,
        shift: bool | None = None,
        transpose: bool | None = None,
    ) -> None:
        check_choice('pattern', pattern, PATTERNS)
        check_choice('summary', summary, SUMMARIES)
        check_flag('count_bias', count_bias)
        of_cells = dict(window_size=window_size, cell_size=cell_size, reach=reach, shift=shift)
        for name, value in (of_cells if pattern == 'axial' else dict(transpose=transpose)).items():
            if value is not None:
                raise UserError(f'{name}={value!r} is of another pattern than pattern={pattern!r}: leave it out')
        if reach == 0 and cell_size is not None:
            raise UserError(
                f'{cell_size=} has no effect with reach=0, by which no window is seen by its cells: leave it out'
            )
        for name, value in dict(shift=shift, transpose=transpose).items():
            check_flag(name, False if value is None else value)
        self.pattern = pattern
        self.summary = summary
        self.count_bias = count_bias
        self.transpose = bool(transpose)
        # timm's attentions have a `window_size` of their own, that of their biases.
        self.window = as_sides('window_size', 12 if window_size is None else window_size, '(rows, columns)')
        self.cell = as_sides('cell_size', 4 if cell_size is None else cell_size, '(rows, columns)')
        self.reach = None if reach is None else as_integer('reach', reach, 0, 'None or an integer of at least 0')
        self.shift = bool(shift)

    @classmethod
    def at_layer(cls, options: dict[str, Any], layer: int, depth: int, grid_size: tuple[int, int]) -> dict[str, Any]:
        alternating = 'transpose' if options.get('pattern') == 'axial' else 'shift'
        return {alternating: layer % 2 == 1, **options}

    @property
    def options(self) -> dict[str, Any]:
        common = dict(pattern=self.pattern, summary=self.summary, count_bias=self.count_bias)
        if self.pattern == 'axial':
            return dict(**common, transpose=self.transpose)
        window, cell = (list(sides) if isinstance(sides, tuple) else sides for sides in (self.window, self.cell))
        cells = {} if self.reach == 0 else dict(cell_size=cell)
        return dict(**common, window_size=window, **cells, reach=self.reach, shift=self.shift)

    def forward(
        self,
        x: Tensor,
        grid: PatchGrid,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        self.check_call(x, grid, attn_mask, is_causal)
        far = (self.summary, self.count_bias)
        if self.pattern == 'axial':
            q, k, v = self.project(x)
            q, k = self.rotate(q, k, rope, grid.prefix)
            of_grid = (grid.prefix, grid.height, grid.width, self.transpose)
            v = self.drop_keys(self.values_of_maps(v))
            y = attend_axially(q, k, v, *of_grid, *far, (self.scale, self.fused_attn))
            return self.finish(self.merge_heads(y), x)
        cut = self._cut(grid)
        x = reorder(x, grid.prefix, cut)
        q, k, v = self.project(x)
        if rope is not None:
            q, k = self.rotate(q, k, reorder(table_of(rope), 0, cut), grid.prefix)
        how = (self.scale, self.fused_attn, self.drop_rate)
        y = attend_near_and_far(q, k, self.values_of_maps(v), grid.prefix, cut, *far, how)
        y = self.norm_and_gate(self.merge_heads(y), x)
        return self.proj_drop(reorder(self.proj(y), grid.prefix, cut, back=True))

    def num_attended(self, grid: PatchGrid) -> int:
        """The keys of a patch, with 'cells' in a whole window that no border is near. A prefix token attends to all."""
        if self.pattern == 'axial':
            height, width = (grid.width, grid.height) if self.transpose else (grid.height, grid.width)
            return grid.prefix + width + height - 1 + smaller(1, height - 1) * (width - 1)
        return grid.prefix + count_seen(self._cut(grid))

    def _cut(self, grid: PatchGrid) -> Cut:
        window, cell = to_2tuple(self.window), to_2tuple(self.cell)
        return Cut(grid.height, grid.width, window, cell, self.shift, self.reach)
