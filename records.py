"""What runs leave behind: names, records, the paper's statistics, and which runs a search still needs.

A record is one run's JSON file, RESULTS/DATA/NAME.json; a run is done if and only if it is there and valid.
"""

import contextlib
import errno
import json
import math
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

EXTEND = 6  # a search adds at most so many rates on each side of the starting ones
NOT_DATA = ("report", "logs", "speed")  # folders in RESULTS that hold no records of runs
# Numbers, or null:
OPTIONS = ("ghost", "dropout", "alpha", "wd", "momentum", "scalar_lr", "train_size")
FINAL = ("test_accuracy", "train_loss", "train_objective")
ENTRY = {"lr", "train_loss", "l2", "train_accuracy", "seconds"}  # of every epoch
BOUNDS = dict.fromkeys(("train_accuracy", "test_accuracy", "test_top5"), (0, 1))

for stream, mode in {"stdin": "r", "stdout": "w", "stderr": "w"}.items():
    if getattr(sys, stream) is None:  # closed, as by `>&-`: no file that is opened later may take its number
        setattr(sys, stream, open(os.devnull, mode))  # noqa: SIM115


class UserError(Exception):
    """Something that only the user can mend, in one line."""


class OwnError(UserError):
    """What only this rank has seen; other errors are those of all ranks, and one per machine says so."""


def flush(file):
    """Write out what was printed; what a terminal or a pipe that is no more would have shown is lost."""
    try:
        file.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


def power(rate: float) -> str:
    """A learning rate as the paper writes it, 2^-2 for 0.25; others as the shortest decimal that is exact."""
    mantissa, exponent = math.frexp(rate)
    return f"2^{exponent - 1}" if mantissa == 0.5 else str(float(rate)).removesuffix(".0")


def plural(number: int, what: str) -> str:
    """`1 run`, `2 runs`."""
    return f"{number:,} {what}{'s' * (number != 1)}"


def slug(data_name: str) -> str:
    """The folder of a data set's records. Raises UserError for a name that gives none."""
    folder = "-".join("".join(c if c.isalnum() else " " for c in data_name.lower()).split())
    if not folder or len(folder.encode()) > 100 or folder in NOT_DATA or not data_name.isprintable():
        rule = f"1 to 100 letters and digits, no unprintable ones, and not {', '.join(NOT_DATA)}"
        raise UserError(f"the data set's name {data_name[:100]!a} gives no folder: it needs {rule}")
    return folder


def run_name(prefix: str, config: dict, defaults: dict) -> str:
    """The name of a run's record, without suffix; it shows those of the options in `defaults` that differ."""
    name = f"{prefix}_{config['init']}_bs{config['bs']}_lr{power(config['lr'])}_ep{config['epochs']}"
    for key in (key for key in defaults if config[key] not in (None, defaults[key])):
        value, word = config[key], key.replace("_", "")
        option = word if value is True else value if isinstance(value, str) else f"{word}{value}"
        name += "_" + option.removesuffix(".0")
    return f"{name}_s{config['seed']:02d}"


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
    except (KeyError, TypeError) as error:
        raise ValueError(f"not a record of a run: missing or of the wrong kind: {error}") from None


def check_record(record: dict, name: str):
    """Raise ValueError unless a record is complete, and its parts and the file's name agree."""
    config, history, final, status = (record[key] for key in ("config", "history", "final", "status"))
    diverged, epochs = status == "diverged", config["epochs"]
    check_config(config, name)
    kinds = isinstance(record["data"]["fingerprint"], str), isinstance(record["environment"], dict)
    check(all(kinds), "its fingerprint is not a text, or its environment is not an object")
    for key in ("classes", "train_images", "test_images"):
        check(is_number(record["data"][key], 1, kind=int), f"its {key} cannot be {record['data'][key]!r}")
    for epoch, entry in enumerate(history, 1):
        if entry["epoch"] != epoch:
            raise ValueError(f"its history has epoch {entry['epoch']} in place of {epoch}")
        for key in ENTRY | entry.keys():  # texts only where they are needed: sweeps read thousands of records
            if not is_number(entry[key], *BOUNDS.get(key, ())):
                raise ValueError(f"its {key} at epoch {epoch} cannot be {entry[key]!r}")
    check(diverged or status == "done", f"its status is {status!r}, neither done nor diverged")
    check(diverged or len(history) == epochs, f"its history ends at epoch {len(history)} of {epochs}")
    check(not diverged or is_number(record["diverged_at_step"], 0, kind=int), "it diverged at no step")
    last = dict.fromkeys(final) if diverged else history[-1]
    if not diverged:
        last = last | {"train_objective": last["train_loss"] + last["l2"]}
    for key in (*FINAL, *final):
        value, ours = final[key], last[key]
        agrees = value is None if diverged else is_number(value) and math.isclose(value, ours, rel_tol=1e-9)
        check(agrees, f"its final {key} is {value!r}, and {ours} at the end of its history")


