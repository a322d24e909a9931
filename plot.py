"""The paper's figures, tables and claims, from the records of runs and beside the paper's own numbers.

    python plot.py results            # writes results/report/REPORT.md with every figure, table and claim
    python plot.py results --edges    # prints the learning rates to try next where an optimum lies on an edge

Statistics (section 3 of the paper): of the n runs at one learning rate the best ceil(0.8 n) are kept, 12 of 15, for the
test accuracy and for the training loss independently; each has its own optimal learning rate, the one of the best mean.
A diverged run is the worst of all: where one is among the kept, its learning rate has no mean and is never the optimum.
"""

import argparse
import contextlib
import functools
import json
import math
import os
import re
import sys
from collections import Counter, defaultdict, namedtuple
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev

METHODS = {  # name, colour, marker and line: the legend of Figures 1 to 4 first, then the other rows of the tables
    "bn": ("Batch Normalization", "#1b4f9c", "o", "-"),
    "none": ("No Normalization", "#d1495b", "s", "--"),
    "zeroinit": ("ZeroInit", "#e39b0b", "^", "-."),
    "bn (whole batch)": ("Batch Normalization over the whole batch", "#76a5dc", "h", "-"),
    "biases": ("+ biases", "#7a5195", "v", ":"),
    "dropout": ("+ dropout", "#4f9d69", "D", ":"),
    "scalar": ("+ scalar multiplier", "#111111", "P", (0, (5, 1))),
    "biases+dropout": ("+ biases & dropout", "#999999", "X", (0, (1, 1))),
    "zeroinit without L2": ("ZeroInit without L2", "#b07aa1", "<", (0, (3, 1, 1, 1))),
    "zeroinit-nodropout": ("ZeroInit without Dropout", "#2a9d8f", ">", (0, (3, 1, 1, 1))),
    "zeroinit+bias": ("ZeroInit + Scalar Bias", "#8c564b", "d", (0, (5, 1))),
    "fixup": ("Fixup", "#59a14f", "p", (0, (5, 5))),
}
NAME = {method: look[0] for method, look in METHODS.items()}
TWO, THREE = (
    ("bn", "zeroinit"),
    ("bn", "none", "zeroinit"),
)  # the methods of most claims, and of Figures 1 and 2
WHOLE = ("bn (whole batch)", "none", "zeroinit")  # and of Figures 3 and 4

FIGURES = {
    1: "Optimal test accuracy (a) and optimal training loss (b) at a range of batch sizes.",
    2: "The learning rates that maximize the test accuracy (a) and minimize the training loss (b).",
    3: "Optimal test accuracy (a) and training loss (b) with batch statistics over the whole batch.",
    4: "Optimal learning rates, as in Figure 2, with batch statistics over the whole batch.",
}
TABLES = {  # by depth at batch size 64: test accuracy (%), optimal learning rate, training loss
    (1, "none"): {16: "92.3 ± 0.3|–|0.212 ± 0.004"},
    (1, "biases"): {16: "91.9 ± 0.2|–|0.205 ± 0.003"},
    (1, "dropout"): {16: "93.2 ± 0.1|–|0.226 ± 0.001"},
    (1, "scalar"): {16: "94.0 ± 0.1|–|0.181 ± 0.001"},
    (1, "biases+dropout"): {16: "93.6 ± 0.1|–|0.212 ± 0.001"},
    (1, "zeroinit"): {16: "94.4 ± 0.1|–|0.189 ± 0.001"},
    (2, "bn"): {
        16: "93.5 ± 0.1|2^-1",
        100: "94.7 ± 0.1|2^-1 (2^-2 – 2^0)",
        1000: "94.6 ± 0.1|2^-2 (2^-3 – 2^0)",
    },
    (2, "zeroinit"): {16: "93.3 ± 0.1|2^-2", 100: "94.2 ± 0.1|2^-2", 1000: "94.3 ± 0.2|2^-2 (2^-3 – 2^-1)"},
    (3, "zeroinit without L2"): {16: "91.0|2^-3", 100: "92.2 ± 0.1|2^-3", 1000: "92.5 ± 0.2|2^-3"},
    (3, "scalar"): {
        16: "93.1 ± 0.1|2^-2 (2^-3 – 2^-2)",
        100: "94.1 ± 0.1|2^-2 (2^-3 – 2^-2)",
        1000: "94.2 ± 0.1|2^-1 (2^-2 – 2^-1)",
    },
    # by batch size: top-1 / top-5 validation accuracy (%) on ImageNet
    (4, "bn"): {256: "74.97 / 92.20", 1024: "74.93 / 92.13", 4096: "74.88 / 91.93"},
    (4, "fixup"): {256: "74.81 / 91.84", 1024: "74.60 / 91.69", 4096: "73.02 / 90.59"},
    (4, "zeroinit-nodropout"): {256: "74.93 / 91.89", 1024: "74.61 / 91.81", 4096: "70.76 / 89.15"},
    (4, "zeroinit"): {256: "75.56 / 92.35", 1024: "75.46 / 92.53", 4096: "72.65 / 90.70"},
    (5, "bn"): {256: "75.57 / 92.48", 1024: "75.32 / 92.37", 4096: "75.37 / 92.38"},
    (5, "fixup"): {256: "74.41 / 91.65", 1024: "74.43 / 91.74", 4096: "72.37 / 90.28"},
    (5, "zeroinit"): {256: "70.05 / 89.16", 1024: "68.40 / 87.82", 4096: "68.19 / 87.92"},
    (5, "zeroinit+bias"): {256: "75.23 / 92.37", 1024: "74.94 / 91.99", 4096: "70.82 / 89.60"},
}
NETWORK = {
    1: {"bs": 64, "width": 4, "depth": 16},
    2: {"bs": 64, "width": 2},
    3: {"bs": 64, "width": 2},
}  # by table
ALSO = {1: ("bn",), 2: ("none", "scalar")}  # rows beside the paper's, where they were run
TOLD = {
    "model",
    "version",
    "data",
    "width",
    "epochs",
    "fingerprint",
    "init",
    "depth",
    "bs",
    "ghost",
    "dropout",
    "wd",
}
SATURATION = {"bn": 2**4, "none": 2**-3, "zeroinit": 2**1}  # the largest optimal learning rates of Figure 2a
ENGINES = {
    "plain": ("o", ":"),
    "eager": ("s", "--"),
    "ours": ("^", "-"),
    "concurrent": ("D", "-."),
}  # marker and line
NOTE = """Each number is the mean of the best ceil(0.8 n) of n runs ± one standard deviation, at the learning rate with
the best mean (on ImageNet, of top-1); rates in brackets are tied with it, within one standard deviation; *edge*: it is
the lowest or highest. Kept: how many of all runs at that rate; diverged: of the runs at all rates. In the figures bars
are standard deviations or brackets, a hollow marker is an edge, and a crossed out one at the bottom diverged. The
paper's numbers are those of the paper's protocol."""

