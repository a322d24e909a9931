"""The paper's figures, tables and claims from the records of runs, beside the paper's own numbers.

    python plot.py results                   # writes results/report/REPORT.md and its pictures
    python plot.py results --table table1    # prints one figure or table as text
    python plot.py results --csv runs.csv    # writes every epoch of every run as a row

Which runs belong to a figure or table is in paper.py, the statements and their verdicts in claims.py.
"""

import csv
import io
import itertools
import math
import shlex
import sys
import textwrap
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from claims import FAILS, HOLDS, TIED, UNDECIDED, judge_all, judge_speed, number
from paper import NAMES, NO_L2, PAPER, SATURATION, TARGETS, WHOLE, file_name, make_sections, name_of
from records import ACCURACY, LOSS, atomic_write, flush, plural, power, read_all, statistic

# -------------------------------------------------------------------------------------------------- pictures


@dataclass(frozen=True)
class Look:
    """How a method is drawn."""

    color: str
    marker: str
    line: object = "-"  # a line style of matplotlib


LOOKS = {
    "bn": Look("#1b4f9c", "o"),
    WHOLE: Look("#6ea0d8", "h"),
    "none": Look("#d1495b", "s", "--"),
    "zeroinit": Look("#e39b0b", "^", "-."),
    "biases": Look("#7a5195", "v", ":"),
    "dropout": Look("#4f9d69", "D", ":"),
    "scalar": Look("#222222", "P", (0, (5, 1))),
    "biases+dropout": Look("#999999", "X", (0, (1, 1))),
    NO_L2: Look("#b07aa1", "<", (0, (3, 1, 1, 1))),
    "zeroinit-nodropout": Look("#2a9d8f", ">", (0, (3, 1, 1, 1))),
    "zeroinit+bias": Look("#8c564b", "d", (0, (5, 1))),
    "fixup": Look("#7fa93c", "p", (0, (5, 5))),
}
SPARE_COLORS = ("#c2185b", "#00838f", "#6d4c41", "#3949ab", "#9e9d24", "#ef6c00", "#546e7a")
SPARE_MARKERS = ("*", "8", "H", "d", "X")  # for all other methods


def looks_of(sections):
    """A look for every method; those that LOOKS does not name get one in the order of their names."""
    grids = [grid for section in sections for grid in section.grids]
    unknown = sorted({name for grid in grids for name in (grid.method, grid.whole)} - LOOKS.keys())
    spare = zip(unknown, itertools.cycle(SPARE_COLORS), itertools.cycle(SPARE_MARKERS), strict=False)
    return LOOKS | {method: Look(color, marker, (0, (2, 1))) for method, color, marker in spare}


@dataclass(frozen=True)
class Mark:
    """A point of a line."""

    x: float
    y: float | None = None  # None: it diverged; of optimal rates, no rate trains
    down: float = 0.0  # the lengths of its bar
    up: float = 0.0
    edge: bool = False  # hollow: more rates or seeds could be better
    best: bool = False  # with a ring: the optimum


@dataclass(frozen=True)
class Line:
    """The marks of one method."""

    method: str
    marks: list
    paper: bool = False  # the paper's numbers: light, and not connected
    thin: bool = False  # one of many runs


SIZE, DEPTH, RATE, EPOCH = "batch size", "layers", "learning rate", "epoch"  # the x axes


@dataclass(frozen=True)
class Panel:
    """One set of axes; those with the same labels have the same ranges."""

    title: str
    xlabel: str
    ylabel: str
    lines: list
    metric: object = None  # on the y axis; None for learning rates


def label_of(section, metric):
    return metric.name if metric is LOSS else f"{section.setup.accuracy} (%)"


def value_mark(x, metric, stat, **more):
    """A mark at a mean with its deviation, or without a value where there is none."""
    if stat is None or stat.mean is None:
        return Mark(x)
    scale = 1 if metric is LOSS else 100
    return Mark(x, scale * stat.mean, *[scale * (stat.std or 0.0)] * 2, **more)


def result_mark(result, rates):
    """A mark at what a result reaches, or at its optimal rate with the bracket of the rates tied with it."""
    best = result.best
    if not rates:
        return value_mark(result.x, result.metric, result.grid.reached(result.metric), edge=result.open)
    ends = (best.rate - best.tied[0], best.tied[-1] - best.rate, result.open) if best else ()
    return Mark(result.x, best and best.rate, *ends)


