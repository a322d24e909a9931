"""The paper's figures and tables: their numbers, and which runs belong where.

Records become grids (one configuration at all its learning rates), grids become sections (one protocol), and
a section knows the lines of each figure and table. The statistics are those of records.py.
"""

import itertools
import math
import re
from collections import Counter
from dataclasses import dataclass

from records import ACCURACY, EXTEND, LOSS, final_of, optimum, slug

# ------------------------------------------------------------------------------------------------- the paper

WHOLE, NO_L2 = "bn (whole batch)", "zeroinit without L2"  # `method_of` says which runs these are
NAMES = {  # in the order of legends and tables
    "bn": "Batch Normalization",
    WHOLE: "Batch Normalization (whole batch)",
    "none": "No Normalization",
    "biases": "+ biases",
    "dropout": "+ dropout",
    "scalar": "+ scalar multiplier",
    "biases+dropout": "+ biases & dropout",
    "fixup": "Fixup",
    "zeroinit-nodropout": "ZeroInit without Dropout",
    "zeroinit": "ZeroInit",
    "zeroinit+bias": "ZeroInit + Scalar Bias",
    NO_L2: "ZeroInit without L2",
}
HAS_DROPOUT = ("dropout", "biases+dropout", "zeroinit", "zeroinit+bias")


@dataclass(frozen=True)
class Cell:
    """What a table of the paper says of one method: accuracies in per cent, rates as exponents of two."""

    accuracy: float
    std: float | None = None
    rates: tuple = ()  # the optimal rate and, if there is a bracket, the lowest and the highest tied with it
    loss: float | None = None
    loss_std: float | None = None
    top5: float | None = None


CELLS = {  # (table, method): one cell for each of the table's PLACES
    (1, "none"): [Cell(92.3, 0.3, (), 0.212, 0.004)],
    (1, "biases"): [Cell(91.9, 0.2, (), 0.205, 0.003)],
    (1, "dropout"): [Cell(93.2, 0.1, (), 0.226, 0.001)],
    (1, "scalar"): [Cell(94.0, 0.1, (), 0.181, 0.001)],
    (1, "biases+dropout"): [Cell(93.6, 0.1, (), 0.212, 0.001)],
    (1, "zeroinit"): [Cell(94.4, 0.1, (), 0.189, 0.001)],
    (2, "bn"): [Cell(93.5, 0.1, (-1,)), Cell(94.7, 0.1, (-1, -2, 0)), Cell(94.6, 0.1, (-2, -3, 0))],
    (2, "zeroinit"): [Cell(93.3, 0.1, (-2,)), Cell(94.2, 0.1, (-2,)), Cell(94.3, 0.2, (-2, -3, -1))],
    (3, NO_L2): [Cell(91.0, None, (-3,)), Cell(92.2, 0.1, (-3,)), Cell(92.5, 0.2, (-3,))],
    (3, "scalar"): [
        Cell(93.1, 0.1, (-2, -3, -2)),
        Cell(94.1, 0.1, (-2, -3, -2)),
        Cell(94.2, 0.1, (-1, -2, -1)),
    ],
    (4, "bn"): [Cell(74.97, top5=92.20), Cell(74.93, top5=92.13), Cell(74.88, top5=91.93)],
    (4, "fixup"): [Cell(74.81, top5=91.84), Cell(74.60, top5=91.69), Cell(73.02, top5=90.59)],
    (4, "zeroinit-nodropout"): [Cell(74.93, top5=91.89), Cell(74.61, top5=91.81), Cell(70.76, top5=89.15)],
    (4, "zeroinit"): [Cell(75.56, top5=92.35), Cell(75.46, top5=92.53), Cell(72.65, top5=90.70)],
    (5, "bn"): [Cell(75.57, top5=92.48), Cell(75.32, top5=92.37), Cell(75.37, top5=92.38)],
    (5, "fixup"): [Cell(74.41, top5=91.65), Cell(74.43, top5=91.74), Cell(72.37, top5=90.28)],
    (5, "zeroinit"): [Cell(70.05, top5=89.16), Cell(68.40, top5=87.82), Cell(68.19, top5=87.92)],
    (5, "zeroinit+bias"): [Cell(75.23, top5=92.37), Cell(74.94, top5=91.99), Cell(70.82, top5=89.60)],
}
DEPTHS, SIZES = [(16, 64), (100, 64), (1000, 64)], [(50, 256), (50, 1024), (50, 4096)]
PLACES = {1: [(16, 64)], 2: DEPTHS, 3: DEPTHS, 4: SIZES, 5: SIZES}  # the (depth, batch size) of each table
PAPER = {
    (n, m, *at): cell for (n, m), cells in CELLS.items() for at, cell in zip(PLACES[n], cells, strict=True)
}
SATURATION = {"bn": 4, "none": -3, "zeroinit": 1}  # Figure 2a: exponents of the largest optimal rates