Metric = namedtuple("Metric", "key name unit scale digits sign")  # the sign says whether more is better
ACCURACY = Metric("test_accuracy", "test accuracy", " (%)", 100, 1, +1)
TOP1 = Metric("test_accuracy", "top-1 accuracy", " (%)", 100, 2, +1)
LOSS = Metric(
    "train_objective", "training loss", "", 1, 3, -1
)  # with the L2 part: the paper's 0.18 cannot be without

Setup = namedtuple(
    "Setup", "network metrics tables seeds ghost dropout l2 protocol"
)  # how the paper trains a network
OPTIONS = {"momentum": 0.9, "l2_all": False, "scalar_lr": 1.0, "pad_mode": "zeros", "train_size": None}
CIFAR10 = {"data": "CIFAR-10", "epochs": 200} | OPTIONS
IMAGENET = {"data": "ImageNet", "epochs": 90, "image_size": 224} | OPTIONS
SETUPS = {  # by the version of ResNet-50, None for Wide-ResNets
    None: Setup("Wide-ResNet", (ACCURACY, LOSS), (1, 2, 3), 15, 64, 0.6, 5e-4, CIFAR10),
    "v1": Setup("ResNet-50-V1", (TOP1,), (5,), 1, 256, 0.2, 1e-4, IMAGENET | {"stride_on": "1x1"}),
    "v2": Setup("ResNet-50-V2", (TOP1,), (4,), 1, 256, 0.2, 1e-4, IMAGENET | {"stride_on": "3x3"}),
}

# ------------------------------------------------------------------------------------------------------------- records


def power(rate):
    """A learning rate as the paper writes it, 2^-2."""
    return f"2^{math.log2(rate):.0f}" if math.log2(rate).is_integer() else f"{rate:g}"


def curve(record, metric):
    """The (epoch, number) of a run where the metric was measured; the training loss with its L2 part, as in `final`."""
    if metric is LOSS:
        return [(entry["epoch"], entry["train_loss"] + entry["l2"]) for entry in record["history"]]
    return [
        (entry["epoch"], metric.scale * entry[metric.key])
        for entry in record["history"]
        if metric.key in entry
    ]


def check(**right):
    if wrong := [key for key in right if not right[key]]:
        raise ValueError(f"bad {', '.join(wrong)}")


def read_run(path, record):
    """The record of a run with the name of its grid; raises an exception for anything else."""
    config, final, done = record["config"], record["final"], record["status"] == "done"
    version, rate, seed = config.get("version"), f"_lr{power(config['lr'])}_", f"_s{config['seed']:02d}"
    sizes = [config[key] for key in ("bs", "epochs", *(() if version else ("depth", "width")))]
    metrics = SETUPS[version].metrics
    check(
        model=config["model"] == ("resnet50" if version else "wrn"),
        text=all(
            isinstance(text, str) for text in (config["data"], config["init"], record["data"]["fingerprint"])
        ),
        size=all(isinstance(size, int) and size > 0 for size in sizes),
        name=rate in path.stem and path.stem.endswith(seed),
        status=record["status"] in ("done", "diverged"),
        final=not done
        or (0 <= final["test_accuracy"] <= 1 and all(math.isfinite(final[m.key]) for m in metrics)),
        top5=not done or 0 <= final.get("test_top5", 0) <= 1,
        history=all(math.isfinite(sum(point)) for metric in metrics for point in curve(record, metric)),
        environment=isinstance(record["environment"], dict),
    )
    grid = f"{path.parent.name}/{path.stem.removesuffix(seed).replace(rate, '_', 1)}"
    return record | {
        "grid": grid,
        "config": OPTIONS | config | {"fingerprint": record["data"]["fingerprint"]},
    }


def read_speed(path, record):
    """A record of speed.py with {(batch size, method, engine): fastest row}; raises an exception for anything else."""
    rows = sorted(record["rows"], key=lambda row: row["images_per_second"])
    check(
        kind=record["kind"] == "speed",
        rows=rows
        and all(
            min(row["bs"], row["runs"]) > 0 and row["method"] in METHODS and row["engine"] in ENGINES
            for row in rows
        ),
        speed=all(0 < row["low"] <= row["images_per_second"] <= row["high"] < math.inf for row in rows),
        cost=all({"target", "runs", "hours"} <= line.keys() for line in record["cost"]),
        checks=all({"what", "value", "target", "met"} <= line.keys() for line in record["checks"]),
    )
    precision = {"off": "float32"}
    fastest = {
        (
            row["bs"],
            row["method"],
            f"{row['engine']}, {precision.get(row['precision'], row['precision'])}",
        ): row
        for row in rows
    }
    return record | {
        "fastest": dict(sorted(fastest.items())),
        "title": f"Images per second: {record['model']} on {record['data']}, {record['device']} (speed/{path.name})",
        "about": f"- threads {record['threads']}, torch {record['torch']}; commit {record['commit']}",
        "folder": f"speed-{path.stem}",
    }


def read_records(folder):
    """The records of runs and those of speed.py in a results folder, and {file: what is wrong} for other JSON files."""
    runs, speeds, problems = {}, [], {}
    for path in sorted(
        path for path in folder.glob("*/*.json") if path.parent.name not in ("report", "logs")
    ):
        name = f"{path.parent.name}/{path.name}"
        try:
            record = json.loads(
                path.read_text(encoding="utf-8"), parse_constant=lambda word: check(**{word: False})
            )
            if path.parent.name == "speed":
                speeds.append(read_speed(path, record))
                continue
            run = read_run(path, record) | {"file": name}
            if (first := runs.setdefault(frozenset(run["config"].items()), run)) is not run:
                raise ValueError(f"the same run as {first['file']}")
        except json.JSONDecodeError as error:
            problems[name] = f"empty, truncated or no JSON ({error})"
        except Exception as error:  # a foreign file can be wrong in any way
            problems[name] = f"no record ({type(error).__name__}: {error})"
    return list(runs.values()), speeds, problems


