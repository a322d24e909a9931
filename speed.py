"""How fast this code trains, beside a plain PyTorch loop, and what the paper's experiments therefore cost.

    python speed.py                          # Wide-ResNet 16-4: a table, and a record in results/speed/
    python speed.py --photos DIR             # also the ImageNet input pipeline, on a folder of photographs

All that is compared runs interleaved in this process: each figure is the median over the rounds, with the lowest and
the highest. The images are generated; their content does not matter to the time.
"""

import argparse
import bisect
import functools
import itertools
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

import common
import resnet_imagenet
import runner
import wrn_cifar
from common import UserError, WideResNet
from runner import Parser, number, positive

WHOLE = "bn (whole batch)"
METHODS = ["bn", WHOLE, "none", "zeroinit", "fixup"]
TRAFFIC = {"bn": 17e6, "other": 14e6}  # bytes that a step of Wide-ResNet 16-4 in bf16 moves per image

# ---------------------------------------------------------------------------------------------------------- contenders


class Pictures(Dataset):
    """Images as torchvision's data sets give them, arrays or files: PIL, through the usual transforms."""

    def __init__(self, sources, labels, *crop):
        self.sources, self.labels = sources, labels
        finish = transforms.ToTensor(), transforms.Normalize(resnet_imagenet.MEAN, resnet_imagenet.STD)
        self.transform = transforms.Compose([*crop, *finish])

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        source = self.sources[i]
        image = Image.open(source).convert("RGB") if isinstance(source, Path) else Image.fromarray(source)
        return self.transform(image), self.labels[i]


def crop_32():
    return transforms.RandomCrop(32, 4), transforms.RandomHorizontalFlip()


def load(pictures, bs, workers=0):
    """The sizes of a DataLoader's batches, for ever."""
    loader = DataLoader(pictures, bs, shuffle=True, num_workers=workers, persistent_workers=workers > 0)
    while True:
        yield from (len(labels) for _, labels in loader)


def plain(net, pictures, bs, device):
    """A textbook's training loop; yields the number of images after each update."""
    net, total = net.to(device), 0.0
    optimizer = torch.optim.SGD(net.parameters(), lr=2**-10, momentum=0.9, weight_decay=5e-4)
    loader = DataLoader(pictures, bs, shuffle=True, num_workers=2, drop_last=True, persistent_workers=True)
    while True:
        for images, labels in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(net(images.to(device)), labels.to(device))
            loss.backward()
            optimizer.step()
            total += loss.item()
            yield bs


def ours(methods, args, bs, data, device, precision, capture):
    """This engine's, for one run or several at once; yields the number of images after a burst of each."""
    bursts = []
    for seed, method in enumerate(methods):
        config, net = make(method, args, bs)
        run = common.Run(config | {"seed": seed}, net, data, device, precision)
        with runner.on_stream(run):
            if capture:
                run.capture()
        bursts.append((run, common.train(run, 10**9)))
    while True:
        yield sum(advance(run, burst) for run, burst in bursts)


def advance(run, bursts) -> int:
    with runner.on_stream(run):
        return next(bursts)


def make(method, args, bs):
    """The configuration and the net of a method."""
    init, ghost = ("bn", 0) if method == WHOLE else (method, 64)
    line = f"--depth {args.depth} --width {args.width} --init {init} --ghost {ghost} --bs {bs} --lr 2^-10 --epochs 9999"
    (config,) = wrn_cifar.configurations(wrn_cifar.parse_args(line.split())).values()
    return config, wrn_cifar.make_net(config)


def contenders(args, bs, data, pictures, device, precision) -> dict:
    """What is compared at a batch size: (method, engine, runs, precision) -> an iterator of trained images."""
    entries = {}
    for method in args.methods:
        if method == WHOLE and bs <= 64:
            continue  # the ghost batch is the whole batch anyway
        if method in ("bn", "none"):
            net = WideResNet(args.depth, args.width, method, ghost=0)
            entries[method, "plain", 1, "off"] = plain(net, pictures, bs, device)
        engine = functools.partial(ours, args=args, bs=bs, data=data, device=device)
        for p in dict.fromkeys(("off", precision) if device.type == "cpu" else (precision,)):
            entries[method, "ours", 1, p] = engine([method], precision=p, capture=device.type == "cuda")
        if device.type == "cuda":
            entries[method, "eager", 1, precision] = engine([method], precision=precision, capture=False)
            runs = runner.side_by_side(device, bs)
            if runs > 1:
                entries[method, "concurrent", runs, precision] = engine(
                    [method] * runs, precision=precision, capture=True
                )
    return entries


# ----------------------------------------------------------------------------------------------------------- measuring


