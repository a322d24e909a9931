"""Wide-ResNets on CIFAR-10: Figures 1 to 4 and Tables 1 to 3 of the paper.

    python wrn_cifar.py --init zeroinit --bs 64 --seeds 15 --search best    # the last row of Table 1
    python wrn_cifar.py --data shapes --width 1 --bs 16 --epochs 3          # a minute on a CPU, no download

Each run leaves one JSON record in --out; runs that have theirs are skipped, so the same command goes on.
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__" and sys.stderr and sys.stderr.isatty():
    print("loading PyTorch ...", file=sys.stderr)

import data
import points
import runner
from common import METHODS, WideResNet
from points import Parser, positive
from records import ACCURACY, LOSS, UserError

HALVINGS = 10  # at 100, 110, ..., 190 of 200 epochs (section 3)
INITS = [init for init, method in METHODS.items() if not method.last_bias]  # zeroinit+bias is for V1


def make_parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument_group("network").add_argument
    add("--depth", type=positive, default=16, help="6n+4")
    add("--width", type=positive, default=4, help="the k of Wide-ResNet d-k")
    add = parser.add_argument_group("data").add_argument
    add("--data", choices=("cifar10", "cifar100", "folder", "shapes"), default="cifar10", help="the images")
    add("--data-dir", type=Path, default=Path("data"), help="where CIFAR is or goes; or {train,test}/CLASS/*")
    add("--data-name", help="name of the images in records and reports [of a folder: its own name]")
    add("--train-size", type=positive, help="train on this many images only [all]")
    add("--pad-mode", choices=("zeros", "reflect"), default="zeros", help="what a crop sees outside an image")
    points.add_shared_flags(parser, INITS, ghost=64, bs=64, epochs=200, wd=5e-4)
    return parser


def parse_args(argv=None) -> argparse.Namespace:
    """Parse and check the flags; a bad one ends with one line and exit code 2."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.depth < 10 or (args.depth - 4) % 6:
        parser.error(f"argument --depth: should be 6n+4 (10, 16, 22, ..., 1000), not {args.depth}")
    points.check_shared_flags(parser, args)
    return args


def expected_rate(init: str, bs: int) -> float:
    """The optimum to expect: in proportion to the batch size up to where Figure 2a saturates.

    At B 64 it is that of Tables 2 and 3 at 16 layers (ZeroInit without L2 has 2^-3 there). Without a scalar
    it is 2^-4, an eighth of batch norm's: in the paper optimal rates at small B are similar, at width 1
    (results/README.md) it is 2^-6.
    """
    method = METHODS[init]
    if method.norm:
        at_64, limit = 2**-1, 2**4
    elif method.scalar or method.fixup:
        at_64, limit = 2**-2, 2**1
    else:
        at_64, limit = 2**-4, 2**-3
    return min(at_64 * points.power_of_two(bs) / 64, limit)


def make_point(args: argparse.Namespace) -> points.Point:
    """All runs that the flags may ask for."""
    net = {"model": "wrn", "depth": args.depth, "width": args.width}
    defaults = {"ghost": 64, "dropout": 0.6, "wd": 5e-4, "pad_mode": "zeros", "train_size": None}
    rate = expected_rate(args.init, args.bs)
    prefix, metrics = f"wrn{args.depth}-{args.width}", (ACCURACY, LOSS)
    return points.make_point(args, prefix, net, defaults, rate, around=3, metrics=metrics)


def make_net(config: dict, classes: int) -> WideResNet:
    """The net of a configuration, on PyTorch's default device."""
    keys = ("depth", "width", "init", "ghost", "dropout", "alpha", "base_init")
    return WideResNet(num_classes=classes, **{key: config[key] for key in keys})


def load_data(args: argparse.Namespace, device) -> data.Images:
    """The images that the flags name, on the device."""
    if args.data == "shapes":
        train, test, classes = data.shapes(data.SHAPES, seed=0), data.shapes(data.SHAPES_TEST, seed=1), 10
    elif args.data == "folder":
        train, test, classes = data.load_folder(args.data_dir)
    else:
        train, test, classes = data.load_cifar(args.data, args.data_dir)
    return data.Images(args.data_name, train, test, device, classes, args.pad_mode, args.train_size)


def count_images(args: argparse.Namespace) -> tuple[int, int]:
    """How many training images and classes there are, without reading them."""
    images, classes = data.count_images(args.data, args.data_dir)
    if args.train_size and args.train_size > images:
        raise UserError(f"--train-size {args.train_size} is more than the {images} training images")
    return args.train_size or images, classes


if __name__ == "__main__":
    sys.exit(runner.exit_code(lambda: runner.main(sys.modules[__name__])))
