"""How fast this code trains, beside a plain PyTorch loop, and what the paper's experiments therefore cost.

    python speed.py                         # Wide-ResNet 16-4: table, record, picture (a CPU takes long)
    python speed.py --short                 # under four minutes on a GPU
    python speed.py --model resnet50-v2     # for Tables 4 and 5
    bash sweep.sh table1 --cost              # runs and hours of a table

All that is compared runs in turn in one process: each figure is the median of the rounds, with the lowest and
the highest. The images are generated; their content does not matter to the time.
"""

import argparse
import itertools
import json
import re
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

import common
import data
import points
import resnet_imagenet
import runner
import wrn_cifar
from cost import GHOST, WHOLE, Row, cost, multiplications
from points import number, positive
from records import UserError, atomic_write, slug

# Bytes that an update of Wide-ResNet 16-4 in bf16 reads and writes per image, counted kernel by kernel.
TRAFFIC = {"bn": 22.3e6, "bn, compiled": 17.5e6, "without norm": 14e6}

# ---------------------------------------------------------------------------------------- ways to train


class Pictures(Dataset):
    """Images as torchvision's data sets give them, from arrays or files: PIL, then the usual transforms."""

    def __init__(self, sources, labels, *crop):
        self.sources, self.labels = sources, labels
        finish = transforms.ToTensor(), transforms.Normalize(data.MEAN, data.STD)
        self.transform = transforms.Compose([*crop, *finish])

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        source = self.sources[i]
        image = Image.open(source).convert("RGB") if isinstance(source, Path) else Image.fromarray(source)
        return self.transform(image), self.labels[i]


def forever(loader):
    """The batches of a DataLoader, epoch after epoch."""
    while True:
        yield from loader


def configure(row: Row, args, device, seed: int = 0):
    """The script, the flags and the configuration of a run that a row stands for."""
    if args.wrn:
        script, words = wrn_cifar, "--depth {} --width {}".format(*args.model[3:].split("-"))
    else:
        script, words = resnet_imagenet, f"--arch {args.model[-2:]} --image-size {args.image_size}"
    words += " --init bn --ghost 0" if row.method == WHOLE else f" --init {row.method}"
    words += f" --bs {row.bs} --lr 2^-20 --epochs 9999 --data shapes --device {device}"
    words += f" --amp {'off' if row.precision == 'float32' else row.precision}"
    flags = script.parse_args(words.split() + ["--compile"] * (row.engine == "compiled"))
    return script, flags, script.make_point(flags).config((flags.lr[0], seed))


def plain(row: Row, args, images, pictures):
    """A textbook's training loop; yields the number of images after each update."""
    script, _, config = configure(row, args, images.device)
    net = script.make_net(config | {"ghost": row.bs}, images.classes).to(images.device)
    optimizer = torch.optim.SGD(net.parameters(), lr=2**-20, momentum=0.9, weight_decay=5e-4)
    options = {"num_workers": 2, "drop_last": True, "persistent_workers": True}
    for x, labels in forever(DataLoader(pictures, row.bs, shuffle=True, **options)):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x.to(images.device)), labels.to(images.device))
        loss.backward()
        optimizer.step()
        loss.item()
        yield row.bs


def ours(row: Row, args, images):
    """This code's loop for one run or several at once; yields the number of images after a burst of each."""
    training = []
    for seed in range(row.runs):
        script, flags, config = configure(row, args, images.device, seed)
        run = runner.make_run(script, config, images, flags)
        with runner.on_stream(run):
            if run.stream and images.on_device and row.engine != "eager":
                run.capture()
        training.append((run, common.train(run, 10**9)))
    while True:
        done = 0
        for run, bursts in training:
            with runner.on_stream(run):
                done += next(bursts)
        yield done


