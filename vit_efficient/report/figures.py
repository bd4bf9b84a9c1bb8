"""How lines are told apart in figures."""

from typing import Any

# Okabe and Ito, "Color Universal Design", 2008: told apart with any colour vision; but for yellow, and for black, which
# is kept for what the others are compared to. Markers differ as well.
_COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9')
_STYLES = ('-', '--', ':')  # one for each time around the colours
_MARKERS = 'os^DvPX'


def line_style(number: int, markers: bool = True) -> dict[str, Any]:
    """Of the line with this number, for matplotlib."""
    style = dict(color=_COLOURS[number % len(_COLOURS)], linestyle=_STYLES[number // len(_COLOURS) % len(_STYLES)])
    return {**style, 'marker': _MARKERS[number % len(_MARKERS)]} if markers else style