def check_config(config: dict, name: str):
    """Raise ValueError unless a record's configuration is possible, and agrees with the file's name."""
    right = {"model": config["model"] in ("wrn", "resnet50"), "lr": is_number(config["lr"], 1e-300)}
    right |= {"seed": is_number(config["seed"], 0, kind=int)}
    right |= {key: isinstance(config[key], str) and config[key].isprintable() for key in ("data", "init")}
    right |= {key: config.get(key) is None or is_number(config[key], 0) for key in OPTIONS}
    right |= {"dampening": is_number(config.get("dampening"), 0)}  # else its rates could mean either
    right |= {"precision": isinstance(config.get("precision", ""), str)}
    sizes = ["bs", "epochs"]
    if config["model"] == "wrn":
        sizes += ["depth", "width"]
    else:
        right |= {"version": config.get("version") in ("v1", "v2")}
    right |= {key: is_number(config[key], 1, kind=int) for key in sizes}
    for key, holds in right.items():
        check(holds, f"its {key} cannot be {config.get(key)!r}")
    for part in (f"_lr{power(config['lr'])}_", f"_s{config['seed']:02d}.json"):
        check(part in name, f"its name does not agree with its configuration: {part} is not in it")


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
    """A binary file that becomes `path` once it is complete and on the disk; the last becomes `previous`.

    Nothing but a file is replaced, such as a folder or /dev/stdout; a link stays, and leads to the new file.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EPERM, "it is there, and not a file", str(path))
    path = Path(os.path.realpath(path)) if path.is_symlink() else path
    path.parent.mkdir(parents=True, exist_ok=True)  # a folder that was removed takes no run with it
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
    """The records of runs in RESULTS, each with its "file", DATA/NAME.json; {file: problem} of the rest."""
    records, problems = {}, {}
    for path in sorted(p for p in folder.glob("[!.]*/[!.]*.json") if p.parent.name not in NOT_DATA):
        record = {"file": f"{path.parent.name}/{path.name}"}
        try:
            record |= read_record(path)
            run = json.dumps([record["config"], record["data"]["fingerprint"]], sort_keys=True)
            first = records.setdefault(run, record)
            check(first is record, f"the same run as {first['file']}")
        except (OSError, ValueError) as error:
            problems[record["file"]] = str(error)
    return list(records.values()), problems


@dataclass(frozen=True)
class Metric:
    key: str  # in `final`
    name: str
    sign: int  # +1 where more is better, -1 where less is
    images: str  # on which a run is better than chance, where it trains


ACCURACY = Metric("test_accuracy", "test accuracy", +1, "test")
LOSS = Metric("train_objective", "training loss", -1, "train")


def final_of(record: dict) -> dict:
    """The `final` of a record, and on which images it is better than `chance`, by five standard errors."""
    better, guess = [], 1 / record["data"]["classes"]
    for part in ("test", "train") if record["status"] == "done" else ():
        error = math.sqrt(guess * (1 - guess) / record["data"][f"{part}_images"])
        limit = guess + min(5 * error, (1 - guess) / 2)
        better += [part] if record["history"][-1][f"{part}_accuracy"] > limit else []
    return record["final"] | {"better_than_chance": better}


@dataclass
class Stat:
    mean: float | None  # of the runs kept; None where too many diverged
    std: float | None  # sample standard deviation; None also for one run
    runs: int
    kept: list[dict]
    trains: bool  # it has a mean, and most runs kept are better than chance: the best of others is noise


@dataclass
class Optimum(Stat):
    rate: float
    tied: list[float]  # the rates whose mean is within one standard deviation of the best
    edge: str  # "lowest", "highest", "lowest and highest" or "" among all rates that were run
    unfinished: list[float]  # rates with fewer seeds that are beside it, tied with it or better so far


def kept(n: int) -> int:
    """How many of n runs are kept: the best 80%, 12 of 15 (section 3 of the paper)."""
    return -(-4 * n // 5)


def statistic(finals: list[dict], metric: Metric) -> Stat:
    """The paper's statistic of the runs at one rate; a diverged run is worse than any other."""
    done = [final for final in finals if final[metric.key] is not None]
    best = sorted(done, key=lambda final: -metric.sign * final[metric.key])[: kept(len(finals))]
    scores = [final[metric.key] for final in best] if len(best) == kept(len(finals)) else []
    mean, std = fmean(scores) if scores else None, stdev(scores) if scores[1:] else None
    trained = [final for final in best if metric.images in final.get("better_than_chance", (metric.images,))]
    return Stat(mean, std, len(finals), best, mean is not None and 2 * len(trained) > len(best))


