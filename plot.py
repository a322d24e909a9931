"""The paper's figures, tables and claims, from the records of runs and beside the paper's own numbers.

    python plot.py results            # writes results/report/REPORT.md with every figure, table and claim
    python plot.py results --edges    # prints the learning rates to try next where an optimum lies on an edge

Statistics (section 3 of the paper): of the n runs at one learning rate the best ceil(0.8 n) are kept, 12 of 15, for the
test accuracy and for the training loss independently; each has its own optimal learning rate, the one of the best mean.
A diverged run is the worst of all: where one is among the kept, its learning rate has no mean and is never the optimum.
"""

import argparse
import functools
import io
import json
import math
import os
import re
import sys
from collections import Counter, defaultdict, namedtuple
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev

METHODS = {  # name, colour, marker and line: the legend of Figures 1 to 4 first, then the other rows of the tables
    "bn": ("Batch Normalization", "#1b4f9c", "o", "-"),
    "none": ("No Normalization", "#d1495b", "s", "--"),
    "zeroinit": ("ZeroInit", "#e39b0b", "^", "-."),
    "bn over the batch": ("Batch Normalization over the whole batch", "#76a5dc", "h", "-"),
    "biases": ("+ biases", "#7a5195", "v", ":"),
    "dropout": ("+ dropout", "#4f9d69", "D", ":"),
    "scalar": ("+ scalar multiplier", "#111111", "P", (0, (5, 1))),
    "biases+dropout": ("+ biases & dropout", "#999999", "X", (0, (1, 1))),
    "zeroinit without L2": ("ZeroInit without L2", "#b07aa1", "<", (0, (3, 1, 1, 1))),
    "zeroinit-nodropout": ("ZeroInit without Dropout", "#2a9d8f", ">", (0, (3, 1, 1, 1))),
    "fixup": ("Fixup", "#59a14f", "p", (0, (5, 5))),
}
FIGURES = {
    1: "Optimal test accuracy (a) and optimal training loss (b) at a range of batch sizes.",
    2: "The learning rates that maximize the test accuracy (a) and minimize the training loss (b).",
    3: "Optimal test accuracy (a) and training loss (b) with batch statistics over the whole batch.",
    4: "Optimal learning rates, as in Figure 2, with batch statistics over the whole batch.",
}
TABLES = {  # (table, method, depth): test accuracy (%), optimal learning rate, training loss; at batch size 64
    (1, "none", 16): ("92.3 ± 0.3", "–", "0.212 ± 0.004"),
    (1, "biases", 16): ("91.9 ± 0.2", "–", "0.205 ± 0.003"),
    (1, "dropout", 16): ("93.2 ± 0.1", "–", "0.226 ± 0.001"),
    (1, "scalar", 16): ("94.0 ± 0.1", "–", "0.181 ± 0.001"),
    (1, "biases+dropout", 16): ("93.6 ± 0.1", "–", "0.212 ± 0.001"),
    (1, "zeroinit", 16): ("94.4 ± 0.1", "–", "0.189 ± 0.001"),
    (2, "bn", 16): ("93.5 ± 0.1", "2^-1", "–"),
    (2, "bn", 100): ("94.7 ± 0.1", "2^-1 (2^-2 – 2^0)", "–"),
    (2, "bn", 1000): ("94.6 ± 0.1", "2^-2 (2^-3 – 2^0)", "–"),
    (2, "zeroinit", 16): ("93.3 ± 0.1", "2^-2", "–"),
    (2, "zeroinit", 100): ("94.2 ± 0.1", "2^-2", "–"),
    (2, "zeroinit", 1000): ("94.3 ± 0.2", "2^-2 (2^-3 – 2^-1)", "–"),
    (3, "zeroinit without L2", 16): ("91.0", "2^-3", "–"),
    (3, "zeroinit without L2", 100): ("92.2 ± 0.1", "2^-3", "–"),
    (3, "zeroinit without L2", 1000): ("92.5 ± 0.2", "2^-3", "–"),
    (3, "scalar", 16): ("93.1 ± 0.1", "2^-2 (2^-3 – 2^-2)", "–"),
    (3, "scalar", 100): ("94.1 ± 0.1", "2^-2 (2^-3 – 2^-2)", "–"),
    (3, "scalar", 1000): ("94.2 ± 0.1", "2^-1 (2^-2 – 2^-1)", "–"),
}
ALSO = {1: ("bn",), 2: ("none", "scalar"), 3: ()}  # rows beside the paper's, where they were run
SATURATION = {"bn": 2**4, "none": 2**-3, "zeroinit": 2**1}  # the largest optimal learning rates of Figure 2a
OPTIONS = {"momentum": 0.9, "l2_all": False, "scalar_lr": 1.0, "pad_mode": "zeros", "train_size": None}
PROTOCOL = {"data": "CIFAR-10", "epochs": 200} | OPTIONS
NOTE = """Each number is the mean of the best ceil(0.8 n) of n runs ± one standard deviation, at the learning rate with
the best mean; rates in brackets are tied with it, within one standard deviation; *edge*: it is the lowest or highest.
Kept: how many of all runs at that rate; diverged: of the runs at all rates. In the figures bars are standard deviations
or brackets, a hollow marker is an edge, and a crossed out one at the bottom diverged."""
SEEDS, BATCH, GHOST, DROPOUT, L2 = 15, 64, 64, 0.6, 5e-4

