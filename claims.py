"""The statements of the paper, and whether runs bear them out.

A claim is a function whose docstring is the statement, or a row of "A is better than B". It gets the results
of its figure or table from one section (paper.py) and returns a verdict, which is `undecided` where learning
rates that were not tried could change it.
"""

import contextlib
import itertools
import json
import math
import re
import shlex
from dataclasses import dataclass, field, replace
from enum import Enum

from paper import FEWER_SEEDS, NAMES, NO_L2, SATURATION, SETUPS, TARGETS, WHOLE, Section, name_of
from records import ACCURACY, LOSS, power

# -------------------------------------------------------------------------------------------------- verdicts


class Verdict(Enum):
    """What runs say of a statement."""

    HOLDS = "holds"
    FAILS = "does not hold"
    TIED = "tied"
    UNDECIDED = "undecided"


HOLDS, FAILS, TIED, UNDECIDED = Verdict
TIED_EDGE = "tied rates are on the edge"
TINY = 1e-9  # a limit that is met exactly is met


def decide(lead, error=0.0, rise=False, fall=False):
    """The verdict on a lead that must be positive; more learning rates could let it `rise`, or `fall`."""
    if math.isnan(lead):
        return UNDECIDED  # of two that do not train
    if abs(lead) <= error:
        return UNDECIDED if rise or fall else TIED
    return (UNDECIDED if fall else HOLDS) if lead > 0 else UNDECIDED if rise else FAILS


def every(verdicts):
    """The verdict on several statements together."""
    found = set(verdicts)
    return next((verdict for verdict in (FAILS, UNDECIDED, TIED, HOLDS) if verdict in found), UNDECIDED)


def noise(*results):
    """The standard error of a difference of results; a smaller difference is tied."""
    return math.hypot(*(result.error for result in results))


def compare(first, second, by=0.0):
    """Whether the first result is better than the second by more than `by`; what does not train is worst."""
    return decide(first.score - second.score - by, noise(first, second), first.open, second.open)


def not_behind(first, second, by):
    """Whether the first result is at most so far behind the second; tied if it is further, but by noise."""
    lead = first.score - second.score + by + TINY
    return decide(lead, 0.0 if lead > 0 else noise(first, second), first.open, second.open)


def overlap(first, second):
    """Whether the bars of one standard deviation of two results overlap."""
    bars = first.std + second.std
    return every([not_behind(first, second, bars), not_behind(second, first, bars)])


def grows(first, second, low=-math.inf, high=math.inf):
    """Whether the rate grows from one result to another by 2^low to 2^high, as far as the tied rates tell."""
    if not (first and second):
        return UNDECIDED  # not run
    above, below = second.low - first.high - high, low - second.high + first.low
    up, down = second.up or first.down, second.down or first.up
    fall = (up and high < math.inf) or (down and low > -math.inf)
    return decide(TINY - max(above, below), 0, up if below > above else down, fall)


def higher_rate(first, second):
    """Whether all tied rates of the first result are above those of the second."""
    if not (first and second):
        return UNDECIDED  # not run
    lead = max(0, first.low - second.high) - max(0, second.low - first.high)
    return decide(lead, 0, first.up or second.down, first.down or second.up)


def rows(*lines):
    """The results of several lines at each x that all of them have."""
    at = [{result.x: result for result in line} for line in lines]
    return [[line[x] for line in at] for x in at[0] if all(x in line for line in at)]


def at(line, x):
    """The result of a line at x, None if it has none there."""
    return next((result for result in line if result.x == x), None)


def best_of(line):
    return max(line, key=lambda result: result.score)


# ---------------------------------------------------------------------------------------------------- claims