def rate(steps, seconds, device) -> float:
    """Items per second of an iterator that yields how many it made, over about so many seconds."""
    began, items = time.perf_counter(), 0
    while True:
        items += next(steps)
        if device.type == "cuda" and time.perf_counter() - began >= seconds:
            torch.cuda.synchronize()
        if time.perf_counter() - began >= seconds:
            return items / (time.perf_counter() - began)


def medians(entries: dict, args) -> dict:
    """The median rates of things that the CPU does."""
    rates = interleave(entries, args.rounds, args.seconds, torch.device("cpu"))
    return {name: statistics.median(found) for name, found in rates.items()}


def interleave(entries: dict, rounds, seconds, device) -> dict:
    """The rates of each entry, one per round; the first round only warms up."""
    rates = {key: [] for key in entries}
    for turn, (key, steps) in itertools.product(range(rounds + 1), entries.items()):
        figure = rate(steps, seconds, device)
        if turn:
            rates[key].append(figure)
    return rates


def augmentation(data, pictures, args) -> dict:
    """Images per second on one core: this code's crop and flip, and PIL's through a DataLoader in the same process."""
    mine = (len(data.train_batch(part)[1]) for part in itertools.cycle(data.draw(0, 0).split(64)))
    return medians({"ours": mine, "PIL": load(pictures, 64)}, args)


def pipeline(folder: Path, args) -> list[dict]:
    """Checks of the ImageNet input pipeline against torchvision's transforms, on the photographs of a folder.

    Flipping and standardization are left out on our side: they are the device's.
    """
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in resnet_imagenet.SUFFIXES)
    if not files:
        raise UserError(f"--photos: {folder} holds no photographs")
    part = np.array([bytes(p) for p in files]), np.zeros(len(files), dtype=np.int64)
    random_crop = transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip()
    centre_crop = transforms.Resize(256), transforms.CenterCrop(224)
    result = []
    for what, workers, theirs, target in (
        ("training images, one core", 0, random_crop, 1.5),
        ("validation images, one core", 0, centre_crop, 1.7),
        ("training images, two workers", 2, random_crop, 1.8),
    ):
        data = resnet_imagenet.ImageNet("photographs", part, part, "", torch.device("cpu"), workers=workers)
        rows = torch.cat([data.draw(0, epoch) for epoch in range(4)])
        if theirs is centre_crop:
            rows[:, 2] = resnet_imagenet.CENTRE
        mine = (len(parts[0]) for _ in itertools.count() for parts in data.feed([*rows.split(32)]))
        rates = medians({"ours": mine, "theirs": load(Pictures(files, part[1], *theirs), 32, workers)}, args)
        print(
            f"{what}: {rates['ours']:,.0f} images/s, by torchvision's transforms {rates['theirs']:,.0f}",
            flush=True,
        )
        value = rates["ours"] / rates["theirs"]
        result.append({"what": f"decoding {what}", "value": value, "target": target, "met": value >= target})
    return result


def bandwidth(device) -> float:
    """Bytes per second that a large copy reads and writes."""
    here = torch.empty(2**28, device=device)
    there = torch.empty_like(here)
    copies = (there.copy_(here).nbytes * 2 for _ in itertools.count())
    next(copies)
    return rate(copies, 0.5, device)


# ------------------------------------------------------------------------------------------------------------- results


