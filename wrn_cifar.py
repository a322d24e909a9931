"""Wide-ResNets on CIFAR-10: Figures 1 to 4 and Tables 1 to 3 of the paper, one run per learning rate and seed.

    python wrn_cifar.py --init zeroinit --bs 64 --lr 2^-2 --seeds 15    # one learning rate of Table 1's last row
    python wrn_cifar.py --data shapes --depth 16 --width 1 --epochs 2   # seconds on a CPU, nothing to download

Each run leaves one JSON record in --out; runs that have theirs are skipped, so the same command completes a sweep.
"""

import argparse
import fcntl
import hashlib
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import common
import runner
from common import METHODS, UserError, WideResNet
from runner import Parser, fraction, natural, positive

SHAPES = 4096  # training images of the generated data

# -------------------------------------------------------------------------------------------------------------- flags


def make_parser() -> Parser:
    show = argparse.ArgumentDefaultsHelpFormatter
    parser = Parser(description=__doc__.partition("\n")[0], formatter_class=show)
    add = parser.add_argument_group("network").add_argument
    add("--depth", type=positive, default=16, help="6n+4")
    add("--width", type=positive, default=4, help="the k of Wide-ResNet d-k")
    inits = [init for init, method in METHODS.items() if not method.last_bias]  # that one is for ResNet-V1
    add("--init", choices=inits, default="zeroinit", help="the method, a row of the paper's tables")
    add("--ghost", type=natural, default=64, help="images per ghost batch of batch norm; 0: the whole batch")
    add("--dropout", type=fraction, help="drop probability instead of the method's (0.6 where it has dropout)")
    add("--base-init", choices=("lecun", "he-in", "he-out"), default="lecun", help="distribution of initial weights")
    add = parser.add_argument_group("data").add_argument
    add("--data", choices=("cifar10", "folder", "shapes"), default="cifar10", help="folder: DIR/{train,test}/CLASS/*")
    add("--data-dir", type=Path, default=Path("data"), help="where CIFAR-10 is or goes, or the folder of images")
    add("--data-name", help="name of the images in records and reports [the folder's own name]")
    add("--train-size", type=positive, help="train on this many images only")
    add("--pad-mode", choices=("zeros", "reflect"), default="zeros", help="what the random crop sees outside an image")
    runner.add_shared_flags(parser, bs=64, lr=[0.25], epochs=200, wd=5e-4)
    return parser