def list_rows(args, bs: int, device) -> list[Row]:
    """What is to be compared at a batch size."""
    captured = device.type == "cuda" and args.wrn
    together = runner.side_by_side(device, bs) if captured else 1
    precisions = (args.precision,) if args.short else dict.fromkeys(("float32", args.precision))
    rows = []
    for method in args.methods:
        if method == WHOLE and bs <= GHOST:
            continue  # the ghost batch is the whole batch anyway
        if method in ("bn", "none") and args.wrn:
            rows.append(Row(method, bs, "plain", 1, "float32"))
        rows += [Row(method, bs, "captured" if captured else "eager", 1, p) for p in precisions]
        rows += [Row(method, bs, "eager", 1, args.precision)] * captured
        rows += [Row(method, bs, "concurrent", together, args.precision)] * (together > 1)
        rows += [Row(method, bs, "compiled", 1, args.precision)] * args.compile
    # Float32 comes last: what fits least into a GPU's memory should not push out the rest.
    return sorted(rows, key=lambda row: row.precision == "float32" and row.engine != "plain")


# --------------------------------------------------------------------------------------------- measuring


def rate(steps, seconds: float, device) -> float:
    """Items per second of an iterator that yields how many it made, over at least so many seconds."""
    began = time.perf_counter()
    for items in itertools.accumulate(steps):
        if time.perf_counter() - began >= seconds:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            return items / (time.perf_counter() - began)


def interleave(entries: dict, args, device) -> dict:
    """The rates of each iterator, one per round: {key: (median, lowest, highest)}. A first round warms up.

    What does not fit into the device's memory is left out, with a line that says so.
    """
    rates = {key: [] for key in entries}
    for _, key in itertools.product(range(args.rounds + 1), entries):
        try:
            if key in rates:
                rates[key].append(rate(entries[key], args.seconds, device))
        except RuntimeError as error:
            if not runner.is_out_of_memory(error):
                raise
            print(f"this does not fit into the device's memory: {key}")
            del rates[key]
    return {key: (statistics.median(its[1:]), min(its[1:]), max(its[1:])) for key, its in rates.items()}


def measure(args, images, pictures, bs: int) -> list[Row]:
    """The rows of a batch size."""
    torch.compiler.reset()  # it stops compiling after some nets of one class
    entries = {}
    for row in list_rows(args, bs, images.device):
        by_us = row.engine != "plain"
        entries[row] = ours(row, args, images) if by_us else plain(row, args, images, pictures)
    found = interleave(entries, args, images.device).items()
    return [replace(row, images_per_second=middle, low=low, high=high) for row, (middle, low, high) in found]


