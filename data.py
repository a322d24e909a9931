"""The images: CIFAR-10 and CIFAR-100, folders, ImageNet through worker processes, generated shapes.

`Images` holds a small data set on the device; `ImageNet` has worker processes decode and crop large pictures.
Both offer what `common.Run` needs, and their `name`, `fingerprint`, `classes` (how many), and the `mean` and
`std` of the standardization (three channels each, for pixels in [0, 1]).
"""

import contextlib
import fcntl
import functools
import hashlib
import itertools
import math
import mmap
import os
import random
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from common import stop_asked, stream_seed
from ranks import rank_variable
from records import UserError, atomic_write

SHAPES, SHAPES_TEST = 4096, 1000  # images of the generated data
PATTERNS = "F0F0 FF00 9999 9696 9966 F999 6600 FF66 F690 F096"  # bars, chequers, a grid, dots, arrows
CIFAR = {"cifar10": ("CIFAR-10", 10), "cifar100": ("CIFAR-100", 100)}
SUFFIXES = (".jpeg", ".jpg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of ImageNet's pixels: red, green, blue
CENTRE = -1  # stands in place of a crop's random number, for the crop of validation
CHUNK = 64  # images that a worker process decodes at a time
POLL, PATIENCE = 5, 300  # seconds between looks for a request to stop, and until missing images are an error
GRACE = 15  # seconds that images are waited for after such a request; torchrun kills after 30
STUCK = []  # iterators that are not to be collected: one would wait 5 seconds for each worker that hangs
QUIET = rank_variable("LOCAL_RANK") > 0  # the first of a machine's ranks speaks for all
progress_bar = functools.partial(tqdm, leave=False, disable=QUIET or None)  # a bar where stderr is a terminal


class Images:
    """A data set of uint8 images on the device, where they are cropped, flipped and standardized in batches.

    `train` and `test` are pairs of uint8 images (N, H, W, 3) and int64 labels (N,).
    """

    on_device = True

    def __init__(self, name, train, test, device, classes, pad_mode="zeros", train_size=None):
        self.name, self.fingerprint, self.device = name, fingerprint(*train, *test), device
        images, labels = train
        if train_size is not None:
            if train_size > len(images):
                raise UserError(f"--train-size {train_size} is more than the {len(images)} training images")
            chosen = np.random.default_rng(0).permutation(len(images))[:train_size]  # the same for every seed
            images, labels = images[chosen], labels[chosen]
        self.classes, self.train_images, self.test_images = classes, len(images), len(test[0])
        self.size, self.pad = images.shape[1], images.shape[1] // 8  # four pixels of zeros around 32x32
        self.mean, self.std = mean_and_deviation(images)
        self.scale, self.shift = scale_and_shift(self.mean, self.std, device)
        border = (0, 0), (self.pad, self.pad), (self.pad, self.pad), (0, 0)
        padded = np.pad(images, border, mode="constant" if pad_mode == "zeros" else "reflect")
        self.side = padded.shape[1]
        self.pixels = torch.from_numpy(padded.reshape(-1, 3)).to(device)
        self.labels = torch.from_numpy(labels)
        crop = torch.arange(self.size)[:, None] * self.side + torch.arange(self.size)
        self.crop = torch.stack([crop.flatten(), crop.flip(1).flatten()]).to(device)  # as it is, and flipped
        self.test = torch.from_numpy(test[0]).flatten(1, 2).to(device), torch.from_numpy(test[1]).to(device)

    def draw(self, seed: int, epoch: int) -> torch.Tensor:
        """The training images in an epoch's order: rows (the crop's first pixel in `pixels`, flip, label)."""
        generator = torch.Generator().manual_seed(stream_seed(seed, "data", epoch))
        order = torch.randperm(self.train_images, generator=generator)
        corner = torch.randint(2 * self.pad + 1, (2, self.train_images), generator=generator)
        flip = torch.randint(2, (self.train_images,), generator=generator)
        first = (order * self.side + corner[0]) * self.side + corner[1]
        return torch.stack([first, flip, self.labels[order]], 1).to(self.device)

    def feed(self, batches):
        """What train_batch takes, for each batch of rows."""
        return ((rows,) for rows in batches)

    def train_batch(self, rows: torch.Tensor):
        """The images of rows, cropped, flipped, standardized, (B, 3, H, W), channels last; and labels."""
        first, flip, labels = rows.unbind(1)
        return self.standardize(self.pixels[first[:, None] + self.crop[flip]]), labels

    def test_batches(self, rank: int = 0, world: int = 1, bs: int = 500):
        """A rank's part of the test images, neither cropped nor flipped."""
        images, labels = (part[rank::world] for part in self.test)
        yield from zip(map(self.standardize, images.split(bs)), labels.split(bs), strict=True)

    def standardize(self, images):
        """uint8 (B, H * W, 3) to float (B, 3, H, W)."""
        images = torch.addcmul(self.shift, images, self.scale)
        return images.view(-1, self.size, self.size, 3).permute(0, 3, 1, 2)


def fingerprint(*arrays: np.ndarray) -> str:
    """16 hexadecimal digits of the arrays' bytes: ranks that have the same images have the same digits."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:16]


def mean_and_deviation(images: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel of uint8 images (N, H, W, 3), for pixels in [0, 1].

    They come from integer sums: float32 sums stop growing at 2^24.
    """
    channels = (torch.from_numpy(images[..., channel].flatten()) for channel in range(3))
    counts = np.stack([channel.bincount(minlength=256).numpy() for channel in channels])
    n, total, squares = (counts @ np.arange(256) ** power for power in range(3))
    variance = squares / n - (total / n) ** 2
    return (total / n / 255).tolist(), (np.sqrt(variance.clip(0)) / 255).clip(1e-6).tolist()


def scale_and_shift(mean: list[float], std: list[float], device) -> torch.Tensor:
    """The scale (3,) and the shift (3,) that standardize uint8 pixels: pixels * scale + shift."""
    scale, shift = [1 / (255 * s) for s in std], [-m / s for m, s in zip(mean, std, strict=True)]
    return torch.tensor([scale, shift], device=device)


def load_cifar(name: str, folder: Path):
    """CIFAR-10 ("cifar10") or CIFAR-100 ("cifar100") as (train, test, classes), downloaded if need be.

    torchvision checks MD5 sums before it unpickles; one process downloads at a time. Raises UserError.
    """
    from torchvision import datasets  # takes seconds, and few runs need it

    (title, classes), kind = CIFAR[name], getattr(datasets, name.upper())
    try:
        try:
            train = kind(folder, train=True)
        except RuntimeError:  # absent or corrupt
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / ".download.lock", "w") as lock:
                if not QUIET:
                    print(f"{title} is not in {folder}: downloading it", file=sys.stderr)
                fcntl.flock(lock, fcntl.LOCK_EX)
                train = kind(folder, train=True, download=True)
        test = kind(folder, train=False)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):  # where nothing came
            (folder / ".download.lock").unlink(missing_ok=True)
            folder.rmdir()
        ways = f"put {kind.filename} there, or try --data folder or --data shapes"
        raise UserError(f"{title} is not in {folder} and cannot be downloaded ({error}): {ways}") from None
    return *((part.data, np.array(part.targets, dtype=np.int64)) for part in (train, test)), classes