# ---------------------------------------------------------------------------------------------------------- statistics


class Grid:
    """The runs of one configuration: a list of records for each learning rate.

    `key` is (method, depth, batch size); the method is None where ghost batches, dropout or L2 are not the paper's.
    """

    def __init__(self, name, config):
        self.name, self.config, self.runs = name, config, defaultdict(list)
        self.setup = setup = SETUPS[config.get("version")]
        method, bs, ghost, l2 = (config.get(key) for key in ("init", "bs", "ghost", "wd"))
        drops = method in ("dropout", "biases+dropout", "zeroinit", "zeroinit+bias")
        usual = [min(bs, setup.ghost) if method == "bn" else None, setup.dropout * drops, setup.l2]
        if method == "bn" and ghost == bs > setup.ghost:
            method, usual[0] = "bn (whole batch)", bs
        if method == "zeroinit" and l2 == 0:
            method, usual[2] = "zeroinit without L2", 0
        known = method in METHODS and usual == [ghost, config.get("dropout"), l2]
        self.key = method if known else None, config.get("depth", 50), bs


# A metric at its optimal learning rate: the number of runs there, the rates tied with it, which end of the grid it is
# if any, and as in the paper's tables the number, 94.4 ± 0.1, and the rate with its bracket, 2^-2 (2^-3 – 2^-1).
Optimum = namedtuple("Optimum", "method metric bs rate mean std runs tied edge value bracketed")


Kept = namedtuple(
    "Kept", "metric runs mean std"
)  # the best of the runs at a learning rate; no mean where one diverged


