"""How all figures look: colours, markers and matplotlib's settings. It draws nothing.

Colours are Okabe and Ito's, which colour-blind people can tell apart.
"""

from typing import Any

COLOURS = ("#444444", "#0072B2", "#E69F00", "#D55E00", "#009E73", "#CC79A7", "#56B4E9")
MARKERS = ("o", "s", "v", "D", "^", "P", "X")
MUTED = "#6b7280"
STYLE: dict[Any, Any] = {
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.grid": True,
    "grid.color": "#e5e7eb",
    "axes.axisbelow": True,
    "svg.hashsalt": "adsc",
    "text.parse_math": False,  # labels come from outside: a `$` is a dollar
}
