"""What runs leave behind: names, records, the paper's statistics, and the runs that a search still needs.

A record is the JSON file of one run, RESULTS/DATA/NAME.json, named by everything that decides the result.
A run is done if and only if its valid record exists. Standard library only.
"""

import contextlib
import json
import math
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

NOT_DATA = ("report", "logs", "speed", "slurm")  # folders in RESULTS that hold no records of runs
ENTRY = ("epoch", "lr", "train_loss", "l2", "train_accuracy", "seconds")  # of each epoch of a history
FINAL = ("test_accuracy", "train_loss", "train_objective")
FRACTIONS = ("train_accuracy", "test_accuracy", "test_top5")
EXTEND = 6  # a search adds at most so many rates on each side of the starting ones


class UserError(Exception):
    """Something that only the user can mend, in one line."""


# ------------------------------------------------------------------------------------------------------ names
def power(rate: float) -> str:
    """A learning rate as the paper writes it, 2^-2 for 0.25; others as the shortest decimal that is exact."""
    mantissa, exponent = math.frexp(rate)
    return f"2^{exponent - 1}" if mantissa == 0.5 else str(float(rate)).removesuffix(".0")


def slug(data_name: str) -> str:
    """The folder of a data set's records. Raises UserError for a name that gives none."""
    folder = "-".join("".join(c if c.isalnum() else " " for c in data_name.lower()).split())
    if not folder or len(folder.encode()) > 100 or folder in NOT_DATA:
        rule = f"it needs 1 to 100 letters and digits, and cannot be {', '.join(NOT_DATA)}"
        raise UserError(f"the data set's name {data_name[:100]!a} gives no folder name: {rule}")
    return folder


def run_name(prefix: str, config: dict, defaults: dict) -> str:
    """The name of a run's record, without suffix: options in the order of `defaults`, without those equal to it."""
    name = f"{prefix}_{config['init']}_bs{config['bs']}_lr{power(config['lr'])}_ep{config['epochs']}"
    for key, default in defaults.items():
        value, word = config[key], key.replace("_", "")
        if value is not None and value != default:
            name += (
                f"_{value}" if isinstance(value, str) else f"_{word}" if value is True else f"_{word}{value}"
            )
            name = name.removesuffix(".0")
    return f"{name}_s{config['seed']:02d}"


# ---------------------------------------------------------------------------------------------------- records
def check(right: bool, problem: str):
    """Raise ValueError with the problem unless all is right."""
    if not right:
        raise ValueError(problem)


def is_number(value, low=-sys.float_info.max, high=sys.float_info.max, kind=(int, float)) -> bool:
    """True for a finite number from low to high; a flag is no number."""
    return isinstance(value, kind) and not isinstance(value, bool) and low <= value <= high


def read_record(path: Path) -> dict:
    """The valid record at `path`. Raises FileNotFoundError, or ValueError that says what is wrong with it."""
    text = path.read_bytes()
    try:
        record = json.loads(text, parse_constant=lambda word: check(False, f"{word} is not a JSON number"))
        check_record(record, path.name)
        return record
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"empty, truncated or not JSON ({error})") from None
    except KeyError as error:
        raise ValueError(f"not a whole record of a run: {error} is missing") from None
    except (TypeError, AttributeError) as error:
        raise ValueError(f"not a record of a run: a part is of the wrong kind ({error})") from None


def check_record(record: dict, name: str):
    """Raise ValueError unless a record is complete, and its parts and the file's name agree."""
    config, history, final, status = (record[key] for key in ("config", "history", "final", "status"))
    epochs, wrn = config["epochs"], config["model"] == "wrn"
    right = {"model": wrn or config["model"] == "resnet50"}
    right |= {
        "lr": is_number(config["lr"], sys.float_info.min),
        "seed": is_number(config["seed"], 0, kind=int),
    }
    right |= {key: isinstance(config[key], str) for key in ("data", "init")}
    right |= {} if wrn else {"version": config["version"] in ("v1", "v2")}
    sizes = ("bs", "epochs", "depth", "width")[: 4 if wrn else 2]
    for key, holds in (right | {key: is_number(config[key], 1, kind=int) for key in sizes}).items():
        check(holds, f"its {key} cannot be {config[key]!r}")
    for part in (f"_lr{power(config['lr'])}_", f"_s{config['seed']:02d}.json"):
        check(part in name, f"its name does not agree with its configuration: {part} is not in it")
    check(isinstance(record["data"]["fingerprint"], str), "the fingerprint of its data is not a text")
    check(isinstance(record["environment"], dict), "its environment is not an object")
    for epoch, entry in enumerate(history, 1):
        check(entry["epoch"] == epoch, f"its history has epoch {entry['epoch']} in place of {epoch}")
        for key in (*ENTRY, *entry):
            bounds, words = ((0, 1), "from 0 to 1") if key in FRACTIONS else ((), "finite")
            check(
                is_number(entry[key], *bounds), f"its {key} at epoch {epoch} is {entry[key]!r}, not {words}"
            )
    check(status in ("done", "diverged"), f"its status is {status!r}, neither done nor diverged")
    if status == "diverged":
        check(all(final[key] is None for key in (*FINAL, *final)), "it diverged, but its final has numbers")
        check(is_number(record["diverged_at_step"], 0, kind=int), "its diverged_at_step is not a step")
        check(len(history) <= epochs, f"its history has {len(history)} epochs of {epochs}")
        return
    check(len(history) == epochs, f"its history ends at epoch {len(history)} of {epochs}")
    end = history[-1] | {"train_objective": history[-1]["train_loss"] + history[-1]["l2"]}
    for key in (*FINAL, *final):
        same = is_number(final[key]) and math.isclose(final[key], end[key], rel_tol=1e-9)
        check(same, f"its final {key} is {final[key]!r}, but {end[key]} at the end of its history")