def load_folder(folder: Path, size: int = 32):
    """Images of folder/{train,test}/CLASS/* as (train, test, classes), resized where they have another size.

    Decoded images are kept in a file in the folder. Raises UserError.
    """
    *parts, names, found = list_images(folder, ("train", "test"))
    times = np.array([os.stat(path).st_mtime_ns for paths, _ in parts for path in paths])
    key, cache, images = found + fingerprint(times), folder / f"cache-{size}px.npz", []
    if cache.exists():
        try:
            with np.load(cache) as kept:
                images = [kept["train"], kept["test"]] if str(kept["key"]) == key else []
        except Exception as error:  # a damaged file can be wrong in any way
            print(f"{cache} is damaged ({error}): decoding the images again", file=sys.stderr)
    if not images:
        for paths, _ in parts:
            pictures = (Image.fromarray(decode(path).numpy()) for path in progress_bar(paths, "decoding"))
            images.append(np.stack([p.resize((size, size), Image.Resampling.BICUBIC) for p in pictures]))
        try:
            with atomic_write(cache) as file:
                np.savez(file, key=key, train=images[0], test=images[1])
        except OSError as error:
            print(f"decoded images are not kept: {cache}: {error.strerror}", file=sys.stderr)
    return (images[0], parts[0][1]), (images[1], parts[1][1]), len(names)