def how_many(n):
    """So many of n runs are kept: 12 of 15."""
    return -(-4 * n // 5)


def best_runs(runs, metric):
    """The runs that are kept, of which diverged ones are the worst."""
    done = [run for run in runs if run["status"] == "done"]
    kept = sorted(done, key=lambda run: -metric.sign * run["final"][metric.key])[: how_many(len(runs))]
    if len(kept) < how_many(len(runs)):
        return Kept(metric, kept, None, None)
    scores = [run["final"][metric.key] for run in kept]
    return Kept(metric, kept, fmean(scores), stdev(scores) if len(scores) > 1 else None)


@functools.cache
def optimum(grid, metric):
    """The optimal learning rate and what it reaches, None where all diverged; of equally good rates the lowest."""
    rates = sorted(grid.runs)
    points = {rate: best_runs(grid.runs[rate], metric) for rate in rates}
    trained = [rate for rate in rates if points[rate].mean is not None]
    if not trained:
        return None
    best = max(trained, key=lambda rate: metric.sign * points[rate].mean)
    _, kept, mean, std = points[best]
    tied = [rate for rate in trained if std is not None and abs(points[rate].mean - mean) <= std] or [best]
    edge = " and ".join(word for word, end in (("lowest", rates[0]), ("highest", rates[-1])) if end == best)
    value = " ± ".join(f"{metric.scale * x:.{metric.digits}f}" for x in (mean, std) if x is not None)
    if metric is TOP1 and all("test_top5" in run["final"] for run in kept):
        value += f" / {100 * fmean(run['final']['test_top5'] for run in kept):.2f}"
    bracketed = power(best) + f" ({power(tied[0])} – {power(tied[-1])})" * (len(tied) > 1)
    (method, _, bs), runs = grid.key, len(grid.runs[best])
    return Optimum(method, metric, bs, best, mean, std, runs, tied, edge, value, bracketed)


def next_rates(grid):
    """The learning rates to try next: beyond each edge that is an optimum, or a lower one where every rate diverged."""
    best = [found.rate for metric in grid.setup.metrics if (found := optimum(grid, metric))]
    lowest, highest = min(grid.runs), max(grid.runs)
    return [lowest / 2] * (lowest in best or not best) + [highest * 2] * (highest in best)


# ------------------------------------------------------------------------------------------------------------ sections


class Section:
    """One protocol: grids that differ in nothing but method, depth and batch size.

    `at` holds those of the paper's methods by (method, depth, batch size). `depth` is the one of the figures, that with
    the most batch sizes; `bs` is that of Tables 1 to 3, the paper's 64 or else the one at which most was run.
    """

    def __init__(self, title, grids):
        self.title, self.grids, self.setup = title, grids, grids[0].setup
        self.counts = [len(runs) for grid in grids for runs in grid.runs.values()]
        self.caption = f"{title}, {seeds(self.counts)}"
        order = sorted(grids, key=lambda grid: (*grid.key[1:], [*METHODS, None].index(grid.key[0])))
        self.at = {grid.key: grid for grid in order if grid.key[0]}
        depths = Counter(depth for depth, _ in {key[1:] for key in self.at})
        sizes = Counter(bs for _, _, bs in self.at)
        self.depth = max(depths, key=lambda depth: (depths[depth], depth == 16), default=16)
        self.bs = max(sizes, key=lambda bs: (bs == 64, sizes[bs]), default=64)

    def lines(self, place, metric, methods=None):
        """{method: {batch size, or depth: optimum}} at a place of the paper; empty where something else was run.

        A figure needs two batch sizes, and Figures 3 and 4 one that 1 and 2 do not show. One ghost batch or less is a
        whole batch as well.
        """
        kind, number, deep = *place.split(), place in DEEP
        own = kind != "Fig." or number < "3"
        sizes = range(1, sys.maxsize) if kind != "Fig." else range(16, sys.maxsize) if own else range(1, 1025)
        if metric not in self.setup.metrics or (kind == "Table" and int(number) not in self.setup.tables):
            return {}
        lines = {method: {} for method in methods or (THREE if number < "3" else WHOLE)}
        for (name, depth, bs), grid in self.at.items():
            if bs in sizes and (bs == self.bs if deep else depth == self.depth):
                own |= name == "bn (whole batch)" or bs < 16
                for method in (
                    {name, "bn (whole batch)"} if name == "bn" and bs <= self.setup.ghost else {name}
                ):
                    lines.get(method, {})[depth if deep else bs] = optimum(grid, metric)
        return lines if own and (kind != "Fig." or len(set().union(*lines.values())) > 1) else {}

    def differences(self, **network):
        """What is not as in the paper."""
        ours, paper = (
            self.grids[0].config | {"depth": self.depth, "bs": self.bs},
            self.setup.protocol | network,
        )
        different = [key for key in paper if str(ours.get(key)).lower() != str(paper[key]).lower()]
        return [f"{key} {ours.get(key)} instead of {paper[key]}" for key in different]


def seeds(counts):
    """In words, from the numbers of runs."""
    few, many = min(counts), max(counts)
    return f"{few} to {many} seeds" if few < many else f"{many} seed{'s' * (many > 1)}"


def title(config):
    """What is trained, on which data and for how long, with every option that does not have its default."""
    setup = SETUPS[config.get("version")]
    network = f"width {config['width']}" if "width" in config else setup.network
    usual = setup.protocol | {"base_init": "lecun"}
    options = [
        f"{key} {config[key]}" for key in sorted(config.keys() - TOLD) if config[key] != usual.get(key)
    ]
    return ", ".join(
        [config["data"], network, f"{config['epochs']} epoch{'s' * (config['epochs'] > 1)}", *options]
    )


def make_sections(records):
    """The records in grids, the grids in sections; data sets of one name are told apart by their fingerprints."""
    grids, sections = {}, defaultdict(list)
    for record in records:
        config = {key: value for key, value in record["config"].items() if key not in ("lr", "seed")}
        grid = grids.setdefault(frozenset(config.items()), Grid(record["grid"], config))
        grid.runs[record["config"]["lr"]].append(record)
    for grid in grids.values():
        sections[-grid.config["epochs"], title(grid.config), grid.config["fingerprint"]].append(grid)
    same = Counter(name for _, name, _ in sections)
    return [
        Section(name + f", images {images[:8]}" * (same[name] > 1), sections[_, name, images])
        for _, name, images in sorted(sections)
    ]


# -------------------------------------------------------------------------------------------------------------- claims

# `each` is what a test gets: a row, the optima of the methods at one batch size or depth; a line, those of one method;
# or all rows. It returns None where they do not decide. `shown` is what of an optimum is told. A claim needs `least`
# rows from `low` to `high`, one at `reach` or more, `kept` runs in each mean, and some the paper's network.
Claim = namedtuple(
    "Claim",
    "place statement methods each test metric low high shown least reach kept network",
    defaults=(ACCURACY, 1, math.inf, "value", 1, 1, 1, {}),
)


def lead(first, second):
    return first.metric.sign * (first.mean - second.mean)


def ahead(place, first, second, metric=ACCURACY, by=0.0, low=1, high=math.inf):
    """The claim that one method is ahead of another by more than a difference; if negative, at most so far behind."""
    beside = f"at most {-by:.1%} worse" if by < 0 else f"over {by:.1%} better" if by else "better"
    statement = f"{NAME[first]} is {beside} than {NAME[second]} in {metric.name}"
    statement += f" for B ≤ {high}" * (high < math.inf) + f" for B ≥ {low}" * (low > 1)
    return Claim(place, statement, (first, second), "row", lambda row: lead(*row) > by, metric, low, high)


def spread(optima):
    return max(best.rate for best in optima) / min(best.rate for best in optima)


def flat_then_falls(line):
    first, second, last, best = line[0], line[1], line[-1], max(line, key=lambda best: best.mean)
    return (
        abs(first.mean - second.mean) <= first.std + second.std
        and best.mean - last.mean > best.std + last.std
    )


def order_of_magnitude(rows):
    lines = [
        [best for best in line if best.mean > max(b.mean for b in line) - 0.01]
        for line in zip(*rows, strict=True)
    ]
    bn, zeroinit = (line[-1].bs for line in lines)
    open_ended = bn == rows[-1][0].bs or zeroinit == rows[0][0].bs
    return bn >= 8 * zeroinit or (None if open_ended else False)


def proportional_then_saturates(line):
    parts = [[best for best in line if low <= best.bs <= 4 * low] for low in (line[0].bs, line[-1].bs / 4)]
    if min(map(len, parts)) < 2:
        return None  # the batch sizes are too far apart
    first, last = (math.log(part[-1].rate / part[0].rate, part[-1].bs / part[0].bs) for part in parts)
    return 0.5 <= first <= 1.5 and last < 0.5


def plain_fails(rows):
    *deep, plain = rows[-1]
    return not plain or all(plain.mean < best.mean / 2 for best in deep)


# fmt: off
CLAIMS = [
    ahead("Fig. 1a", "bn", "none"),
    Claim("Fig. 1a", "The test accuracy is independent of the batch size when it is small, and then falls (the bars of "
          "the two smallest B overlap, those of the best and the largest do not)", THREE, "line", flat_then_falls,
          least=3, kept=2),
    Claim("Fig. 1a", "The largest efficient batch size of batch normalization is an order of magnitude above "
          "ZeroInit's (within 1% of the method's best; 8 times or more)", TWO, "all", order_of_magnitude, least=2),
    Claim("Fig. 1a", "ZeroInit is at most one standard deviation (the larger) below batch normalization for B ≤ 256",
          TWO, "row", lambda row: lead(*row) <= max(best.std for best in row), high=256, kept=2),
    *(ahead("Fig. 1b", "bn", other, LOSS) for other in ("none", "zeroinit")),
    Claim("Fig. 2a", "The optimal learning rate is proportional to the batch size, then saturates (over the first "
          "factor of 4 it grows as B^0.5 to B^1.5, over the last slower)", THREE, "line", proportional_then_saturates,
          shown="rate", least=4, reach=4096),  # from 2^-1 at B 64, batch norm reaches 2^4 at 2048
    Claim("Fig. 2a", "It saturates at 2^-3 without normalization, 2^1 with ZeroInit and 2^4 with batch normalization "
          "(within a factor of 2)", THREE, "line",
          lambda line: 0.5 <= max(best.rate for best in line) / SATURATION[line[0].method] <= 2,
          shown="rate", reach=4096, network=NETWORK[1]),
    Claim("Fig. 2a", "The ratio of learning rate to batch size is similar for all three at small B (within a factor of "
          "4 for B ≤ 16)", THREE, "row", lambda row: spread(row) <= 4, shown="rate", high=16),
    *(ahead("Table 1", *p) for p in pairwise(("zeroinit", "scalar", "biases+dropout", "dropout", "none", "biases"))),
    *(ahead("Table 1", *p, LOSS) for p in pairwise(("scalar", "zeroinit", "biases", "none", "dropout"))),
    ahead("Table 1", "biases+dropout", "dropout", LOSS),
    *(Claim(place, f"{NAME[method]} trains very deep networks (with 100 layers or more it keeps over half of the "
            "shallowest network's accuracy)", (method,), "line",
            lambda line: line[-1].mean > line[0].mean / 2, least=2, reach=100)
      for place, method in (("Table 2", "bn"), ("Table 2", "zeroinit"), ("Table 3", "zeroinit without L2"),
                            ("Table 3", "scalar"))),
    Claim("Section 4", "Very deep networks train with either and not without (at the largest depth, 40 or more, the "
          "plain network reaches less than half of their accuracy)", (*TWO, "none"), "all", plain_fails, low=40),
    Claim("Table 2", "Both train 1000 layers to over 94% test accuracy", TWO, "line",
          lambda line: line[-1].mean > 0.94, reach=1000, network=NETWORK[2]),
    Claim("Table 2", "The optimal learning rate is only weakly dependent on depth (within a factor of 2)", TWO, "line",
          lambda line: spread(line) <= 2, shown="rate", least=2, reach=100),
    ahead("Fig. 3a", "zeroinit", WHOLE[0], high=4),
    ahead("Fig. 3a", WHOLE[0], "zeroinit", low=256),
    ahead("Fig. 3b", WHOLE[0], "zeroinit", LOSS),
    Claim("Fig. 4a", "All three have similar learning rates in the small batch limit (within a factor of 4 for B ≤ 16)",
          WHOLE, "row", lambda row: spread(row) <= 4, shown="rate", least=2, high=16),
    *(ahead("Table 4", method, "bn", TOP1, -0.005, high=1024) for method in ("fixup", "zeroinit")),  # competitive
    *(ahead("Table 4", "bn", method, TOP1, 0.005, low=4096) for method in ("fixup", "zeroinit")),
    ahead("Table 4", "fixup", "zeroinit-nodropout", TOP1, -0.005, high=1024),  # comparable
    ahead("Table 4", "zeroinit-nodropout", "fixup", TOP1, -0.005, high=1024),
    ahead("Table 5", "fixup", "bn", TOP1, -0.015, high=1024),  # slightly below, then considerably
    ahead("Table 5", "bn", "fixup", TOP1, 0.015, low=4096),
    *(ahead("Table 5", method, "zeroinit", TOP1, 0.01) for method in ("bn", "fixup", "zeroinit+bias")),
    ahead("Table 5", "zeroinit+bias", "fixup", TOP1, -0.005, high=1024),  # the gap is closed
]
# fmt: on
DEEP = ("Table 2", "Table 3", "Section 4")  # these compare depths, the others batch sizes
FASTER = (
    "WRN-16-4 trains roughly 40% faster at B 64 without batch normalization (1.3 to 1.7 times the images/s)"
)


def judge(section, claim):
    """A claim's verdict in a section and the numbers behind it, from how many seeds; None where they are not enough."""

    def tell(best):
        told = best and (best.value if claim.shown == "value" else power(best.rate))
        return f"{told} (*edge*)" if best and best.edge else told or "diverged"

    lines = section.lines(claim.place, claim.metric, claim.methods)
    shared = [x for x in next(iter(lines.values()), ()) if all(x in line for line in lines.values())]
    shared = [x for x in shared if claim.low <= x <= claim.high]
    lines = [[line[x] for x in shared] for line in lines.values()]
    found = [best for line in (lines[:-1] if claim.test is plain_fails else lines) for best in line]
    trained = all(best and how_many(best.runs) >= claim.kept for best in found)
    usual = not claim.network or not section.differences(**claim.network)
    if len(shared) < claim.least or shared[-1] < claim.reach or not trained or not usual:
        return None
    rows = list(zip(*lines, strict=True))
    results = [claim.test(each) for each in {"row": rows, "line": lines, "all": [rows]}[claim.each]]
    texts = [
        f"{NAME[method]} {', '.join(map(tell, line))}"
        for method, line in zip(claim.methods, lines, strict=True)
    ]
    axis = "depth" if claim.place in DEEP else "B"
    numbers = f"{axis} {', '.join(map(str, shared))}: {'; '.join(texts)}"
    if claim.each == "row" and claim.shown == "value":
        ties = [
            x
            for x, row in zip(shared, rows, strict=True)
            if abs(lead(*row)) <= max(best.std or 0 for best in row)
        ]
        numbers += f"; within one standard deviation at {axis} {', '.join(map(str, ties))}" * bool(ties)
    counts, paper = [best.runs for best in found], section.setup.seeds
    few = f", fewer than the paper's {paper} ({how_many(paper)} best)" * (min(counts) < paper)
    verdict = "holds" if all(results) else "does not hold"
    return None if None in results else (verdict, f"{numbers}; {seeds(counts)}{few}")


def judge_speed(speed):
    """The same for the wall-clock claim of section 3, from a record of speed.py; this project's engine decides it."""
    found = {key[1:]: row["images_per_second"] for key, row in speed["fastest"].items() if key[0] == 64}
    ratios = {
        key[1]: found[key] / found["bn", key[1]]
        for key in found
        if key[0] == "none" and ("bn", key[1]) in found
    }
    if speed["model"] != "wrn16-4" or not ratios:
        return None
    ours = min(ratios, key=lambda engine: not engine.startswith("ours"))
    numbers = "; ".join(f"{it} {ratios[it]:.2f} times ({found['none', it]:,.0f} images/s)" for it in ratios)
    return "holds" if 1.3 <= ratios[ours] <= 1.7 else "does not hold", f"{numbers}; a timing, no seeds"


def needs(claim):
    """What has to have been run to decide a claim, in words."""
    axis = "depth" if claim.place in DEEP else "batch size"
    rest = f", {claim.least} or more {axis}s" * (claim.least > 1) + f", a {axis} of {claim.reach} or more" * (
        claim.reach > 1
    )
    rest += ", two seeds or more" * (claim.kept > 1)
    rest += ", the paper's protocol" * bool(claim.network) + ", and rates that do not diverge"
    return f"runs of {claim.place} with {', '.join(NAME[method] for method in claim.methods)}{rest}"


def judge_all(sections, speeds):
    """Markdown: a line for each claim and each section that decides it; then those that nothing decides."""
    asked = [
        (claim, needs(claim), [(section.title, judge(section, claim)) for section in sections])
        for claim in CLAIMS
    ]
    timed = [(speed["title"], judge_speed(speed)) for speed in speeds]
    asked.append((("Section 3", FASTER), "a record of speed.py with both at B 64", timed))
    decided, undecided = [], []
    for (place, statement, *_), needed, answers in asked:
        lines = [f"- **{it[0]}**, {place}: {statement}. *{name}:* {it[1]}" for name, it in answers if it]
        decided += lines
        undecided += [] if lines else [f"- **not enough runs**, {place}: {statement}. It needs {needed}"]
    return ["\n".join(lines) for lines in (decided, undecided) if lines]


# ------------------------------------------------------------------------------------------------------------ pictures

Panel = namedtuple(
    "Panel", "title xlabel ylabel bases lines"
)  # the bases of logarithmic axes; lines of (look, points)
Point = namedtuple("Point", "x y down up mark", defaults=(None, 0, 0, ""))  # without a y it diverged


def style(method, **changes):
    name, colour, marker, line = METHODS[method]
    size = {"bn": 6.5, WHOLE[0]: 6.5, "none": 5.5}.get(method, 4.5)  # markers at the same place stay visible
    look = {
        "label": name,
        "color": colour,
        "marker": marker,
        "linestyle": line,
        "markersize": size,
        "linewidth": 1.3,
    }
    return look | changes


def mean_point(x, found, mark):
    """What runs reach, without a bar if it is one run."""
    if not found or found.mean is None:
        return Point(x)
    return Point(x, found.metric.scale * found.mean, *[found.metric.scale * (found.std or 0)] * 2, mark)


def rate_point(bs, best, mark):
    """The optimal learning rate and its bracket."""
    return (
        Point(bs, best.rate, best.rate - best.tied[0], best.tied[-1] - best.rate, mark) if best else Point(bs)
    )


def figure_panels(section, number):
    """Figures 1 to 4."""
    rates = number in (2, 4)
    for metric, letter in zip((ACCURACY, LOSS), "ab", strict=True):
        lines, point = [], rate_point if rates else mean_point
        for method, line in section.lines(f"Fig. {number}", metric).items():
            points = [point(bs, best, "edge" * bool(best and best.edge)) for bs, best in line.items()]
            lines.append((style(method), points))
        label = "learning rate" if rates else metric.name + metric.unit
        yield Panel(
            f"({letter}) {metric.name}", "batch size", f"optimal {label}", (2, 2 if rates else 0), lines
        )


def rate_lines(grid, metric):
    """A ring marks the optimum, a crossed out marker at the bottom a learning rate that diverged."""
    best, points = optimum(grid, metric), []
    for rate, runs in sorted(grid.runs.items()):
        points.append(mean_point(rate, best_runs(runs, metric), "best" * bool(best and rate == best.rate)))
    yield style(grid.key[0]), points


def curve_lines(grid, metric):
    """Every run at the optimal learning rate; crossed out markers show where one, at any learning rate, diverged."""
    best = optimum(grid, metric)
    for run in (run for runs in grid.runs.values() for run in runs):
        diverged = run["status"] == "diverged"
        if diverged or (best and run["config"]["lr"] == best.rate):
            points = [Point(*point) for point in curve(run, metric)] + [
                Point(len(run["history"]) + 1)
            ] * diverged
            yield style(grid.key[0], alpha=0.6, linewidth=0.8, markersize=2), points


MULTIPLES = ((rate_lines, "rates", "learning rate", 2), (curve_lines, "curves", "epoch", 0))


def small_multiples(section, lines, metric, label, base):
    """A panel for each depth and batch size, with the lines of each method."""
    for depth, bs in dict.fromkeys(key[1:] for key in section.at):
        drawn = [
            line for key, grid in section.at.items() if key[1:] == (depth, bs) for line in lines(grid, metric)
        ]
        yield Panel(f"{depth} layers, batch size {bs}", label, metric.name + metric.unit, (base, None), drawn)


def speed_panel(speed):
    """Colours are methods, markers and lines are engines, and bars go from the slowest to the fastest round."""
    lines, named = defaultdict(list), {}
    for (bs, method, engine), row in speed["fastest"].items():
        mean = row["images_per_second"]
        lines[method, engine].append(Point(bs, mean, mean - row["low"], row["high"] - mean))
    looks = []
    for (method, engine), points in lines.items():
        marker, line = ENGINES[engine.split(",")[0]]
        look = style(method, marker=marker, linestyle=line, markersize=4)
        named |= {
            method: style(method, marker="", linestyle="-"),
            engine: look | {"label": engine, "color": "#555555"},
        }
        looks.append((look | {"label": None}, points))
    return Panel(
        "", "batch size", "images per second", (2, 10), looks + [(look, []) for look in named.values()]
    )


def draw_line(axes, layer, look, points):
    """A line with bars, hollow markers at edges, a ring around the best and crosses at the bottom for what diverged."""
    xs, ys, bars = (
        [p.x for p in points],
        [math.nan if p.y is None else p.y for p in points],
        [p[2:4] for p in points],
    )
    axes.errorbar(
        xs, ys, [*zip(*bars, strict=True)] if any(map(any, bars)) else None, capsize=3, zorder=layer, **look
    )
    bare = look | {"label": None, "linestyle": "none", "zorder": layer + 0.5}
    changes = {
        "edge": {"markerfacecolor": "white"},
        "best": {"marker": "o", "markersize": 12, "fillstyle": "none"},
    }
    for point in points:
        if point.mark:
            axes.plot(point.x, point.y, **bare | changes[point.mark])
    lost = [point.x for point in points if point.y is None]
    for marker in (look["marker"], "x") if lost else ():  # each method at a height of its own
        height = 0.02 + 0.011 * list(NAME.values()).index(look["label"])
        cross = {
            "marker": marker,
            "markersize": 6,
            "fillstyle": "none",
            "transform": axes.get_xaxis_transform(),
        }
        axes.plot(lost, [height] * len(lost), **bare | cross)


def draw(folder, name, caption, panels):
    """Write panels with one legend below as PNG and SVG, always the same bytes; return the Markdown that shows them.

    Axes of the same name have the same range, so that panels can be compared.
    """
    import matplotlib  # not above, because --edges has to start fast
    from matplotlib.figure import Figure

    matplotlib.rcParams.update(
        {"svg.hashsalt": "plot", "font.size": 9, "axes.grid": True, "grid.color": "#e8e8e8"}
    )
    columns, legend, named = min(4, len(panels)), {}, {}
    lines, (width, height) = (
        math.ceil(len(panels) / columns),
        {1: (5.5, 4), 2: (4.4, 3.6)}.get(columns, (3.2, 2.6)),
    )
    figure = Figure(figsize=(width * columns, height * lines), layout="constrained")
    figure.suptitle(caption, fontsize=9, color="#555555")
    for i, panel in enumerate(panels, 1):
        trained = any(point.y is not None for _, points in panel.lines for point in points)
        like = {"sharex": named.get(panel.xlabel), "sharey": named.get(panel.ylabel) if trained else None}
        axes = figure.add_subplot(lines, columns, i, title=panel.title, **like)
        axes.set(xlabel=panel.xlabel, ylabel=panel.ylabel)
        named |= {panel.xlabel: axes} | ({panel.ylabel: axes} if trained else {})
        axes.margins(y=0.2)  # the crosses stand below the curves
        for layer, (look, points) in enumerate(panel.lines, 2):
            draw_line(axes, layer, look, points)
        for scale, base in zip((axes.set_xscale, axes.set_yscale), panel.bases, strict=True):
            if base:
                scale("log", base=base)
        if not panel.bases[0]:
            axes.xaxis.get_major_locator().set_params(integer=True)
        if not trained:
            axes.set_yticks([])  # all diverged: there is no scale
        legend |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    order = sorted(legend, key=[*NAME.values(), *legend].index)
    width = int(figure.get_figwidth() / 2.2)
    figure.legend([legend[label] for label in order], order, loc="outside lower center", ncols=width)
    for kind, unstamped in (("png", {"Software": None}), ("svg", {"Date": None})):
        with whole_file(folder / f"{name}.{kind}") as file:
            figure.savefig(file, format=kind, dpi=150, metadata=unstamped)
    return f"![{name}]({folder.name}/{name}.png)"


@contextlib.contextmanager
def whole_file(path):
    """A binary file that is written completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "wb") as file:
        yield file
    temporary.replace(path)


# -------------------------------------------------------------------------------------------------------------- report


def markdown(header, rows):
    """A table, without the columns in which there is nothing."""
    shown = [i for i in range(len(header)) if any(row[i] != "–" for row in rows)]
    return "\n".join(
        f"| {' | '.join(str(row[i]) for i in shown)} |" for row in (header, ["---"] * len(header), *rows)
    )


def table_keys(section, number):
    """The (method, depth, batch size) of the rows of a table; none if what makes it a table of its own was not run."""
    methods, imagenet = [method for table, method in TABLES if table == number], number > 3
    own = [key for key in section.at if key[0] in methods and (imagenet or key[2] == section.bs)]
    own = [key for key in own if number > 1 or key[1] == 16]
    places, components = {key[1:] for key in own}, {key[0] for key in own} - {"none", "scalar", "zeroinit"}
    if not {1: components, 2: len(places) > 1, 3: len(places) > 1}.get(number, places):
        return []
    if not section.differences(**NETWORK.get(number, {})):
        places |= {(50, x) if imagenet else (x, section.bs) for x in TABLES[number, methods[0]]}
    keys = [(method, *place) for place in sorted(places) for method in (*methods, *ALSO.get(number, ()))]
    return [key for key in keys if key[0] in methods or key in section.at]


def cells(grid, metric):
    """The number and the learning rate of an optimum."""
    if not grid or not (best := optimum(grid, metric)):
        tried = dict.fromkeys(power(rate) for rate in (min(grid.runs), max(grid.runs))) if grid else ()
        return ("diverged", f"at {' – '.join(tried)}") if grid else ("not run", "not run")
    return best.value, best.bracketed + f" **({best.edge} tried)**" * bool(best.edge)


def table(section, keys, number=None):
    """Markdown: the grids at some (method, depth, batch size), beside the numbers of one of the paper's tables."""
    rows, metrics = [], section.setup.metrics
    for method, depth, bs in keys:
        grid = section.at.get((method, depth, bs))
        paper = TABLES.get((number, method), {}).get(depth if LOSS in metrics else bs, "–").split("|")
        paper += ["–"] * (3 - len(paper))
        (value, rate), (loss, its_rate), *_ = [*(cells(grid, metric) for metric in metrics), ("–", "–")]
        runs = [run for rate in grid.runs for run in grid.runs[rate]] if grid else []
        found = [best for metric in metrics if grid and (best := optimum(grid, metric))]
        kept = dict.fromkeys(f"{how_many(best.runs)}/{best.runs}" for best in found)
        lost = f"{sum(run['status'] == 'diverged' for run in runs)} of {len(runs)}" if runs else "–"
        row = [depth, bs, NAME[method], value, paper[0], rate, paper[1], loss, paper[2], its_rate]
        rows.append([*row, ", ".join(kept) or "–", lost])
    accuracy = "Test accuracy (%)" if LOSS in metrics else "Top-1 / top-5 (%)"
    header = f"Layers|B|Method|{accuracy}|Paper|Rate|Paper|Training loss|Paper|Rate|Kept|Diverged"
    return markdown(header.split("|"), rows)


def protocol(section, **network):
    """The end of a caption: the section's protocol, and what in it is not the paper's."""
    differences, paper = section.differences(**network), section.setup.seeds
    differences += [f"{seeds(section.counts)} instead of {paper}"] * (min(section.counts) < paper)
    told = f"Not the paper's protocol: {', '.join(differences)}." if differences else "The paper's protocol."
    return f"{section.caption}. {told}"


def what_was_run(section):
    """Markdown: runs, machines and commits; seeds that some rates lack; grids that no figure or table shows."""
    runs = [run for grid in section.grids for records in grid.runs.values() for run in records]
    machines = {
        ", ".join(str(run["environment"].get(key)) for key in ("device", "precision", "torch"))
        for run in runs
    }
    commits = {str(run["environment"].get("commit")) for run in runs}
    yield f"- {len(runs)} runs, {sum(run['status'] == 'diverged' for run in runs)} of them diverged"
    yield f"- device, precision, torch: {'; '.join(sorted(machines))}; commit {', '.join(sorted(commits))}"
    yield f"- images with fingerprint {runs[0]['config']['fingerprint']}"
    for grid in section.grids:
        seeds, lacking = (
            {rate: {run["config"]["seed"] for run in grid.runs[rate]} for rate in sorted(grid.runs)},
            {},
        )
        for rate, present in seeds.items():
            lacking.setdefault(tuple(sorted(set().union(*seeds.values()) - present)), []).append(power(rate))
        for missing, rates in lacking.items():
            if missing:
                yield f"- {grid.name} lacks at {', '.join(rates)} seed {', '.join(map(str, missing))}"
        if not grid.key[0]:
            yield f"- {grid.name} is in no figure or table"


def section_report(section, home, curves):
    """Markdown of a section, whose pictures go into a folder of its own."""
    folder = home / re.sub(r"[^a-z0-9.^-]+", "-", section.title.lower()).strip("-")
    caption = section.caption
    yield f"# {caption}"
    yield "\n".join(what_was_run(section))
    for number in FIGURES:
        if section.lines(f"Fig. {number}", ACCURACY):
            yield draw(folder, f"fig{number}", caption, list(figure_panels(section, number)))
            network = f"{section.depth}-{section.grids[0].config['width']} Wide-ResNet"
            yield f"**Figure {number}.** {FIGURES[number]} {network}. {protocol(section, width=4, depth=16)}"
    tabled = set()
    for number in section.setup.tables:
        if keys := table_keys(section, number):
            tabled |= set(keys)
            yield f"**Table {number}.** {protocol(section, **NETWORK.get(number, {}))}"
            yield table(section, keys, number)
    for metric in section.setup.metrics:
        for lines, name, label, base in MULTIPLES if curves or metric is TOP1 else MULTIPLES[:1]:
            panels = list(small_multiples(section, lines, metric, label, base))
            if any(points for panel in panels for _, points in panel.lines):
                yield draw(folder, f"{name}_{metric.key}", caption, panels)
                yield f"**{metric.name.capitalize()} against the {label}.** {lines.__doc__} {caption}."
    if section.at.keys() - tabled:
        yield "**All grids.**"
        yield table(section, section.at)


def speed_report(speed, home):
    """Markdown of a record of speed.py: a picture, a table, what the targets of the sweep cost, and its checks."""
    fastest, rows = speed["fastest"], []
    engines = sorted({key[2] for key in fastest}, key=lambda engine: [*ENGINES].index(engine.split(",")[0]))
    for bs, method in dict.fromkeys(key[:2] for key in fastest):
        cells, plain = [], None
        for row in (fastest.get((bs, method, engine)) for engine in engines):  # the plain loop comes first
            plain = row if row and row["engine"] == "plain" else plain
            text = (
                f"{row['images_per_second']:,.0f}" + f", {row['runs']} runs" * (row["runs"] > 1)
                if row
                else "–"
            )
            if row and plain and row is not plain:
                text += f" (× {row['images_per_second'] / plain['images_per_second']:.2f})"
            cells.append(text)
        rows.append([bs, NAME[method], *cells])
    yield from (f"# {speed['title']}", speed["about"])
    yield draw(home / speed["folder"], "speed", speed["title"], [speed_panel(speed)])
    yield f"**Images per second.** {speed_panel.__doc__} × how many times the plain loop's."
    yield markdown(["B", "Method", *engines], rows)
    if costs := [[line["target"], f"{line['runs']:,}", f"{line['hours']:,.0f}"] for line in speed["cost"]]:
        yield "**What the targets of the sweep cost on this machine.**"
        yield markdown(["Target", "Runs", "Hours"], costs)
    for line in speed["checks"]:
        met = "met" if line["met"] else "**not met**"
        yield f"- {met}: {line['what']}: {line['value']:,.2f}, at least {line['target']:,}"


def report(folder, runs, speeds, problems, curves):
    """Write RESULTS/report: the claims, then every section, then the files that were not used."""
    home, sections = folder / "report", make_sections(runs)
    parts = ["# Claims of the paper", NOTE, *judge_all(sections, speeds)]
    for section in sections:
        parts += section_report(section, home, curves)
    for speed in speeds:
        parts += speed_report(speed, home)
    if problems:
        parts += ["# Files that were not used", "\n".join(f"- {name}: {problems[name]}" for name in problems)]
    with whole_file(home / "REPORT.md") as file:
        file.write(("\n\n".join(parts) + "\n").encode())
    return home / "REPORT.md"


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", type=Path, help="folder with the records, RESULTS/DATASET/RUN.json")
    parser.add_argument(
        "--curves", action="store_true", help="also draw the learning curves at the optimal rates"
    )
    parser.add_argument("--edges", action="store_true", help="print GRID<tab>RATE for each rate to try next")
    args = parser.parse_args()
    runs, speeds, problems = read_records(args.results)
    for name, problem in problems.items():
        print(f"{args.results / name}: not used: {problem}", file=sys.stderr)
    if not runs and not speeds:
        parser.exit(2, f"error: no records in {args.results} (as {args.results}/DATASET/RUN.json)\n")
    if args.edges:
        grids = [grid for section in make_sections(runs) for grid in section.grids]
        print("".join(f"{grid.name}\t{power(rate)}\n" for grid in grids for rate in next_rates(grid)), end="")
        return
    try:
        print(f"report: {report(args.results, runs, speeds, problems, args.curves)}")
    except OSError as error:
        parser.exit(2, f"error: cannot write the report: {error}\n")


if __name__ == "__main__":
    main()