@dataclass(frozen=True)
class Claim:
    """A statement of the paper and the test that decides it."""

    place: str
    statement: str
    methods: tuple
    test: object  # gets the results of each method, and returns a verdict
    loss: bool = False  # about the training loss, as those of panels b are anyway; else about the accuracy
    low: int = 1  # batch sizes or depths from
    high: float = math.inf  # and to
    least: int = 1  # so many of them are needed
    reach: int = 1  # and one this large; of batch sizes a quarter, where the budget is not the paper's
    beyond: bool = False  # whatever the budget, only that large a one can deny it
    start: float = math.inf  # and one this small
    runs: int = 1  # so many runs kept behind each result are needed
    rates: bool = False  # about optimal rates, which are told in place of what they reach
    both: bool = False  # both are told
    worst: bool = False  # a result that trains at no rate is the worst; in other claims it drops out
    paired: bool = False  # compares the methods at the batch sizes or depths that all of them have
    paper: bool = False  # about absolute numbers: only for the paper's data, network and budget
    leads: tuple = ()  # (by over, and up to): the lead nearest to failing is told in place of all numbers

    @property
    def metric(self):
        return LOSS if self.loss or self.place.endswith("b") else ACCURACY

    @property
    def target(self):
        """The name of the figure or table whose runs decide it: "fig1" for Fig. 1a."""
        return re.sub(r"\W|[ab]$", "", DECIDED_BY.get(self.place, self.place).lower())


CLAIMS = []
DECIDED_BY = {"Section 2": "Table 2", "Section 6": "Fig. 2"}  # whose runs decide what the text says


def claim(places, *methods, **options):
    """Make a function a claim of each place: its docstring is the statement, {0} a method, {names} all."""

    def register(test):
        names = [name_of(method) for method in methods]
        statement = " ".join(test.__doc__.split()).removesuffix(".")
        statement = statement.format(*names, names=", ".join(names), **options)
        CLAIMS.extend(Claim(place, statement, methods, test, **options) for place in places.split(", "))
        return test

    return register


def better(place, first, second, words="better than", least=0.0, most=math.inf, **options):
    """Add the claim that one method leads another wherever both were run, by over `least` and up to `most`.

    A negative `least` is a distance that the first may be behind.
    """

    def leads(*lines):
        found = []
        for one, two in rows(*lines):
            found.append(not_behind(one, two, -least) if least < 0 else compare(one, two, least))
            found += [not_behind(two, one, most)] if most < math.inf else []
        return every(found)

    claim = Claim(place, "", (first, second), leads, worst=True, leads=(least, most), **options)
    accuracy = SETUPS[TARGETS[claim.target].version].accuracy
    low, high = claim.low, claim.high
    where = f" for B ≥ {low}" if low > 1 else f" for B ≤ {high}" if high < math.inf else ""
    name = accuracy if claim.metric is ACCURACY else claim.metric.name
    statement = f"{NAMES[first]} is {words} {NAMES[second]} in {name}{where}"
    CLAIMS.append(replace(claim, statement=statement))


def reaches(place, statement, methods, floor, **options):
    """Add the claim that methods reach an accuracy with the paper's data, network and budget."""

    def reach(*lines):
        results = [result for line in lines for result in line]
        return every(decide(r.score - floor, noise(r), r.open) for r in results)

    CLAIMS.append(Claim(place, statement, methods, reach, worst=True, paper=True, **options))


OTHERS = ("none", "biases", "dropout", "biases+dropout", "zeroinit")
THREE, THREE_WHOLE = ("bn", "none", "zeroinit"), (WHOLE, "none", "zeroinit")
better("Fig. 1a", "bn", "none")


@claim("Fig. 1a", "bn", "none", least=2, start=64, worst=True)
def higher_after_tuning(bn, none):
    """Batch Normalization is over one point better, each at its best batch size and learning rate."""
    rise, fall = (any(result.open for result in line) for line in (bn, none))
    best, plain = best_of(bn), best_of(none)
    return decide(best.score - plain.score - 0.01, noise(best, plain), rise, fall)