@dataclass(frozen=True)
class Target:
    """A figure or table of the paper: which runs it shows."""

    title: str
    caption: str
    methods: tuple  # the paper's; other methods that were run at the same places are shown below them
    width: int | None = 4  # of the paper's network
    table: int = 0  # its number among the tables
    sizes: tuple = (1, math.inf)  # batch sizes from and to
    whole: bool = False  # batch norm over the whole batch in place of ghost batches
    rates: bool = False  # shows optimal rates in place of what they reach
    deep: bool = False  # compares depths in place of batch sizes
    version: str | None = None  # of ResNet-50
    least: int = 2  # so many batch sizes or depths make it worth showing, and another method part of it
    more: bool = True  # whether other methods are shown
    barred: tuple = ()  # those that are not, because another table has them


OF_TABLE = {n: tuple(method for table, method in CELLS if table == n) for n in PLACES}  # methods
LARGE = {"methods": ("bn", "none", "zeroinit"), "sizes": (16, math.inf)}
SMALL = {"methods": (WHOLE, "none", "zeroinit"), "sizes": (1, 1024), "whole": True}
DEEP = {"width": 2, "deep": True}
TARGETS = {
    "fig1": Target("Figure 1", "Test accuracy and training loss at the optimal rates", **LARGE),
    "fig2": Target("Figure 2", "The optimal learning rates of Figure 1", rates=True, **LARGE),
    "fig3": Target("Figure 3", "As Figure 1, with batch statistics over the whole batch", **SMALL),
    "fig4": Target("Figure 4", "The optimal learning rates of Figure 3", rates=True, **SMALL),
    "table1": Target("Table 1", "The components of ZeroInit", OF_TABLE[1], table=1, least=1),
    "table2": Target("Table 2", "The effect of depth", OF_TABLE[2], table=2, barred=OF_TABLE[3], **DEEP),
    "table3": Target(
        "Table 3", "ZeroInit without L2; its scalar alone", OF_TABLE[3], table=3, more=False, **DEEP
    ),
    "table4": Target("Table 4", "ResNet-50-V2", OF_TABLE[4], None, table=4, version="v2", least=1),
    "table5": Target("Table 5", "ResNet-50-V1", OF_TABLE[5], None, table=5, version="v1", least=1),
}


@dataclass(frozen=True)
class Setup:
    """How the paper trains one kind of network."""

    metrics: tuple
    accuracy: str  # what the accuracy is called
    digits: int  # of it in per cent
    seeds: int
    ghost: int
    dropout: float
    l2: float
    protocol: dict


OPTIONS = {"momentum": 0.9, "dampening": 0.9, "l2_all": False, "scalar_lr": 1.0, "base_init": "he-in"}
CIFAR = OPTIONS | {"data": "CIFAR-10", "epochs": 200, "pad_mode": "zeros", "train_size": None}
IMAGENET = OPTIONS | {"data": "ImageNet", "epochs": 90, "image_size": 224}
SETUPS = {  # by the version of ResNet-50, None for Wide-ResNets
    None: Setup((ACCURACY, LOSS), ACCURACY.name, 1, 15, 64, 0.6, 5e-4, CIFAR),
    "v1": Setup((ACCURACY,), "top-1 accuracy", 2, 1, 256, 0.2, 1e-4, IMAGENET | {"stride_on": "1x1"}),
    "v2": Setup((ACCURACY,), "top-1 accuracy", 2, 1, 256, 0.2, 1e-4, IMAGENET | {"stride_on": "3x3"}),
}

