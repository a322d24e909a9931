"""ResNet-50 on ImageNet, on one or several GPUs: Tables 4 and 5 of the paper.

    torchrun --nproc_per_node=8 resnet_imagenet.py --arch v2 --init zeroinit --bs 1024 --data-dir DIR
    python resnet_imagenet.py --data shapes --image-size 64 --bs 64 --epochs 1     # minutes on a CPU

DIR holds train/CLASS/* and val/CLASS/*. Each run leaves one JSON record in --out; the same command goes on.
"""

import argparse
import math
import os
import sys
from pathlib import Path

if __name__ == "__main__" and sys.stderr and sys.stderr.isatty():
    print("loading PyTorch ...", file=sys.stderr)

import data
import points
import runner
from common import METHODS, ResNet50
from points import Parser
from ranks import rank_variable
from records import ACCURACY

HALVINGS = 9  # at 45, 50, ..., 85 of 90 epochs (section 5)
PARTS = ("train", "val")  # folders of the data
STRIDE_ON = {"v1": "1x1", "v2": "3x3"}  # He et al., 2016a; fb.resnet.torch (He et al., 2016b, have 1x1)


def make_parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument_group("network").add_argument
    add("--arch", choices=("v1", "v2"), default="v2", help="ResNet-50-V1 or -V2")
    add("--stride-on", choices=("1x1", "3x3"), help="the convolution with the stride [1x1 in v1, 3x3 in v2]")
    add = parser.add_argument_group("data").add_argument
    add("--data", choices=("folder", "shapes"), default="folder", help="the images")
    add("--data-dir", type=Path, default=Path("data/imagenet"), help="holds train/CLASS/* and val/CLASS/*")
    add("--data-name", help="name of the images in records and reports [the folder's own name]")
    add("--image-size", type=points.number(int, 1, 10_000), default=224, help="side of the crops")
    few = points.number(int, 0, 1000)
    add("--workers", type=few, help="processes that decode images, per rank [its part of the cores]")
    points.add_shared_flags(parser, METHODS, ghost=256, bs=256, epochs=90, wd=1e-4, concurrent=1)
    return parser


def parse_args(argv=None) -> argparse.Namespace:
    """Parse and check the flags; a bad one ends with one line and exit code 2."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if METHODS[args.init].last_bias and args.arch != "v1":
        parser.error(f"argument --init: {args.init} is for --arch v1, whose blocks end with a ReLU")
    args.stride_on = args.stride_on or STRIDE_ON[args.arch]
    if args.workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        per_rank = cores // rank_variable("LOCAL_WORLD_SIZE", 1)
        args.workers = min(32, max(1, per_rank)) if args.data == "folder" else 0  # 32 keep up with any GPU
    points.check_shared_flags(parser, args)
    last_size = math.ceil(args.image_size / 32) ** 2  # pixels that the last blocks see
    if args.ghost and args.ghost * last_size < 2:
        parser.error("argument --bs: batch norm needs more than one image of this --image-size")
    return args


def make_point(args: argparse.Namespace) -> points.Point:
    """All runs that the flags may ask for; the expected rate is B / 256, undamped 0.1 * B / 256."""
    net = {"model": "resnet50", "version": args.arch}
    defaults = {"ghost": 256, "dropout": 0.2, "wd": 1e-4}
    defaults |= {"stride_on": STRIDE_ON[args.arch], "image_size": 224}
    rate = points.power_of_two(args.bs) / 256
    prefix, metrics = f"resnet50-{args.arch}", (ACCURACY,)
    return points.make_point(args, prefix, net, defaults, rate, around=2, metrics=metrics)


def make_net(config: dict, classes: int) -> ResNet50:
    """The net of a configuration, on PyTorch's default device."""
    keys = ("version", "init", "ghost", "dropout", "alpha", "base_init", "stride_on")
    return ResNet50(num_classes=classes, **{key: config[key] for key in keys})


def load_data(args: argparse.Namespace, device) -> data.ImageNet:
    """The images that the flags name; worker processes decode them."""
    if args.data == "shapes":
        train = data.shapes(data.SHAPES, 0, args.image_size)
        val = data.shapes(data.SHAPES_TEST, 1, args.image_size)
        classes, fingerprint = 10, data.fingerprint(*train, *val)
    else:
        train, val, names, fingerprint = data.list_images(args.data_dir, PARTS)
        classes = len(names)
    size, workers = args.image_size, args.workers
    return data.ImageNet(args.data_name, train, val, fingerprint, device, classes, size, workers)


def count_images(args: argparse.Namespace) -> tuple[int, int]:
    """How many training images and classes there are, without reading them."""
    return data.count_images(args.data, args.data_dir, PARTS)


if __name__ == "__main__":
    sys.exit(runner.exit_code(lambda: runner.main(sys.modules[__name__])))