def optimum(grid: dict[float, list[dict]], metric: Metric) -> Optimum | None:
    """The best of the rates with the most seeds among those that train, the lowest of equals.

    Where none trains, it is the best at chance; None if all diverged.
    """
    stats = {rate: statistic(grid[rate], metric) for rate in sorted(grid)}
    able = {rate: stat for rate, stat in stats.items() if stat.trains}
    able = able or {rate: stat for rate, stat in stats.items() if stat.mean is not None}
    if not able:
        return None
    most = max(stat.runs for stat in able.values())
    means = {rate: stat.mean for rate, stat in able.items() if stat.runs == most}
    best = max(means, key=lambda rate: metric.sign * means[rate])
    tied = [rate for rate in means if abs(means[rate] - means[best]) <= (stats[best].std or 0)]
    edge = " and ".join(word for word, end in (("lowest", min(grid)), ("highest", max(grid))) if end == best)
    least = metric.sign * means[best] - (stats[best].std or 0) if stats[best].trains else -math.inf
    beside = [*stats][max(0, [*stats].index(best) - 1) : [*stats].index(best) + 2]
    fewer = {rate: stat for rate, stat in stats.items() if stat.runs < most and stat.trains}
    unfinished = [rate for rate in fewer if rate in beside or metric.sign * fewer[rate].mean > least]
    return Optimum(**vars(stats[best]), rate=best, tied=tied, edge=edge, unfinished=unfinished)


@dataclass
class Plan:
    asked: list[tuple[float, int]]  # all (rate, seed) that the search has asked for so far
    missing: list[tuple[float, int]]  # those without an outcome, in the order to run
    planned: int  # how many there will be in the end; a search with edges or many ties makes more
    notes: list[str]


def plan(outcomes: dict, rates, seeds, metrics, search: str | None, extend: int = EXTEND) -> Plan:
    """What a search needs next; `outcomes` maps (rate, seed) to the `final` of a record.

    It is replayed by stages that see only outcomes that it asked for: order and other runs change nothing.
    """
    rates, seeds, notes, missing, counts = sorted(set(rates)), list(dict.fromkeys(seeds)), [], [], {}
    limits, full = (rates[0] / 2**extend, rates[-1] * 2**extend), len(seeds)
    more = dict.fromkeys(rates, 1 if search == "best" else full)
    while more and not missing:
        counts |= more  # {rate: how many seeds, the first ones}
        asked = [(rate, seed) for n, seed in enumerate(seeds) for rate in sorted(counts) if n < counts[rate]]
        missing, more = [pair for pair in asked if pair not in outcomes], {}
        if search and not missing:
            found = {rate: [outcomes[rate, seed] for seed in seeds[:n]] for rate, n in counts.items()}
            more, notes = next_stage(found, metrics, search, full, limits)
    waiting = {rate for rate, _ in missing}
    planned = sum(full if rate in waiting else n for rate, n in counts.items())
    if missing and max(counts.values()) == 1:  # the optima are not known yet
        fewest = max(3, len(counts)) if search else len(counts)  # rates in the end: an optimum has neighbours
        planned = min(fewest + 3 * len(metrics) * (full - 1), fewest * full)
    return Plan(asked, missing, planned, notes)


def next_stage(found: dict, metrics, search: str, full: int, limits) -> tuple[dict[float, int], list[str]]:
    """What a search asks for after the outcomes `found`, {rate: so many of its first seeds}; and notes.

    Rates beyond an optimal edge come first; where no rate trains, those beyond both, but none above one that
    diverged. Then, for "best", all seeds at each metric's best rate, its neighbours, and rates that with
    fewer seeds are better or tied.
    """
    order, beyond, around = sorted(found), set(), set()
    for metric in metrics:
        stats = {rate: stat for rate in order if (stat := statistic(found[rate], metric)).trains}
        whole = [rate for rate in stats if len(found[rate]) == full] or stats
        best = max(whole, key=lambda rate: metric.sign * stats[rate].mean, default=None)
        if best in (None, order[0]):
            beyond.add(order[0] / 2)
        if best in (None, order[-1]) and statistic(found[order[-1]], metric).mean is not None:
            beyond.add(order[-1] * 2)
        if stats:
            around |= {*order[max(0, order.index(best) - 1) : order.index(best) + 2]}
            least = metric.sign * stats[best].mean - (stats[best].std or 0)
            around |= {rate for rate in stats if metric.sign * stats[rate].mean > least}
    new = {rate: 1 if search == "best" else full for rate in beyond if limits[0] <= rate <= limits[1]}
    notes = [f"the search would go on to {power(rate)}, but stops" for rate in sorted(beyond - new.keys())]
    for rate in around if search == "best" and not new else ():
        n, diverged = len(found[rate]), sum(final[metrics[0].key] is None for final in found[rate])
        fewest = n + max(0, full - kept(full) + 1 - diverged)  # seeds that could leave it without a mean
        new |= {rate: min(full, fewest) if diverged else full}
    return {rate: n for rate, n in new.items() if n > len(found.get(rate, ()))}, notes