# ----------------------------------------------------------------------------------------- grids and sections

OF_POINT = ("init", "ghost", "dropout", "wd", "alpha", "depth", "bs")  # what may differ within a section
BUDGET = {"epochs", "train_size", "image_size"}  # a grid has the paper's `budget` if these are the paper's


def method_of(config, whole=False):
    """The method of a configuration: `init`, and in words what is not usual for it.

    `whole`: also where a single ghost batch is the whole batch.
    """
    setup, init, bs, words = SETUPS[config.get("version")], config["init"], config["bs"], ""
    ghost, dropout, l2, alpha = (config.get(key) for key in ("ghost", "dropout", "wd", "alpha"))
    usual = setup.dropout if init in HAS_DROPOUT else 0.0
    if ghost is not None and (ghost != min(bs, setup.ghost) or (whole and ghost == bs)):
        words += " (whole batch)" if ghost == bs else f", ghost {ghost}"
    if dropout is not None and dropout != usual:
        words += f", dropout {dropout:g}"
    if alpha:
        words += f", alpha {alpha:g}"
    if l2 is not None and l2 != setup.l2:
        words += f", L2 {l2:g}" if l2 else " without L2"
    return init + words


def name_of(method):
    """The method's name in figures and tables, also of one that NAMES does not have."""
    init = re.split(r",| \(| without ", method)[0]
    return NAMES.get(method) or NAMES.get(init, init) + method[len(init) :]


class Grid:
    """The runs of one configuration at its learning rates: a point of a figure, a row of a table."""

    def __init__(self, config, images):
        self.config, self.test_images, self.runs, self.optima = config, images, {}, {}
        self.method, self.depth, self.bs = method_of(config), config.get("depth", 50), config["bs"]
        self.whole = method_of(config, whole=True)  # its name in Figures 3 and 4
        self.setup = SETUPS[config.get("version")]
        paper = self.setup.protocol
        self.budget = all(config.get(key, paper[key]) == paper[key] for key in BUDGET & paper.keys())

    def reached(self, metric):
        """The optimum, at chance where no rate trains; None if every rate diverged."""
        if metric not in self.optima:
            finals = {rate: [final_of(run) for run in runs] for rate, runs in self.runs.items()}
            self.optima[metric] = optimum(finals, metric)
        return self.optima[metric]

    def best(self, metric):
        """The optimum, None if no rate trains."""
        reached = self.reached(metric)
        return reached if reached and reached.trains else None

    @property
    def failure(self):
        """What is said where no rate trains."""
        return "at chance" if self.reached(ACCURACY) else "diverged"


FEWER_SEEDS = "a rate with fewer seeds could be better"
BEST_ONLY = 1.22  # the mean of the best 80% of normal numbers varies more than their deviation tells


class Result:
    """One method at one batch size or depth `x`, at its optimal rate for a metric.

    Its `score` is the metric's mean, negated where less is better; minus infinity if no rate trains. It is
    `open` where more runs could raise it, for a reason in words. `low` and `high` are the exponents of the
    tied rates, further apart where the rates are; `up` and `down` say that they may be higher or lower.
    """

    def __init__(self, x, grid, metric):
        self.x, self.grid, self.metric, self.best = x, grid, metric, grid.best(metric)
        self.score, self.std, self.error, self.open = -math.inf, 0.0, 0.0, ""
        self.low = self.high = math.nan
        rates, self.up, self.down = sorted(grid.runs), False, False
        if best := self.best:
            self.score, self.std = metric.sign * best.mean, best.std or 0.0
            self.open = "an optimum is on the edge" if best.edge else far_neighbour(best.rate, rates)
            first, last = rates.index(best.tied[0]), rates.index(best.tied[-1])
            self.up, self.down = last == len(rates) - 1, first == 0
            below = 1 if self.down else math.log2(rates[first] / rates[first - 1])
            above = 1 if self.up else math.log2(rates[last + 1] / rates[last])
            self.low = math.log2(rates[first]) - max(0.0, below - 1) / 2  # the paper's are a factor 2 apart
            self.high = math.log2(rates[last]) + max(0.0, above - 1) / 2
            self.error = BEST_ONLY * self.std / math.sqrt(len(best.kept))  # of the mean
            if len(best.kept) < 4:  # so few may agree by chance; the error of a single run is
                single = 0.01 * best.mean
                if metric is ACCURACY:  # as the number of test images allows
                    single = math.sqrt(best.mean * (1 - best.mean) / grid.test_images)
                self.error = max(self.error, single / math.sqrt(len(best.kept)))
        elif few_rates(grid, rates):
            self.open = "none of a few rates trains"
        self.unfinished = reached.unfinished if (reached := grid.reached(metric)) else []
        if self.unfinished:
            self.open = FEWER_SEEDS
        if self.best and self.open and (self.unfinished or not self.best.edge):
            self.up = self.down = True  # the optimal rate may be another

    @property
    def next_rates(self):
        """The rates beyond tied ones that are on the edge."""
        rates = self.grid.runs
        return [min(rates) / 2] * self.down + [2 * max(rates)] * self.up


