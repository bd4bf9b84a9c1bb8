"""Tables as Markdown, CSV and JSON."""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vit_efficient.utils.checks import check_choice, is_real
from vit_efficient.utils.errors import UserError

FORMATS = ('markdown', 'csv', 'json')
NOTHING = '–'  # an empty cell, where a reader is to see that it is empty


@dataclass(frozen=True)
class Column:
    """A column of a table."""

    key: str  # its name in rows, CSV and JSON
    title: str = ''  # its heading in Markdown; the key by default
    digits: int | None = None  # decimals in Markdown; None shows numbers as they are. CSV and JSON hold them unrounded
    spread: str = ''  # the key of another column, which Markdown shows in this one's cells after a ±

    def show(self, row: Mapping[str, Any]) -> str:
        """The cell of a row, in Markdown."""
        spread = row[self.spread] if self.spread else None
        return self._text(row[self.key]) + ('' if spread is None else f' ± {self._text(spread)}')

    def _text(self, value: Any) -> str:
        if value is None:
            return NOTHING
        if isinstance(value, bool):
            return 'yes' if value else 'no'
        if is_real(value):
            return f'{value:,}' if self.digits is None else f'{value:,.{self.digits}f}'
        return str(value).replace('|', r'\|').replace('\n', ' ')


class Table:
    """Rows under columns.

    Args:
        columns: In order; a name stands for a column of that key.
        rows: Mappings by column key. A missing key, None and a number that is not finite are empty cells.

    Raises:
        UserError: If a row has a key that is no column's.
    """

    def __init__(self, columns: Sequence[Column | str], rows: Sequence[Mapping[str, Any]] = ()):
        self.columns = [Column(column) if isinstance(column, str) else column for column in columns]
        keys = [column.key for column in self.columns]
        for row in rows:
            for key in row:
                if key not in keys:
                    raise UserError(f'no column {key!r} in a table of {", ".join(keys)}')
        self.rows = [{key: None if _is_nothing(row.get(key)) else row[key] for key in keys} for row in rows]

    def render(self, format: str = 'markdown') -> str:
        """The table as text that ends with a newline, in one of `FORMATS`."""
        check_choice('format', format, FORMATS)
        return getattr(self, f'_{format}')()

    def _markdown(self) -> str:
        """Padded, so that it reads as plain text too; numbers to the right."""
        spreads = {column.spread for column in self.columns}
        columns = [column for column in self.columns if column.key not in spreads]
        heads = [column.title or column.key for column in columns]
        cells = [[column.show(row) for column in columns] for row in self.rows]
        numeric = [all(row[c.key] is None or is_real(row[c.key]) for row in self.rows) for c in columns]
        widths = [max(3, *(len(line[i]) for line in [heads, *cells])) for i in range(len(heads))]

        def line(texts: Sequence[str]) -> str:
            padded = (f'{text:{">" if n else "<"}{w}}' for text, w, n in zip(texts, widths, numeric, strict=True))
            return f'| {" | ".join(padded)} |\n'

        rule = ['-' * (w - 1) + (':' if n else '-') for w, n in zip(widths, numeric, strict=True)]
        return ''.join(line(texts) for texts in [heads, rule, *cells])

    def _csv(self) -> str:
        text = io.StringIO()
        writer = csv.DictWriter(text, [column.key for column in self.columns], lineterminator='\n')
        writer.writeheader()
        writer.writerows(self.rows)
        return text.getvalue()

    def _json(self) -> str:
        return json.dumps(self.rows, indent=2, ensure_ascii=False) + '\n'


def _is_nothing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and not math.isfinite(value))
