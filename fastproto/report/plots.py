# SPDX-License-Identifier: Apache-2.0
"""Static plots as SVG to stand in a page: its ink, its font, names as text."""

from __future__ import annotations

import contextlib
import io
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np

from fastproto.errors import import_extra

BLUE, GREEN, RED = "#2b8cbe", "#009e73", "#d55e00"  # to be told apart, on white and on black
_INK = "#010203"  # stands for the page's text colour
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fastproto",
    "font.family": "sans-serif",
    "font.size": 10,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "legend.frameon": False,
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK
    ),
}
_DOTS = "dots"  # id of what the dots are in
_MOST_POINTS = 400  # of a curve; more are averaged
_FEWEST_BINS, _MOST_BINS = 5, 20


class Dot(NamedTuple):
    """A case in a plot: where, what is said of it, and the part of the page that it opens."""

    value: float
    title: str
    link: str | None = None


def check_installed() -> None:
    """Raise where a library of the extra is missing.

    Raises:
        ArgumentError: And it says which extra to install.
    """
    import_extra("report", "jinja2", "matplotlib")


def curves(
    title: str,
    lines: Mapping[str, Sequence[tuple[float, float]]],
    *,
    ylabel: str,
    log: bool = False,
) -> str:
    """Lines over the training's steps; each is pairs of step and value."""
    with _figure(6.0, 2.8) as (figure, axes):
        for (name, points), style in zip(
            lines.items(), ((_INK, "-"), (BLUE, "--"), (GREEN, "-."), (RED, ":")), strict=False
        ):
            x, y = _thinned(points)
            marker = "." if len(x) < 40 else ""
            axes.plot(x, y, color=style[0], linestyle=style[1], marker=marker, label=name)
        axes.set_xlabel("step")
        axes.set_ylabel(ylabel)
        axes.grid(color=_INK, alpha=0.12)
        if len(lines) > 1:
            axes.legend()
        axes.margins(x=0.01)
        return _svg(figure, title)


def histogram(title: str, dots: Sequence[Dot], outliers: Sequence[bool], *, xlabel: str) -> str:
    """How often which value is; a dot below for each case, outliers as red triangles."""
    values = np.array([dot.value for dot in dots])
    with _figure(3.2, 2.1) as (figure, axes):
        bins = min(max(_FEWEST_BINS, round(len(values) ** 0.5 * 1.5)), _MOST_BINS)
        axes.hist(values, bins=bins, color=BLUE, alpha=0.45)
        axes.set_title(title, parse_math=False)
        axes.set_xlabel(xlabel)
        axes.set_ylabel("scans")
        axes.yaxis.get_major_locator().set_params(integer=True)
        top = axes.get_ylim()[1]
        axes.set_ylim(-0.14 * top, top)
        axes.set_yticks([tick for tick in axes.get_yticks() if 0 <= tick <= top])
        height = -0.07 * top
        titles: list[Dot] = []
        for marked, marker, colour, size in ((False, "o", BLUE, 14), (True, "^", RED, 34)):
            those = [dot for dot, out in zip(dots, outliers, strict=True) if out == marked]
            if those:
                axes.scatter([dot.value for dot in those], [height] * len(those), s=size, c=colour,
                             marker=marker, linewidths=0, gid=f"{_DOTS}-{len(titles)}")  # fmt: skip
                titles += those
        count = sum(outliers)
        label = f"{title}: {xlabel} in {len(values)} scans, {values.min():.3g} to "
        label += f"{values.max():.3g}, {count} outlier{'s' * (count != 1)}"
        return _svg(figure, label, titles)


def boxes(title: str, groups: Mapping[str, Sequence[Dot]]) -> str:
    """A box per group, quartiles and whiskers of 1.5 times their distance, and every case a dot."""
    names = list(groups)
    with _figure(6.0, 1.1 + 0.42 * len(names)) as (figure, axes):
        values = [[dot.value for dot in groups[name]] for name in names]
        line = {"color": _INK}
        axes.boxplot(values, orientation="horizontal", positions=range(len(names)),
                     widths=0.6, showfliers=False, boxprops=line, whiskerprops=line,
                     capprops=line, medianprops={"color": RED, "linewidth": 2})  # fmt: skip
        titles: list[Dot] = []
        for row, dots in enumerate(groups.values()):
            if dots:
                # Beside each other where values are alike: the same in every run.
                height = row + 0.2 * ((np.arange(len(dots)) * 0.618) % 1 - 0.5) * 2
                axes.scatter([dot.value for dot in dots], height, s=18, c=BLUE, alpha=0.75,
                             linewidths=0, gid=f"{_DOTS}-{len(titles)}", zorder=3)  # fmt: skip
                titles += dots
        axes.set_yticks(range(len(names)), names, parse_math=False)
        axes.invert_yaxis()
        axes.set_xlabel(title, parse_math=False)
        axes.grid(axis="x", color=_INK, alpha=0.12)
        label = f"{title} by organ, a box and a dot for every case; the numbers are in the table"
        return _svg(figure, label, titles)


def _thinned(points: Sequence[tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values, averaged over neighbours where there are too many."""
    table = np.array(points, float).reshape(-1, 2)
    if len(table) > _MOST_POINTS:
        parts = np.array_split(table, _MOST_POINTS)
        table = np.array([part.mean(axis=0) for part in parts])
    return table[:, 0], table[:, 1]


@contextlib.contextmanager
def _figure(width: float, height: float) -> Iterator[tuple[Any, Any]]:
    """A figure of so many inches, with its axes."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.subplots()


def _svg(figure: Any, label: str, dots: Sequence[Dot] = ()) -> str:
    """The figure as an element of a page: without ids of its own, dots with title and link."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("metadata", "style")):  # a style would hold in the whole page
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        for key in [key for key in element.attrib if key.startswith("{")]:
            element.set(key.rpartition("}")[2], element.attrib.pop(key))
    for group in root.iter("g"):
        name, _, first = group.get("id", "").partition(f"{_DOTS}-")
        if not name and first:
            _add_titles(group, dots[int(first) :])
    text = ElementTree.tostring(root, encoding="unicode")
    used = {*re.findall(r'"#(\w+)"', text), *re.findall(r"url\(#(\w+)\)", text)}
    for element in root.iter():
        if element.get("id") not in used:
            element.attrib.pop("id", None)
    box = root.get("viewBox", "")
    root.attrib = {"viewBox": box, "role": "img", "aria-label": label}
    root.set("style", f"width: {float(box.split()[2]) * 4 / 3:.0f}px")
    text = ElementTree.tostring(root, encoding="unicode")
    own = f"p{zlib.crc32(text.encode()):x}-"  # matplotlib's ids are alike in all plots
    text = re.sub(r'(\bid="|"#(?!scan-)|url\(#)(?=\w)', rf"\g<1>{own}", text)
    return text.replace(_INK, "currentColor")


def _add_titles(group: ElementTree.Element, dots: Sequence[Dot]) -> None:
    """Give the markers of a group, in order, what is said of their cases and the link."""
    markers = [
        (parent, child)
        for parent in group.iter()
        if parent.tag != "defs"
        for child in parent
        if child.tag in ("use", "path")
    ]
    for (parent, marker), dot in zip(markers, dots, strict=False):
        ElementTree.SubElement(marker, "title").text = dot.title
        if dot.link:
            place = list(parent).index(marker)
            parent.remove(marker)
            # The table beside the plot has the same links, in an order, for the keyboard.
            link = ElementTree.Element("a", {"href": f"#{dot.link}", "tabindex": "-1"})
            link.append(marker)
            parent.insert(place, link)