def paper_lines(section, target, metric, rates, methods):
    """What the paper's tables and text say of the methods of a figure, or of the picture of depth."""
    light = {method: [] for method in methods}
    for (_, method, depth, bs), cell in PAPER.items() if section.beside(target) else ():
        here = bs == section.bs if target.deep else depth == section.depth
        value = cell.accuracy if metric is ACCURACY else cell.loss
        if rates:
            value = 2.0 ** cell.rates[0] if cell.rates and section.same_rates else None
        if method in light and here and target.deep == bool(cell.rates) and value is not None:
            light[method].append(Mark(depth if target.deep else bs, value))
    if target is TARGETS["fig2"] and metric is ACCURACY and section.beside(target) and section.same_rates:
        last = max(result.x for line in section.shown(target).values() for result in line)
        saturated = SATURATION if last >= 4096 else ()
        light |= {method: [Mark(last, 2.0 ** SATURATION[method])] for method in saturated if method in light}
    return [Line(method, marks, paper=True) for method, marks in light.items() if marks]


def figure_panel(section, target, metric, rates, title=""):
    """What the methods reach, or their optimal rates, against batch size or depth."""
    shown = section.shown(target, metric)
    lines = [Line(method, [result_mark(result, rates) for result in line]) for method, line in shown.items()]
    lines += paper_lines(section, target, metric, rates, shown)
    axis, label = DEPTH if target.deep else SIZE, "optimal learning rate"
    return Panel(title, axis, label if rates else label_of(section, metric), lines, None if rates else metric)


def rates_panel(section, depth, bs, metric, title):
    """A metric against the learning rate, a line for each method, at one depth and batch size."""
    lines = []
    for grid in (grid for grid in section.grids if (grid.depth, grid.bs) == (depth, bs)):
        best, marks = grid.best(metric), []
        for rate, runs in sorted(grid.runs.items()):
            stat = statistic([run["final"] for run in runs], metric)
            marks.append(value_mark(rate, metric, stat, best=bool(best) and best.rate == rate))
        lines.append(Line(grid.method, marks))
        for target in TARGETS.values():
            cell = PAPER.get((target.table, grid.method, depth, bs))
            told = cell and cell.rates and metric is ACCURACY and section.same_rates
            if told and section.beside(target):
                lines.append(Line(grid.method, [Mark(2.0 ** cell.rates[0], cell.accuracy)], paper=True))
    return Panel(title, RATE, label_of(section, metric), lines, metric)


BY_DEPTH = replace(TARGETS["table2"], title="Depth", caption="All methods", methods=tuple(NAMES), barred=())


def depth_panels(section):
    """Accuracy and optimal rate against depth; below, accuracy against the learning rate at each depth."""
    top = [figure_panel(section, BY_DEPTH, ACCURACY, rates) for rates in (False, True)]
    top = [replace(p, lines=[it for it in p.lines if it.paper or len(it.marks) > 1]) for p in top]
    depths = sorted({grid.depth for grid in section.grids if grid.bs == section.bs})
    rows = [top, [rates_panel(section, depth, section.bs, ACCURACY, f"{depth} layers") for depth in depths]]
    rows = [[panel for panel in row if panel.lines] for row in rows]
    return [row for row in rows if row]


def curve(run, metric):
    """The marks of a run at the epochs where the metric was measured; the last one says if it diverged."""
    history = run["history"]
    lost = [Mark(len(history) + 1)] if run["status"] == "diverged" else []
    if metric is LOSS:
        return [Mark(entry["epoch"], entry["train_loss"] + entry["l2"]) for entry in history] + lost
    return [Mark(entry["epoch"], 100 * entry[metric.key]) for entry in history if metric.key in entry] + lost


def curves_panel(section, depth, bs, metric, title):
    """A metric against the epoch, for every run at the optimal rate and every run that diverged."""
    lines = []
    for grid in (grid for grid in section.grids if (grid.depth, grid.bs) == (depth, bs)):
        best = grid.best(metric)
        for rate, runs in grid.runs.items():
            shown = [run for run in runs if run["status"] == "diverged" or (best and rate == best.rate)]
            lines += [Line(grid.method, curve(run, metric), thin=True) for run in shown]
    return Panel(title, EPOCH, label_of(section, metric), lines, metric)


# ------------------------------------------------------------------------------------------------------ axes

LANE = 0.055  # the part of the height that the crosses of one method take


