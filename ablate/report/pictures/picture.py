"""A drawing as SVG for a page that is light or dark, and as PDF for a paper.

Matplotlib draws; colours are placeholders that become CSS variables in the SVG, so that one
picture follows the page's theme. Text stays text (selectable, set in the page's font). The same
input gives the same bytes: no dates, ids hashed with a fixed salt, coordinates rounded.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# role -> (colour on paper, which is also the light theme's; colour on a dark page)
PALETTE: dict[str, tuple[str, str]] = {
    "ink": ("#1d2329", "#e6e9ed"),
    "muted": ("#5f6a76", "#9aa5b1"),
    "line": ("#d9dee4", "#343c45"),
    "band": ("#eef1f5", "#262d35"),
    "paper": ("#ffffff", "#14181d"),
    "better": ("#0b7a5c", "#41c79c"),
    "worse": ("#c03221", "#ff7d6b"),
    "open": ("#9a6400", "#e0a93c"),
    "same": ("#4a6aa5", "#8fb0ec"),
    "level0": ("#6b7682", "#a4afbb"),
    "level1": ("#2563c9", "#6ea8ff"),
    "level2": ("#c2560c", "#f59a4d"),
    "level3": ("#7b3fb5", "#c094f0"),
    "level4": ("#0d8578", "#3fc9b9"),
    "level5": ("#b0286f", "#f07fb8"),
    "level6": ("#7a6a00", "#d3c04a"),
}
"""The baseline of a panel is level0; the text of a colour is legible on its page (4.5 to 1)."""

NUM_LEVEL_COLOURS = 6

_PLACEHOLDER = {role: f"#0102{index:02x}" for index, role in enumerate(PALETTE, start=16)}
_POINT = 1 / 72


def level_role(index: int) -> str:
    """Colour role of the index-th level of a panel; 0 is the baseline."""
    return "level0" if index == 0 else f"level{(index - 1) % NUM_LEVEL_COLOURS + 1}"


@dataclass(frozen=True, slots=True)
class Picture:
    """A drawing that is made when it is written."""

    name: str
    """Letters, digits and dashes; unique on a page (prefix of the ids inside)."""
    title: str
    """What it shows, for those who cannot see it."""
    width: float
    """Inches."""
    height: float
    draw: Callable[[Figure, Mapping[str, str]], None]
    """Draws on a figure, with a colour for every role of PALETTE."""

    def svg(self) -> str:
        """An ``<svg>`` element for a page that defines PALETTE's roles as CSS variables."""
        buffer = io.StringIO()
        with _canvas(self, _PLACEHOLDER) as figure:
            figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        return _for_page(buffer.getvalue(), self)

    def pdf(self) -> bytes:
        """The same on paper, with its fonts."""
        buffer = io.BytesIO()
        with _canvas(self, {role: light for role, (light, _) in PALETTE.items()}) as figure:
            figure.savefig(buffer, format="pdf", metadata={"CreationDate": None})
        return buffer.getvalue()


@contextmanager
def _canvas(picture: Picture, colours: dict[str, str]) -> Iterator[Figure]:
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "ablate",
        "pdf.fonttype": 42,
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib, so sizes are the same anywhere
        "font.size": 8.5,
        "axes.edgecolor": colours["line"],
        "axes.labelcolor": colours["muted"],
        "axes.linewidth": 0.8,
        "axes.facecolor": "none",
        "figure.facecolor": "none",
        "text.color": colours["ink"],
        "text.parse_math": False,  # a level named "$x$" is a name
        "xtick.color": colours["line"],
        "ytick.color": colours["line"],
        "xtick.labelcolor": colours["muted"],
        "ytick.labelcolor": colours["muted"],
        "path.simplify": True,
        "axes.unicode_minus": True,
    }
    with matplotlib.rc_context(), warnings.catch_warnings():
        # Names may be in any script; the page's font has the glyph that the drawing's lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        matplotlib.rcdefaults()  # whatever the machine's own matplotlibrc says
        matplotlib.rcParams.update(style)
        figure = Figure(figsize=(picture.width, picture.height))
        picture.draw(figure, colours)
        yield figure


_TAG = re.compile(r"<[^>]*>")
_NUMBER = re.compile(r"-?\d+\.\d{3,}")


def _short(number: re.Match[str]) -> str:
    return f"{float(number[0]):.2f}".rstrip("0").rstrip(".")


def _for_page(text: str, picture: Picture) -> str:
    """Matplotlib's document as an element that lives on a page beside others of its kind."""
    start = text.index("<svg")
    body = text[text.index(">", start) + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"<style[^>]*>.*?</style>", "", body, count=1, flags=re.DOTALL)
    # ids are only needed where they are referred to, and must not clash between pictures
    used = set(re.findall(r'(?:url\(#|xlink:href="#)([^")]+)', body))
    body = re.sub(
        r'\s?\bid="([^"]*)"',
        lambda m: f' id="{picture.name}-{m[1]}"' if m[1] in used else "",
        body,
    )
    body = re.sub(r"url\(#", f"url(#{picture.name}-", body)
    body = re.sub(r'xlink:href="#', f'href="#{picture.name}-', body)
    body = _TAG.sub(lambda tag: _NUMBER.sub(_short, tag[0]), body)  # never in text
    body = body.replace("'DejaVu Sans', sans-serif", "var(--font)").replace(
        "'DejaVu Sans'", "var(--font)"
    )
    for role, colour in _PLACEHOLDER.items():
        body = body.replace(colour, f"var(--{role})")
    width, height = picture.width / _POINT, picture.height / _POINT
    return (
        f'<svg class="plot" viewBox="0 0 {width:g} {height:g}" role="img" '
        f'aria-label="{escape(picture.title)}" stroke-linejoin="round">'
        f"{body.strip()}"
    )