def far_neighbour(rate, rates):
    """A reason in words if the rates beside an optimum leave room for a better one: over a factor of 4."""
    near = rates[max(0, rates.index(rate) - 1) : rates.index(rate) + 2]
    far = any(after / before > 4 for before, after in itertools.pairwise(near))
    return "the next rate beside an optimum is over a factor of 4 away" if far else ""


def few_rates(grid, rates):
    """True if rates that were not run could train where none does.

    They span less than what a search adds on one side, or are over a factor of 4 apart up to the first that
    diverges.
    """
    done = [any(run["status"] == "done" for run in grid.runs[rate]) for rate in rates]
    last = max((i for i, trained in enumerate(done) if trained), default=-1)
    gaps = [after / rate for rate, after in itertools.pairwise(rates[: last + 2])]
    return rates[-1] < rates[0] * 2**EXTEND or max(gaps, default=1) > 4


class Section:
    """The grids of one protocol: they differ in nothing but method, depth and batch size."""

    def __init__(self, title, grids):
        order = [*NAMES, *sorted({grid.method for grid in grids} - NAMES.keys())]
        self.title = title
        self.grids = sorted(grids, key=lambda grid: (grid.depth, grid.bs, order.index(grid.method)))
        self.config, self.setup = self.grids[0].config, self.grids[0].setup
        places = {(grid.depth, grid.bs) for grid in grids}
        depths, sizes = Counter(depth for depth, _ in places), Counter(bs for _, bs in places)
        self.budget, at = self.grids[0].budget, Counter(grid.bs for grid in grids)
        rank = {bs: (self.budget and bs == 64, sizes[bs], bs == 64, at[bs]) for bs in sorted(sizes)}
        self.bs = max(rank, key=rank.get)  # of Tables 1 to 3
        paper = self.setup.protocol
        ours = {key: self.config.get(key, value) for key, value in paper.items()}
        if ours["dampening"] == ours["momentum"]:  # as by default: rates are effective ones
            ours["dampening"] = paper["dampening"]
        self.differences = {key: it for key, it in ours.items() if str(it).lower() != str(paper[key]).lower()}
        self.same_rates = "dampening" not in self.differences  # effective ones, as the paper's
        most = max(sorted(depths), key=lambda depth: (depths[depth], depth == 16))
        self.depth = 16 if self.budget and depths[16] > 1 else most  # of the figures

    def network(self, target):
        """True if this is the network of the paper's figure or table, and the batch size of Tables 1 to 3."""
        same = self.config.get("version") == target.version and self.config.get("width") == target.width
        usual = self.bs == 64 if target.table else self.depth == 16
        return same and (usual or bool(target.version))

    def beside(self, target):
        """True if the paper's numbers can stand beside ours: images and network are the paper's.

        CIFAR-10 (JPEG) counts as CIFAR-10 here; where a statement is about absolute numbers it does not.
        """
        same_images = self.config["data"].partition(" (")[0].lower() == self.setup.protocol["data"].lower()
        return same_images and self.network(target)

    def lines(self, target, metric):
        """{method: results in order} of a figure or table, for every method that was run."""
        about = self.config.get("version") == target.version and metric in self.setup.metrics
        if not about or not (target.table or self.has_figure(target)):
            return {}
        lines = {}
        for grid in self.grids:
            if method := self.method_in(target, grid):
                x = grid.depth if target.deep else grid.bs
                lines.setdefault(method, []).append(Result(x, grid, metric))
        return lines

    def has_figure(self, target):
        """True if a figure has runs of its own. Those that all share are Figure 1's, unless that has none."""
        large = any(grid.bs > (grid.config.get("ghost") or grid.bs) for grid in self.grids)
        whole = any(" (whole batch)" in grid.method for grid in self.grids)
        if target.whole:
            return whole or any(grid.bs < 16 for grid in self.grids)
        return large or not whole

    def method_in(self, target, grid):
        """As which method a figure or table shows a grid; None if it does not show it."""
        if target.version:
            return grid.method
        if target.table:
            return grid.method if grid.bs == self.bs and (target.deep or grid.depth == 16) else None
        low, high = target.sizes
        if grid.depth != self.depth or not low <= grid.bs <= high:
            return None
        if target.whole and grid.config.get("ghost"):
            return grid.whole if grid.config["ghost"] == grid.bs else None
        return None if " (whole batch)" in grid.method and not target.whole else grid.method

    def shown(self, target, metric=ACCURACY):
        """The lines of a figure or table that are shown, the paper's methods first; empty if not run."""
        lines, barred = self.lines(target, metric), target.methods + target.barred
        others = [m for m in lines if m not in barred and len(lines[m]) >= target.least and target.more]
        chosen = {m: lines[m] for m in (*target.methods, *others) if m in lines}
        xs = {result.x for line in chosen.values() for result in line}
        return chosen if len(xs) >= target.least or (self.beside(target) and target.table) else {}


