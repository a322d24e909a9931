"""Stands in for the Python scripts in tests of sweep.sh: it starts in no time, and a run is a nap.

A command line has --seeds runs. Each adds its name to OUT/begun, sleeps for --nap seconds, and adds it to
OUT/made; one lock per run divides them between processes. A line whose --init is a key of $ENDS (JSON) begins
a run and ends with that exit code, or by that signal if it is negative.
"""

import fcntl
import json
import os
import shlex
import signal
import sys
import time
from pathlib import Path


def value(words, flag, default=None):
    return words[len(words) - words[::-1].index(flag)] if flag in words else default


def runs(words):
    """The folder of a line's results, and the names of its runs."""
    name = "-".join(value(words, flag, "") for flag in ("--init", "--bs", "--depth")).strip("-")
    runs = [f"{name}-{i}" for i in range(int(value(words, "--seeds")))]
    return Path(value(words, "--out", "results")), runs


def noted(file):
    return file.read_text().split() if file.exists() else []


def note(file, text):
    with open(file, "a") as lines:
        lines.write(text + "\n")


def train(words):
    out, names = runs(words)
    init, elsewhere = value(words, "--init"), False
    out.mkdir(parents=True, exist_ok=True)
    for name in names:
        with open(out / f"{name}.lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                elsewhere = True
                continue
            if name in noted(out / "made"):
                continue
            note(out / "begun", name)
            end = json.loads(os.environ.get("ENDS", "{}")).get(init, 0)
            if end:
                print(f"error: {init} is out of luck", end="", flush=True)
                os.kill(os.getpid(), -end) if end < 0 else sys.exit(end)
            time.sleep(float(value(words, "--nap", 0)))
            print(f"{name} on GPU {os.environ.get('CUDA_VISIBLE_DEVICES')}", flush=True)
            if name == names[-1]:  # the sweep may end as soon as it sees this one
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            note(out / "made", name)
    sys.exit(76 if elsewhere else 0)


def watch(lines, workers):
    """Ends like the real one: 0 once all runs are made, 1 if some are not and all workers ended.

    It is not quicker than the process of the last run, which the sweep would stop as it leaves.
    """
    for worker in workers:
        while Path(f"/proc/{worker}").exists():
            if all(set(names) <= set(noted(out / "made")) for out, names in lines):
                time.sleep(0.5)
                sys.exit(0)
            time.sleep(0.05)
    sys.exit(any(set(names) - set(noted(out / "made")) for out, names in lines))


def main(script, words):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    if script != "wrn_cifar.py" and script != "resnet_imagenet.py":
        print(script, *words)
    elif "--status" in words:
        bad = any("--widht" in line for line in sys.stdin)
        sys.exit((print("header\ntarget  unrecognized arguments: --widht"), 2)[1] if bad else 0)
    elif "--watch" in words:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        watch([runs(shlex.split(line, comments=True)) for line in sys.stdin], words[1:])
    else:
        train(words)


if __name__ == "__main__":
    main(Path(sys.argv[0]).name, sys.argv[1:])
