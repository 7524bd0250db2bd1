"""A plan as a picture: the tiers as bars, one predicted step's timeline below. SVG, readable in light and dark."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from html import escape
from typing import TYPE_CHECKING

from offload.sizes import format_size

if TYPE_CHECKING:
    from offload.planning.report import Report

_WIDTH, _LEFT, _BAR, _LANE = 900, 90, 34, 22
_COLOURS = {"weights": "#3b7dd8", "experts": "#2a9d6f", "kv": "#d98a2b", "other": "#8a8f98"}
_LANES = {"compute": "#3b7dd8", "link": "#d98a2b", "disk": "#2a9d6f"}
_MOST_SLICES = 4000  # per lane; beyond that, neighbours are drawn as one


def draw(report: Report) -> str:
    """The picture as SVG text."""
    body = list(_bars(report))
    top = 70 + 3 * (_BAR + 14) + 50
    body += _timeline(report, top)
    height = top + 30 + 3 * (_LANE + 8) + 40
    return page(_WIDTH, height, body, ".w{fill:#fff}")


def page(width: int, height: int, body: Iterable[str], style: str) -> str:
    """A whole SVG file; text is dark on light, or light on dark where the reader prefers that."""
    style = "text{font:12px system-ui,sans-serif;fill:#333}.h{font-size:15px;font-weight:600}" \
            "@media(prefers-color-scheme:dark){text{fill:#ddd}}" + style  # fmt: skip
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}"><style>{style}</style>\n' + "\n".join(body) + "\n</svg>\n"
    )


def words(x: float, y: float, text: str, kind: str = "") -> str:
    """A line of text. What no XML file may contain is replaced."""
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    return f'<text x="{x:.1f}" y="{y:g}"' + (f' class="{kind}"' if kind else "") + f">{escape(text)}</text>"


def _bars(report: Report) -> Iterator[str]:
    p = report.prediction
    label = "simulated" if p.simulated else "predicted"
    yield words(10, 24, f"{report.facts.name} on {report.machine.name}", "h")
    yield words(10, 46, f"{label}: {p.decode_tokens_per_s:.3g} tokens/s, first token after {p.ttft_s:.2g} s, "
                        f"{p.bottleneck}-bound")  # fmt: skip
    tiers = [t for t in ("device", "host", "disk") if any(r.tier == t for r in report.placement)]
    room = _WIDTH - _LEFT - 20
    budget = {"device": report.plan.vram, "host": report.plan.ram}
    for n, tier in enumerate(tiers):
        rows = [r for r in report.placement if r.tier == tier and r.nbytes]
        total = max(budget.get(tier, 0), sum(r.nbytes for r in rows), 1)
        y = 66 + n * (_BAR + 14)
        yield words(10, y + 15, tier)
        yield words(10, y + 30, format_size(total))
        x = float(_LEFT)
        yield f'<rect x="{_LEFT}" y="{y}" width="{room}" height="{_BAR}" fill="none" stroke="#8a8f98"/>'
        for row in rows:
            wide = room * row.nbytes / total
            kind = next((k for k, word in (("experts", "expert"), ("kv", "KV"), ("weights", "weights"),
                                           ("weights", "streamed")) if word in row.what), "other")  # fmt: skip
            title = escape(f"{row.what}: {format_size(row.nbytes)}")
            yield (f'<rect x="{x:.1f}" y="{y}" width="{max(wide, 0.5):.1f}" height="{_BAR}" fill="{_COLOURS[kind]}" '
                   f'stroke="#fff" stroke-width="0.5"><title>{title}</title></rect>')  # fmt: skip
            if wide > 7 * len(row.what):
                yield words(x + 6, y + 21, row.what, "w")
            x += wide


def _timeline(report: Report, top: int) -> Iterator[str]:
    slices = report.step()
    end = max((b for *_, b in slices), default=1.0) or 1.0
    scale = (_WIDTH - _LEFT - 20) / end
    yield words(10, top, f"one decode step, {1000 * report.prediction.decode.seconds:.3g} ms", "h")
    lanes = [lane for lane in _LANES if any(s[0] == lane for s in slices)]
    for n, lane in enumerate(lanes):
        y = top + 14 + n * (_LANE + 8)
        yield words(10, y + 15, lane)
        mine = sorted((a, b, name) for kind, name, a, b in slices if kind == lane)
        step = max(1, len(mine) // _MOST_SLICES)
        for i in range(0, len(mine), step):
            group = mine[i : i + step]
            a, b = group[0][0], group[-1][1]
            yield (f'<rect x="{_LEFT + a * scale:.2f}" y="{y}" width="{max((b - a) * scale, 0.3):.2f}" '
                   f'height="{_LANE}" fill="{_LANES[lane]}" stroke="#fff" stroke-width="0.2">'
                   f"<title>{escape(group[0][2])}: {1000 * (b - a):.3g} ms</title></rect>")  # fmt: skip