def title_of(config):
    """What is trained, on which data, for how long, and every option that is not the paper's."""
    setup, precision = SETUPS[config.get("version")], config.get("precision", "float32")
    network = f"width {config['width']}" if "width" in config else f"ResNet-50-{config['version'].upper()}"
    told = {"model", "version", "data", "width", "epochs", "precision", *OF_POINT}
    told |= {"dampening"} if config.get("dampening") == config.get("momentum") else set()
    extra = [key for key in sorted(config.keys() - told) if config[key] != setup.protocol.get(key)]
    options = [f"{key.replace('_', ' ')} {str(config[key]).removesuffix('.0')}" for key in extra]
    options += [precision] if precision != "float32" else []
    epochs = f"{config['epochs']} epoch{'s' if config['epochs'] > 1 else ''}"
    return ", ".join([config["data"], network, epochs, *options])


def file_name(title):
    """The name of the folder of a section's pictures."""
    return re.sub(r"[^\w.^-]+", "-", title.lower()).strip("-")


def make_sections(records):
    """The records as grids, the grids as sections, those nearest to the paper's protocol first."""
    grids, sections = {}, {}
    for record in records:
        config = {key: value for key, value in record["config"].items() if key not in ("lr", "seed")}
        images = record["data"]["fingerprint"]
        same = config | {"data": slug(config["data"])}  # however its name is written
        key = str(sorted(same.items())) + images
        if key not in grids:
            grids[key] = Grid(config, record["data"]["test_images"])
            shared = sorted((key, same[key]) for key in same.keys() - set(OF_POINT))
            sections.setdefault((str(shared), images), []).append(grids[key])
        grids[key].runs.setdefault(record["config"]["lr"], []).append(record)
    titles = {key: title_of(members[0].config) for key, members in sections.items()}
    alike, found = Counter(map(file_name, titles.values())), []
    for key, members in sections.items():
        images = f", images {key[1][:8]}" if alike[file_name(titles[key])] > 1 else ""
        found.append(Section(titles[key] + images, members))

    def distance(section):
        other_width = section.config.get("width") not in (None, 2, 4)
        different = section.differences.keys()
        return "data" in different, len(different), other_width, -section.config["epochs"], section.title

    return sorted(found, key=distance)