class Scale:
    """A y axis that is linear on either side of a knee.

    The better values are stretched if a method that collapses would flatten them: 94.4 and 94.5 stay apart.
    """

    def __init__(self, values, sign):
        ordered = sorted(values, reverse=sign > 0)
        best, worst = ordered[0], ordered[-1]
        good, span = abs(best - ordered[3 * len(ordered) // 5]), abs(best - worst) or 1.0
        self.best, self.worst, self.knee, self.zoomed = best, worst, worst, 0 < good < 0.1 * span
        if self.zoomed:  # the better three fifths, up to a round number
            step = 10.0 ** math.floor(math.log10(good))
            self.knee = step * (math.floor if sign > 0 else math.ceil)((best - sign * good) / step)
            self.zoomed = abs(best - self.knee) < span
        fine, rest = abs(best - self.knee), abs(self.knee - worst) or span
        slopes = (0.7 / fine, 0.3 / rest) if self.zoomed else (1 / span, 1 / span)
        self.above, self.below = slopes[:: 1 if sign > 0 else -1]

    def forward(self, y):
        y = np.asarray(y, dtype=float) - self.knee
        return np.where(y < 0, self.below * y, self.above * y)

    def inverse(self, z):
        z = np.asarray(z, dtype=float)
        return self.knee + np.where(z < 0, z / self.below, z / self.above)

    def ticks(self):
        """Round numbers on either side; those near the knee only on the better one."""
        from matplotlib.ticker import MaxNLocator

        def within(one, other, most):
            low, high = sorted((one, other))
            found = MaxNLocator(most, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
            return [round(float(tick), 9) for tick in found if low <= tick <= high] or [one]

        rest = within(self.knee, self.worst, 3) if self.zoomed else []
        rest = [tick for tick in rest if abs(self.forward(tick)) > 0.07]
        return within(self.best, self.knee, 6) + rest


def powers(low, high):
    """Powers of two from low to high, about six of them."""
    low, high = math.ceil(math.log2(low) - 1e-9), math.floor(math.log2(high) + 1e-9)
    return [2.0**k for k in range(low, high + 1, max(1, math.ceil((high - low) / 6)))]


def rate_text(rate):
    return f"$2^{{{math.log2(rate):.0f}}}$" if math.log2(rate).is_integer() else power(rate)


def set_x(axes, label, xs, room):
    """Scale and ticks of the x axis, with room at its ends; batch sizes and depths are plain numbers."""
    if label is EPOCH:
        return axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xscale("log", base=2)
    if label is RATE:
        shown = powers(xs[0], xs[-1]) or xs
        axes.set_xticks(shown, map(rate_text, shown))
    else:
        shown = xs[:: math.ceil(len(xs) / 7)]
        axes.set_xticks(shown, [f"{x:g}" for x in shown])
    axes.minorticks_off()
    pad = max(1.3, room, (xs[-1] / xs[0]) ** 0.06)
    axes.set_xlim(xs[0] / pad, xs[-1] * pad)


def set_y(axes, metric, ys, lanes):
    """Scale and ticks of the y axis, with room for the crosses at its bad end."""
    room, good = 0.05 + LANE * lanes, 0.06
    if not ys:
        axes.set_yticks([])  # all diverged: there is no scale
    elif metric is None:
        low, high = math.log2(min(ys)), math.log2(max(ys))
        size = (high - low or 1) / (1 - room - good)
        axes.set_yscale("log", base=2)
        axes.set_ylim(2 ** (low - room * size), 2 ** (high + good * size))
        axes.set_yticks(powers(2**low, 2**high), map(rate_text, powers(2**low, 2**high)))
    else:
        scale = Scale(ys, metric.sign)
        low, high = sorted(map(float, scale.forward([scale.best, scale.worst])))
        below, above = (room, good) if metric.sign > 0 else (good, room)
        size = (high - low or 1) / (1 - room - good)
        ends = low - below * size, high + above * size
        axes.set_yscale("function", functions=(scale.forward, scale.inverse))
        axes.set_ylim(*scale.inverse(ends))
        axes.set_yticks(scale.ticks(), [f"{tick:g}" for tick in scale.ticks()])
        if scale.zoomed:
            outer, middle = scale.inverse([ends[metric.sign < 0], scale.forward(scale.worst) / 2])
            axes.axhspan(scale.knee, outer, color="#f0f0f0", zorder=0)
            style = {"va": "center", "rotation": 90, "size": 6, "c": "#808080"}
            axes.text(1.01, middle, "compressed", transform=axes.get_yaxis_transform(), **style)
    axes.minorticks_off()


def draw_line(axes, layer, line, look, shift, lane, metric):
    """A line with bars; hollow at edges, a ring at the best, crosses at the bad end for what diverged."""
    xs, ys = [mark.x * shift for mark in line.marks], [math.nan if m.y is None else m.y for m in line.marks]
    style = {"color": look.color, "marker": look.marker, "ms": 5, "ls": look.line, "lw": 1.4}
    if line.paper:
        style |= {"ls": "none", "ms": 10, "mew": 1.8, "fillstyle": "none", "alpha": 0.4}
    if line.thin:
        style |= {"lw": 0.8, "ms": 2, "alpha": 0.6}
    bars = [[mark.down for mark in line.marks], [mark.up for mark in line.marks]]
    axes.errorbar(xs, ys, bars if np.any(bars) else None, capsize=2.5, elinewidth=0.9, zorder=layer, **style)
    bare = style | {"ls": "none", "zorder": layer + 0.5}
    ring = {"marker": "o", "ms": 11, "fillstyle": "none", "clip_on": False}
    for mark in (mark for mark in line.marks if mark.y is not None):
        if mark.edge:
            axes.plot(mark.x * shift, mark.y, **bare | {"markerfacecolor": "white"})
        if mark.best:
            axes.plot(mark.x * shift, mark.y, **bare | ring)
    lost = [mark.x * shift for mark in line.marks if mark.y is None]
    height = abs((metric is LOSS) - LANE * (lane + 0.6))  # at the bad end, each method on a lane of its own
    for marker in (look.marker, "x") if lost else ():
        cross = {"marker": marker, "ms": 6, "fillstyle": "none", "transform": axes.get_xaxis_transform()}
        axes.plot(lost, [height] * len(lost), **bare | cross)


def draw_panel(axes, panel, panels, methods, looks):
    """One panel; its ranges are those of all panels with its labels."""
    beside = [other for other in panels if other.xlabel == panel.xlabel]
    alike = [other for other in beside if other.ylabel == panel.ylabel]
    xs = sorted({mark.x for other in beside for line in other.lines for mark in line.marks})
    marks = [mark for other in alike for line in other.lines for mark in line.marks if mark.y is not None]
    lost = [{line.method for line in p.lines for mark in line.marks if mark.y is None} for p in alike]
    wide = 0.012 * math.log2(xs[-1] / xs[0]) if panel.xlabel in (DEPTH, SIZE) else 0
    set_x(axes, panel.xlabel, xs, 2 ** (wide * len(methods) / 2 + 0.15))
    ys = [y for mark in marks for y in (mark.y - mark.down, mark.y, mark.y + mark.up)]
    set_y(axes, panel.metric, ys, max(map(len, lost)))
    lanes = sorted(lost[alike.index(panel)], key=methods.index)
    for layer, line in enumerate(panel.lines, 2):
        # marks at the same place stand side by side
        shift = 2 ** (wide * (methods.index(line.method) - (len(methods) - 1) / 2))
        lane = lanes.index(line.method) if line.method in lanes else 0
        draw_line(axes, layer, line, looks[line.method], shift, lane, panel.metric)


def draw(folder, name, caption, rows, looks):
    """Write rows of panels with one legend as PNG and SVG, always the same bytes; return Markdown."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    style = {"svg.hashsalt": "plot", "font.size": 9, "axes.grid": True, "grid.color": "#e4e4e4"}
    matplotlib.rcParams.update(style)
    columns, widest = math.lcm(*map(len, rows)), max(map(len, rows))
    width, height = {1: (5.4, 3.6), 2: (4.2, 3.3)}.get(widest, (3.1, 2.7))
    figure = Figure(figsize=(width * widest, height * len(rows)), layout="constrained")
    figure.suptitle(textwrap.fill(caption, round(17 * width * widest)), fontsize=8.5, color="#666666")
    places = figure.add_gridspec(len(rows), columns)
    panels = [panel for row in rows for panel in row if panel]
    methods = list(dict.fromkeys(line.method for panel in panels for line in panel.lines))
    methods.sort(key=[*NAMES, *sorted(methods)].index)
    for i, row in enumerate(rows):
        step, left = columns // len(row), None
        for j, panel in ((j, panel) for j, panel in enumerate(row) if panel):
            axes = figure.add_subplot(places[i, j * step : (j + 1) * step], title=panel.title)
            axes.set(xlabel=panel.xlabel, ylabel="" if panel.ylabel == left else panel.ylabel)
            left = panel.ylabel
            draw_panel(axes, panel, panels, methods, looks)
    handles = []
    for method, look in ((method, looks[method]) for method in methods):
        handles.append(Line2D([], [], c=look.color, marker=look.marker, ls=look.line, label=name_of(method)))
    if any(line.paper for panel in panels for line in panel.lines):
        light = {"ls": "none", "ms": 9, "fillstyle": "none", "alpha": 0.5, "label": "the paper"}
        handles.append(Line2D([], [], c="#555555", marker="o", **light))
    ncols = max(2, int(figure.get_figwidth() / 2.4))
    figure.legend(handles=handles, loc="outside lower center", ncols=ncols, handlelength=2.8)
    folder.mkdir(parents=True, exist_ok=True)
    for kind, unstamped in (("png", {"Software": None}), ("svg", {"Date": None})):
        with atomic_write(folder / f"{name}.{kind}") as file:
            figure.savefig(file, format=kind, dpi=150, metadata=unstamped)
        figure.set_layout_engine("none")  # the second picture keeps the places of the first
    return f"![{name}]({folder.name}/{name}.png)"


# ---------------------------------------------------------------------------------------------------- tables


def useful(header, rows):
    """The table without empty columns, and without layers or batch size where all rows have the same."""
    shown = []
    for i, name in enumerate(header):
        told = {row[i] for row in rows}
        shown += [i] if told != {"–"} and (len(told) > 1 or name not in ("Layers", "B")) else []
    return [header[i] for i in shown], [[row[i] for i in shown] for row in rows]


def markdown(header, rows):
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (header, ["---"] * len(header), *rows))


def plain(header, rows):
    """A table as text."""
    cells = [[str(cell).replace("*", "") for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rows = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in cells]
    return "\n".join("  ".join(row).rstrip() for row in rows)


def doubt(best):
    """Why another rate may be the optimal one."""
    words = [f"{best.edge} tried"] * bool(best.edge) + ["fewer seeds beside it"] * bool(best.unfinished)
    return f" **({', '.join(words)})**" if words else ""


def best_text(grid, metric):
    """A grid's number and its optimal rate with the bracket of tied rates."""
    best = grid.best(metric)
    if not best:
        tried = dict.fromkeys((power(min(grid.runs)), power(max(grid.runs))))
        return grid.failure, f"at {' to '.join(tried)}"
    text, top5 = number(grid, metric, best.mean, best.std), [final.get("test_top5") for final in best.kept]
    if None not in top5:
        text += f" / {100 * sum(top5) / len(top5):.2f}"
    bracket = f" ({power(best.tied[0])} – {power(best.tied[-1])})" if len(best.tied) > 1 else ""
    return text, power(best.rate) + bracket + doubt(best)


def paper_text(cell, digits):
    """What the paper's table says: accuracy, rate and loss."""
    if not cell:
        return "–", "–", "–"
    text = f"{cell.accuracy:.{digits}f}" + (f" ± {cell.std}" if cell.std else "")
    text += f" / {cell.top5:.2f}" if cell.top5 else ""
    bracket = f" (2^{cell.rates[1]} – 2^{cell.rates[2]})" if len(cell.rates) > 1 else ""
    rate = f"2^{cell.rates[0]}{bracket}" if cell.rates else "–"
    return text, rate, f"{cell.loss:.3f} ± {cell.loss_std}" if cell.loss else "–"


def row_of(section, depth, bs, method, grid, cell=None):
    """A row of a table: one method at one depth and batch size, ours beside the paper's."""
    accuracy, rate, loss = paper_text(cell, section.setup.digits)
    rate = rate if section.same_rates else "–"
    if not grid:
        return [depth, bs, name_of(method), "not run", accuracy, "–", rate, "–", loss, "–", "–", "–"]
    metrics, runs = section.setup.metrics, [run for runs in grid.runs.values() for run in runs]
    texts = [best_text(grid, metric) for metric in metrics]
    (value, our_rate), (our_loss, its_rate), *_ = [*texts, ("–", "–")]
    optima = [best for metric in metrics if (best := grid.best(metric))]
    kept = ", ".join(dict.fromkeys(f"{len(best.kept)} of {best.runs}" for best in optima)) or "–"
    lost = f"{sum(run['status'] == 'diverged' for run in runs)} of {len(runs)}"
    return [depth, bs, name_of(method), value, accuracy, our_rate, rate, our_loss, loss, its_rate, kept, lost]


def header_of(section):
    accuracy = "Top-1 / top-5 (%)" if section.config.get("version") else "Test accuracy (%)"
    return f"Layers|B|Method|{accuracy}|Paper|Rate|Paper|Training loss|Paper|Rate|Seeds|Diverged".split("|")


def figure_text(result, rates):
    """A result's number, or its optimal rate, and why that may be another."""
    if not result.best:
        return result.grid.failure
    number_text, rate = best_text(result.grid, result.metric)
    return rate if rates else number_text + doubt(result.best)


def figure_table(section, target):
    """Header and rows of a figure: each method's numbers, or optimal rates, at each batch size."""
    found = [(metric, section.shown(target, metric)) for metric in section.setup.metrics]
    sizes, rows = sorted({result.x for _, lines in found for line in lines.values() for result in line}), []
    for metric, lines in found:
        for method, line in lines.items():
            texts = {result.x: figure_text(result, target.rates) for result in line}
            rows.append([label_of(section, metric), name_of(method), *(texts.get(x, "–") for x in sizes)])
    return ["", "Batch size", *sizes], rows


def table_of(section, target):
    """Header and rows of a figure or table; no rows if it was not run."""
    if not target.table:
        return figure_table(section, target)
    lines = section.shown(target)
    beside = lines and section.beside(target)
    ours = {(p.grid.depth, p.grid.bs, method): p.grid for method, line in lines.items() for p in line}
    theirs = [(key, cell) for key, cell in PAPER.items() if beside and key[0] == target.table]
    paper = {(depth, bs, method): cell for (_, method, depth, bs), cell in theirs}
    order = [*target.methods, *lines]
    keys = sorted(ours.keys() | paper.keys(), key=lambda key: (key[:2], order.index(key[2])))
    return useful(header_of(section), [row_of(section, *key, ours.get(key), paper.get(key)) for key in keys])


def print_table(sections, name):
    """A figure or table of every section that has it, as text."""
    target, parts = replace((TARGETS | {"demo": BY_DEPTH})[name], barred=()), []
    for section in sections:
        header, rows = table_of(section, target)
        title = f"{target.title}. {caption_of(section, target)}\n{section.title}"
        parts += [f"{title}\n\n{plain(header, rows)}"] if rows else []
    few = "depths were run" if target.deep else "batch sizes were run, or none is its own"
    nothing = f"{target.title}: fewer than {target.least} of its {few}" if target.least > 1 else ""
    nothing = nothing or f"{target.title}: nothing was run{'' if target.version else ' at 16 layers'} yet"
    return "\n\n".join(parts) or f"{nothing} (bash sweep.sh {name}); the report shows all runs"


def caption_of(section, target):
    """What a figure or table shows, and what all of it has in common."""
    words = [] if target.version or target.deep else [f"{16 if target.table else section.depth} layers"]
    words += [f"batch size {section.bs}"] if target.table and not target.version else []
    return ", ".join([target.caption, *words])


# ---------------------------------------------------------------------------------------------------- report

NOTE = """Of n runs at a learning rate the best ⌈0.8 n⌉ are kept (12 of 15), for accuracy and loss
independently. A number is their mean ± one standard deviation at the rate with the best mean; rates
in brackets are tied with it. *Edge*: that rate is the lowest or highest tried. A statement that
more rates or seeds could overturn is undecided. Tied: the difference is below its standard error (of
a single run: that of an accuracy on so many test images, 1% of a loss). Pictures: bars are standard
deviations or tied rates; hollow: more rates or seeds could be better (an edge, the next rate over a
factor of 4 away, fewer seeds at a rate that is beside it, tied or better); a ring: the optimum;
crossed out, at the bad end: diverged, and optimal rates where none trains; grey: a part of an axis
that is compressed."""


def tally(answers):
    """How many statements hold, in one line."""
    count = Counter(answer.verdict for answer in answers)
    told = f"{count[HOLDS]} hold, {count[FAILS]} do not, {count[TIED]} tied, {count[UNDECIDED]} undecided"
    return f"of {len(answers)} statements: {told}"


def where(answer, labels):
    """The section that an answer is from, and those with another verdict."""
    others = {labels[s]: v for s, v in answer.elsewhere.items() if v not in (answer.verdict, UNDECIDED)}
    text = ", ".join(f"{label}: {verdict.value}" for label, verdict in others.items())
    return labels.get(answer.section, "–") + (f" ({text})" if text else "")


def verdict_tables(answers, labels, out):
    """Markdown: a table for each verdict; what is undecided is folded, by the commands that would decide it.

    `out` ends these commands.
    """
    header, undecided = ["#", "Statement", "Place", "Ours", "Seeds", "Section"], {}
    tables = {verdict: [] for verdict in (HOLDS, FAILS, TIED)}
    for n, answer in enumerate(answers, 1):
        row, ours = [n, answer.claim.statement, answer.claim.place], answer.ours or "–"
        if answer.verdict is UNDECIDED:
            command = answer.command.replace(" && ", f"{out} && ") + out
            undecided.setdefault(command, []).append([*row, answer.reason, ours])
        else:
            tables[answer.verdict].append([*row, ours, answer.seeds or "–", where(answer, labels)])
    for verdict, rows in tables.items():
        if rows:
            yield f"## {verdict.value.capitalize()} ({len(rows)})\n\n{markdown(header, rows)}"
    if undecided:
        header = [*header[:3], "Why", "Ours so far"]
        parts = [f"```bash\n{line}\n```\n\n{markdown(header, rows)}" for line, rows in undecided.items()]
        count = sum(map(len, undecided.values()))
        yield folded(f"<b>Undecided ({count})</b>, by what would decide it", "\n\n".join(parts))


def folded(summary, text):
    return f"<details><summary>{summary}</summary>\n\n{text}\n\n</details>"


def protocol(section):
    """What of the protocol is not the paper's, what was run, and on what."""
    runs = [run for grid in section.grids for runs in grid.runs.values() for run in runs]
    paper, width = section.setup.protocol, section.config.get("width")
    ours = [(key.replace("_", " "), value, paper[key]) for key, value in section.differences.items()]
    words = [f"{key} {value} instead of {'all' if other is None else other}" for key, value, other in ours]
    words += [f"width {width} instead of 4 (2 in Tables 2 and 3)"] if width not in (None, 2, 4) else []
    seeds = sorted(max(map(len, grid.runs.values())) for grid in section.grids)
    span = " to ".join(map(str, dict.fromkeys((seeds[0], seeds[-1]))))
    words += [f"seeds {span} instead of {section.setup.seeds}"] if seeds[0] < section.setup.seeds else []
    odd = any(grid.method not in (*NAMES, grid.config["init"]) for grid in section.grids)
    words += ["methods with options of their own"] if odd else []
    told = f"Not the paper's protocol: {', '.join(words)}" if words else "The paper's protocol"
    lost = sum(run["status"] == "diverged" for run in runs)
    found = {key: {str(run["environment"].get(key)) for run in runs} for key in ("device", "torch", "commit")}
    made = [f"{key} {', '.join(sorted(values))}" for key, values in found.items()]
    return f"{told}. {plural(len(runs), 'run')}, {lost} diverged; {'; '.join(made)}."


def small_multiples(section, draws, metric, without=()):
    """Rows of four panels, one for each depth and batch size, of those with more than a single mark."""
    places = dict.fromkeys((grid.depth, grid.bs) for grid in section.grids).keys() - without
    panels = [draws(section, *at, metric, f"{at[0]} layers, batch size {at[1]}") for at in sorted(places)]
    some = [p for p in panels if any(mark.y is not None for line in p.lines for mark in line.marks)]
    panels = [panel for panel in some if any(len(line.marks) > 1 for line in panel.lines)]
    rows = [panels[i : i + 4] for i in range(0, len(panels), 4)]
    return rows if len(rows) < 2 else [row + [None] * (4 - len(row)) for row in rows]


def section_parts(section, looks, home, curves):
    """Yield (name, Markdown) of a section's pictures and tables; each grid is in one table only."""
    folder, seen = home / file_name(section.title), set()
    deep = {(grid.depth, grid.bs) for grid in section.grids if grid.bs == section.bs}
    deep = deep if len(deep) > 1 and LOSS in section.setup.metrics else set()
    if deep:
        title = f"Depth: {section.title}, batch size {section.bs}"
        yield "depth", draw(folder, "depth", title, depth_panels(section), looks)
    for name in ("fig1", "fig2", "fig3", "fig4", "table2", "table3", "table4", "table5", "table1"):
        target = TARGETS[name]
        grids = {result.grid for line in section.shown(target).values() for result in line}
        if not (grids - seen if target.table else grids):
            continue
        seen |= grids
        table = markdown(*table_of(section, target))
        if not target.table:
            panels = []
            for letter, metric in zip("ab", section.setup.metrics, strict=True):
                panels.append(figure_panel(section, target, metric, target.rates, f"{letter}) {metric.name}"))
            title = f"{target.title}: {section.title}, {section.depth} layers"
            yield name, draw(folder, name, title, [panels], looks)
            table = folded("Numbers", table)
        yield "", f"**{target.title}.** {caption_of(section, target)}.\n\n{table}"
    if rest := [grid for grid in section.grids if grid not in seen]:
        rows = [row_of(section, grid.depth, grid.bs, grid.method, grid) for grid in rest]
        yield "", f"**Other runs.**\n\n{markdown(*useful(header_of(section), rows))}"
    for metric in section.setup.metrics:
        kinds = {"rates": (rates_panel, deep if metric is ACCURACY else set())}
        kinds |= {"curves": (curves_panel, set())} if curves else {}
        for kind, (draws, drawn_before) in kinds.items():
            if rows := small_multiples(section, draws, metric, drawn_before):
                yield "", draw(folder, f"{kind}_{metric.key}", section.title, rows, looks)


def report(folder, sections, problems, curves):
    """Write RESULTS/report/REPORT.md and its pictures; return its path and the tally."""
    home, looks, answers = folder / "report", looks_of(sections), [*judge_all(sections), judge_speed(folder)]
    labels = {section: f"S{n}" for n, section in enumerate(sections, 1)}
    top, parts = {}, []
    for section, label in labels.items():
        parts.append(f"# {label}. {section.title}\n\n{protocol(section)}")
        for name, text in section_parts(section, looks, home, curves):
            if name and name not in top:
                top[name] = text
            else:
                parts.append(text)
    listed = "\n".join(f"- {name}: {problem}" for name, problem in problems.items())
    parts += [f"# Files that were not used\n\n{listed}"] if problems else []
    names = "\n".join(f"- {label}: {section.title}" for section, label in labels.items())
    line = tally(answers)
    head = f"**{line.capitalize()}.** Sections, nearest to the paper first:\n\n{names}"
    head = ["# How much of the paper holds", head, *(top[name] for name in sorted(top))]
    out = "" if folder == Path("results") else f" --out {shlex.quote(str(folder))}"
    text = "\n\n".join([*head, *verdict_tables(answers, labels, out), NOTE, *parts]) + "\n"
    home.mkdir(parents=True, exist_ok=True)
    with atomic_write(home / "REPORT.md") as file:
        file.write(text.encode(errors="backslashreplace"))
    return home / "REPORT.md", line


def write_csv(path, records):
    """Write a row for each run and epoch: all of its configuration, then what was measured."""
    keys = list(dict.fromkeys(key for record in records for key in record["config"]))
    measured = list(dict.fromkeys(key for record in records for entry in record["history"] for key in entry))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = ["epoch_lr" if key == "lr" else key for key in measured]  # `lr` is that of the configuration
    writer.writerow(["file", "status", *keys, *names])
    for record in records:
        start = [record["file"], record["status"], *(record["config"].get(key) for key in keys)]
        entries = record["history"] or [{}]  # it diverged in the first epoch
        writer.writerows([*start, *(entry.get(key) for key in measured)] for entry in entries)
    with atomic_write(path) as file:
        file.write(text.getvalue().encode(errors="backslashreplace"))


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("results", type=Path, help="folder with the records, RESULTS/DATA/RUN.json")
    add("--table", choices=[*TARGETS, "demo"], help="print this figure or table, draw nothing")
    add("--csv", type=Path, metavar="FILE", help="write a row for each run and epoch, draw nothing")
    add("--curves", action="store_true", help="also draw the learning curves at the optimal rates")
    args = parser.parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")
    records, problems = read_all(args.results)
    for name, problem in problems.items():
        print(f"{args.results / name}: not used: {problem}", file=sys.stderr)
    if not records:
        deeper = sorted({str(path.parent.parent) for path in args.results.glob("*/*/*_s[0-9]*.json")})
        hint = f"there are some in {', '.join(deeper)}" if deeper else f"as {args.results}/DATA/RUN.json"
        parser.exit(2, f"error: no records in {args.results} ({hint})\n")
    try:
        if args.csv:
            write_csv(args.csv, records)
            print(f"{args.csv}: {plural(len(records), 'run')}")
        elif args.table:
            print(print_table(make_sections(records), args.table))
        else:
            path, line = report(args.results, make_sections(records), problems, args.curves)
            print(f"{line}\nreport: {path}")
        sys.stdout.flush()
    except OSError as error:
        flush(sys.stdout)
        parser.exit(2, f"error: cannot write {error.filename or 'the output'}: {error.strerror}\n")


if __name__ == "__main__":
    main()