def parse_args(argv=None) -> argparse.Namespace:
    """Parse and check the flags; a bad one ends with one line and exit code 2."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.depth < 10 or (args.depth - 4) % 6:
        parser.error(f"argument --depth: should be 6n+4 (10, 16, 22, ..., 100, ..., 1000), not {args.depth}")
    runner.check_shared_flags(parser, args)
    names = {"cifar10": "CIFAR-10", "shapes": "shapes", "folder": args.data_dir.resolve().name}
    args.data_name = args.data_name or names[args.data]
    return args


def configurations(args: argparse.Namespace) -> dict:
    """All runs that the flags ask for: the path of each record -> everything that decides its result."""
    net = {"model": "wrn", "depth": args.depth, "width": args.width}
    defaults = {"ghost": 64, "dropout": 0.6, "wd": 5e-4, "momentum": 0.9, "l2_all": False, "scalar_lr": 1.0}
    defaults |= {"base_init": "lecun", "pad_mode": "zeros", "train_size": None}
    return runner.one_per_rate_and_seed(args, f"wrn{args.depth}-{args.width}", net, defaults)


# --------------------------------------------------------------------------------------------------------------- data


class Images:
    """A data set of uint8 images on the device; crop, flip and standardization are vectorized operations there.

    `train` and `test` are pairs of uint8 images (N, H, W, 3) and int64 labels (N,).
    """

    on_device = True

    def __init__(self, name, train, test, device, pad_mode="zeros", train_size=None):
        digest = hashlib.sha256()
        for part in (*train, *test):
            digest.update(np.ascontiguousarray(part).data)
        self.name, self.fingerprint, self.device = name, digest.hexdigest()[:16], device
        images, labels = train
        if train_size is not None:
            if train_size > len(images):
                raise UserError(f"--train-size {train_size} is more than the {len(images)} training images")
            chosen = np.random.default_rng(0).permutation(len(images))[:train_size]  # the same ones for every seed
            images, labels = images[chosen], labels[chosen]
        self.train_images, self.test_images = len(images), len(test[0])
        self.size, self.pad = images.shape[1], images.shape[1] // 8  # four pixels of zeros around 32x32
        pixels = images.reshape(-1, 3) / np.float32(255)
        mean, std = pixels.mean(0), pixels.std(0).clip(1e-6)
        self.scale, self.shift = (torch.tensor(x, device=device) for x in (1 / (255 * std), -mean / std))
        border = (0, 0), (self.pad, self.pad), (self.pad, self.pad), (0, 0)
        padded = np.pad(images, border, mode="constant" if pad_mode == "zeros" else "reflect")
        self.side = padded.shape[1]
        self.pixels, self.labels = torch.from_numpy(padded.reshape(-1, 3)).to(device), torch.from_numpy(labels)
        crop = torch.arange(self.size)[:, None] * self.side + torch.arange(self.size)
        crops = torch.stack([crop.flatten(), crop.flip(1).flatten()])  # its pixels, as they are or flipped
        self.crop = crops.to(device)
        self.test = torch.from_numpy(test[0]).flatten(1, 2).to(device), torch.from_numpy(test[1]).to(device)

    def draw(self, seed: int, epoch: int) -> torch.Tensor:
        """The training images in an epoch's order: rows (the crop's first pixel in `pixels`, flip, label)."""
        generator = torch.Generator().manual_seed(common.stream_seed(seed, "data", epoch))
        order = torch.randperm(self.train_images, generator=generator)
        corner = torch.randint(2 * self.pad + 1, (2, self.train_images), generator=generator)
        flip = torch.randint(2, (self.train_images,), generator=generator)
        first = (order * self.side + corner[0]) * self.side + corner[1]
        return torch.stack([first, flip, self.labels[order]], 1).to(self.device)

    def feed(self, batches):
        return ((rows,) for rows in batches)

    def train_batch(self, rows: torch.Tensor):
        """The images and labels that rows describe: cropped, flipped, standardized, (B, 3, H, W) channels last."""
        first, flip, labels = rows.unbind(1)
        return self.standardize(self.pixels[first[:, None] + self.crop[flip]]), labels

    def test_batches(self, rank: int = 0, world: int = 1, bs: int = 500):
        """A rank's share of the test images, as they are."""
        images, labels = (part[rank::world].to(self.device) for part in self.test)
        yield from zip(map(self.standardize, images.split(bs)), labels.split(bs), strict=True)

    def standardize(self, images):
        """uint8 (B, H * W, 3) to float (B, 3, H, W)."""
        images = torch.addcmul(self.shift, images, self.scale)
        return images.view(-1, self.size, self.size, 3).permute(0, 3, 1, 2)


def load_cifar10(folder: Path):
    """CIFAR-10 by torchvision, which checks MD5 sums before it unpickles anything; one process downloads at a time."""
    from torchvision.datasets import CIFAR10

    try:
        try:
            train = CIFAR10(folder, train=True)
        except RuntimeError:  # absent or corrupt
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / ".download.lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                train = CIFAR10(folder, train=True, download=True)
        test = CIFAR10(folder, train=False)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"CIFAR-10 is not in {folder} and could not be downloaded ({error}). Put cifar-10-python.tar.gz there, "
            "or give a folder of images with --data folder --data-dir DIR, or try --data shapes"
        ) from None
    return tuple((part.data, np.array(part.targets, dtype=np.int64)) for part in (train, test))


