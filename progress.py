"""What the command lines of a sweep have come to: counts for each target, and a line for each run that ends.

sweep.sh writes its command lines here, each with its target as a comment. Its logs hold a command line, then
the output and `exit CODE`, again for each time that the line ran.
"""

import importlib
import math
import os
import re
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from points import Point, is_running, say
from records import UserError, plural

SCRIPTS = ("wrn_cifar.py", "resnet_imagenet.py")
NO_FAILURE = (0, 75, 76)  # done, interrupted, the rest is in other processes' hands
INTERVAL = 1.0  # seconds between looks at the records


def read_lines() -> dict[str, list[str]]:
    """The command lines on stdin by their targets: {"table1": [...]}. Raises UserError if there are none."""
    found = {}
    for text in filter(str.strip, [] if sys.stdin.isatty() else sys.stdin):
        line, mark, target = text.strip().rpartition(" # ")
        found.setdefault(target if mark else "", []).append(line or target)
    if not found:
        raise UserError("no command lines on stdin, where `bash sweep.sh` gives them")
    return found


def parse_line(line: str):
    """The script of a command line, and the flags by its own parser."""
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise UserError(f"{error} in the line: {line}") from None
    found = next((i for i, word in enumerate(words) if Path(word).name in SCRIPTS), None)
    if found is None:
        raise UserError(f"no command line of this project: {line[:100]}")
    script = importlib.import_module(Path(words[found]).stem)
    return script, script.parse_args(words[found + 1 :])


def point_of(line: str) -> Point:
    """The point of a command line."""
    script, flags = parse_line(line)
    return script.make_point(flags)


# ---------------------------------------------------------------------------------------------- failures


@dataclass(frozen=True)
class Failure:
    """A command line that did not do what it should: its exit code, the reason in words, its log."""

    line: str
    code: int
    reason: str
    log: Path


def failures(folder: Path, since: float = 0.0) -> dict[str, Failure]:
    """The lines that failed when they last ended, by the logs in RESULTS/logs that changed since a time."""
    last = {}
    times = {log: log.stat().st_mtime for log in (folder / "logs").glob("*.log")}
    for log in sorted(filter(lambda log: times[log] >= since, times), key=times.get):
        with open(log, "rb") as file:
            line = file.readline().decode(errors="replace").strip()
            file.seek(max(0, file.tell() - 1, log.stat().st_size - 10_000))  # its end is enough
            text, _, code = file.read().decode(errors="replace").rstrip().rpartition("\nexit ")
        if code.isdigit():
            last[line] = Failure(line, int(code), reason(int(code), text), log)
    return {line: end for line, end in last.items() if end.code not in NO_FAILURE}


def reason(code: int, text: str) -> str:
    """Why a command failed, from its exit code and the end of its log."""
    if code > 128:  # a shell's code for a signal
        return f"killed by signal {code - 128}" + (", perhaps out of memory" if code == 128 + 9 else "")
    said = [line for line in re.split(r"\nexit \d+\n", text)[-1].splitlines() if line.strip(" =")]
    errors = [line for line in said if re.match(r"(\[rank\d+\]: )?(error: |\w+Error\b)", line)]
    return (errors or said or [f"exit code {code}"])[-1].strip()


def say_failures(failures):
    """Print command lines that failed; those with the same reason stand together."""
    for reason in dict.fromkeys(failure.reason for failure in failures):
        same = [failure for failure in failures if failure.reason == reason]
        say(f"failed: {reason}")
        for failure in same:
            say(f"  {failure.line}\n  (log: {failure.log})")
    if failures:
        say("the same sweep tries them again")


# ------------------------------------------------------------------------------------------------ counts


class Task:
    """A point, the command lines that ask for it, and what has come of it."""

    def __init__(self, point: Point):
        self.point, self.lines = point, []
        self.look()

    def look(self) -> list:
        """Read the records that are new; returns their (rate, seed)."""
        before = set(self.point.found)
        self.plan = self.point.plan()
        self.waiting = {self.point.path(key).name for key in self.plan.missing}
        return [key for key in self.point.found if key not in before]

    def failure(self, failed: dict[str, Failure]) -> Failure | None:
        """How one of its lines failed, unless its runs have been made since."""
        ends = [failed[line] for line in self.lines if line in failed]
        return ends[0] if ends and self.plan.missing else None


def read_tasks(lines: list[str], known: dict) -> list[Task]:
    """The tasks of command lines; `known` collects them by what decides their runs: equal ones are one."""
    tasks = {}
    for line in dict.fromkeys(lines):
        point = point_of(line)
        key = point.path((1.0, 0)), *map(tuple, (point.rates, point.seeds)), point.search
        known[key] = tasks[key] = known.get(key) or Task(point)
        tasks[key].lines.append(line)
    return list(tasks.values())