BN, NONE = ("bn", 64, "ours"), ("none", 64, "ours")
CHECKS = [  # where, what, at least, and the two rows (method, batch size, engine, precision if it matters) to compare
    ("cpu", "float32 against the plain loop, B 64", 1.3, (*BN, "off"), ("bn", 64, "plain")),
    ("cpu", "float32 against the plain loop, B 256", 1.3, ("bn", 256, "ours", "off"), ("bn", 256, "plain")),
    ("cpu", "bf16 against the plain loop, B 64", 4, (*BN, "bf16"), ("bn", 64, "plain")),
    ("cpu", "bf16 against the plain loop, B 256", 4.5, ("bn", 256, "ours", "bf16"), ("bn", 256, "plain")),
    (
        "cpu",
        "ZeroInit against batch norm in bf16, B 64",
        1.3,
        ("zeroinit", 64, "ours", "bf16"),
        (*BN, "bf16"),
    ),
    ("cpu", "ghost batches against the whole batch, B 256", 0.97, ("bn", 256, "ours"), (WHOLE, 256, "ours")),
    ("cuda", "captured against eager, B 1", 5, ("bn", 1, "ours"), ("bn", 1, "eager")),
    ("cuda", "captured against eager, B 16", 3, ("bn", 16, "ours"), ("bn", 16, "eager")),
    ("cuda", "captured against eager, B 64", 1.5, BN, ("bn", 64, "eager")),
    ("cuda", "concurrent against in turn, B 1", 5, ("bn", 1, "concurrent"), ("bn", 1, "ours")),
    ("cuda", "concurrent against in turn, B 16", 3, ("bn", 16, "concurrent"), ("bn", 16, "ours")),
    ("cuda", "concurrent against in turn, B 64", 1.2, ("bn", 64, "concurrent"), BN),
    ("cuda", "concurrent against the plain loop, B 1", 20, ("bn", 1, "concurrent"), ("bn", 1, "plain")),
    ("cuda", "concurrent against the plain loop, B 4", 20, ("bn", 4, "concurrent"), ("bn", 4, "plain")),
    ("cuda", "against the plain loop, B 128", 8, ("bn", 128, "ours"), ("bn", 128, "plain")),
    ("cuda", "ghost batches against the whole batch, B 512", 0.9, ("bn", 512, "ours"), (WHOLE, 512, "ours")),
    (
        "cuda",
        "ghost batches against the whole batch, B 2048",
        0.9,
        ("bn", 2048, "ours"),
        (WHOLE, 2048, "ours"),
    ),
    ("cuda", "images/s, B 512", 100_000, ("bn", 512, "ours"), None),
    ("cuda", "images/s, B 2048", 100_000, ("bn", 2048, "ours"), None),
    ("", "without batch norm against with it, B 64 (the paper: roughly 1.4)", 1.0, NONE, BN),
    (
        "",
        "crop and flip against PIL, per core",
        8,
        ("crop and flip", 64, "ours"),
        ("crop and flip", 64, "PIL"),
    ),
    ("", "a step against its crop and flip, B 64", 50, ("crop and flip", 64, "ours"), NONE),
]


def find(rows, method, bs, engine, precision=None) -> float | None:
    """A row's images/s; None where it was not measured."""
    wanted = {"method": method, "bs": bs, "engine": engine} | ({"precision": precision} if precision else {})
    return next((row["images_per_second"] for row in rows if wanted.items() <= row.items()), None)


def checks(rows, device) -> list[dict]:
    """The figures to reach on a device: what, value, target and whether it is met."""
    result = []
    for where, what, target, above, below in CHECKS:
        over, under = find(rows, *above), find(rows, *below) if below else 1.0
        if over and under and where in ("", device.type):
            result.append(
                {"what": what, "value": over / under, "target": target, "met": over / under >= target}
            )
    return result


@functools.cache
def work(depth: int, width: int) -> float:
    """Multiplications of a forward pass of Wide-ResNet depth-width on one image."""
    total = 0

    def count(module, _, output):
        nonlocal total
        total += module.weight[0].numel() * output.numel()

    with torch.device("meta"):
        net = WideResNet(depth, width, "none")
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(count)
        net(torch.empty(1, 3, 32, 32))
    return total


def speed_at(rows, method, bs) -> float:
    """Images/s of the best measured way to train, between measured batch sizes on a line through the logarithms."""
    best = {}
    for row in rows:
        if row["engine"] != "plain" and row["method"] == method:
            best[row["bs"]] = max(best.get(row["bs"], 0), row["images_per_second"])
    sizes = sorted(best)
    i = min(max(bisect.bisect(sizes, bs), 1), len(sizes) - 1)
    if len(sizes) == 1 or not sizes[0] < bs < sizes[-1]:
        return best[min(max(bs, sizes[0]), sizes[-1])]
    low, high = sizes[i - 1 : i + 1]
    t = math.log(bs / low) / math.log(high / low)
    return best[low] ** (1 - t) * best[high] ** t


def cost(rows, args) -> list[dict]:
    """Runs and hours of each of sweep.sh's CIFAR-10 targets on this machine, from the measured images/s."""
    result, sweep = [], Path(__file__).with_name("sweep.sh")
    for target in ("fig1", "fig3", "table1", "table2", "table3"):
        lines = subprocess.run(
            ["bash", sweep, target, "--dry-run"], capture_output=True, text=True, check=True
        ).stdout
        runs, seconds = 0, 0.0
        for line in lines.splitlines():
            flags = wrn_cifar.parse_args(line.split()[2:])
            like = (
                "zeroinit" if common.METHODS[flags.init].scalar else "none"
            )  # where the method was not measured
            method = flags.init if flags.init in METHODS else like
            method = WHOLE if method == "bn" and flags.ghost == 0 and flags.bs > 64 else method
            relative = work(flags.depth, flags.width) / work(args.depth, args.width)
            made = len(wrn_cifar.configurations(flags))
            runs += made
            seconds += made * flags.epochs * 50_000 * relative / speed_at(rows, method, flags.bs)
        result.append({"target": target, "runs": runs, "hours": seconds / 3600})
    return result


