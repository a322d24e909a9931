"""progress.py: what the command lines of a sweep have come to, by made-up records and logs."""

import fcntl
import functools
import io
import json
import os
import re
import subprocess
import sys
import threading
import time

import pytest
from test_sweep import printed

import progress
from records import UserError

DATA = {"fingerprint": "x", "classes": 10, "train_images": 50_000, "test_images": 10_000}


def line(out, *flags, init="bn"):
    fixed = f"--bs 64 --out {out} --device cpu --amp off --epochs 2"
    return f"python wrn_cifar.py --init {init} {fixed} {' '.join(flags)}"


def record(config, accuracy, loss=1.0, seconds=30.0):
    """A record of a run: diverged if it has no accuracy."""
    entry = {"lr": config["lr"], "train_loss": loss, "l2": 0.0, "train_accuracy": 0.5, "seconds": seconds / 2}
    found = {"config": config, "status": "done", "data": dict(DATA), "environment": {}}
    if accuracy is None:
        final = dict.fromkeys(("test_accuracy", "train_loss", "train_objective"))
        return found | {"status": "diverged", "history": [], "final": final, "diverged_at_step": 3}
    history = [entry | {"epoch": epoch} for epoch in range(1, config["epochs"] + 1)]
    history[-1]["test_accuracy"] = accuracy
    return found | {
        "history": history,
        "final": {"test_accuracy": accuracy, "train_loss": loss, "train_objective": loss},
    }


def write(point, key, accuracy, **numbers):
    point.folder.mkdir(parents=True, exist_ok=True)
    point.path(key).write_text(json.dumps(record(point.config(key), accuracy, **numbers)))


def write_log(out, name, *lines):
    (out / "logs").mkdir(parents=True, exist_ok=True)
    log = out / "logs" / f"{name}.log"
    log.write_text("".join(f"{line}\n" for line in lines))
    return log


# -------------------------------------------------------------------------------------------------- counting


def test_status_counts_points_and_runs(tmp_path, capsys):
    """Three points of two rates and two seeds: one done, one half done and failed, one begun elsewhere."""
    flags = ("--lr", "2^-3", "2^-2", "--seeds", "2")
    lines = [line(tmp_path, *flags, init=init) for init in ("bn", "none", "scalar")]
    done, half, begun = map(progress.point_of, lines)
    for key in done.plan().asked:
        write(done, key, 0.5)
    write(half, (2**-3, 0), None)
    write(half, (2**-3, 1), 0.4)
    begun.folder.mkdir(exist_ok=True)
    write_log(tmp_path, "a", lines[0], "error: made up for since", "", "exit 1")
    write_log(tmp_path, "b", lines[1], "error: no luck", "", "exit 1")
    with open(begun.path((2**-2, 0)).with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert progress.print_status({"table1": lines, "fig1": lines[:1]}) == 0
    head, table1, fig1, *failed = capsys.readouterr().out.splitlines()
    assert re.split(" {2,}", head) == [
        *("target", "points", "failed", "runs done", "diverged", "running", "planned")
    ]
    assert table1.split() == ["table1", "1/3", "1", "6", "1", "1", "12"]
    assert fig1.split() == ["fig1", "1/1", "0", "4", "0", "0", "4"]
    log, again = f"  (log: {tmp_path}/logs/b.log)", "the same sweep tries them again"
    assert failed == ["failed: error: no luck", f"  {lines[1]}", log, again]
    assert len(head) == len(table1)


def test_runs_count_once_where_flags_make_points_the_same(tmp_path, capsys):
    lines = [line(tmp_path, "--lr", "0.25", f"--bs {bs} --bs 32") for bs in (16, 64)]
    write(progress.point_of(lines[0]), (0.25, 0), 0.5)
    progress.print_status({"fig1": lines})
    assert capsys.readouterr().out.splitlines()[1].split() == ["fig1", "1/1", "0", "1", "0", "0", "1"]


def test_flags_that_only_one_script_takes(capsys):
    targets = {target: [f"{line} --width 1" for line in printed(target)] for target in ("table1", "table4")}
    assert progress.print_status(targets) == 0
    _, table1, table4 = capsys.readouterr().out.splitlines()
    assert table1.startswith("table1        0/6")
    assert table4 == "table4   unrecognized arguments: --width 1 (see --help)"
    assert progress.print_status({"table4": targets["table4"]}) == 2


def test_lines_and_their_targets(monkeypatch):
    text = "a '--x # y' # table1\n\nb # table1\nc # fig1\nd\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    assert progress.read_lines() == {"table1": ["a '--x # y'", "b"], "fig1": ["c"], "": ["d"]}


def test_no_line_is_an_error(monkeypatch):
    terminal = io.StringIO("nobody types command lines")
    terminal.isatty = lambda: True
    for stdin in (io.StringIO("\n"), terminal):
        monkeypatch.setattr(sys, "stdin", stdin)
        with pytest.raises(progress.UserError, match="no command lines on stdin"):
            progress.read_lines()


def test_a_line_of_another_program_is_an_error():
    with pytest.raises(progress.UserError, match="no command line of this project: make all"):
        progress.point_of("make all")


# -------------------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize(
    "code, said, reason",
    [
        (1, ["loading", "Traceback ...", "  x", "RuntimeError: no luck"], "RuntimeError: no luck"),
        (1, ["[rank3]: ValueError: bad", "W123 torchrun says", "======"], "[rank3]: ValueError: bad"),
        (2, ["error: data: no images here"], "error: data: no images here"),
        (137, ["epoch 1/2"], "killed by signal 9, perhaps out of memory"),
        (139, [], "killed by signal 11"),
        (1, ["cannot go on", "========", ""], "cannot go on"),
        (127, [], "exit code 127"),
    ],
)
def test_the_reason_of_a_failure(tmp_path, code, said, reason):
    earlier = ["error: of an earlier time", "", "exit 1"]
    log = write_log(tmp_path, "a", "the line", *earlier, *said, "", f"exit {code}")
    assert progress.failures(tmp_path) == {"the line": progress.Failure("the line", code, reason, log)}


