"""Expert use as a picture: a row for each layer, a column for each expert. SVG, readable in light and dark."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from cli.picture import page, words

if TYPE_CHECKING:
    from offload.routing_report import RoutingReport

_WIDTH, _LEFT, _RIGHT, _TOP = 900, 60, 125, 118
_LEVELS = 6  # of a colour, two for each factor of two
_MOST_CELLS, _MOST_COLUMNS = 1 << 16, 512  # beyond these, neighbouring experts are drawn as one
_MOST_TITLES = 1 << 13  # with more cells, they are not named one by one
_MORE, _LESS = "#e0662b", "#3b7dd8"  # even use is drawn as nothing at all, on whatever background there is


def draw(report: RoutingReport) -> str:
    """The picture as SVG text."""
    layers = len(report.experts)
    high = min(18.0, max(3.0, 640 / layers))
    classes = ".e{fill:none;stroke:#8a8f98;stroke-width:0.5}.n{fill-opacity:0}" + "".join(
        f".{kind}{n}{{fill:{colour};fill-opacity:{n / _LEVELS:.2f}}}"
        for kind, colour in (("m", _MORE), ("l", _LESS))
        for n in range(1, _LEVELS + 1)
    )
    body = [*_heading(report), *_rows(report, high)]
    return page(_WIDTH, math.ceil(_TOP + layers * high + 34), body, classes)


def _heading(r: RoutingReport) -> Iterator[str]:
    yield words(10, 24, f"use of experts: {r.name}", "h")
    yield words(10, 46, r.facts())
    yield words(10, 64, f"{100 * r.repeats:.1f}% of the choices were the previous token's; {100 * r.chance:.1f}% by "
                        "chance")  # fmt: skip
    x = _LEFT
    for kind, text in (("l6", "an eighth or less"), ("l4", "a quarter"), ("l2", "half"), ("", "even"), ("m2", "twice"),
                       ("m4", "4 times"), ("m6", "8 times or more")):  # fmt: skip
        yield f'<rect x="{x}" y="77" width="14" height="14" class="e {kind}"/>'
        yield words(x + 19, 88, text)
        x += 32 + 7 * len(text)
    yield words(10, _TOP - 8, "layer")
    yield words(_WIDTH - _RIGHT + 8, _TOP - 8, "effective experts")


def _rows(r: RoutingReport, high: float) -> Iterator[str]:
    most = max(r.experts)
    columns = min(most, _MOST_COLUMNS, max(1, _MOST_CELLS // len(r.experts)))
    each = math.ceil(most / columns)  # experts in a column
    wide = (_WIDTH - _LEFT - _RIGHT) / math.ceil(most / each)
    named = sum(math.ceil(e / each) for e in r.experts) <= _MOST_TITLES
    skip = max(1, math.ceil(12 / high))  # rows between two that have room for words
    for layer, use in enumerate(r.relative):
        y = _TOP + layer * high
        for column, first in enumerate(range(0, len(use), each)):
            part = use[first : first + each]
            relative = sum(part) / len(part)
            experts = f"expert {first}" if len(part) == 1 else f"experts {first} to {first + len(part) - 1}"
            title = f"<title>layer {layer}, {experts}: {relative:.2f} times even use</title>" if named else ""
            kind = _kind(relative)
            if kind or title:
                yield (f'<rect x="{_LEFT + column * wide:.2f}" y="{y:.2f}" width="{wide:.2f}" height="{high:.2f}" '
                       f'class="{kind or "n"}">{title}</rect>')  # fmt: skip
        yield (f'<rect x="{_LEFT}" y="{y:.2f}" width="{math.ceil(len(use) / each) * wide:.2f}" height="{high:.2f}" '
               'class="e"/>')  # fmt: skip
        if layer % skip == 0:
            middle = y + high / 2 + 4
            yield words(10, middle, str(layer))
            yield words(_WIDTH - _RIGHT + 8, middle, f"{r.effective[layer]:.1f} of {len(use)}")
    yield words(_LEFT, _TOP + len(r.experts) * high + 20, f"experts 0 to {most - 1}")


def _kind(relative: float) -> str:
    """The class of a colour: two levels for each factor of two; "" about even use."""
    level = round(2 * math.log2(relative)) if relative > 0 else -_LEVELS
    return "" if level == 0 else f"{'m' if level > 0 else 'l'}{min(abs(level), _LEVELS)}"