def median(line):
    return sorted(line, key=lambda result: result.score)[len(line) // 2]


@claim("Fig. 1a", *THREE, least=2, start=16, runs=8, high=64, worst=True)
@claim("Fig. 3a", "zeroinit", least=3, start=16, runs=8, high=256, worst=True)
def independent_of_batch_size(*lines):
    """The accuracy does not depend on B for B ≤ {high}: {names} (deviation bars overlap the median's)."""
    return every(overlap(result, median(line)) for line in lines for result in line)


@claim("Fig. 1a", *THREE, least=3, reach=4096, beyond=True, runs=4, worst=True)
def falls_at_large_sizes(*lines):
    """The accuracy falls when B is large (at the largest it is over one deviation below the median)."""
    ends = [(median(line[:-1]), line[-1]) for line in lines]
    return every(compare(middle, end, max(middle.std, end.std)) for middle, end in ends)


@claim("Fig. 3a", WHOLE, least=3, start=8, reach=64, runs=4, worst=True)
def falls_at_small_sizes(bn):
    """Batch Normalization drops when B is small (at the smallest over one deviation below the median)."""
    middle = median(bn[1:])
    return compare(middle, bn[0], max(middle.std, bn[0].std))


@claim("Fig. 1a", "none", "bn", least=3, start=64, reach=1024, worst=True)
@claim("Fig. 1a", "zeroinit", "bn", least=3, start=64, reach=1024, worst=True)
def efficient_sizes(*lines):
    """The largest efficient B (within a point of the best) is at least 8 times smaller for {0} than {1}."""
    bounds = []
    for line in lines:
        size = max(result.x for result in line if result.score >= best_of(line).score - 0.01)
        above = min((result.x / 2 for result in line if result.x > size), default=math.inf)
        known = best_of(line).best and not any(result.open for result in line)
        size = size if size > line[0].x else 0  # smaller ones, which were not run, may be better still
        bounds.append((size, above) if known else (0, math.inf))
    (its_low, its_high), (low, high) = bounds
    return HOLDS if low >= 8 * its_high else FAILS if high < 8 * its_low else UNDECIDED


better("Fig. 1a", "zeroinit", "none")


@claim("Fig. 1a", "zeroinit", "none", "bn", high=256, worst=True, paired=True)
def recovers_most(*lines):
    """ZeroInit recovers most of what Batch Normalization improves (over half of the gap) for B ≤ 256."""
    found = []
    for z, none, bn in rows(*lines):
        plain = none.score if none.best or not z.best else 0.0  # not infinitely bad: half of that is
        lead, error = z.score - (plain + bn.score) / 2, math.hypot(z.error, none.error / 2, bn.error / 2)
        found += [compare(bn, none), decide(lead, error, z.open, none.open or bn.open)]
    return every(found)


@claim("Fig. 1a", "zeroinit", "bn", high=256, runs=8, worst=True, paired=True)
def competitive(*lines):
    """ZeroInit is competitive with Batch Normalization for B ≤ 256 (deviation bars overlap, or it leads)."""
    return every(not_behind(zeroinit, bn, zeroinit.std + bn.std) for zeroinit, bn in rows(*lines))


better("Fig. 1a", "bn", "zeroinit", low=1024)
better("Fig. 1b", "bn", "none")
better("Fig. 1b", "bn", "zeroinit")


@claim("Fig. 1b", "none", "bn", least=3, start=64, reach=1024, worst=True, paired=True)
@claim("Fig. 1b", "zeroinit", "bn", least=3, start=64, reach=1024, worst=True, paired=True)
@claim("Fig. 1b", "none", "zeroinit", least=3, start=64, reach=1024, worst=True, paired=True)
def loss_degrades(*lines):
    """The training loss of {0} grows by a greater factor from the smallest to the largest B than {1}'s."""
    (more, less), *_, (more_end, less_end) = rows(*lines)
    if not (more.best and less.best):
        return UNDECIDED
    lead = math.log(more_end.score / more.score) - math.log(less_end.score / less.score)
    error = math.hypot(*(result.error / result.score for result in (more, less, more_end, less_end)))
    return decide(lead, error, more.open or less_end.open, more_end.open or less.open)


@claim("Fig. 1b", "zeroinit", "none", high=64, worst=True, paired=True)
def similar_losses(*lines):
    """Losses without normalization are similar with and without ZeroInit (within 20% for B ≤ 64)."""
    pairs = rows(*lines) + rows(*lines[::-1])
    return every(not_behind(one, two, -0.2 * two.score) for one, two in pairs)


@claim("Fig. 2a, Fig. 2b", *THREE, least=4, start=16, runs=4, rates=True)
@claim("Fig. 4a, Fig. 4b", *THREE_WHOLE, least=2, start=16, runs=4, rates=True)
def proportional(*lines):
    """The optimal rate is proportional to B when B is small (over a factor of 4, as B^0.5 to B^1.5)."""
    ends = [(line[0], at(line, 4 * line[0].x)) for line in lines]
    return every(verdict for pair in ends for verdict in (grows(*pair, 1, 3), higher_rate(*pair[::-1])))


@claim("Fig. 2a, Fig. 2b", *THREE, least=4, reach=8192, beyond=True, runs=4, rates=True)
def saturates(*lines):
    """The optimal rate saturates when B is large (over the last factor of 4 it grows slower than B^0.5)."""
    return every(grows(at(line, line[-1].x / 4), line[-1], high=0.9) for line in lines)


@claim("Fig. 2a, Fig. 2b", *THREE, high=32, runs=4, rates=True, paired=True)
@claim("Fig. 4a, Fig. 4b", *THREE_WHOLE, high=16, least=2, runs=4, rates=True, paired=True)
def similar_rates(*lines):
    """All three have similar optimal rates at the same small B (within a factor of 4 for B ≤ {high})."""
    return every(grows(*pair, -2, 2) for row in rows(*lines) for pair in itertools.combinations(row, 2))


@claim("Fig. 2a", *THREE, least=4, reach=4096, runs=4, rates=True, paper=True)
def saturation_rates(*lines):
    """The optimal rate saturates at 2^4 with normalization, 2^-3 without and 2^1 with ZeroInit (factor 2)."""
    found = []
    for limit, line in zip(SATURATION.values(), lines, strict=True):
        top = max(line, key=lambda result: result.high)
        found += [decide(limit + 1 - result.low + TINY, 0, result.down, result.up) for result in line]
        found += [decide(top.high - limit + 1 + TINY, 0, any(result.up for result in line), top.down)]
    return every(found)


@claim("Fig. 2a, Fig. 2b", "bn", "zeroinit", "none", reach=1024, runs=4, rates=True, paired=True)
def larger_rates(*lines):
    """At the largest B the optimal rate is larger with ZeroInit than without, largest with normalization."""
    bn, zeroinit, none = rows(*lines)[-1]
    return every([higher_rate(bn, zeroinit), higher_rate(zeroinit, none)])


@claim("Fig. 2a, Fig. 2b", "bn", "none", low=1, high=32, runs=4, both=True, paired=True)
@claim("Fig. 4a, Fig. 4b", WHOLE, "none", low=8, high=32, runs=4, both=True, paired=True)
def rate_is_not_the_reason(*lines):
    """Larger rates are not why normalization is better at small B ({low} to {high}: within a factor of 4)."""
    pairs = rows(*lines)
    return every(verdict for bn, none in pairs for verdict in (compare(bn, none), grows(none, bn, -2, 2)))


@claim("Section 6", "bn", least=3, start=32, reach=1024, runs=4)
def small_rates_suffice(bn):
    """Batch Normalization is as accurate at the smallest B as at rates 8 times as large (bars overlap)."""
    larger = [result for result in bn if grows(bn[0], result, low=3) is HOLDS]
    if not larger:
        return grows(bn[0], max(bn, key=lambda result: result.high), low=3)
    top = best_of(larger)
    return not_behind(bn[0], top, bn[0].std + top.std + noise(bn[0], top))  # the best of several


def keeps(result, shallow, points=True):
    """Whether a network trains as well as a shallow one: to two `points` at the paper's budget, or to 80%."""
    floor = shallow.score - 0.02 if points and result.grid.budget else 0.8 * shallow.score
    return decide(result.score - floor + TINY, 0, result.open, shallow.open)


@claim("Section 2", "none", "bn", least=2, start=16, reach=40, worst=True, paired=True)
def plain_fails_at_depth(none, bn):
    """Batch Normalization enables depth (the deepest trains; without it, below 80% of the shallowest)."""
    (plain, norm), *_, (deep_plain, deep_norm) = rows(none, bn)
    kept = keeps(deep_plain, plain, points=False)
    return every([{HOLDS: FAILS, FAILS: HOLDS}.get(kept, kept), keeps(deep_norm, norm)])


@claim("Table 2", "bn", least=2, start=16, reach=100, worst=True)
@claim("Table 2", "zeroinit", least=2, start=16, reach=100, worst=True)
@claim("Table 3", NO_L2, least=2, start=16, reach=100, worst=True)
@claim("Table 3", "scalar", least=2, start=16, reach=100, worst=True)
def trains_very_deep(line):
    """{0} trains very deep networks (within 2 points of the shallowest; at another budget, 80% of it)."""
    return every(keeps(result, line[0]) for result in line[1:])


@claim("Table 2", "bn", "zeroinit", least=2, reach=100, runs=4, rates=True)
@claim("Table 3", NO_L2, least=2, reach=100, runs=4, rates=True)
def rate_hardly_depends_on_depth(*lines):
    """The optimal rate hardly depends on depth: {names} (within a factor of 2, tied rates included)."""
    return every(grows(*pair, -1, 1) for line in lines for pair in itertools.combinations(line, 2))


better("Table 2", "bn", "zeroinit", "slightly (at most one point) better than", most=0.01)
reaches("Table 2", "Both train 1000 layers to over 94% test accuracy", ("bn", "zeroinit"), 0.94, low=1000)
better("Table 3", "zeroinit", NO_L2)
reaches("Table 1", "A scalar multiplier is sufficient for an accuracy of 94% (rounded)", ("scalar",), 0.935)
reaches("Table 1", "ZeroInit reaches 94.4% (94.2% or more)", ("zeroinit",), 0.942)


@claim("Table 1", "scalar", *OTHERS, loss=True, worst=True, paired=True)
def scalar_has_lowest_loss(*lines):
    """The scalar multiplier alone achieves the lowest training loss."""
    return every(compare(scalar, other) for scalar, *others in rows(*lines) for other in others)


for pair in itertools.pairwise(("zeroinit", "scalar", "biases+dropout", "dropout", "none", "biases")):
    better("Table 1", *pair)
for pair in (("scalar", "zeroinit"), ("zeroinit", "biases"), ("biases", "none"), ("none", "dropout")):
    better("Table 1", *pair, loss=True)
better("Table 1", "biases+dropout", "dropout", loss=True)
better("Fig. 3a", "zeroinit", WHOLE, high=4)
better("Fig. 3a", WHOLE, "zeroinit", low=512)
better("Fig. 3b", WHOLE, "zeroinit")
for method in ("fixup", "zeroinit"):
    better("Table 4", method, "bn", "competitive (at most 0.5 points below) with", -0.005, high=1024)
    better("Table 4", "bn", method, "over 0.5 points better than", 0.005, low=4096)
# The paper says so without a batch size; at 4096 its own numbers are 73.02 and 70.76.
better("Table 4", "fixup", "zeroinit-nodropout", "comparable (0.5 points) to", -0.005, 0.005, high=1024)
better("Table 5", "bn", "fixup", "slightly (at most 1.5 points) better than", 0.0, 0.015, high=1024)
better("Table 5", "bn", "fixup", "considerably (over 1.5 points) better than", 0.015, low=4096)
for method, word in (("bn", "significantly"), ("fixup", "significantly"), ("zeroinit+bias", "considerably")):
    better("Table 5", method, "zeroinit", f"{word} (over 1 point) better than", 0.01)
better("Table 5", "zeroinit+bias", "fixup", "at most 0.5 points below", -0.005, high=1024)
CLAIMS.sort(key=lambda claim: ([*TARGETS].index(claim.target), claim.place))

# -------------------------------------------------------------------------------------------------- judgement


@dataclass(frozen=True)
class Answer:
    """What runs say of a claim."""

    claim: Claim
    verdict: Verdict
    section: Section | None = None  # whose runs these are
    ours: str = ""  # the numbers behind it
    seeds: str = ""  # how many runs are behind each number
    reason: str = ""  # why it is undecided
    command: str = ""  # what would decide it
    elsewhere: dict = field(default_factory=dict)  # the verdict in every section that has one


def number(grid, metric, mean, std=None):
    """A mean with its deviation, as the paper writes it: 94.4 ± 0.1 or 0.189 ± 0.001."""
    scale, digits = (1, 3) if metric is LOSS else (100, grid.setup.digits)
    return " ± ".join(f"{scale * value:.{digits}f}" for value in (mean, std) if value is not None)


def tell(result, rates=False, both=False):
    """What is said of a result: its number, or its optimal rate."""
    best = result.best
    if not best:
        return result.grid.failure
    text, rate = number(result.grid, result.metric, best.mean, best.std), power(best.rate)
    return (rate if rates else f"{text} at {rate}" if both else text) + (" (*edge*)" if best.edge else "")


def places(claim, results):
    """Where results stand: B 16, 64 or 16, 100 layers."""
    xs = ", ".join(str(result.x) for result in results)
    return f"{xs} layers" if TARGETS[claim.target].deep else f"B {xs}"


def margin(first, second, least, most):
    """How far the lead of a result is from failing to be over `least` and up to `most`."""
    lead = first.score - second.score if first.best else -math.inf
    return lead - least if most == math.inf else min(lead - least, most - lead)


def numbers(claim, lines):
    """The numbers behind a verdict: those of each line, or of the lead that is nearest to failing."""
    table = rows(*lines.values())
    if claim.leads and table:
        table = sorted(table, key=lambda row: margin(*row, *claim.leads))
        verdicts = [claim.test(*([result] for result in row)) for row in table]
        one, two = table[verdicts.index(every(verdicts))]
        which = "the smallest lead" if claim.leads[1] == math.inf else "the one nearest to a limit"
        which += "" if one is table[0][0] else " that decides"
        among = f" ({which}, of {len(table)})" if len(table) > 1 else ""
        return f"{tell(one)} against {tell(two)} at {places(claim, [one])}{among}"
    texts, common = [], {row[0].x for row in table}
    for method, line in lines.items():
        line = [result for result in line if result.x in common or not (claim.paired and common)]
        few = sorted({line[0], best_of(line), line[-1]}, key=lambda result: result.x)
        chosen = few if len(line) > 4 and not claim.rates and claim.high == math.inf else line
        told = ", ".join(tell(result, claim.rates, claim.both) for result in chosen)
        texts.append(f"{name_of(method)} {told} ({places(claim, chosen)})")
    return "; ".join(texts)


def sweeps(claim, methods, grid="", flags=""):
    """The command that makes the runs of a claim's methods: the sweep of its figure or table.

    Where that lacks one of them, it is Table 2's with these methods, before that of Table 3 without L2.
    """
    start, end = f"{grid}bash sweep.sh {claim.target}{flags}", ""
    if not set(methods) <= set(TARGETS[claim.target].methods):
        end = f" && {start}" if NO_L2 in methods else ""
        inits = " ".join(method for method in methods if method != NO_L2)
        start = f'{grid}INITS="{inits}" bash sweep.sh table2{flags}'
    return start + end


def command(section, claim, methods, xs=(), rates=(), seeds=0):
    """The sweep that makes the runs of a claim's methods, with the flags of a section's protocol.

    It searches, unless it is for some rates that have fewer seeds than others.
    """
    target, config, words = TARGETS[claim.target], section.config, []
    if config.get("width") != target.width:
        words.append(f"--width {config['width']}")
    if not target.version and target.table and section.bs != 64:
        words.append(f"--bs {section.bs}")
    if not target.version and not target.table and section.depth != 16:
        words.append(f"--depth {section.depth}")
    if not target.version and not target.table and (images := config.get("train_size")):
        low, high = target.sizes
        xs = xs or [1 << k for k in range(14) if low <= 1 << k <= min(high, images)]
    named = {"CIFAR-100": "--data cifar100", "shapes": "--data shapes"}
    for option, value in section.differences.items():
        flag = f"--{option.replace('_', '-')}" + ("" if value is True else f" {value}")
        folder = f"--data folder --data-dir DIR --data-name {shlex.quote(str(value))}"
        words.append(named.get(value, folder) if option == "data" else flag)
    if target.version and "data" not in section.differences:  # its folder may have any name
        words.append(f"--data-dir DIR --data-name {shlex.quote(config['data'])}")
    precision = config.get("precision", "float32")
    words.append(f"--amp {'off' if precision == 'float32' else precision}")
    sizes = " ".join(map(str, sorted(xs)))
    grid = f'{"DEPTHS" if target.deep else "BATCHES"}="{sizes}" ' if xs else ""
    if rates:
        grid += f'LRS="{" ".join(map(power, sorted(rates)))}" '
        if set(methods) <= set(target.methods) and claim.target != "table3":  # which has no choice
            grid += f'INITS="{" ".join(methods).replace(WHOLE, "bn")}" '
        words.append(f"--seeds {seeds}")
    return sweeps(claim, methods, grid, f" {' '.join(words)}")


def lacking(section, claim, lines, tried):
    """What is missing to judge a claim, in words, and whether at the batch sizes or depths run so far."""
    deep, reach = TARGETS[claim.target].deep, claim.reach
    axis, reach = "depth" if deep else "batch size", reach if section.budget or deep else reach / 4
    if absent := [method for method in claim.methods if not tried[method]]:
        few = {*absent} <= {grid.method for grid in section.grids}
        within = f" of {claim.low} or more" if claim.low > 1 else f" of {claim.high:g} or less"
        within = within if claim.low > 1 or claim.high < math.inf else ""
        reason = f"run at too few {axis}s{within}" if few else "not run"
        return f"{reason}: {', '.join(map(name_of, absent))}", True
    if not all(lines.values()):
        return "an optimal rate of each is needed", False
    common = [row[0].x for row in rows(*lines.values())]
    if len(common) < claim.least:
        return f"all methods have {len(common)} {axis}s in common, {claim.least} are needed", False
    if common[-1] < reach:
        return f"no {axis} of {reach:g} or more that all methods have", False
    if common[0] > claim.start:
        return f"no {axis} of {claim.start:g} or less that all methods have", False
    bests = [result.best for line in lines.values() for result in line if result.best]
    few = any(len(best.kept) < claim.runs for best in bests)  # their deviation would say little
    needed = f"{claim.runs} runs kept of each point are needed ({5 * claim.runs // 4} seeds)"
    return needed if few else "", True


def wasteful(results, rates, seeds, points):
    """Whether all `rates` at all `points` of a sweep are over twice the runs that the results lack."""
    lacks = [{rate: seeds - len(result.grid.runs.get(rate, ())) for rate in rates} for result in results]
    own = sum(lack[rate] for result, lack in zip(results, lacks, strict=True) for rate in result.unfinished)
    rest = (points - len(results)) * len(rates) * seeds
    return sum(sum(lack.values()) for lack in lacks) + rest > 2 * own


def judge(section, claim):
    """The answer of a section to a claim; None if the claim is not about such runs."""
    target = TARGETS[claim.target]
    strict = section.budget or claim.paper  # at the paper's budget only the paper's network counts
    if (strict and not section.network(target)) or (claim.paper and section.differences):
        return None
    if claim.metric not in section.setup.metrics or section.config.get("version") != target.version:
        return None
    found = section.lines(target, claim.metric) if section.shown(target) else {}
    found = {key: [r for r in line if claim.low <= r.x <= claim.high] for key, line in found.items()}
    tried = {method: found.get(method, []) for method in claim.methods}
    lines = {key: [result for result in line if result.best or claim.worst] for key, line in tried.items()}
    results = [result for line in lines.values() for result in line]
    runs = sorted({(result.best.runs, len(result.best.kept)) for result in results if result.best})
    seeds = " to ".join(dict.fromkeys(f"{best} of {n}" for n, best in runs[:1] + runs[-1:]))
    ours = [numbers(claim, lines)] if all(lines.values()) else []
    for method, line in tried.items():
        if lost := [result for result in line if result not in lines[method]]:
            ours.append(f"{name_of(method)} trains at no rate at {places(claim, lost)}")
    answer = Answer(claim, UNDECIDED, section, "; ".join(ours), seeds)
    reason, here = lacking(section, claim, lines, tried)
    if reason:
        xs = {result.x for line in found.values() for result in line} if here and target.least > 1 else ()
        needed = [method for method in claim.methods if not tried[method]] or claim.methods
        return replace(answer, reason=reason, command=command(section, claim, needed, xs))
    verdict = claim.test(*lines.values())
    if claim.beyond and verdict in (FAILS, TIED) and min(line[-1].x for line in lines.values()) < claim.reach:
        reason = f"no batch size of {claim.reach} or more"
        return replace(answer, reason=reason, command=command(section, claim, claim.methods))
    if verdict is not UNDECIDED:
        return replace(answer, verdict=verdict)
    edges = [result for result in results if result.open]
    if not edges and (claim.rates or claim.both):
        edges = [result for result in results if result.up or result.down]
    why = {result.open or TIED_EDGE: [] for result in edges}
    for result in edges:
        why[result.open or TIED_EDGE].append(f"{name_of(result.grid.method)} at {places(claim, [result])}")
    failed = sum(not result.best for result in results) > 1
    reason = "more than one of them trains at no rate" if failed else "the range is too small"
    reason = "; ".join(f"{key}: {', '.join(found)}" for key, found in why.items()) or reason
    xs = {result.x for result in edges} if target.least > 1 else ()  # one batch size, or the paper's three
    needed = [method for method in claim.methods if any(result in edges for result in lines[method])]
    rates = {rate for result in edges for rate in result.unfinished} if set(why) == {FEWER_SEEDS} else ()
    rates = {rate for result in edges for rate in result.next_rates} if set(why) == {TIED_EDGE} else rates
    seeds = max(result.grid.reached(claim.metric).runs for result in edges) if rates else 0
    if set(why) == {FEWER_SEEDS} and wasteful(edges, rates, seeds, max(1, len(xs)) * len(needed)):
        rates = ()  # a search makes fewer runs
    decides = command(section, claim, needed or claim.methods, xs, rates, seeds)
    return replace(answer, reason=reason, command=decides)


def judge_all(sections):
    """Every claim's answer, from the section nearest to the paper that decides it."""
    found = []
    for claim in CLAIMS:
        answers = [answer for section in sections if (answer := judge(section, claim))]
        decided = [answer for answer in answers if answer.verdict is not UNDECIDED]
        partly = [answer for answer in answers if answer.ours]
        nothing = Answer(claim, UNDECIDED, reason="not run", command=sweeps(claim, claim.methods))
        chosen = next(iter([*decided, *partly, *answers]), nothing)
        found.append(replace(chosen, elsewhere={answer.section: answer.verdict for answer in answers}))
    return found


def judge_speed(folder):
    """The wall-clock claim, from the records of speed.py in RESULTS/speed; the fastest engine for one run."""
    words = "WRN-16-4 trains roughly 40% faster at B 64 without Batch Normalization (1.3 to 1.7 times)"
    claim, speeds = Claim("Section 3", words, ("none", "bn"), None), {}
    for path in sorted(folder.glob("speed/*.json")):
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # not such a record
            record = json.loads(path.read_text(encoding="utf-8"))
            for row in record["rows"] if record["model"] == "wrn16-4" else ():
                how = f"{row['engine']}, {row['precision']}, speed/{path.name}"
                if row["bs"] == 64 and row["runs"] == 1:
                    fastest = speeds.setdefault(how, {"none": 0.0, "bn": 0.0})
                    fastest[row["method"]] = max(fastest.get(row["method"], 0.0), row["images_per_second"])
    found = [(fast["none"], fast["bn"], how) for how, fast in speeds.items() if fast["none"] and fast["bn"]]
    if not found:
        return Answer(claim, UNDECIDED, reason="not measured", command="python speed.py")
    none, bn, how = max(found)
    ours = f"{none / bn:.2f} times ({none:,.0f} against {bn:,.0f} images/s; {how})"
    return Answer(claim, decide(0.2 - abs(none / bn - 1.5)), ours=ours)