def test_the_last_end_of_a_line_counts(tmp_path):
    for age, (name, code) in enumerate((("a", 1), ("b", 0), ("c", 1), ("d", 75), ("e", 76))):
        log = write_log(
            tmp_path, name, "line 1" if name < "c" else f"line {name}", "error: x", "", f"exit {code}"
        )
        os.utime(log, (1000 + age,) * 2)
    write_log(tmp_path, "running", "line 9", "epoch 1/2")
    write_log(tmp_path, "empty")
    assert list(progress.failures(tmp_path)) == ["line c"]
    os.utime(tmp_path / "logs" / "b.log", (999,) * 2)
    assert list(progress.failures(tmp_path)) == ["line 1", "line c"]
    assert list(progress.failures(tmp_path, since=1001)) == ["line c"]
    assert progress.failures(tmp_path / "nowhere") == {}


# -------------------------------------------------------------------------------------------------- watching


@pytest.fixture
def worker():
    """A process that the monitor takes for the only worker; tests end it."""
    process = subprocess.Popen(["sleep", "60"])
    threading.Thread(target=process.wait, daemon=True).start()  # as the shell does, at once
    yield process
    process.kill()


def watch(lines, worker, actions, monkeypatch):
    """The exit code of a monitor between whose looks the actions are done, one at a time."""
    queue = iter(actions)
    monkeypatch.setattr(progress.time, "sleep", lambda _: next(queue, lambda: None)())
    return progress.watch({"table1": lines}, [worker.pid])


def end(worker):
    def kill():
        worker.kill()
        while progress.is_alive(worker.pid):
            os.sched_yield()

    return kill


def test_watch_prints_a_line_per_run_and_ends_when_all_are_done(tmp_path, worker, monkeypatch, capsys):
    lines = [line(tmp_path, "--lr", "2^-3", "2^-2", init=init) for init in ("bn", "biases+dropout")]
    first, second = map(progress.point_of, lines)
    write(first, (2**-3, 0), 0.5)

    def two():  # in the order of their records' times
        write(second, (2**-3, 0), 0.9414)
        write(first, (2**-2, 0), None)
        os.utime(first.path((2**-2, 0)), (time.time() - 5,) * 2)

    assert watch(lines, worker, [lambda: None, two, lambda: write(second, (2**-2, 0), 0.1)], monkeypatch) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "table1: 2 points, 4 runs planned, 1 of them done; 1 worker"
    assert said[1].startswith("[2/4 runs") and said[1].endswith("] wrn16-4 bn B 64 2^-2 seed 0: diverged")
    assert said[2].startswith("[3/4 runs, about ")
    assert said[2].endswith("] wrn16-4 biases+dropout B 64 2^-3 seed 0: 94.1%")
    assert said[3] == "[4/4 runs] wrn16-4 biases+dropout B 64 2^-2 seed 0: 10.0%"
    assert max(map(len, said)) <= 80 and len(said) == 4