def find_record(path: Path) -> dict | None:
    """The valid record at `path`, or None where there is none: that run has yet to be made."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, ValueError):
        return read_record(path)


def write_record(path: Path, record: dict):
    """Write a record as strict JSON, completely or not at all; another file of that name is set aside."""
    text = json.dumps(record, allow_nan=False, indent=1)
    if path.exists():
        path.replace(path.with_suffix(".json.broken"))
        print(f"{path} was not a valid record: kept as {path.name}.broken", file=sys.stderr)
    with atomic_write(path) as file:
        file.write(text.encode())


@contextlib.contextmanager
def atomic_write(path: Path, previous: Path | None = None):
    """A binary file that becomes `path` once it is complete and on the disk; the one before becomes `previous`."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = error.filename or str(path)
        raise


def check_same(path: Path, theirs: dict, ours: dict):
    """Raise UserError with the first difference between two configurations."""
    for key in sorted(ours.keys() | theirs.keys()):
        if theirs.get(key) != ours.get(key):
            raise UserError(f"{path} holds another run: its {key} is {theirs.get(key)}, not {ours.get(key)}")


def read_all(folder: Path) -> tuple[list[dict], dict[str, str]]:
    """All records of runs in RESULTS, each with its "file", DATA/NAME.json; and {file: problem} of other JSON."""
    records, problems = {}, {}
    for path in sorted(path for path in folder.glob("*/[!.]*.json") if path.parent.name not in NOT_DATA):
        name = f"{path.parent.name}/{path.name}"
        try:
            record = read_record(path) | {"file": name}
            key = json.dumps([record["config"], record["data"]["fingerprint"]], sort_keys=True)
            first = records.setdefault(key, record)
            check(first is record, f"the same run as {first['file']}")
        except (OSError, ValueError) as error:
            problems[name] = str(error)
    return list(records.values()), problems


# ------------------------------------------------------------------------------------------------- statistics
@dataclass(frozen=True)
class Metric:
    """A number of `final`, its name in words, and whether more is better (+1) or less (-1)."""

    key: str
    name: str
    sign: int


ACCURACY = Metric("test_accuracy", "test accuracy", +1)
LOSS = Metric("train_objective", "training loss", -1)


@dataclass
class Stat:
    """Mean and sample deviation of the runs kept: no mean if too many diverged, no deviation of one run."""

    mean: float | None
    std: float | None
    runs: int
    kept: list[dict]


@dataclass
class Optimum(Stat):
    """The statistic at the best rate, the rates tied with it, and which edges of the grid it is."""

    rate: float
    tied: list[float]
    edge: str


