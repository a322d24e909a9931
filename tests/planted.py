"""Records drawn from the paper's own numbers and deviations; where it draws a curve, from a reasonable one.

The tables are copied from the paper once more, so that a slip in paper.py shows.
"""

import json
import random
from dataclasses import dataclass

from records import power, slug

SPREAD, SHIFT = (
    0.763,
    0.328,
)  # of the best 12 of 15 normal numbers: their deviation and mean, in true deviations
DROPOUT = ("dropout", "biases+dropout", "zeroinit", "zeroinit+bias")
LARGE = [16 << k for k in range(10)]  # the batch sizes of Figures 1 and 2


@dataclass(frozen=True)
class Truth:
    """What one method reaches at one point: means and deviations of the best 12 of 15 runs."""

    accuracy: float  # per cent
    std: float = 0.1
    loss: float = 0.2
    loss_std: float = 0.001
    rate: int = -2  # the exponent of the optimal rate for the accuracy
    tied: tuple = ()  # exponents of the lowest and highest rate that are as good
    loss_rate: int | None = None  # that for the loss, if it is another
    most: int | None = None  # no rate above this exponent was run
    least: int | None = None  # and none below this
    diverged: bool = False  # at every rate
    top5: float = 92.0
    seeds: int = 15


def points():
    """{(group, method, depth, batch size): Truth}; the groups are the paper's four networks."""
    truth = {}
    for n, bs in enumerate(LARGE):
        bn = [94.38, 94.42, 94.45, 94.45, 94.45, 94.45, 94.45, 94.4, 94.1, 92.5][n]
        zeroinit = [94.4, 94.4, 94.4, 94.4, 94.4, 93.7, 92.5, 90.0, 85.0, 75.0][n]
        none = [92.3, 92.3, 92.3, 92.3, 91.8, 90.0, 86.0, 78.0, 60.0, 40.0][n]
        its_loss = [0.189, 0.189, 0.189, 0.192, 0.2, 0.23, 0.3, 0.4, 0.6, 0.9][n]
        worse_loss = [0.212, 0.212, 0.212, 0.23, 0.3, 0.5, 0.8, 1.2, 1.6, 2.0][n]
        truth["wide", "bn", 16, bs] = Truth(bn, 0.1, 0.15 + 0.003 * max(0, n - 7), rate=min(4, n - 3))
        truth["wide", "zeroinit", 16, bs] = Truth(zeroinit, 0.1, its_loss, rate=min(1, n - 4))
        truth["wide", "none", 16, bs] = Truth(none, 0.3, worse_loss, 0.004, rate=min(-3, n - 5))
    for n, bs in enumerate((1, 2, 4, 8)):
        loss = (0.175, 0.165, 0.158, 0.153)[n]
        truth["wide", "bn", 16, bs] = Truth((90.0, 92.5, 93.6, 94.1)[n], 0.1, loss, rate=n - 7)
        truth["wide", "zeroinit", 16, bs] = Truth(94.4, 0.1, 0.189, rate=n - 8)
        truth["wide", "none", 16, bs] = Truth(92.3, 0.3, 0.212, 0.004, rate=n - 9)
    for n, bs in enumerate((128, 256, 512, 1024)):
        truth["wide", "bn (whole batch)", 16, bs] = Truth(
            (94.5, 94.7, 94.6, 94.3)[n], loss=0.15, rate=min(4, n)
        )
    truth["wide", "biases", 16, 64] = Truth(91.9, 0.2, 0.205, 0.003, rate=-4)
    truth["wide", "dropout", 16, 64] = Truth(93.2, 0.1, 0.226, 0.001, rate=-4)
    truth["wide", "scalar", 16, 64] = Truth(94.0, 0.1, 0.181, 0.001)
    truth["wide", "biases+dropout", 16, 64] = Truth(93.6, 0.1, 0.212, 0.001, rate=-4)
    for method, column in DEEP.items():
        for depth, row in zip((16, 100, 1000), column, strict=True):
            truth["deep", method, depth, 64] = row
    for group, table in (("v2", TABLE4), ("v1", TABLE5)):
        for method, column in table.items():
            for bs, (top1, top5) in zip((256, 1024, 4096), column, strict=True):
                truth[group, method, 50, bs] = Truth(top1, 0.05, rate=-1, top5=top5, seeds=1)
    return truth


DEEP = {
    "bn": (Truth(93.5, rate=-1), Truth(94.7, rate=-1, tied=(-2, 0)), Truth(94.6, rate=-2, tied=(-3, 0))),
    "zeroinit": (Truth(93.3), Truth(94.2), Truth(94.3, 0.2, tied=(-3, -1))),
    "zeroinit without L2": (Truth(91.0, rate=-3), Truth(92.2, rate=-3), Truth(92.5, 0.2, rate=-3)),
    "scalar": (
        Truth(93.1, tied=(-3, -2)),
        Truth(94.1, tied=(-3, -2)),
        Truth(94.2, rate=-1, tied=(-2, -1)),
    ),
    "none": (Truth(91.0, 0.3, rate=-4), Truth(60.0, 1.0, rate=-9), Truth(30.0, 2.0, rate=-13)),
}
TABLE4 = {
    "bn": ((74.97, 92.20), (74.93, 92.13), (74.88, 91.93)),
    "fixup": ((74.81, 91.84), (74.60, 91.69), (73.02, 90.59)),
    "zeroinit-nodropout": ((74.93, 91.89), (74.61, 91.81), (70.76, 89.15)),
    "zeroinit": ((75.56, 92.35), (75.46, 92.53), (72.65, 90.70)),
}
TABLE5 = {
    "bn": ((75.57, 92.48), (75.32, 92.37), (75.37, 92.38)),
    "fixup": ((74.41, 91.65), (74.43, 91.74), (72.37, 90.28)),
    "zeroinit": ((70.05, 89.16), (68.40, 87.82), (68.19, 87.92)),
    "zeroinit+bias": ((75.23, 92.37), (74.94, 91.99), (70.82, 89.60)),
}


