"""What command lines of the paper's experiments cost on this machine, by the records of speed.py.

    bash sweep.sh table1 --cost

A line's target is its comment: `python wrn_cifar.py --init bn --seeds 15 --search best # table1`.
"""

import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from common import METHODS, epoch_end
from paper import WHOLE
from points import device_name, find_device
from progress import parse_line, read_lines
from records import UserError, plan

GHOST = 64  # images in a ghost batch of a Wide-ResNet whose method is "bn", not WHOLE
IMAGENET = 1_281_167  # training images


@dataclass(frozen=True)
class Row:
    """A row of a record of speed.py: a way to train, and the images per second of all its runs together."""

    method: str  # a key of METHODS, or WHOLE
    bs: int
    engine: str  # plain (a textbook's loop), or ours: eager, captured (CUDA graphs), concurrent, compiled
    runs: int  # trained at once
    precision: str
    images_per_second: float = 0.0  # the median of the rounds
    low: float = 0.0
    high: float = 0.0


def read_records(folders: set[Path]) -> list[dict]:
    """The records of speed in folders, the newest first; prints a line for each file that is none."""
    found = []
    for path in (path for folder in sorted(folders) for path in folder.glob("[!.]*.json")):
        try:
            record = json.loads(path.read_text())
            rows = [Row(**row) for row in record["rows"]]
            needed = {key: record[key] for key in ("made", "model", "multiplications", "device")}
            found.append(needed | {"rows": rows, "file": path})
        except (OSError, ValueError, KeyError, TypeError) as error:
            print(f"{path} is not used, it is no record of this speed.py: {error}", file=sys.stderr)
    return sorted(found, key=lambda record: record["made"], reverse=True)


def multiplications(script, config: dict, size: int) -> int:
    """How many multiplications the convolutions of a configuration's net make, forward, for one image."""
    counts = []
    with torch.device("meta"):
        net = script.make_net(config, 10).eval()
        for module in (module for module in net.modules() if isinstance(module, nn.Conv2d)):
            module.register_forward_hook(lambda m, _, out: counts.append(m.weight[0].numel() * out.numel()))
        net(torch.empty(1, 3, size, size))
    return sum(counts)


def speed_of(record: dict, config: dict, flags, bs: float) -> float | None:
    """Images/s of the record's net at a batch size with a configuration's method; None if not measured.

    The fastest rows of the batch sizes are joined by lines through the logarithms. A method that speed.py
    does not measure is as fast as the one that is most like it.
    """
    method = METHODS[config["init"]]
    like = "bn" if method.norm else "fixup" if method.fixup else "none"
    like = "zeroinit" if method.scalar or method.biases else like
    whole = config["model"] == "wrn" and config["ghost"] == config["bs"]
    engines = ["eager"] if flags.eager else ["eager", "captured", "concurrent"]
    engines = ["compiled"] if flags.compile else engines
    best = {}
    for row in record["rows"]:
        measured = row.method == (WHOLE if whole and row.bs > GHOST else like)
        if measured and row.precision == config["precision"] and row.engine in engines:
            best[row.bs] = max(best.get(row.bs, 0), row.images_per_second)
    sizes = sorted(best)
    speeds = [math.log(best[size]) for size in sizes]
    return math.exp(np.interp(math.log(bs), np.log(sizes), speeds)) if best else None


def find_speed(records: list[dict], config: dict, flags, bs: float):
    """The newest record of this device that tells a configuration's speed, and that speed in images/s.

    Raises UserError, which says what would measure it, if there is none.
    """
    device, other, method = device_name(find_device(flags.device)), "", ""
    for record in (record for record in records if record["model"].startswith(config["model"])):
        if record["device"] != device:
            other = f" ({record['file']} is of {record['device']})"
        elif speed := speed_of(record, config, flags, bs):
            return record, speed
        else:
            method = f"--init {config['init']} of "  # others were measured
    command = "python speed.py" + (" --model resnet50-v2" if config["model"] == "resnet50" else "")
    command += f" --amp {config['precision']}" if config["precision"] != "float32" else ""
    command += " --compile" if flags.compile else ""
    what = f"{method}{config['model']} in {config['precision']} on {device}"
    raise UserError(f"no record tells the speed of {what}{other}: `{command}` measures it")


def hours_of_a_run(script, flags, config: dict, record: dict, speed: float, known: dict) -> float:
    """How long a run takes on one device, without evaluations; `known` keeps the work of nets."""
    size = getattr(flags, "image_size", 16 if flags.data == "shapes" else 32)
    key = size, *map(config.get, ("model", "depth", "width", "version", "stride_on"))
    known[key] = known.get(key) or multiplications(script, config, size)
    images = IMAGENET if flags.data_name.lower() == "imagenet" else script.count_images(flags)[0]
    trained = epoch_end(config["epochs"] - 1, images, config["bs"]) * config["bs"]
    return trained / speed * known[key] / record["multiplications"] / 3600


def cost(folder: Path):
    """Print points, planned runs and hours of the command lines on stdin, by their targets.

    The records of speed are those in `folder` and beside the lines' own results. Raises UserError if none
    tells the hours of any.
    """
    parsed = [(target, line, *parse_line(line)) for target, lines in read_lines().items() for line in lines]
    records = read_records({folder, *(flags.out / "speed" for *_, flags in parsed)})
    known, targets, notes = {}, {}, {}
    for target, line, script, flags in parsed:
        ranks = re.search(r"nproc.per.node.(\d+)", line)
        point, hours = script.make_point(flags), math.nan
        config = point.config((point.rates[0], point.seeds[0]))
        try:
            record, speed = find_speed(records, config, flags, config["bs"] / int(ranks[1] if ranks else 1))
            hours = hours_of_a_run(script, flags, config, record, speed, known)
            notes[f"by {record['file']}: {record['model']} on {record['device']}, {record['made']}"] = True
        except UserError as error:
            notes[f"?: {error}"] = False
        searches = [flags.search and search for search in ("best", "all")]
        runs = [plan({}, point.rates, point.seeds, point.metrics, search).planned for search in searches]
        targets.setdefault(target or "these", {})[point.path((1.0, 0))] = *runs, hours
    if not any(notes.values()):
        raise UserError("; ".join(notes).replace("?: ", ""))
    if len(targets) > 1:
        targets["all"] = {path: its for target in targets.values() for path, its in target.items()}
    print_costs(targets)
    print(*notes, sep="\n")


def print_costs(targets: dict):
    """Print {target: {point: (runs of --search best, of --search all, hours of a run)}}."""
    print("runs planned    --search best:          --search all:             (hours of one device)")
    print("target  points      runs        hours       runs        hours")
    for target, its in targets.items():
        text = f"{target:8}{len(its):6}"
        for i in (0, 1):
            runs = sum(counts[i] for counts in its.values())
            hours = sum(counts[i] * counts[2] for counts in its.values())
            text += f"{runs:10,}" + (f"{'?':>13}" if math.isnan(hours) else f"{hours:13,.1f}")
        print(text)