NAME = {method: look[0] for method, look in METHODS.items()}
THREE, TWO = ("bn", "none", "zeroinit"), ("bn", "zeroinit")  # the methods of Figures 1 to 4, and of most claims

Metric = namedtuple("Metric", "key name unit scale digits sign")  # the sign says whether more is better
ACCURACY = Metric("test_accuracy", "test accuracy", " (%)", 100, 1, +1)
LOSS = Metric("train_objective", "training loss", "", 1, 3, -1)  # with the L2 part: the paper's 0.18 cannot be without

# ------------------------------------------------------------------------------------------------------------- records


def power(rate):
    """A learning rate as the paper writes it, 2^-2."""
    return f"2^{math.log2(rate):.0f}" if math.log2(rate).is_integer() else f"{rate:g}"


def curve(record, metric):
    """The (epoch, number) of a run where the metric was measured; the training loss with its L2 part, as in `final`."""
    if metric is LOSS:
        return [(entry["epoch"], entry["train_loss"] + entry["l2"]) for entry in record["history"]]
    return [(entry["epoch"], metric.scale * entry[metric.key]) for entry in record["history"] if metric.key in entry]


def read_record(path):
    """A run's record with the name of its grid; raises an exception for a file that is anything else."""
    record = json.loads(path.read_text(encoding="utf-8"), parse_constant=int)  # int refuses NaN, which is not JSON
    config, final, done = record["config"], record["final"], record["status"] == "done"
    rate, seed = f"_lr{power(config['lr'])}_", f"_s{config['seed']:02d}"
    counts = ("bs", "epochs", *(("depth", "width") if config["model"] == "wrn" else ()))
    right = {key: isinstance(config[key], str) for key in ("model", "data", "init")}
    right |= {key: isinstance(config[key], int) and config[key] > 0 for key in counts}
    right |= {
        "name": rate in path.stem and path.stem.endswith(seed),
        "status": record["status"] in ("done", "diverged"),
        "final": not done or (0 <= final[ACCURACY.key] <= 1 and abs(final[LOSS.key]) < math.inf),
        "history": all(math.isfinite(sum(point)) for metric in (ACCURACY, LOSS) for point in curve(record, metric)),
        "environment": isinstance(record["environment"], dict),
        "fingerprint": isinstance(record["data"]["fingerprint"], str),
    }
    if not all(right.values()):
        raise ValueError(f"bad {', '.join(key for key, fine in right.items() if not fine)}")
    grid = f"{path.parent.name}/{path.stem.removesuffix(seed).replace(rate, '_', 1)}"
    return record | {"grid": grid, "config": OPTIONS | config | {"fingerprint": record["data"]["fingerprint"]}}


def read_records(folder):
    """All records in a results folder, and {file: what is wrong with it} for its other JSON files."""
    records, problems, first = [], {}, {}
    paths = [path for path in folder.glob("*/*.json") if path.parent.name not in ("report", "logs", "speed")]
    for path in sorted(paths):
        name = f"{path.parent.name}/{path.name}"
        try:
            record = read_record(path)
            if (same := first.setdefault(frozenset(record["config"].items()), name)) != name:
                raise ValueError(f"the same run as {same}")
            records.append(record)
        except Exception as error:  # a foreign file can be wrong in any way
            problems[name] = f"not used ({type(error).__name__}: {error})"
    return records, problems


# ---------------------------------------------------------------------------------------------------------- statistics


@dataclass(frozen=True, eq=False)
class Grid:
    """The runs of one configuration: a list of records for each learning rate."""

    name: str
    config: dict
    runs: dict

    @property
    def method(self):
        """The key of METHODS, or None where ghost batches, dropout or L2 are not the paper's."""
        init, bs, ghost, l2 = (self.config.get(key) for key in ("init", "bs", "ghost", "wd"))
        dropout = DROPOUT if init in ("dropout", "biases+dropout", "zeroinit") else 0
        if self.config["model"] != "wrn" or init not in METHODS or self.config.get("dropout") != dropout:
            return None
        if init == "zeroinit" and l2 == 0:
            return "zeroinit without L2"
        if init == "bn" and ghost == bs > GHOST:
            init, ghost = "bn over the batch", GHOST
        return init if l2 == L2 and ghost in (None, min(GHOST, bs)) else None


# A metric at its optimal learning rate: the rates tied with it; which end of the grid it is, if any; and as in the
# paper's tables the number, 94.4 ± 0.1, and the rate, 2^-2, or with its bracket, 2^-2 (2^-3 – 2^-1).
Optimum = namedtuple("Optimum", "grid metric bs depth rate mean std kept total tied edge value power bracketed")