def against_pil(what, least, args, device, mine, loader) -> dict:
    """The verdict on an iterator of this code's that prepares images, against a DataLoader, on one core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    theirs = (len(labels) for _, labels in forever(loader))
    (ours, *_), (pil, *_) = interleave({"ours": mine, "PIL": theirs}, args, device).values()
    torch.set_num_threads(threads)
    return verdict(f"{what}: {ours:,.0f} images/s, by torchvision's transforms {pil:,.0f}", ours / pil, least)


def decoding(folder: Path, args):
    """Verdicts on the decoding of ImageNet, on the photographs of a folder. Raises UserError without any.

    Flipping and standardization are left out on our side: they are the device's.
    """
    files = sorted(path for path in folder.rglob("[!.]*") if path.suffix.lower() in data.SUFFIXES)
    if not files:
        raise UserError(f"--photos: {folder} holds no photographs")
    part = np.array([bytes(path) for path in files]), np.zeros(len(files), np.int64)
    random_crop = transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip()
    centre_crop = transforms.Resize(256), transforms.CenterCrop(224)
    for what, workers, crop, least in (
        ("training images, one core", 0, random_crop, 1.5),
        ("validation images, one core", 0, centre_crop, 1.7),
        ("training images, two workers", 2, random_crop, 1.8),
    ):
        images = data.ImageNet("photographs", part, part, "", torch.device("cpu"), 1, workers=workers)
        rows = torch.cat([images.draw(0, epoch) for epoch in range(4)])
        rows[:, 2] = data.CENTRE if crop is centre_crop else rows[:, 2]
        mine = (len(parts[0]) for _ in itertools.count() for parts in images.feed([*rows.split(32)]))
        loader = DataLoader(Pictures(files, part[1], *crop), 32, shuffle=True, num_workers=workers)
        yield against_pil(f"decoding {what}", least, args, images.device, mine, loader)


def traffic_limits(device) -> dict:
    """Images/s at which an update's memory traffic is as much as a large copy's."""
    here = torch.empty(2**28, device=device)
    there = torch.empty_like(here)
    copies = (there.copy_(here).nbytes * 2 for _ in itertools.count())
    speeds = [rate(copies, seconds, device) for seconds in (0, 0.5)]  # the first warms up
    return {name: speeds[1] / traffic for name, traffic in TRAFFIC.items()}


# ------------------------------------------------------------------------------------------------ checks


@dataclass(frozen=True)
class Check:
    """Ratios of two rows of Wide-ResNet 16-4, and what they should be."""

    device: str  # the type of device that the check is for
    what: str
    least: dict  # {batch size: the ratio that it should have at least}
    over: dict  # what the upper row is; of several such rows, the fastest
    under: dict | None  # where the lower row differs from the upper one; None: the value is images/s


BN, NONE, PLAIN = {"method": "bn"}, {"method": "none"}, {"engine": "plain", "precision": "float32"}
EAGER, GRAPH, MANY = {"engine": "eager"}, {"engine": "captured"}, {"engine": "concurrent"}
FLOAT32, BF16 = EAGER | {"precision": "float32"}, EAGER | {"precision": "bf16"}
NORM = "without batch norm against with it (section 3 of the paper: roughly 1.4)"
GHOSTS = "ghost batches against the whole batch"
CHECKS = [
    Check("cpu", "float32 against the plain loop", {64: 1.3, 256: 1.3}, BN | FLOAT32, PLAIN),
    Check("cpu", "bf16 against the plain loop", {64: 4, 256: 4.5}, BN | BF16, PLAIN),
    Check("cpu", GHOSTS, {256: 0.97}, BN | EAGER, {"method": WHOLE}),
    Check("cpu", NORM, {64: 1.3}, NONE | EAGER, BN),
    Check("cuda", "captured against eager", {1: 5, 16: 3, 64: 1.5}, BN | GRAPH, EAGER),
    Check("cuda", "concurrent against in turn", {1: 5, 16: 3, 64: 1.2}, BN | MANY, GRAPH),
    Check("cuda", "images/s", {512: 60_000}, BN | GRAPH, None),
    Check("cuda", GHOSTS, {512: 0.9}, BN | GRAPH, {"method": WHOLE}),
    Check("cuda", NORM, {64: 1.3}, NONE | GRAPH, BN),
]


def find(rows: list[Row], **wanted) -> float | None:
    """The images/s of the fastest of the rows that are as wanted; None where there is none."""
    return max((row.images_per_second for row in rows if wanted.items() <= vars(row).items()), default=None)


def verdict(what: str, value: float, least: float) -> dict:
    """A part of the record: a ratio, and whether it is as large as it should be."""
    return {"what": what, "value": value, "least": least, "met": value >= least}


def judge(rows: list[Row], device_type: str):
    """The verdicts of the checks that the rows decide."""
    for check in (check for check in CHECKS if check.device == device_type):
        for bs, least in check.least.items():
            over = find(rows, bs=bs, **check.over)
            under = 1.0 if check.under is None else find(rows, bs=bs, **check.over | check.under)
            if over and under:
                yield verdict(f"{check.what}, B {bs}", over / under, least)


# ---------------------------------------------------------------------------------- record, table, picture


def make_record(args, device):
    """Measure all, one batch size after the other; yields the record as it is after each, and at the end."""
    size, n = (32, 8192 if device.type == "cpu" else 50_000) if args.wrn else (args.image_size, 1024)
    train, test = data.shapes(n, 0, size), data.shapes(64, 1, size)
    images = data.Images("shapes", train, test, device, 10 if args.wrn else 1000)
    images.on_device = args.wrn  # ImageNet's come from the host, so that its updates are no CUDA graphs
    pictures = Pictures(*train, transforms.RandomCrop(size, size // 8), transforms.RandomHorizontalFlip())
    script, _, config = configure(Row("bn", 2, "eager", 1, "float32"), args, device)
    record = {"kind": "speed", "made": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())}
    record |= {"model": args.model, "multiplications": multiplications(script, config, size)}
    record |= {"device": points.device_name(device), "threads": torch.get_num_threads()}
    record |= {"torch": torch.__version__, "commit": runner.commit(), "rows": [], "checks": []}
    record["limit"] = traffic_limits(device) if device.type == "cuda" and args.model == "wrn16-4" else {}
    for bs in args.batches:
        print(f"batches of {bs} ...", flush=True)
        record["rows"] += measure(args, images, pictures, bs)
        record["checks"] = [*judge(record["rows"], device.type)] if args.model == "wrn16-4" else []
        yield record
    if args.wrn and device.type == "cpu":
        mine = (len(images.train_batch(rows)[1]) for rows in itertools.cycle(images.draw(0, 0).split(64)))
        loader = DataLoader(pictures, 64, shuffle=True)
        record["checks"].append(against_pil("crop and flip, one core", 8, args, device, mine, loader))
    record["checks"] += decoding(args.photos, args) if args.photos else []
    yield record


def print_table(record: dict):
    """Print what a record holds."""
    form = "{:16} {:>5} {:15} {:9} {:>10} {:>22} {:>9} {:>7}"
    head = "images/s", "lowest to highest", "ms/update", "/ plain"
    print("\n" + form.format("method", "B", "engine", "precision", *head))
    for row in record["rows"]:
        engine = row.engine + (f" x {row.runs}" if row.runs > 1 else "")
        speed, spread = row.images_per_second, f"{row.low:,.1f} to {row.high:,.1f}"
        base = find(record["rows"], bs=row.bs, method=row.method, engine="plain")
        cells = f"{speed:,.1f}", spread, f"{1000 * row.bs * row.runs / speed:,.2f}"
        ratio = f"{speed / base:.2f}" if base else ""
        print(form.format(row.method, row.bs, engine, row.precision, *cells, ratio))
    for name, value in record["limit"].items():
        print(f"{value:10,.0f} images/s is the limit that memory traffic sets, {name}")
    for check in record["checks"]:
        met = "met" if check["met"] else "MISSED"
        print(f"{check['value']:10,.2f} (at least {check['least']:,}: {met})  {check['what']}")


# What the legend of the picture calls the engines; others keep their names.
WORDS = {"plain": "plain PyTorch loop", "captured": "CUDA graphs", "concurrent": "many runs at once"}


def draw(record: dict, path: Path):
    """Draw images per second against the batch size, with bars from lowest to highest, for each method."""
    import matplotlib.pyplot as plt

    methods, ways = list(dict.fromkeys(row.method for row in record["rows"])), {}
    for row in sorted(record["rows"], key=lambda row: row.bs):
        ways.setdefault((row.engine, row.precision), []).append(row)
    size = {"figsize": (max(6, 2.5 * len(methods) + 1), 4), "layout": "constrained", "squeeze": False}
    figure, axes = plt.subplots(1, len(methods), sharex=True, sharey=True, **size)
    for method, panel in zip(methods, axes[0], strict=True):
        for way, marker in zip(ways, itertools.cycle("osD^v")):
            its = [row for row in ways[way] if row.method == method]
            x, y = [row.bs for row in its], [row.images_per_second for row in its]
            bars = [[r.images_per_second - r.low for r in its], [r.high - r.images_per_second for r in its]]
            label = f"{WORDS.get(way[0], way[0])}, {way[1]}"
            panel.errorbar(x, y, bars, label=label, marker=marker, capsize=3)
        panel.set(title=method, xlabel="batch size", yscale="log")
        panel.set_xscale("log", base=2)
    sizes = [row.bs for row in record["rows"]]
    axes[0][0].set_xlim(min(sizes) / 1.5, max(sizes) * 1.5)  # also of a single batch size
    axes[0][0].set_ylabel("images per second")
    figure.suptitle(f"{record['model']} on {record['device']}")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=120)


# -------------------------------------------------------------------------------------------------- main


def parse_args(argv=None) -> argparse.Namespace:
    parser = points.Parser(__doc__)
    add = parser.add_argument
    add("--model", default="wrn16-4", help="what to measure: wrnD-K, resnet50-v1 or resnet50-v2")
    add("--image-size", type=positive, default=224, help="of ResNet-50")
    add("--methods", nargs="+", choices=[*common.METHODS, WHOLE], help="rows of the table [the usual ones]")
    add("--batches", type=positive, nargs="+", help="batch sizes [1 to 256 on a CPU, to 2048 on a GPU]")
    add("--rounds", type=positive, help="how often each figure is measured [5; with --short 2]")
    add("--seconds", type=number(float, 0, 1e6), help="how long, at least [1; with --short 0.4]")
    add("--short", action="store_true", help="batch sizes 1, 16, 64 and 512, in one precision, without fixup")
    add("--compile", action="store_true", help="measure torch.compile as well; it takes minutes")
    add("--photos", type=Path, help="folder of photographs, to measure how fast ImageNet is decoded")
    add("--device", help="cpu, cuda, cuda:1 ... [a GPU if there is one]")
    add("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto", help="precision of the passes")
    add("--out", type=Path, default=Path("results"), help="the record goes to its folder speed/")
    add("--cost", action="store_true", help="tell what the command lines on stdin cost, by the records")
    args = parser.parse_args(argv)
    if not re.fullmatch(r"wrn[0-9]+-[1-9][0-9]*|resnet50-v[12]", args.model):
        parser.error(f"argument --model: should be wrn16-4, resnet50-v2 or the like, not {args.model}")
    args.wrn, gpu = args.model.startswith("wrn"), points.find_device(args.device).type == "cuda"
    if args.wrn:
        sizes = [1, 4, 16, 64, 128, 512, 2048] if gpu else [1, 16, 64, 256]
        sizes, methods = [1, 16, 64, 512] if args.short else sizes, ["bn", WHOLE, "none", "zeroinit"]
    else:
        sizes, methods = [32, 128, 256, 512] if gpu else [16], ["bn", "zeroinit"]
    args.batches = args.batches or sizes
    args.methods = args.methods or methods + ["fixup"] * (not args.short)
    args.rounds = args.rounds or (2 if args.short else 5)
    args.seconds = (0.4 if args.short else 1.0) if args.seconds is None else args.seconds
    return args


def main(argv=None):
    args = parse_args(argv)
    folder = args.out / "speed"
    if args.cost:
        return cost(folder)
    device = runner.pick_device(args.device)
    args.precision = common.pick_precision(args.amp, device)
    path = folder / f"{args.model}_{slug(points.device_name(device))}_t{torch.get_num_threads()}.json"
    with runner.output_folder(folder):
        for record in make_record(args, device):
            content = record | {"rows": [vars(row) for row in record["rows"]]}
            with atomic_write(path) as file:
                file.write(json.dumps(content, allow_nan=False, indent=1).encode())
    print_table(record)
    draw(record, path.with_suffix(".png"))
    print(f"record: {path}; picture: {path.with_suffix('.png')}")


if __name__ == "__main__":
    sys.exit(runner.exit_code(main))