def list_images(folder: Path) -> tuple[list[Path], list[Path]]:
    """The files of folder/{train,test}/CLASS/*. Raises UserError unless both hold the same classes."""
    parts = [sorted(p for p in (folder / part).glob("*/*") if p.is_file()) for part in ("train", "test")]
    if not all(parts):
        raise UserError(
            f"--data-dir: {folder} should hold images in train/CLASS/ and test/CLASS/, but one or both are empty"
        )
    train, test = ({p.parent.name for p in files} for files in parts)
    if train != test:
        odd = ", ".join(sorted(train ^ test))
        raise UserError(f"--data-dir: {folder}: train and test should hold the same classes, and differ in {odd}")
    return tuple(parts)


def load_folder(folder: Path, size: int = 32):
    """Images from folder/{train,test}/CLASS/*, resized to 32x32 where they are not; decoded once, then cached there."""
    parts = list_images(folder)
    listing = "".join(f"{p} {p.stat().st_size} {p.stat().st_mtime_ns}\n" for files in parts for p in files)
    key, cache = hashlib.sha256(listing.encode()).hexdigest(), folder / f"cache-{size}px.npz"
    try:
        with np.load(cache) as kept:
            if str(kept["key"]) == key:
                return tuple((kept[f"{part}_images"], kept[f"{part}_labels"]) for part in ("train", "test"))
    except FileNotFoundError:
        pass
    except Exception as error:  # a damaged file can be wrong in any way
        print(f"{cache} is damaged ({error}): decoding the images again", file=sys.stderr)
    label = {name: i for i, name in enumerate(sorted({p.parent.name for p in parts[0]}))}
    data = []
    for files in parts:
        images = [read_image(p, size) for p in tqdm(files, "decoding", unit=" images", disable=not sys.stderr.isatty())]
        data.append((np.stack(images), np.array([label[p.parent.name] for p in files], dtype=np.int64)))
    try:
        with runner.atomic_write(cache) as file:
            names = ("train_images", "train_labels", "test_images", "test_labels")
            np.savez(file, key=key, **dict(zip(names, (*data[0], *data[1]), strict=True)))
    except OSError as error:
        print(f"decoded images are not kept: {cache}: {error.strerror}", file=sys.stderr)
    return tuple(data)


def read_image(path: Path, size: int) -> np.ndarray:
    """An image file as uint8 (size, size, 3)."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            image = image.convert("RGB")
        return np.asarray(image if image.size == (size, size) else image.resize((size, size), Image.Resampling.BICUBIC))
    except (OSError, SyntaxError) as error:
        raise UserError(f"{path} is not a readable image ({error})") from None


def shapes(n: int, seed: int, size: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Draw n images of ten patterns: uint8 (n, size, size, 3) and balanced labels, int64 (n,).

    A pattern repeats a disc, a ring, a triangle that points up or down, an upright or diagonal cross, vertical or
    horizontal bars, a chequerboard or a grid of dots: each stays itself when it is mirrored or shifted. Whatever the
    class, its place, scale, tilt (up to 11 degrees) and colour vary, and so do the background's darker colour and its
    gradient, a small round distractor behind the pattern, and the noise.
    """
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n, dtype=np.int64) % 10)

    def uniform(low, high, *shape):
        return rng.uniform(low, high, (n, *shape, 1, 1)).astype(np.float32)

    # Lengths are in half images: the centres of the pixels lie in (-1, 1).
    radius, tilt, slope = uniform(0.35, 0.65), uniform(-0.2, 0.2), uniform(-25, 25, 2)
    centre, spot = uniform(-1, 1, 2), uniform(-1, 1, 2)
    back, spot_colour = uniform(16, 128, 3), uniform(16, 240, 3)
    colour = back + uniform(64, 120, 3)
    images = rng.integers(-16, 17, (n, 3, size, size), dtype=np.int16)  # integer noise is the same on every machine

    grid = (np.arange(size, dtype=np.float32) + 0.5) * 2 / size - 1
    x, y = grid[None, :], grid[:, None]
    for label in range(10):
        at = labels == label
        r, t = radius[at], tilt[at]
        dx, dy = x - centre[at, 0], y - centre[at, 1]
        u, v = (dx + t * dy) / r, (dy - t * dx) / r  # a turn without sines, which also shrinks the forms by up to 2%
        u, v = ((w + 1.25) % 2.5 - 1.25 for w in (u, v))
        cover = np.clip(0.5 - outside(label, u, v) * r * (size / 2), 0, 1)[:, None]  # soft edges, one pixel wide
        px, py = x - spot[at, 0], y - spot[at, 1]
        spot_cover = np.clip(0.5 + (0.2 - np.sqrt(px * px + py * py)) * (size / 2), 0, 1)[:, None]
        picture = back[at] + (slope[at, :1] * x + slope[at, 1:] * y)
        picture += spot_cover * (spot_colour[at] - picture)
        picture += cover * (colour[at] - picture)
        images[at] += np.rint(picture).astype(np.int16)
    return np.clip(images, 0, 255).astype(np.uint8).transpose(0, 2, 3, 1).copy(), labels


