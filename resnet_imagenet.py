"""ResNet-50 on ImageNet: Tables 4 and 5 of the paper, one run per learning rate and seed.

    python resnet_imagenet.py --arch v2 --init zeroinit --bs 256 --lr 2^-3 --data-dir DIR    # a point of Table 4
    torchrun --nproc-per-node 8 resnet_imagenet.py --bs 1024 --lr 2^-1 --data-dir DIR        # --bs is that of all ranks
    python resnet_imagenet.py --data shapes --image-size 64 --epochs 2                       # nothing to download

DIR holds train/CLASS/* and val/CLASS/*. Each run leaves one JSON record in --out; runs that have theirs are skipped.
"""

import argparse
import functools
import hashlib
import math
import os
import random
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import common
import runner
from common import METHODS, UserError
from runner import Parser, fraction, natural, positive
from wrn_cifar import SHAPES, shapes

try:  # what PIL does, to the bit, in less time; torchvision means to give it up some day
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:
    decode_jpeg = None

STRIDE_ON = {"v1": "1x1", "v2": "3x3"}  # a block's convolution with the stride (He et al., 2016a; He et al., 2016b)
HALVINGS = 9  # of the learning rate, at epochs 45, 50, ..., 85 of 90 (section 5)
SUFFIXES = (".jpeg", ".jpg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels: red, green, blue
CENTRE = -1  # stands where a crop's random number does, for the crop of validation

# -------------------------------------------------------------------------------------------------------------- flags


def make_parser() -> Parser:
    parser = Parser(description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument_group("network").add_argument
    add("--arch", choices=STRIDE_ON, default="v2", help="ResNet-50-V1, or V2 with pre-activation")
    add("--init", choices=METHODS, default="zeroinit", help="the method, a column of the paper's tables")
    add("--ghost", type=natural, default=256, help="images per ghost batch of batch norm; 0: the whole batch")
    add("--dropout", type=fraction, help="drop probability instead of the method's (0.2 where it has dropout)")
    add("--base-init", choices=("lecun", "he-in", "he-out"), default="lecun", help="distribution of initial weights")
    add("--stride-on", choices=("1x1", "3x3"), help="a block's convolution with the stride [v1: 1x1, v2: 3x3]")
    add = parser.add_argument_group("data").add_argument
    add("--data", choices=("folder", "shapes"), default="folder", help="folder: DIR/{train,val}/CLASS/*")
    add("--data-dir", type=Path, default=Path("data/imagenet"), help="the folder of images")
    add("--data-name", help="name of the images in records and reports [the folder's own name]")
    add("--image-size", type=positive, default=224, help="pixels of a side of what the net sees")
    add("--workers", type=natural, help="processes that decode images, for each rank [its share of the cores]")
    runner.add_shared_flags(parser, bs=256, lr=[0.125], epochs=90, wd=1e-4, eval_every=1, concurrent=1)
    parser.add_argument("--eval-only", action="store_true", help="print the accuracy of saved weights or checkpoints")
    return parser


def parse_args(argv=None) -> argparse.Namespace:
    """Parse and check the flags; a bad one ends with one line and exit code 2."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if METHODS[args.init].last_bias and args.arch != "v1":
        parser.error(f"argument --init: {args.init} is for --arch v1, whose blocks end with a ReLU")
    runner.check_shared_flags(parser, args)
    args.stride_on = args.stride_on or STRIDE_ON[args.arch]
    args.data_name = args.data_name or ("shapes" if args.data == "shapes" else args.data_dir.resolve().name)
    if args.workers is None:  # 32 keep up with any GPU
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        share = min(32, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
        args.workers = share if args.data == "folder" else 0
    return args


def configurations(args: argparse.Namespace) -> dict:
    """All runs that the flags ask for: the path of each record -> everything that decides its result."""
    net = {"model": "resnet50", "version": args.arch}
    defaults = {"ghost": 256, "dropout": 0.2, "wd": 1e-4, "momentum": 0.9, "l2_all": False, "scalar_lr": 1.0}
    defaults |= {"base_init": "lecun", "stride_on": STRIDE_ON[args.arch], "image_size": 224}
    return runner.one_per_rate_and_seed(args, f"resnet50-{args.arch}", net, defaults)


# -------------------------------------------------------------------------------------------------------------- files


def class_names(folder: Path) -> list[str]:
    """The sorted names of the folders in a folder, which is a part of the data. Raises UserError if there is none."""
    try:
        with os.scandir(folder) as entries:
            names = {e.name: e.is_dir() for e in entries}
    except OSError as error:
        layout = f"{folder.parent} should hold images in train/CLASS/ and val/CLASS/"
        raise UserError(f"--data-dir: {layout} ({folder}: {error.strerror})") from None
    if not any(names.values()):
        raise UserError(
            f"--data-dir: {folder} holds {len(names)} files and no class folders: sort its images into "
            f"{folder.name}/CLASS/, with the same classes in train and val"
        )
    return sorted(name for name, is_folder in names.items() if is_folder)


def list_images(folder: Path):
    """The images of folder/train/CLASS/* and folder/val/CLASS/*: (paths, labels) of each part, and a fingerprint.

    Paths are an array of bytes (N,), labels int64 (N,): the places of the classes in their sorted names. The
    fingerprint is of names and sizes. Files without an image's suffix are passed over. Raises UserError unless both
    parts have the same classes, and images in each.
    """
    classes = {part: class_names(folder / part) for part in ("train", "val")}
    if odd := sorted({*classes["train"]} ^ {*classes["val"]}):
        some = ", ".join(odd[:5]) + (f" and {len(odd) - 5} more" if len(odd) > 5 else "")
        raise UserError(f"--data-dir: {folder}: train and val should hold the same classes, and differ in {some}")
    digest, parts = hashlib.sha256(), []
    for part, names in classes.items():
        paths, labels = [], []
        for label, name in enumerate(names):
            try:
                with os.scandir(folder / part / name) as entries:
                    files = sorted((e.name, e.stat().st_size) for e in entries if e.name.lower().endswith(SUFFIXES))
            except OSError as error:
                raise UserError(f"--data-dir: {error.filename}: {error.strerror}") from None
            if not files:
                raise UserError(f"--data-dir: {folder / part / name} holds no images ({', '.join(SUFFIXES)})")
            for file, size in files:
                digest.update(os.fsencode(f"{part}/{name}/{file} {size}\n"))
                paths.append(os.fsencode(folder / part / name / file))
            labels += [label] * len(files)
        # Worker processes share an array's memory; a list's would be copied as they count references to its items.
        parts.append((np.array(paths), np.array(labels, dtype=np.int64)))
    return *parts, digest.hexdigest()[:16]


def decode(path: str) -> torch.Tensor:
    """An image file as RGB, uint8 (H, W, 3), whatever its format and mode; its rotation tag is ignored.

    Raises UserError if it cannot be read.
    """
    try:
        data = np.fromfile(path, np.uint8)
        if decode_jpeg and data[:3].tobytes() == b"\xff\xd8\xff":
            try:
                return decode_jpeg(torch.from_numpy(data), ImageReadMode.RGB).permute(1, 2, 0)
            except RuntimeError:
                pass  # PIL says what is wrong, or can read it
        with Image.open(path) as image:
            return torch.from_numpy(np.array(image.convert("RGB")))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is not a readable image ({error})") from None


# -------------------------------------------------------------------------------------------------------------- crops


def crop_box(number: int, height: int, width: int) -> tuple[int, int, int, int]:
    """The random crop that a number stands for: top, left, height, width (Szegedy et al., 2015).

    Its area is uniform in 8% to 100% of the image, the logarithm of its aspect ratio in that of 3/4 to 4/3, and so is
    its place. When ten of these did not fit, it is the largest central one with an aspect ratio in these bounds.
    """
    uniform = random.Random(number).uniform
    for _ in range(10):
        area, ratio = height * width * uniform(0.08, 1), math.exp(uniform(math.log(3 / 4), math.log(4 / 3)))
        h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < h <= height and 0 < w <= width:
            return int(uniform(0, height - h + 1)), int(uniform(0, width - w + 1)), h, w
    h, w = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


def random_crop(image: torch.Tensor, number: int, size: int) -> torch.Tensor:
    """The crop that a number stands for, resized to (size, size, 3)."""
    top, left, height, width = crop_box(number, *image.shape[:2])
    return resize(image[top : top + height, left : left + width], size, size)


def centre_crop(image: torch.Tensor, size: int) -> torch.Tensor:
    """The middle (size, size, 3) of an image whose shorter side is resized to 256/224 of that."""
    side, short = size * 256 // 224, min(image.shape[:2])
    height, width = (int(side * length / short) for length in image.shape[:2])
    top, left = round((height - size) / 2), round((width - size) / 2)
    return resize(image, height, width)[top : top + size, left : left + size]


def resize(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    image = image[None].permute(0, 3, 1, 2)  # in this order the memory layout is seen to be channels last
    return F.interpolate(image, (height, width), mode="bilinear", antialias=True)[0].permute(1, 2, 0)


# --------------------------------------------------------------------------------------------------------------- data


class Decoder(Dataset):
    """What worker processes do. `sources` are paths, or uint8 images (N, H, W, 3), with int64 `labels` (N,)."""

    def __init__(self, sources, labels, size):
        self.sources, self.labels, self.size = sources, labels, size

    def __getitem__(self, rows: np.ndarray):
        """Images, uint8 (B, size, size, 3), whether to flip them, bool (B,), and labels, int64 (B,), of rows (B, 3).

        Or what is wrong with a file: an error raised in a worker would come out inside a traceback.
        """
        images = torch.empty((len(rows), self.size, self.size, 3), dtype=torch.uint8)
        try:
            for image, (index, _, crop) in zip(images, rows.tolist(), strict=True):
                whole = self.read(self.sources[index])
                image[:] = centre_crop(whole, self.size) if crop == CENTRE else random_crop(whole, crop, self.size)
        except UserError as error:
            return str(error)
        return images, torch.from_numpy(rows[:, 1] == 1), torch.from_numpy(self.labels[rows[:, 0]])

    def read(self, source) -> torch.Tensor:
        return decode(os.fsdecode(source)) if isinstance(source, bytes) else torch.from_numpy(source)


class ImageNet:
    """Images that worker processes decode and crop, and the device flips and standardizes.

    `train` and `val` are pairs of sources and labels (see `Decoder`). A row of numbers says what becomes of an image:
    (index, flip, random number of the crop); validation images have the indices after those of the training images.
    """

    on_device = False

    def __init__(self, name, train, val, fingerprint, device, size=224, workers=0):
        self.name, self.fingerprint, self.device, self.workers = name, fingerprint, device, workers
        self.train_images, self.test_images = len(train[0]), len(val[0])
        self.decoder = Decoder(*(np.concatenate(pair) for pair in zip(train, val, strict=True)), size)
        self.mean, self.std = (torch.tensor(v, device=device).view(3, 1, 1) * 255 for v in (MEAN, STD))
        self.loaders, self.idle = [], []  # all, so that none is garbage while it has workers; and those not in use

    def draw(self, seed: int, epoch: int) -> torch.Tensor:
        """The rows of the training images in an epoch's order, int64 (N, 3)."""
        generator = torch.Generator().manual_seed(common.stream_seed(seed, "data", epoch))
        order = torch.randperm(self.train_images, generator=generator)
        flip = torch.randint(2, (self.train_images,), generator=generator)
        crop = torch.randint(2**62, (self.train_images,), generator=generator)
        return torch.stack([order, flip, crop], 1)

    def feed(self, batches):
        """For each of a list of batches of rows, in turn, what `train_batch` takes, on the device.

        Raises UserError at a file that is no image.
        """
        loader, ready = self.idle.pop() if self.idle else self.start_workers(), []
        loader.sampler[:] = [rows.numpy() for rows in batches]
        try:
            for parts in loader:
                if isinstance(parts, str):
                    raise UserError(parts)
                ready.append([part.to(self.device, non_blocking=True) for part in parts])
                if len(ready) > 1:
                    yield ready.pop(0)
        finally:  # before the last batch is handed on, so that a validation after it finds the workers free
            self.idle.append(loader)
        yield from ready

    def start_workers(self) -> DataLoader:
        """A loader whose sampler is a list of batches, to be filled for each feed; its workers stay."""
        loader = DataLoader(
            self.decoder,
            sampler=[],
            batch_size=None,  # each item is a batch
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            worker_init_fn=leave_group,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # leaves the global one alone
        )
        self.loaders.append(loader)
        return loader

    def train_batch(self, images, flips, labels):
        """Images (B, 3, S, S), channels last, flipped where they should be and standardized, and their labels (B,)."""
        images = images.permute(0, 3, 1, 2)
        images = torch.where(flips[:, None, None, None], images.flip(3), images)
        return (images - self.mean) / self.std, labels

    def test_batches(self, rank: int = 0, world: int = 1, bs: int = 128):
        """A rank's share of the validation images: all ranks together have each once."""
        index = torch.arange(self.train_images, self.train_images + self.test_images)[rank::world]
        rows = torch.stack([index, torch.zeros_like(index), torch.full_like(index, CENTRE)], 1)
        for parts in self.feed([part for part in rows.split(bs) if len(part)]):
            yield self.train_batch(*parts)


def leave_group(_worker: int):
    """Leave the script's process group: a signal to all of it is for the script, which still needs its workers."""
    os.setsid()


def load_data(args: argparse.Namespace, device: torch.device) -> ImageNet:
    """The data set that the flags name."""
    if args.data == "folder":
        train, val, fingerprint = list_images(args.data_dir)
    else:
        train, val = shapes(SHAPES, seed=0, size=args.image_size), shapes(1000, seed=1, size=args.image_size)
        fingerprint = hashlib.sha256(b"".join(part.tobytes() for part in (*train, *val))).hexdigest()[:16]
    return ImageNet(args.data_name, train, val, fingerprint, device, args.image_size, args.workers)


# --------------------------------------------------------------------------------------------------------------- main


def print_accuracy(runs: dict, build, args: argparse.Namespace):
    """Print the validation accuracy of saved weights, or of checkpoints. Raises UserError where there is neither."""
    device = common.pick_device(args.device)
    data, precision = load_data(args, device), common.pick_precision(args.amp, device)
    for path, config in runs.items():
        run = common.Run(config, build(config), data, device, precision, args.micro, HALVINGS, args.compile)
        if (weights := path.with_suffix(".pt")).exists():
            run.net.load_state_dict(torch.load(weights, map_location=device, weights_only=True)["state_dict"])
        elif state := runner.read_checkpoint(path, run.state()["config"]):
            run.load(state)
        else:
            raise UserError(f"--eval-only: there is neither {weights} nor {runner.checkpoint_files(path)[0]}")
        shares = ", ".join(f"{name} {share:.2%}" for name, share in run.evaluate().items())
        runner.say(f"{path.stem}: {shares}")


def main():
    args = parse_args()
    if args.status:
        return runner.print_status(sys.stdin, lambda argv: configurations(parse_args(argv)))
    runs = configurations(args)

    def build(config):
        classes = 10 if args.data == "shapes" else len(class_names(args.data_dir / "train"))
        keys = ("version", "init", "ghost", "dropout", "base_init", "stride_on")
        return common.ResNet50(num_classes=classes, **{key: config[key] for key in keys})

    if args.dry_run:
        images = SHAPES if args.data == "shapes" else len(list_images(args.data_dir)[0][0])
        runner.print_plan(runs, build, images, args, drops=HALVINGS)
    elif args.eval_only:
        print_accuracy(runs, build, args)
    else:
        runner.train_missing(runs, build, functools.partial(load_data, args), args, drops=HALVINGS)


if __name__ == "__main__":
    sys.exit(runner.exit_code(main))