def mean_of_best(runs, metric):
    """Mean, standard deviation and number of the best ceil(0.8 n) of n runs; the mean is nan if one diverged."""
    scores = [metric.sign * run["final"][metric.key] if run["status"] == "done" else -math.inf for run in runs]
    kept = sorted(scores, reverse=True)[: -(-4 * len(runs) // 5)]
    if kept[-1] == -math.inf:
        return math.nan, None, len(kept)
    return metric.sign * fmean(kept), stdev(kept) if len(kept) > 1 else None, len(kept)


@functools.cache
def optimum(grid, metric):
    """The optimal learning rate and what it reaches, None where all diverged; of equally good rates the lowest."""
    rates = sorted(grid.runs)
    points = {rate: mean_of_best(grid.runs[rate], metric) for rate in rates}
    trained = [rate for rate in rates if not math.isnan(points[rate][0])]
    if not trained:
        return None
    best = max(trained, key=lambda rate: metric.sign * points[rate][0])
    mean, std, kept = points[best]
    tied = [rate for rate in trained if std is not None and abs(points[rate][0] - mean) <= std] or [best]
    edge = " and ".join(word for word, end in (("lowest", rates[0]), ("highest", rates[-1])) if end == best)
    value = " ± ".join(f"{metric.scale * x:.{metric.digits}f}" for x in (mean, std) if x is not None)
    bracketed = power(best) + f" ({power(tied[0])} – {power(tied[-1])})" * (len(tied) > 1)
    bs, depth, total = grid.config["bs"], grid.config.get("depth"), len(grid.runs[best])
    return Optimum(grid, metric, bs, depth, best, mean, std, kept, total, tied, edge, value, power(best), bracketed)


def next_rates(grid):
    """The learning rates to try next: beyond each edge that is an optimum, or a lower one where every rate diverged."""
    best = [found.rate for metric in (ACCURACY, LOSS) if (found := optimum(grid, metric))]
    lowest, highest = min(grid.runs), max(grid.runs)
    return [lowest / 2] * (lowest in best or not best) + [highest * 2] * (highest in best)


# ------------------------------------------------------------------------------------------------------------ sections


@dataclass(frozen=True, eq=False)
class Section:
    """One protocol: grids that differ in nothing but method, depth and batch size."""

    title: str
    caption: str
    seeds: set
    grids: list

    @functools.cached_property
    def at(self):
        """{(method, depth, batch size): grid} of the paper's methods."""
        grids = {(grid.method, grid.config["depth"], grid.config["bs"]): grid for grid in self.grids if grid.method}
        return dict(sorted(grids.items(), key=lambda item: (*item[0][1:], list(METHODS).index(item[0][0]))))

    @functools.cached_property
    def depth(self):
        """The depth of the figures: the paper's 16, or the one with the most batch sizes."""
        sizes = Counter(depth for depth, _ in {key[1:] for key in self.at if key[0] in THREE})
        return 16 if sizes[16] > 1 else max(sizes, key=sizes.get, default=16)

    @functools.cached_property
    def batch(self):
        """The batch size of the tables: the paper's 64, or the one at which most was run."""
        sizes = Counter(bs for _, _, bs in self.at)
        return BATCH if sizes[BATCH] else max(sizes, key=sizes.get, default=BATCH)

    def line(self, figure, metric, method):
        """{batch size: optimum} of a method in a figure; in Figures 3 and 4 a ghost batch is the whole batch."""
        line = {}
        for (name, depth, bs), grid in self.at.items():
            wanted = "bn over the batch" if figure > 2 and method == "bn" and bs > GHOST else method
            shown = bs >= 16 if figure < 3 else bs <= 1024  # the batch sizes of the paper's figures
            if (name, depth) == (wanted, self.depth) and shown:
                line[bs] = optimum(grid, metric)
        return line

    def has_figure(self, figure):
        """Whether there are batch sizes for a figure, and for Figures 3 and 4 some that Figures 1 and 2 do not show."""
        bn, *others = [self.line(figure, ACCURACY, method) for method in THREE]
        small = sum(bs < GHOST for bs in bn) > 1 or any(bs < 16 or bs > GHOST for bs in bn)
        return len(set(bn).union(*others)) > 1 and (figure < 3 or small)

    def differences(self, **paper):
        """What is not as in the paper."""
        ours, paper = self.grids[0].config | {"depth": self.depth}, PROTOCOL | paper
        return [f"{key} {ours.get(key)} instead of {paper[key]}" for key in paper if ours.get(key) != paper[key]]


def seeds(counts):
    """In words, from the numbers of runs."""
    few, many = min(counts), max(counts)
    return f"{few} to {many} seeds" if few < many else f"{many} seed{'s' * (many > 1)}"


def title(config):
    """What is trained, on which data and for how long, with every option that does not have its default."""
    network = f"width {config['width']}" if config["model"] == "wrn" else config["model"]
    told = {"model", "data", "width", "epochs", "fingerprint", "init", "depth", "bs", "ghost", "dropout", "wd"}
    usual = OPTIONS | {"base_init": "lecun"}
    options = [f"{key} {value}" for key, value in sorted(config.items()) if key not in told and value != usual.get(key)]
    return ", ".join([config["data"], network, f"{config['epochs']} epoch{'s' * (config['epochs'] > 1)}", *options])


def make_sections(records):
    """The records in grids, the grids in sections; data sets of one name are told apart by their fingerprints."""
    grids, sections = {}, defaultdict(list)
    for record in records:
        config = {key: value for key, value in record["config"].items() if key not in ("lr", "seed")}
        grid = grids.setdefault(frozenset(config.items()), Grid(record["grid"], config, defaultdict(list)))
        grid.runs[record["config"]["lr"]].append(record)
    for grid in grids.values():
        sections[title(grid.config), grid.config["fingerprint"]].append(grid)
    same = Counter(name for name, _ in sections)
    result = []
    for (name, images), members in sorted(sections.items(), key=lambda item: (-item[1][0].config["epochs"], item[0])):
        name += f", images {images[:8]}" if same[name] > 1 else ""
        counts = {len(runs) for grid in members for runs in grid.runs.values()}
        result.append(Section(name, f"{name}, {seeds(counts)}", counts, members))
    return result


# -------------------------------------------------------------------------------------------------------------- claims


class NotEnoughRuns(Exception):
    """What a claim needs and the records do not hold."""


def need(enough, what):
    if not enough:
        raise NotEnoughRuns(f"needs {what}")


# Which optima a claim is about: lists of them, each of which has to pass the claim's test.


def lines(section, place, *methods):
    """For each method its optima by batch size, in a panel of a figure: Fig. 1a."""
    figure, metric = int(place[5]), {"a": ACCURACY, "b": LOSS}[place[6]]
    need(section.has_figure(figure), f"the batch sizes of Figure {figure}")
    for method in methods:
        line = section.line(figure, metric, method)
        need(len(line) > 1, f"two batch sizes with {NAME[method]}")
        need(all(line.values()), f"at each batch size a rate at which {NAME[method]} does not diverge")
        yield list(line.values())


def rows(section, place, *methods, largest=math.inf):
    """For each batch size that the methods share, up to the largest, their optima."""
    found = [{best.bs: best for best in line} for line in lines(section, place, *methods)]
    shared = [bs for bs in found[0] if all(bs in line for line in found)]
    need(len(shared) > 1, f"two batch sizes with each of {', '.join(NAME[method] for method in methods)}")
    need(shared[0] <= largest, f"a batch size of {largest} or less")
    return [[line[bs] for line in found] for bs in shared if bs <= largest]


def all_rows(*arguments):
    """These rows as one list."""
    return [[best for row in rows(*arguments) for best in row]]


def depths(section, _, *methods, deepest=100):
    """For each method its optima by depth, if they reach the deepest."""
    for method in methods:
        line = [optimum(grid, ACCURACY) for key, grid in section.at.items() if key == (method, key[1], section.batch)]
        need(all(line), f"at each depth a rate at which {NAME[method]} does not diverge")
        need(len(line) > 1 and line[-1].depth >= deepest, f"{NAME[method]} at {deepest} layers or more, and at fewer")
        yield line


def at_depth(section, _, *methods, least=40):
    """The optima of all methods at the largest depth that they share; all rates of the last one may have diverged."""
    shared = [depth for _, depth, bs in section.at if bs == section.batch and depth >= least]
    shared = [depth for depth in shared if all((method, depth, section.batch) in section.at for method in methods)]
    need(shared, f"{least} layers or more with each of {', '.join(NAME[method] for method in methods)}")
    found = [optimum(section.at[method, max(shared), section.batch], ACCURACY) for method in methods]
    need(all(found[:-1]), f"a rate at which {NAME[methods[0]]} does not diverge")
    return [[best for best in found if best]]


def table1(section, _, metric, *methods):
    """The optima of two rows of Table 1."""
    row = [optimum(section.at[key], metric) for method in methods if (key := (method, 16, section.batch)) in section.at]
    need(
        len(row) == 2 and all(row),
        f"16 layers at B {section.batch} with {' and '.join(NAME[method] for method in methods)}",
    )
    return [row]


# The tests.


def std(best):
    need(best.std is not None, "two kept runs for a standard deviation")
    return best.std


def spread(optima):
    return max(best.rate for best in optima) / min(best.rate for best in optima)


def first_is_best(row):
    return all(row[0].metric.sign * (row[0].mean - other.mean) > 0 for other in row[1:])


def flat_then_falls(line):
    need(len(line) > 2, "three batch sizes")
    first, second, last, best = line[0], line[1], line[-1], max(line, key=lambda found: found.mean)
    flat = abs(first.mean - second.mean) <= std(first) + std(second)
    return flat and best.mean - last.mean > std(best) + std(last)


def order_of_magnitude(pairs):
    efficient = []
    for line in (pairs[::2], pairs[1::2]):
        top = max(best.mean for best in line)
        efficient.append(max(best.bs for best in line if best.mean > top - 0.01))
    (bn, zeroinit), smallest, largest = efficient, pairs[0].bs, pairs[-1].bs
    need(bn >= 8 * zeroinit or (bn < largest and zeroinit > smallest), f"batch sizes beyond {smallest} to {largest}")
    return bn >= 8 * zeroinit


def proportional_then_saturates(line):
    small, large = ([best for best in line if low <= best.bs <= 4 * low] for low in (line[0].bs, line[-1].bs / 4))
    need(len(line) > 3 and len(small) > 1 and len(large) > 1, "four batch sizes in steps of 4 or less")
    first, last = (math.log(part[-1].rate / part[0].rate, part[-1].bs / part[0].bs) for part in (small, large))
    return 0.5 <= first <= 1.5 and last < 0.5


def saturates(line):
    need(line[-1].bs >= 4096, "batch sizes up to 4096")
    return 0.5 <= max(best.rate for best in line) / SATURATION[line[0].grid.method] <= 2


def crossover(pairs):
    bn, zeroinit, *_, large_bn, large_zeroinit = pairs
    need(bn.bs <= 8 and large_bn.bs >= 64, "batch sizes from 8 to 64")
    return bn.mean < zeroinit.mean and large_bn.mean > large_zeroinit.mean


def trains(line):
    return line[-1].mean > line[0].mean / 2


def plain_fails(row):
    *deep, plain = row if row[-1].grid.method == "none" else [*row, None]
    return not plain or all(plain.mean < best.mean / 2 for best in deep)


def over_94(line):
    return line[-1].mean > 0.94


def orders_of_table1(metric, column, words):
    """A claim for each two rows that follow each other when Table 1 is sorted by one of its columns."""
    numbers = {method: float(cells[column].split()[0]) for (table, method, _), cells in TABLES.items() if table == 1}
    for first, second in pairwise(sorted(numbers, key=lambda method: -metric.sign * numbers[method])):
        if numbers[first] != numbers[second]:
            statement = f"{NAME[first]} has a {words} than {NAME[second]}"
            yield "Table 1", statement, "value", first_is_best, table1, metric, first, second


# The place in the paper; the statement, in brackets how it is judged; what it compares; the test; the optima to test.
# fmt: off
CLAIMS = [
    ("Fig. 1a", "Batch normalization beats no normalization at every batch size",
     "value", first_is_best, rows, "bn", "none"),
    ("Fig. 1a", "The test accuracy is independent of the batch size when it is small, and then falls (the bars of the "
     "two smallest B overlap, those of the best and the largest do not)", "value", flat_then_falls, lines, *THREE),
    ("Fig. 1a", "The largest efficient batch size of batch normalization is an order of magnitude above ZeroInit's "
     "(within 1% of the method's best accuracy; 8 times or more)", "value", order_of_magnitude, all_rows, *TWO),
    ("Fig. 1a", "ZeroInit is at most one standard deviation (the larger) below batch normalization for B ≤ 256",
     "value", lambda row: row[0].mean - row[1].mean <= max(map(std, row)), partial(rows, largest=256), *TWO),
    ("Fig. 1b", "Batch normalization has the lowest training loss at every batch size",
     "value", first_is_best, rows, *THREE),
    ("Fig. 2a", "The optimal learning rate is proportional to the batch size, then saturates (over the first factor of "
     "4 it grows as B^0.5 to B^1.5, over the last slower)", "power", proportional_then_saturates, lines, *THREE),
    ("Fig. 2a", "It saturates at 2^-3 without normalization, 2^1 with ZeroInit and 2^4 with batch normalization "
     "(within a factor of 2)", "power", saturates, lines, *THREE),
    ("Fig. 2a", "The ratio of learning rate to batch size is similar for all three at small B (within a factor of 4 "
     "for B ≤ 16)", "power", lambda row: spread(row) <= 4, partial(rows, largest=16), *THREE),
    *orders_of_table1(ACCURACY, 0, "higher test accuracy"),
    *orders_of_table1(LOSS, 2, "lower training loss"),
    ("Table 2", "Batch normalization and ZeroInit train very deep networks (with 100 layers or more they keep over "
     "half of the shallowest network's accuracy)", "value", trains, depths, *TWO),
    ("Section 4", "Very deep networks train with either and not without (at the largest depth, 40 or more, the plain "
     "network reaches less than half of their accuracy)", "value", plain_fails, at_depth, "bn", "zeroinit", "none"),
    ("Table 2", "Both train 1000 layers to over 94% test accuracy",
     "value", over_94, partial(depths, deepest=1000), *TWO),
    ("Table 2", "The optimal learning rate is only weakly dependent on depth (within a factor of 2)",
     "power", lambda line: spread(line) <= 2, depths, *TWO),
    ("Table 3", "ZeroInit needs no L2 regularization to train very deep networks",
     "value", trains, depths, "zeroinit without L2"),
    ("Table 3", "The scalar multiplier alone is sufficient to train very deep networks",
     "value", trains, depths, "scalar"),
    ("Fig. 3a", "Over the whole batch, batch normalization is below ZeroInit at very small B, above it at large B",
     "value", crossover, all_rows, *TWO),
    ("Fig. 3b", "Over the whole batch, batch normalization has a lower training loss than ZeroInit at every B",
     "value", first_is_best, rows, *TWO),
    ("Fig. 4a", "All three have similar learning rates in the small batch limit (within a factor of 4 for B ≤ 16)",
     "power", lambda row: spread(row) <= 4, partial(rows, largest=16), *THREE),
]
# fmt: on
ABSOLUTE = {saturates: {"width": 4, "depth": 16}, over_94: {"width": 2}}  # numbers only the paper's network can meet


def judge(section, place, _, shown, test, series, *arguments):
    """A claim's verdict in a section and the numbers behind it, how many seeds they took and which are on an edge."""
    try:
        differences = section.differences(**ABSOLUTE[test]) if test in ABSOLUTE else []
        need(not differences, f"the paper's protocol ({', '.join(differences)})")
        optima = list(series(section, place, *arguments))
        verdict = "holds" if all(test(each) for each in optima) else "does not hold"
    except NotEnoughRuns as reason:
        return "not enough runs", str(reason)
    used = [best for each in optima for best in each]
    deep, lines = place in ("Table 2", "Table 3", "Section 4"), defaultdict(list)
    for init in dict.fromkeys(best.grid.config["init"] for best in used):
        line = [best for best in used if best.grid.config["init"] == init]
        numbers = [getattr(best, shown) + " (*edge*)" * bool(best.edge) for best in line]
        places = ", ".join(str(best.depth if deep else best.bs) for best in line)
        lines[places].append(f"{NAME[line[0].grid.method]} {', '.join(numbers)}")
    texts = [f"{'depth' if deep else 'B'} {places}: {'; '.join(line)}" for places, line in lines.items()]
    return verdict, "; ".join([*texts, seeds([best.total for best in used])])


def judge_all(sections):
    """Markdown: a line for each claim and each section that decides it; then what the others need."""
    decided, undecided = [], []
    for claim in CLAIMS:
        place, statement, *_ = claim
        verdicts = {section.title: judge(section, *claim) for section in sections}
        for name, (verdict, numbers) in verdicts.items():
            if verdict != "not enough runs":
                decided.append(f"- **{verdict}**, {place}: {statement}. *{name}:* {numbers}")
        if all(verdict == "not enough runs" for verdict, _ in verdicts.values()):
            reasons = "; or ".join(dict.fromkeys(reason for _, reason in verdicts.values()))
            undecided.append(f"- **not enough runs**, {place}: {statement}. It {reasons}")
    return ["\n".join(lines) for lines in (decided, undecided) if lines]


# ------------------------------------------------------------------------------------------------------------ pictures


def canvas(section, count, columns, width, height):
    """A figure with its panels; matplotlib is imported here because --edges has to start fast."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update({"svg.hashsalt": "plot", "font.size": 9, "axes.grid": True, "grid.color": "#e8e8e8"})
    lines = math.ceil(count / columns)
    figure = Figure(figsize=(width * columns, height * lines), layout="constrained")
    figure.suptitle(section.caption, fontsize=9, color="#555555")
    panels = [figure.add_subplot(lines, columns, 1 + i) for i in range(count)]
    for axes in panels:
        axes.margins(y=0.2)  # the crosses stand below the curves
    return figure, panels


def style(method, **changes):
    name, colour, marker, line = METHODS[method]
    size = {"bn": 6.5, "none": 5.5}.get(method, 4.5)  # markers at the same place stay visible
    look = {"label": name, "color": colour, "marker": marker, "linestyle": line, "markersize": size, "linewidth": 1.3}
    return look | changes


def crosses(axes, method, places):
    """Mark what diverged at the bottom, by the crossed out marker of its method and at a height of its own."""
    height = [0.02 + 0.011 * list(METHODS).index(method)] * len(places)
    for marker in (METHODS[method][2], "x"):
        look = style(method, label=None, marker=marker, linestyle="none", fillstyle="none", markersize=6)
        axes.plot(places, height, transform=axes.get_xaxis_transform(), **look)


def point(best, rates):
    """A marker's height and the lengths of its bar: a learning rate with its bracket, or a mean with its deviation."""
    if best is None:
        return math.nan, 0, 0
    if rates:
        return best.rate, best.rate - best.tied[0], best.tied[-1] - best.rate
    return [best.metric.scale * number for number in (best.mean, best.std or 0, best.std or 0)]


def draw_figure(section, number):
    """Figures 1 to 4; a marker is hollow where the optimum is an edge, and a cross where every rate diverged."""
    rates = number in (2, 4)
    figure, panels = canvas(section, 2, 2, 4.4, 3.6)
    for axes, metric, letter in zip(panels, (ACCURACY, LOSS), "ab", strict=True):
        for layer, method in enumerate(THREE, 2):
            if line := section.line(number, metric, method):
                heights, *bars = zip(*(point(best, rates) for best in line.values()), strict=True)
                axes.errorbar(list(line), heights, bars, capsize=3, zorder=layer, **style(method))
                edges = [bool(best and best.edge) for best in line.values()]
                hollow = style(method, label=None, linestyle="none", markerfacecolor="white", zorder=layer + 0.5)
                axes.plot(list(line), heights, markevery=edges, **hollow)
                crosses(axes, method, [bs for bs, best in line.items() if not best])
        axes.set_xscale("log", base=2)
        if rates:
            axes.set_yscale("log", base=2)
        label = "learning rate" if rates else metric.name + metric.unit
        axes.set(title=f"({letter}) {metric.name}", xlabel="batch size", ylabel=f"optimal {label}")
    return figure


def draw_rates(axes, grid, metric):
    """A ring marks the optimum, a crossed out marker at the bottom a learning rate that diverged."""
    points = {rate: mean_of_best(grid.runs[rate], metric) for rate in sorted(grid.runs)}
    means, stds = ([metric.scale * (numbers[i] or 0) for numbers in points.values()] for i in (0, 1))
    axes.errorbar(list(points), means, stds, capsize=2, **style(grid.method))
    if best := optimum(grid, metric):
        ring = style(grid.method, label=None, marker="o", markersize=12, fillstyle="none")
        axes.plot(best.rate, metric.scale * best.mean, **ring)
    crosses(axes, grid.method, [rate for rate, numbers in points.items() if math.isnan(numbers[0])])
    axes.set_xscale("log", base=2)


def draw_curves(axes, grid, metric):
    """Every run at the optimal learning rate; crossed out markers show where one, at any learning rate, diverged."""
    diverged = [run for runs in grid.runs.values() for run in runs if run["status"] == "diverged"]
    for run in (grid.runs[best.rate] if (best := optimum(grid, metric)) else []) + diverged:
        points = list(zip(*curve(run, metric), strict=True)) or [[], []]
        axes.plot(*points, **style(grid.method, alpha=0.6, linewidth=0.8, markersize=2))
    crosses(axes, grid.method, [len(run["history"]) + 1 for run in diverged])
    axes.set_xlim(0, grid.config["epochs"] + 1)
    axes.xaxis.get_major_locator().set_params(integer=True)


def small_multiples(section, draw, metric, label):
    """A panel for each depth and batch size, with a line for each method."""
    places = list(dict.fromkeys(key[1:] for key in section.at))
    columns = min(4, len(places))
    figure, panels = canvas(section, len(places), columns, *((3.2, 2.6) if columns > 1 else (5.5, 4)))
    for axes, place in zip(panels, places, strict=True):
        grids = [grid for key, grid in section.at.items() if key[1:] == place]
        for grid in grids:
            draw(axes, grid, metric)
        if not any(optimum(grid, metric) for grid in grids):
            axes.set_yticks([])  # all diverged: there is no scale
        axes.set(title="{} layers, batch size {}".format(*place), xlabel=label, ylabel=metric.name + metric.unit)
    return figure


def save(figure, path):
    """Put one legend below all panels, in the order of METHODS, and write PNG and SVG, the same bytes each time."""
    named = {}
    for axes in figure.axes:
        named |= {name: handle for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    order = [name for name in NAME.values() if name in named]
    columns = int(figure.get_figwidth() / 2.2)
    figure.legend([named[name] for name in order], order, loc="outside lower center", ncols=columns)
    for kind, unstamped in (("png", {"Software": None}), ("svg", {"Date": None})):
        picture = io.BytesIO()
        figure.savefig(picture, format=kind, dpi=150, metadata=unstamped)
        write(path.with_name(f"{path.name}.{kind}"), picture.getvalue())


def write(path, content):
    """Write a file completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    temporary.replace(path)


# -------------------------------------------------------------------------------------------------------------- report


def table_rows(section, number):
    """The (method, depth, batch size) of the rows of a table; none if what makes it a table of its own was not run."""
    methods = list(dict.fromkeys(method for table, method, _ in TABLES if table == number))
    run = {
        key[:2] for key in section.at if key[0] in methods and key[2] == section.batch and (number > 1 or key[1] == 16)
    }
    depths = {depth for _, depth in run}
    if len(depths) < 2 if number > 1 else not {"biases", "dropout", "biases+dropout"} & {method for method, _ in run}:
        return []
    if number > 1 and not section.differences(width=2):
        depths |= {16, 100, 1000}
    keys = [(method, depth, section.batch) for depth in sorted(depths) for method in [*methods, *ALSO[number]]]
    return [key for key in keys if key[0] in methods or key in section.at]


def cells(grid):
    """Test accuracy, its rate, training loss, its rate, runs kept of those at the optimum, diverged runs of all."""
    if not grid:
        return ["not run"] * 6
    best = [found for metric in (ACCURACY, LOSS) if (found := optimum(grid, metric))]
    runs = [run for runs in grid.runs.values() for run in runs]
    diverged = f"{sum(run['status'] == 'diverged' for run in runs)} of {len(runs)}"
    if not best:
        tried = f"at {' – '.join(dict.fromkeys(power(rate) for rate in (min(grid.runs), max(grid.runs))))}"
        return ["diverged", tried] * 2 + ["–", diverged]
    kept = ", ".join(dict.fromkeys(f"{found.kept}/{found.total}" for found in best))
    rates = [found.bracketed + f" **({found.edge} tried)**" * bool(found.edge) for found in best]
    return [best[0].value, rates[0], best[1].value, rates[1], kept, diverged]


def table(section, keys, number=None):
    """Markdown: the grids at some (method, depth, batch size), beside the numbers of one of the paper's tables."""
    names = "Layers|B|Method|Test accuracy (%)|Paper|Rate|Paper|Training loss|Paper|Rate|Kept|Diverged"
    lines = [names.split("|"), ["---"] * 12]
    for method, depth, bs in keys:
        ours = cells(section.at.get((method, depth, bs)))
        paper = TABLES.get((number, method, depth), ("–", "–", "–"))
        places = [str(depth), str(bs), NAME[method]]
        lines.append([*places, ours[0], paper[0], ours[1], paper[1], ours[2], paper[2], *ours[3:]])
    shown = [i for i in range(12) if any(line[i] != "–" for line in lines[2:])]
    return "\n".join("| " + " | ".join(line[i] for i in shown) + " |" for line in lines)


def protocol(section, **paper):
    """The end of a caption: the section's protocol, and what in it is not the paper's."""
    differences = section.differences(**paper)
    if min(section.seeds) < SEEDS:
        differences.append(f"{seeds(section.seeds)} instead of {SEEDS}")
    paper = f"Not the paper's protocol: {', '.join(differences)}." if differences else "The paper's protocol."
    return f"{section.caption}. {paper}"


def what_was_run(section):
    """Markdown: runs, machines and commits; seeds that some rates lack; grids that no figure or table shows."""
    runs = [run for grid in section.grids for records in grid.runs.values() for run in records]
    machines = {", ".join(str(run["environment"].get(key)) for key in ("device", "precision", "torch")) for run in runs}
    commits = {str(run["environment"].get("commit")) for run in runs}
    yield f"- {len(runs)} runs, {sum(run['status'] == 'diverged' for run in runs)} of them diverged"
    yield f"- device, precision, torch: {'; '.join(sorted(machines))}; commit {', '.join(sorted(commits))}"
    yield f"- images with fingerprint {runs[0]['config']['fingerprint']}"
    for grid in section.grids:
        seeds = {rate: {run["config"]["seed"] for run in grid.runs[rate]} for rate in sorted(grid.runs)}
        for rate, present in seeds.items():
            if missing := set().union(*seeds.values()) - present:
                yield f"- {grid.name} lacks at {power(rate)} seed {', '.join(map(str, sorted(missing)))}"
        if not grid.method:
            yield f"- {grid.name} is in no figure or table"


def section_report(section, home, curves):
    """Markdown of a section, whose pictures go into a folder of its own."""

    def picture(name, figure):
        save(figure, home / name)
        return f"![{name}]({home.name}/{name}.png)"

    yield f"# {section.caption}"
    yield "\n".join(what_was_run(section))
    for number in filter(section.has_figure, FIGURES):
        yield picture(f"fig{number}", draw_figure(section, number))
        network = f"{section.depth}-{section.grids[0].config['width']} Wide-ResNet"
        yield f"**Figure {number}.** {FIGURES[number]} {network}. {protocol(section, width=4, depth=16)}"
    tabled = set()
    for number in (1, 2, 3):
        if keys := table_rows(section, number):
            tabled |= set(keys)
            yield f"**Table {number}.** {protocol(section, width=4 if number == 1 else 2)}"
            yield table(section, keys, number)
    for metric in (ACCURACY, LOSS) if section.at else ():
        for name, draw, label in (("rates", draw_rates, "learning rate"), ("curves", draw_curves, "epoch")):
            if name == "rates" or curves:
                yield picture(f"{name}_{metric.key}", small_multiples(section, draw, metric, label))
                yield f"**{metric.name.capitalize()} against the {label}.** {draw.__doc__} {section.caption}."
    if section.at.keys() - tabled:
        yield "**All grids.**"
        yield table(section, section.at)


def report(folder, records, problems, curves):
    """Write RESULTS/report: the claims, then every section, then the files that were not used."""
    home, sections = folder / "report", make_sections(records)
    parts = ["# Claims of the paper", NOTE, *judge_all(sections)]
    for section in sections:
        slug = re.sub(r"[^a-z0-9.^-]+", "-", section.title.lower()).strip("-")
        parts += section_report(section, home / slug, curves)
    if problems:
        parts += ["# Files that are no records", "\n".join(f"- {name}: {problems[name]}" for name in problems)]
    write(home / "REPORT.md", ("\n\n".join(parts) + "\n").encode())
    return home / "REPORT.md"


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", type=Path, help="folder with the records, RESULTS/DATASET/RUN.json")
    parser.add_argument("--curves", action="store_true", help="also draw the learning curves at the optimal rates")
    parser.add_argument("--edges", action="store_true", help="print GRID<tab>RATE for each rate to try next")
    args = parser.parse_args()
    records, problems = read_records(args.results)
    for name, problem in problems.items():
        print(f"{args.results / name}: {problem}", file=sys.stderr)
    if not records:
        parser.exit(2, f"error: no records in {args.results} (as {args.results}/DATASET/RUN.json)\n")
    if args.edges:
        for grid in (grid for section in make_sections(records) for grid in section.grids):
            print("".join(f"{grid.name}\t{power(rate)}\n" for rate in next_rates(grid)), end="")
    else:
        try:
            print(f"report: {report(args.results, records, problems, args.curves)}")
        except OSError as error:
            parser.exit(2, f"error: cannot write the report: {error}\n")


if __name__ == "__main__":
    main()