def config_of(group, method, depth, bs, **changes):
    """The configuration of a point, without rate and seed, in the paper's protocol but for the changes."""
    method, _, alpha = method.partition(", alpha ")
    init, resnet = method.split(" ")[0], group in ("v1", "v2")
    ghost = (bs if "whole" in method else min(bs, 256 if resnet else 64)) if init == "bn" else None
    shared = {"init": init, "bs": bs, "ghost": ghost, "l2_all": False, "scalar_lr": 1.0}
    shared |= {"momentum": 0.9, "dampening": 0.9}
    shared |= {
        "base_init": "he-in",
        "precision": "float32",
        "alpha": float(alpha or 0) if "zeroinit" in init else None,
    }
    if resnet:
        own = {"data": "ImageNet", "model": "resnet50", "version": group, "epochs": 90, "wd": 1e-4}
        own |= {"image_size": 224, "stride_on": {"v1": "1x1", "v2": "3x3"}[group]}
    else:
        own = {"data": "CIFAR-10", "model": "wrn", "depth": depth, "width": {"wide": 4, "deep": 2}[group]}
        own |= {"epochs": 200, "wd": 0.0 if "L2" in method else 5e-4, "pad_mode": "zeros", "train_size": None}
    drop = 0.2 if resnet else 0.6
    return shared | own | {"dropout": drop if init in DROPOUT else 0.0} | changes


def draw_point(key, truth, random_numbers, **changes):
    """The records of one point: 15 seeds at each rate around the optimum."""
    config = config_of(*key, **changes)
    loss_rate = truth.rate if truth.loss_rate is None else truth.loss_rate
    low, high = truth.tied or (truth.rate, truth.rate)
    std, loss_std = truth.std / 100 / SPREAD, truth.loss_std / SPREAD
    rates = range(min(low, loss_rate) - 1, max(high, loss_rate) + 2)
    if truth.most is not None:
        rates = [rate for rate in rates if rate <= truth.most]
    if truth.least is not None:
        rates = [rate for rate in rates if rate >= truth.least]
    records = []
    for rate in rates:
        # a tied rate is a quarter of a deviation behind, each further step at least four
        behind = 0.25 if rate != truth.rate else 0.0
        off = max(low - rate, rate - high, 0)
        mean = truth.accuracy / 100 - SHIFT * std - (behind + 5 * off) * std - 0.002 * off
        loss = truth.loss + SHIFT * loss_std + 5 * abs(rate - loss_rate) * loss_std
        for seed in range(truth.seeds):
            accuracy = min(1.0, max(0.0, random_numbers.gauss(mean, std)))
            reached = max(1e-3, random_numbers.gauss(loss, loss_std))
            if truth.seeds == 1:
                accuracy += SHIFT * std
            records.append(record(config | {"lr": 2.0**rate, "seed": seed}, accuracy, reached, truth))
    return records


def record(config, accuracy, loss, truth):
    """The record of a run, as read_all() gives it, but without a history; `write` adds one."""
    final = {"test_accuracy": accuracy, "train_loss": loss - 0.1, "train_objective": loss}
    if config["model"] == "resnet50":
        final["test_top5"] = truth.top5 / 100
    if truth.diverged:
        final = dict.fromkeys(final)
    classes, images = (10, 10_000) if config["model"] == "wrn" else (1000, 50_000)
    data = {"fingerprint": "0" * 16, "classes": classes, "train_images": 50_000, "test_images": images}
    return {
        "config": config,
        "status": "diverged" if truth.diverged else "done",
        "history": [] if truth.diverged else [{"train_accuracy": accuracy} | final],
        "final": final,
        "data": {"name": config["data"]} | data,
        "environment": {"torch": "2.14", "device": "cpu", "commit": "abc1234"},
        "file": "planted",
    }


def write(folder, records):
    """Write records, with histories, as files; return their paths."""
    paths = []
    for run in records:
        config, final, lost = run["config"], run["final"], run["status"] == "diverged"
        entry = {"lr": config["lr"], "train_loss": 2.0, "l2": 0.1, "train_accuracy": 0.3, "seconds": 1.0}
        history = [{"epoch": epoch + 1} | entry for epoch in range(1 if lost else config["epochs"])]
        if not lost:
            history[-1] |= {"train_loss": final["train_loss"], "test_accuracy": final["test_accuracy"]}
            history[-1]["l2"] = final["train_objective"] - final["train_loss"]
            history[-1] |= {"test_top5": final["test_top5"]} if "test_top5" in final else {}
        whole = run | {"history": history} | ({"diverged_at_step": 7} if lost else {})
        told = [
            config.get(key) for key in ("version", "depth", "width", "init", "ghost", "wd", "alpha", "bs")
        ]
        words = "-".join(map(str, told))
        name = f"{words}_lr{power(config['lr'])}_ep{config['epochs']}_s{config['seed']:02d}.json"
        paths.append(folder / slug(config["data"]) / name)
        paths[-1].parent.mkdir(parents=True, exist_ok=True)
        paths[-1].write_text(json.dumps(whole))
    return paths


def draw(seed, truth=None, **changes):
    """All records of one draw."""
    numbers = random.Random(seed)
    truth = points() if truth is None else truth
    return [run for key, point in truth.items() for run in draw_point(key, point, numbers, **changes)]
