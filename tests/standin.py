"""Stands in for wrn_cifar.py, resnet_imagenet.py and plot.py in tests of sweep.sh: a run is a nap that leaves a record.

Runs whose --init is a key of the environment's ENDS (JSON) end with that exit code instead, or by that signal if it is
negative. Every run that is begun adds a line to OUT/begun, and every one that leaves a record a line to OUT/made.
"""

import argparse
import fcntl
import json
import os
import shlex
import signal
import sys
import time
from pathlib import Path

SCRIPT = Path(sys.argv[0]).stem


def parse(argv):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for flag in ("arch",) if SCRIPT == "resnet_imagenet" else ("depth", "width", "eval-every"):
        parser.add_argument(f"--{flag}")
    for flag in ("epochs", "wd", "ghost", "data", "data-dir"):
        parser.add_argument(f"--{flag}")
    parser.add_argument("--init")
    parser.add_argument("--bs", type=int)
    parser.add_argument("--lr", nargs="+")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--nap", type=float, default=0.0)
    args = parser.parse_args(argv)
    name = "_".join(
        filter(
            None, [SCRIPT, *(vars(args).get(key) for key in ("arch", "depth")), args.ghost, args.init, f"bs{args.bs}"]
        )
    )
    paths = [args.out / "naps" / f"{name}_lr{lr}_s{seed:02d}.json" for lr in args.lr for seed in range(args.seeds)]
    return args, paths


def is_running(path):
    try:
        with open(path.with_suffix(".lock")) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def print_status():
    for line in sys.stdin.read().splitlines():
        words = shlex.split(line, comments=True)
        _, paths = parse(words[words.index(f"{SCRIPT}.py") + 1 :])
        records = [json.loads(path.read_text()) for path in paths if path.exists()]
        diverged = sum(record["status"] == "diverged" for record in records)
        running = sum(is_running(path) for path in paths if not path.exists())
        name = paths[0].stem
        grid = "naps/" + name[: name.index("_lr")]
        print(len(records), diverged, running, len(paths), grid, line, sep="\t")


def train(args, paths):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    ends = json.loads(os.environ.get("ENDS", "{}")).get(args.init)
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_suffix(".lock"), "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                continue
            if path.exists():
                continue
            note(args.out / "begun", path)
            time.sleep(args.nap)
            if ends is not None:
                print(f"error: {args.init} is out of luck", end="", flush=True)
                os.kill(os.getpid(), -ends) if ends < 0 else sys.exit(ends)
            note(args.out / "made", path)
            status = "diverged" if args.init == "none" else "done"
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps({"status": status, "gpu": os.environ.get("CUDA_VISIBLE_DEVICES")}))
            temporary.rename(path)


def note(file, path):
    with open(file, "a") as lines:
        lines.write(path.stem + "\n")


def plot(out, edges):
    """The optimum of every grid is 2^BEST: where its records do not reach it, the next rate is 2^(highest + 1)."""
    names = [path.stem for path in Path(out).glob("naps/*.json")]
    if not edges:
        print("report")
    elif "BEST" in os.environ:
        for grid in {name[: name.index("_lr")] for name in names}:
            highest = max(int(name.split("_lr2^")[1][:-4]) for name in names if name.startswith(f"{grid}_lr"))
            if highest < int(os.environ["BEST"]):
                print(f"naps/{grid}\t2^{highest + 1}")


if __name__ == "__main__":
    if SCRIPT == "plot":
        plot(sys.argv[1], sys.argv[2:] == ["--edges"])
    elif sys.argv[1:] == ["--status"]:
        print_status()
    else:
        train(*parse(sys.argv[1:]))