def kept(n: int) -> int:
    """How many of n runs are kept: the best 80%, 12 of 15 (section 3 of the paper)."""
    return -(-4 * n // 5)


def statistic(finals: list[dict], metric: Metric) -> Stat:
    """The paper's statistic of the runs at one rate; a diverged run is worse than any other."""
    done = [final for final in finals if final[metric.key] is not None]
    best = sorted(done, key=lambda final: -metric.sign * final[metric.key])[: kept(len(finals))]
    if not best or len(best) < kept(len(finals)):
        return Stat(None, None, len(finals), best)
    mean = math.fsum(final[metric.key] for final in best) / len(best)
    squares = math.fsum((final[metric.key] - mean) ** 2 for final in best)
    return Stat(mean, math.sqrt(squares / (len(best) - 1)) if best[1:] else None, len(finals), best)


def optimum(grid: dict[float, list[dict]], metric: Metric) -> Optimum | None:
    """The best of the rates with the most seeds that any has, the lowest of equals; None if they diverged."""
    stats = {rate: statistic(grid[rate], metric) for rate in sorted(grid)}
    most = max((stat.runs for stat in stats.values()), default=0)
    means = {rate: stat.mean for rate, stat in stats.items() if stat.runs == most and stat.mean is not None}
    if not means:
        return None
    rate = max(means, key=lambda rate: metric.sign * means[rate])
    std, ends = stats[rate].std or 0, {"lowest": min(grid), "highest": max(grid)}
    tied = [other for other in means if abs(means[other] - means[rate]) <= std]
    edge = " and ".join(word for word, end in ends.items() if end == rate)
    return Optimum(**vars(stats[rate]), rate=rate, tied=tied, edge=edge)


# ----------------------------------------------------------------------------------------------------- search
@dataclass
class Plan:
    """The (rate, seed) asked for so far, those missing, how many there will be (an estimate), and notes."""

    asked: list[tuple[float, int]]
    missing: list[tuple[float, int]]
    at_most: int
    notes: list[str]


def plan(outcomes: dict, rates, seeds, metrics, search: str | None, extend: int = EXTEND) -> Plan:
    """Find the runs that a search needs next; `outcomes` maps (rate, seed) to the `final` of a record.

    The search is replayed from its start, stage by stage, and sees only the outcomes that it asked for: its runs
    are the same whatever their order and whatever else was run.
    """
    rates, seeds, notes = sorted(set(rates)), list(dict.fromkeys(seeds)), []
    limits, full = (rates[0] / 2**extend, rates[-1] * 2**extend), len(seeds)
    more = counts = dict.fromkeys(rates, 1 if search == "best" else full)  # the first so many seeds of a rate
    missing = []
    while more and not missing:
        counts = counts | more
        asked = [(rate, seed) for n, seed in enumerate(seeds) for rate in sorted(counts) if n < counts[rate]]
        missing = [pair for pair in asked if pair not in outcomes]
        if missing or not search:
            break
        found = {rate: [outcomes[rate, seed] for seed in seeds[:n]] for rate, n in counts.items()}
        more, notes = next_stage(found, metrics, search, full, limits)
    waiting = {rate for rate, _ in missing}
    most = sum(full if rate in waiting else n for rate, n in counts.items())
    if missing and max(counts.values()) == 1:  # before the optima are known
        most = len(counts) + 3 * len(metrics) * (full - 1)
    return Plan(asked, missing, most, notes)


def next_stage(found: dict, metrics, search: str, full: int, limits) -> tuple[dict[float, int], list[str]]:
    """What a search asks for after the outcomes `found`, {rate: so many of its first seeds}; and notes.

    Rates beyond an optimal edge come first, or below the lowest where every run diverged. Then, for "best", all
    seeds at each metric's best rate, at its neighbours, and at rates whose mean with fewer seeds is better.
    """
    order, beyond, around, notes = sorted(found), [], set(), {}
    for metric in metrics:
        means = {rate: mean for rate in order if (mean := statistic(found[rate], metric).mean) is not None}
        whole = [rate for rate in means if len(found[rate]) == full] or means
        best = max(whole, key=lambda rate: metric.sign * means[rate], default=order[0])
        for end, further in (("lowest", best / 2), ("highest", best * 2)):
            if best != (order[0] if end == "lowest" else order[-1]) or (not means and end == "highest"):
                continue
            if limits[0] <= further <= limits[1]:
                beyond.append(further)
            else:
                what = f"the best for the {metric.name}" if means else "and no run trained"
                notes[f"{power(best)} is the {end} rate that the search tries, {what}"] = None
        if means:
            around |= set(order[max(0, order.index(best) - 1) : order.index(best) + 2])
            around |= {rate for rate in means if metric.sign * (means[rate] - means[best]) > 0}
    if beyond or search == "all":
        return dict.fromkeys(beyond, full if search == "all" else 1), [*notes]
    needed = {rate: seeds_to_ask(found[rate], metrics[0], full) for rate in around}
    return {rate: n for rate, n in needed.items() if n > len(found[rate])}, [*notes]


def seeds_to_ask(finals: list[dict], metric: Metric, full: int) -> int:
    """How many seeds a rate needs: all; where some diverged, the fewest that could leave it without a mean."""
    diverged, spare = sum(final[metric.key] is None for final in finals), full - kept(full)
    return min(full, len(finals) + max(0, spare + 1 - diverged)) if diverged else full