def outside(label: int, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """How far the points (u, v) lie outside the form of half-width one, negative inside; v points down."""
    a, b = np.abs(u), np.abs(v)
    square, disc = np.maximum(a, b) - 1, np.sqrt(u * u + v * v) - 1
    bars_u, bars_v = (0.25 - np.abs((w * 1.25 + 0.75) % 1 - 0.5) for w in (u, v))
    diagonal_a, diagonal_b = np.abs(u + v) * np.float32(0.7071), np.abs(u - v) * np.float32(0.7071)
    return (
        lambda: disc,
        lambda: np.abs(disc + 0.2) - 0.2,
        lambda: np.maximum(v - 0.85, a * 0.88 - v * 0.47 - 0.42),
        lambda: np.maximum(-v - 0.85, a * 0.88 + v * 0.47 - 0.42),
        lambda: np.maximum(square, np.minimum(a, b) - 0.25),
        lambda: np.maximum(np.maximum(diagonal_a, diagonal_b) - 1, np.minimum(diagonal_a, diagonal_b) - 0.25),
        lambda: np.maximum(square, bars_u),
        lambda: np.maximum(square, bars_v),
        lambda: np.maximum(square, np.maximum(np.minimum(bars_u, bars_v), -np.maximum(bars_u, bars_v))),
        lambda: np.maximum(square, np.maximum(bars_u, bars_v)),
    )[label]()


def load_data(args: argparse.Namespace, device: torch.device) -> Images:
    """The data set that the flags name, on the device."""
    if args.data == "cifar10":
        train, test = load_cifar10(args.data_dir)
    elif args.data == "folder":
        train, test = load_folder(args.data_dir)
    else:
        train, test = shapes(SHAPES, seed=0), shapes(1000, seed=1)
    return Images(args.data_name, train, test, device, args.pad_mode, args.train_size)


# --------------------------------------------------------------------------------------------------------------- main


def make_net(config: dict) -> WideResNet:
    keys = ("init", "ghost", "dropout", "base_init")
    return WideResNet(config["depth"], config["width"], **{key: config[key] for key in keys})


def count_images(args: argparse.Namespace) -> int:
    """How many training images a run would have, without loading them."""
    counts = {"cifar10": 50_000, "shapes": SHAPES}
    return args.train_size or counts.get(args.data) or len(list_images(args.data_dir)[0])


def main():
    args = parse_args()
    if args.status:
        return runner.print_status(sys.stdin, lambda argv: configurations(parse_args(argv)))
    runs = configurations(args)
    if args.dry_run:
        return runner.print_plan(runs, make_net, count_images(args), args)
    runner.train_missing(runs, make_net, lambda device: load_data(args, device), args)


if __name__ == "__main__":
    sys.exit(runner.exit_code(main))