def test_watch_takes_a_last_look_when_the_workers_have_ended(tmp_path, worker, monkeypatch, capsys):
    lines = [line(tmp_path, "--lr", "2^-3", "2^-2")]
    point = progress.point_of(lines[0])

    def last():
        write(point, (2**-3, 0), 0.5)
        end(worker)()

    assert watch(lines, worker, [last], monkeypatch) == 75  # a run is missing, and no line failed
    assert capsys.readouterr().out.count("[1/2 runs") == 1


@pytest.mark.parametrize("codes, expected", [((2, 2), 2), ((2, 137), 1)])
def test_watch_tells_failures_once_as_they_come_and_all_at_the_end(
    tmp_path, worker, monkeypatch, capsys, codes, expected
):
    lines = [line(tmp_path, "--lr", "2^-3", init=init) for init in ("bn", "none")]

    def fail(name, text, code):
        return lambda: write_log(tmp_path, name, text, "error: no images", "", f"exit {code}")

    actions = [fail(name, text, code) for name, text, code in zip("ab", lines, codes, strict=True)]
    assert watch(lines, worker, [*actions, end(worker)], monkeypatch) == expected
    said = capsys.readouterr().out.splitlines()[1:]
    logs = [tmp_path / "logs" / f"{name}.log" for name in "ab"]
    if expected == 2:
        assert said == [
            f"failed: error: no images (log: {logs[0]})",
            "failed: error: no images",
            *(
                part
                for text, log in zip(lines, logs, strict=True)
                for part in (f"  {text}", f"  (log: {log})")
            ),
            "the same sweep tries them again",
        ]
    else:
        assert f"failed: killed by signal 9, perhaps out of memory (log: {logs[1]})" in said
        assert said[-4:] == [
            "failed: killed by signal 9, perhaps out of memory",
            f"  {lines[1]}",
            f"  (log: {logs[1]})",
            "the same sweep tries them again",
        ]


@pytest.mark.parametrize(
    "flags, problem",
    [("--data folder --data-dir nowhere", "nowhere"), ("--bs 32", "a flag makes several lines the same")],
)
def test_what_all_lines_have_wrong_ends_a_sweep_at_once(tmp_path, worker, monkeypatch, flags, problem):
    lines = [line(tmp_path, "--lr", "2^-3", f"--bs {bs} {flags}") for bs in (16, 64)]
    with pytest.raises(UserError, match=problem):
        watch(lines, worker, [], monkeypatch)


def test_nothing_to_do_is_said_at_once(tmp_path, worker, monkeypatch, capsys):
    lines = [line(tmp_path, "--lr", "2^-3")]
    write(progress.point_of(lines[0]), (2**-3, 0), 0.5)
    assert watch(lines, worker, [], monkeypatch) == 0
    assert capsys.readouterr().out == "table1: 1 point, 1 run planned, 1 of them done; 1 worker\n"


def test_the_time_that_is_left(tmp_path):
    """Two run-seconds a second; 3 runs of 120 s and 4 of a point without one, taken to be the same: 420 s."""
    lines = [line(tmp_path, "--lr", "2^-3", "--seeds", "4", init=init) for init in ("bn", "none")]
    write(progress.point_of(lines[0]), (2**-3, 0), 0.5, seconds=120.0)
    tasks = progress.read_tasks(lines, {})
    assert progress.time_left(tasks, 2.0) == ", about 7 min"
    assert progress.time_left(tasks, 0.02) == ", about 12 h"
    assert progress.time_left(tasks, 0.0) == ""


def test_a_run_that_went_on_does_not_count_as_made_here(tmp_path, worker, monkeypatch, capsys):
    """The record of a run tells the time of all of it: of the rest nothing is known yet."""
    lines = [line(tmp_path, "--lr", *(f"2^-{k}" for k in range(1, 8)))]
    point = progress.point_of(lines[0])

    resumed = functools.partial(write, point, (2**-3, 0), 0.5, seconds=6e5)
    watch(lines, worker, [lambda: None, resumed, end(worker)], monkeypatch)
    said = capsys.readouterr().out
    assert said.startswith("table1: ") and int(re.search(r"about (\d+) h", said)[1]) > 900