def shapes(n: int, seed: int, size: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Draw n images of ten PATTERNS: uint8 (n, size, size, 3) and balanced labels, int64 (n,).

    A tile of four by four cells, its own mirror image, repeats over an image. Its height, width, place and
    colour vary, and so do the darker background and the noise. Integers only: the same on every machine.
    """
    words = np.array([int(word, 16) for word in PATTERNS.split()])
    tiles = (words[:, None, None] >> np.arange(16).reshape(4, 4) & 1).astype(np.uint8)
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n, dtype=np.int64) % 10)
    side = rng.integers(size // 2, size + 1, (2, n, 1))  # height and width of a tile
    start = rng.integers(0, size, (2, n, 1))
    y, x = (np.arange(size) + start) * 4 // side % 4
    lit = tiles[labels[:, None, None], y[:, :, None], x[:, None, :]][..., None]
    back = rng.integers(0, 48, (n, 1, 1, 3), dtype=np.uint8)
    colour = rng.integers(96, 176, (n, 1, 1, 3), dtype=np.uint8)
    return rng.integers(0, 32, (n, size, size, 3), dtype=np.uint8) + back + lit * colour, labels


# ------------------------------------------------------------------------------------------------------ files


def scan(folder: Path, layout: str, suffixes: tuple[str, ...] = ()) -> list[tuple[str, int]]:
    """The sorted names and sizes of a folder's folders, or of its files that have one of the suffixes.

    Hidden ones are passed over. Raises UserError, which shows the expected layout, where one cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            found = [e for e in entries if not e.name.startswith(".") and e.is_dir() != bool(suffixes)]
        return sorted((e.name, e.stat().st_size) for e in found if e.name.lower().endswith(suffixes or ""))
    except OSError as error:
        raise UserError(f"{layout} ({error.filename}: {error.strerror})") from None


def list_images(folder: Path, parts: tuple[str, str]):
    """The images folder/PART/CLASS/* of two parts, ("train", "test") or ("train", "val").

    Returns the (paths, labels) of each part, arrays of bytes and int64 (N,); the classes' names, whose places
    are the labels; a fingerprint of the files' names and sizes. Raises UserError unless both parts have
    images of the same classes, two or more.
    """
    layout = f"--data-dir: {folder} should hold images in {parts[0]}/CLASS/ and {parts[1]}/CLASS/"
    scan(folder, layout)
    classes = {part: [name for name, _ in scan(folder / part, layout)] for part in parts}
    if empty := [part for part in parts if not classes[part]]:
        raise UserError(f"{layout}, but {folder / empty[0]} has no folders: sort its images into classes")
    if odd := sorted(set(classes[parts[0]]) ^ set(classes[parts[1]])):
        alone = f"{parts[odd[0] in classes[parts[1]]]}/{odd[0]}"
        raise UserError(f"{layout}, the same classes in both, but {len(odd)} differ: {alone} is alone")
    if len(classes[parts[0]]) == 1:
        raise UserError(f"{layout}, of more classes than {classes[parts[0]][0]}")
    digest, found = hashlib.sha256(), []
    for part, names in classes.items():
        paths, labels = [], []
        for label, name in enumerate(progress_bar(names, f"listing {part}")):
            files = scan(folder / part / name, layout, SUFFIXES)
            if not files:
                raise UserError(f"--data-dir: {folder / part / name} holds no images ({', '.join(SUFFIXES)})")
            digest.update(b"".join(os.fsencode(f"{part}/{name}/{file} {size}\n") for file, size in files))
            paths += [os.fsencode(f"{folder}/{part}/{name}/{file}") for file, _ in files]
            labels += [label] * len(files)
        # Worker processes share the memory of an array; that of a list is copied when its items are used.
        found.append((np.array(paths), np.array(labels, dtype=np.int64)))
    return *found, classes[parts[0]], digest.hexdigest()[:16]


def count_images(data: str, folder: Path, parts: tuple[str, str] = ("train", "test")) -> tuple[int, int]:
    """How many training images and classes "cifar10", "cifar100", "shapes" or a "folder" has."""
    if data == "folder":
        (paths, _), _, names, _ = list_images(folder, parts)
        return len(paths), len(names)
    return (SHAPES, 10) if data == "shapes" else (50_000, CIFAR[data][1])


@functools.cache
def jpeg_decoder():
    """torchvision's decoder: PIL's pixels in less time. None where it is gone, being deprecated in 0.29."""
    import torchvision  # takes seconds, and few runs need it

    return getattr(torchvision.io, "decode_jpeg", None)


def decode(path) -> torch.Tensor:
    """An image file as RGB, uint8 (H, W, 3), 16-bit grey scaled to 8 bits; its rotation tag is ignored.

    Raises UserError, with the path, for a damaged file, and for 32-bit values, which have no agreed scale.
    """
    path = os.fsdecode(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about torchvision's future, metadata and large images
            data = np.fromfile(path, np.uint8)
            if data[:3].tobytes() == b"\xff\xd8\xff" and jpeg_decoder():
                with contextlib.suppress(RuntimeError):  # PIL says what is wrong, or can read it
                    return jpeg_decoder()(torch.from_numpy(data), "RGB").permute(1, 2, 0)
            with Image.open(path) as image:
                if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
                    grey = (np.asarray(image).astype(np.uint32) * 255 + 32767) // 65535
                    image = Image.fromarray(grey.astype(np.uint8))
                if image.mode in ("I", "F"):
                    raise ValueError("its 32-bit values have no agreed scale: save it with 8 or 16 bits")
                return torch.from_numpy(np.array(image.convert("RGB")))
    except Exception as error:  # a damaged file can be wrong in any way
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{path} is not a readable image ({reason})") from None


# --------------------------------------------------------------------------------------------------- ImageNet


def crop_box(number: int, height: int, width: int) -> tuple[int, int, int, int]:
    """The random crop that a number stands for: top, left, height, width (Szegedy et al., 2015).

    Its area is uniform in 8% to 100% of the image, the logarithm of its aspect ratio in that of 3/4 to 4/3,
    and its place. Where ten of these do not fit, it is the largest in the centre with such an aspect ratio.
    """
    uniform = random.Random(number).uniform
    for _ in range(10):
        area, ratio = height * width * uniform(0.08, 1), math.exp(uniform(math.log(3 / 4), math.log(4 / 3)))
        h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < h <= height and 0 < w <= width:
            return int(uniform(0, height - h + 1)), int(uniform(0, width - w + 1)), h, w
    h, w = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


def crop(image: torch.Tensor, number: int, size: int) -> torch.Tensor:
    """The crop of an image (H, W, 3) that a number stands for, resized to (size, size, 3).

    For CENTRE it is the middle of the image, whose shorter side is first resized to 256/224 of the size.
    """
    height, width = image.shape[:2]
    if number == CENTRE:
        height, width = (int(size * 256 // 224 * length / min(image.shape[:2])) for length in (height, width))
    else:
        top, left, height, width = crop_box(number, height, width)
        image, height, width = image[top : top + height, left : left + width], size, size
    image = image[None].permute(0, 3, 1, 2)  # in this order the memory layout is seen to be channels last
    image = F.interpolate(image, (height, width), mode="bilinear", antialias=True)[0].permute(1, 2, 0)
    top, left = round((height - size) / 2), round((width - size) / 2)
    return image[top : top + size, left : left + size]


@dataclass
class Decoder(Dataset):
    """What worker processes do: decode and crop a chunk of images into memory that the script shares.

    The memory is inherited by fork, and needs no room in /dev/shm, which is small in containers.
    """

    sources: np.ndarray  # paths (bytes), or uint8 images (N, H, W, 3)
    slots: torch.Tensor  # uint8 (slots, CHUNK, size, size, 3)

    def __getitem__(self, task: tuple[int, np.ndarray]) -> str:
        """Fill a slot with the images of rows (B, 3); returns "", or what is wrong with a file.

        An error that is raised in a worker would come out inside a traceback.
        """
        slot, rows = task
        try:
            for image, (index, _, number) in zip(self.slots[slot], rows.tolist(), strict=False):
                source = self.sources[index]
                whole = decode(source) if isinstance(source, bytes) else torch.from_numpy(source)
                image[:] = crop(whole, number, len(image))
        except UserError as error:
            return str(error)
        return ""


class ImageNet:
    """Images that worker processes decode and crop, and the device flips and standardizes.

    `train` and `val` are pairs of sources (see `Decoder`) and int64 labels (N,). A row of numbers is an
    image's index, whether to flip it, and its crop's number. Validation images have the last indices.
    """

    on_device, mean, std = False, MEAN, STD

    def __init__(self, name, train, val, fingerprint, device, classes, size=224, workers=0):
        self.name, self.fingerprint, self.device, self.classes = name, fingerprint, device, classes
        self.train_images, self.test_images = len(train[0]), len(val[0])
        self.sources, labels = (np.concatenate(pair) for pair in zip(train, val, strict=True))
        self.labels, self.size, self.workers = torch.from_numpy(labels), size, workers
        self.idle = []  # loaders whose workers have nothing to do
        jpeg_decoder()  # imported once, not in each worker
        self.scale, self.shift = scale_and_shift(MEAN, STD, device)

    def draw(self, seed: int, epoch: int) -> torch.Tensor:
        """The rows of the training images in an epoch's order, int64 (N, 3)."""
        generator = torch.Generator().manual_seed(stream_seed(seed, "data", epoch))
        order = torch.randperm(self.train_images, generator=generator)
        flip = torch.randint(2, (self.train_images,), generator=generator)
        crop = torch.randint(2**62, (self.train_images,), generator=generator)
        return torch.stack([order, flip, crop], 1)

    def feed(self, batches):
        """For each of a list of batches of rows, in turn, what `train_batch` takes, on the device.

        Raises UserError at a file that is no image, and where workers do not deliver.
        """
        loader, answers = self.start([part.numpy() for rows in batches for part in rows.split(CHUNK)])
        slots, pinned = itertools.cycle(loader.dataset.slots), self.device.type == "cuda"
        for number, rows in enumerate(batches, 1):
            images = torch.empty(len(rows), self.size, self.size, 3, dtype=torch.uint8, pin_memory=pinned)
            for part in images.split(CHUNK):
                self.wait(answers)
                part.copy_(next(slots)[: len(part)])
            if number == len(batches):  # before the yield: a validation finds them free
                self.idle.append(loader)
            parts = images, rows[:, 1] == 1, self.labels[rows[:, 0]]
            yield [part.to(self.device, non_blocking=True) for part in parts]

    def start(self, chunks: list[np.ndarray]):
        """Give workers the rows of chunks of images; returns their loader, and an iterator of its answers."""
        count = 2 * self.workers + 1  # two chunks ahead for each worker, and the one that is being copied
        tasks = list(zip(itertools.cycle(range(count)), chunks, strict=False))
        while self.idle:
            loader = self.idle.pop()
            loader.sampler[:] = tasks
            with contextlib.suppress(RuntimeError):  # its workers died or hang
                return loader, iter(loader)
        options = {"sampler": tasks, "generator": torch.Generator()}
        if self.workers:
            options |= {"num_workers": self.workers, "persistent_workers": True, "timeout": POLL}
            # Outside the script's process group, a signal to all of it does not reach them.
            options |= {"multiprocessing_context": "fork", "worker_init_fn": lambda _: os.setsid()}
        try:
            memory = mmap.mmap(-1, count * CHUNK * self.size * self.size * 3)
            slots = torch.frombuffer(memory, dtype=torch.uint8).view(count, CHUNK, self.size, self.size, 3)
            loader = DataLoader(Decoder(self.sources, slots), None, **options)
            return loader, iter(loader)
        except OSError as error:
            raise UserError(f"--workers {self.workers} cannot be started: {error.strerror}") from None

    def wait(self, answers):
        """Wait for a chunk. Raises UserError if none comes, KeyboardInterrupt if a signal asked to stop."""
        stopping = 0
        for _ in range(math.ceil(PATIENCE / POLL)):
            try:
                if problem := next(answers):
                    raise UserError(problem)
                return
            except RuntimeError as error:
                problem = str(error).partition("\n")[0]
                if not problem.startswith("DataLoader"):
                    raise
            stopping += POLL * bool(stop_asked)
            if stopping > GRACE or "timed out" not in problem:
                break
        else:
            problem = f"nothing for {PATIENCE} seconds"
        STUCK.append(answers)
        if stop_asked:
            raise KeyboardInterrupt
        hint = "can the disk be read, and is the memory enough for so many processes?"
        raise UserError(f"--workers {self.workers}: no images came from them ({problem}): {hint}")

    def train_batch(self, images, flips, labels):
        """Images (B, 3, S, S), channels last, flipped where they should be, standardized, and labels (B,)."""
        images = torch.where(flips[:, None, None, None], images.flip(2), images)
        return torch.addcmul(self.shift, images, self.scale).permute(0, 3, 1, 2), labels

    def test_batches(self, rank: int = 0, world: int = 1, bs: int = 128):
        """A rank's part of the validation images: all ranks together have each once."""
        index = torch.arange(self.train_images, self.train_images + self.test_images)[rank::world]
        rows = torch.stack([index, torch.zeros_like(index), torch.full_like(index, CENTRE)], 1)
        for parts in self.feed([part for part in rows.split(bs) if len(part)]):
            yield self.train_batch(*parts)