def measure(args, device, precision) -> dict:
    """The record: rows of images/s, checks, and what the sweeps cost."""
    train, test = wrn_cifar.shapes(args.images, 0, 32), wrn_cifar.shapes(500, 1, 32)
    data, pictures = wrn_cifar.Images("shapes", train, test, device), Pictures(*train, *crop_32())
    rows = []
    for bs in args.batches:
        entries = contenders(args, bs, data, pictures, device, precision)
        for (method, engine, runs, p), rates in interleave(
            entries, args.rounds, args.seconds, device
        ).items():
            middle = statistics.median(rates)
            row = {"method": method, "bs": bs, "engine": engine, "runs": runs, "precision": p}
            row |= {"images_per_second": middle, "low": min(rates), "high": max(rates)}
            rows.append(row | {"ms_per_step": 1000 * bs * runs / middle})
            print(line_of(rows[-1], find(rows, method, bs, "plain")), flush=True)
        entries.clear()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    crops = augmentation(data, pictures, args)
    extra = [
        {"method": "crop and flip", "bs": 64, "engine": k, "images_per_second": v} for k, v in crops.items()
    ]
    decoding = pipeline(args.photos, args) if args.photos else []
    torch.set_num_threads(threads)
    record = {
        "kind": "speed",
        "device": runner.device_name(device),
        "threads": threads,
        "torch": torch.__version__,
    }
    record |= runner.environment() | {
        "model": f"wrn{args.depth}-{args.width}",
        "data": "generated, 32x32",
        "rows": rows,
    }
    record |= {"augmentation": crops, "checks": checks(rows + extra, device) + decoding}
    if device.type == "cuda":
        record["limit"] = {key: bandwidth(device) / traffic for key, traffic in TRAFFIC.items()}
    return record | {
        "cost": cost(rows, args) if {*METHODS} - {WHOLE} <= {row["method"] for row in rows} else []
    }


def line_of(row: dict, base: float | None) -> str:
    """A row of the printed table."""
    ratio = f"{row['images_per_second'] / base:6.2f}" if base else " " * 6
    name = row["engine"] + (f" x {row['runs']}" if row["runs"] > 1 else "")
    spread = f"{row['low']:,.0f} to {row['high']:,.0f}"
    return (
        f"{row['method']:17} {row['bs']:5} {name:15} {row['precision']:5} {row['images_per_second']:10,.1f} {spread:20}"
        f" {row['ms_per_step']:9.1f} {ratio}"
    )


def make_parser() -> Parser:
    parser = Parser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--depth", type=positive, default=16, help="6n+4")
    add("--width", type=positive, default=4, help="the k of Wide-ResNet d-k")
    add("--methods", nargs="+", choices=METHODS, default=METHODS, help="rows of the table")
    add("--batches", type=positive, nargs="+", help="batch sizes [1 16 64 256 on a CPU, 1 to 2048 on a GPU]")
    add("--rounds", type=positive, default=5, help="times each figure is measured")
    add("--seconds", type=number(float, 0), default=2.0, help="how long each measurement lasts at least")
    add("--images", type=positive, default=8192, help="generated training images")
    add("--photos", type=Path, help="folder of photographs, to measure the ImageNet input pipeline")
    add("--device", help="cpu, cuda, cuda:1 ... [a GPU if there is one]")
    add(
        "--amp",
        choices=("auto", "bf16", "fp16", "off"),
        default="auto",
        help="precision of the engine's passes",
    )
    add("--out", type=Path, default=Path("results"), help="the record goes to its folder speed/")
    return parser


def main():
    args = make_parser().parse_args()
    device = common.pick_device(args.device)
    precision = common.pick_precision(args.amp, device)
    args.batches = args.batches or (
        [1, 16, 64, 256] if device.type == "cpu" else [1, 4, 16, 64, 128, 512, 2048]
    )
    runner.check_writable(args.out / "speed")
    print(json.dumps(vars(args), default=str))
    print("method            batch engine          prec.   images/s lowest to highest     ms/step  / plain")
    record = measure(args, device, precision)
    print()
    for check in record["checks"]:
        verdict = "met" if check["met"] else "MISSED"
        print(f"{check['value']:10,.2f} (at least {check['target']:,}: {verdict})  {check['what']}")
    for part in record["cost"]:
        print(f"{part['target']:8} {part['runs']:6,} runs {part['hours']:12,.0f} hours on this machine")
    name = f"{record['model']}_{record['device'].replace(' ', '-').lower()}_t{record['threads']}.json"
    path = args.out / "speed" / name
    with runner.atomic_write(path) as file:
        file.write(json.dumps(record, allow_nan=False, indent=1).encode())
    print(f"record: {path}")


if __name__ == "__main__":
    sys.exit(runner.exit_code(main))