def print_status(targets: dict[str, list[str]]) -> int:
    """Print counts for each target, then the command lines that failed.

    Each run counts once for a target, even if several of its lines ask for it. Returns an exit code: 2 if no
    target takes these flags.
    """
    say("target     points  failed  runs done  diverged  running  planned")
    known, failed, shown = {}, {}, {}
    for target, lines in targets.items():
        try:
            tasks = read_tasks(lines, known)
        except UserError as error:
            say(f"{target:8} {error}")
            continue
        folder = tasks[0].point.folder.parent
        failed[folder] = failed.get(folder) or failures(folder)
        its = [end for task in tasks if (end := task.failure(failed[folder]))]
        records = [record for task in tasks for record in task.point.found.values()]
        diverged = sum(record["status"] == "diverged" for record in records)
        running = sum(is_running(task.point.path(key)) for task in tasks for key in task.plan.missing)
        finished = f"{sum(not task.plan.missing for task in tasks)}/{len(tasks)}"
        most = sum(task.plan.planned for task in tasks)
        say(f"{target:8}{finished:>9}{len(its):8} {len(records):10}{diverged:10}{running:9}{most:9}")
        shown |= {end.line: end for end in its}
    say_failures(shown.values())
    return 0 if known else 2


# ----------------------------------------------------------------------------------------------- a sweep


def watch(targets: dict[str, list[str]], workers: list[int]) -> int:
    """Print a line for each run that ends from now on, until all are done or the `workers` (processes) ended.

    Returns an exit code: 0 all runs are done, 1 a line failed, 2 all that failed were bad usage or data,
    75 some runs are missing.
    """
    lines = dict.fromkeys(line for lines in targets.values() for line in lines)
    tasks = read_tasks([*lines], {})
    if len(tasks) < len(lines):
        raise UserError("a flag makes several lines the same: INITS, BATCHES or DEPTHS is what you want")
    folder = tasks[0].point.folder
    done, counted, told = sum(len(task.point.found) for task in tasks), 0.0, set()
    most, began, since = sum(task.plan.planned for task in tasks), time.monotonic(), time.time()
    say(
        f"{', '.join(targets)}: {plural(len(tasks), 'point')}, {plural(most, 'run')} planned, "
        f"{done} of them done; {plural(len(workers), 'worker')}"
    )
    if missing := [task for task in tasks if task.plan.missing]:
        script, flags = parse_line(missing[0].lines[0])
        script.count_images(flags)  # a folder without images ends the sweep here, not each line
    alive = True
    while alive and any(task.plan.missing for task in tasks):
        time.sleep(INTERVAL)
        alive = not workers or any(map(is_alive, workers))  # before a last look
        for task, key in new_runs(tasks, folder):
            here = min(seconds(task.point.found[key]), time.monotonic() - began)  # less if it went on
            done, counted = done + 1, counted + here
            most = sum(task.plan.planned for task in tasks)
            left = time_left(tasks, counted / (time.monotonic() - began))
            say(f"[{done}/{most} runs{left}] {task.point.title(key)}: {result(task.point.found[key])}")
        for end in failures(folder.parent, since).values():
            if end.reason not in told:
                told.add(end.reason)
                say(f"failed: {end.reason} (log: {end.log})")
    failed = failures(folder.parent)
    ends = [end for task in tasks if (end := task.failure(failed))]
    say_failures(ends)
    if ends:
        return 2 if all(end.code == 2 for end in ends) else 1
    return 75 if any(task.plan.missing for task in tasks) else 0


def is_alive(process: int) -> bool:
    """True if a process of this user exists."""
    try:
        os.kill(process, 0)
        return True
    except OSError:
        return False


def new_runs(tasks: list[Task], folder: Path) -> list:
    """The runs that ended since the last look, [(task, (rate, seed))], in the order in which they ended."""
    names = {path.name for path in folder.glob("*.json")}
    new = [(task, key) for task in tasks if task.waiting & names for key in task.look()]
    return sorted(new, key=lambda run: run[0].point.path(run[1]).stat().st_mtime)


def seconds(record: dict) -> float:
    """How long a run took."""
    return sum(entry["seconds"] for entry in record["history"])


def time_left(tasks: list[Task], speed: float) -> str:
    """How long a sweep still takes, if its searches ask for the most; `speed` is in run-seconds per second.

    The runs of a point are taken to be as long as those that are done, or as those of other points.
    """
    means = {}
    for task in tasks:
        if times := [seconds(record) for record in task.point.found.values()]:
            means[task] = fmean(times)
    usual = fmean(means.values())
    rest = sum((task.plan.planned - len(task.point.found)) * means.get(task, usual) for task in tasks)
    if not rest or not speed:
        return ""
    minutes = math.ceil(rest / speed / 60)
    return f", about {minutes} min" if minutes < 100 else f", about {minutes / 60:.0f} h"


def result(record: dict) -> str:
    """What came of a run, in a word."""
    return "diverged" if record["status"] == "diverged" else f"{record['final']['test_accuracy']:.1%}"
