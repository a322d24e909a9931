"""Images: CIFAR-10 and CIFAR-100, folders of pictures, ImageNet through worker processes, and generated shapes.

`Images` holds a small data set on the device; `ImageNet` has worker processes decode and crop large pictures. Both
offer what `common.Run` needs, and say which images they are: `name`, `fingerprint` (the same where the images are),
`classes` (how many), and `mean` and `std` of the standardization, three channels each, for pixels in [0, 1].
"""

import contextlib
import fcntl
import hashlib
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

from common import stream_seed
from records import UserError, atomic_write

try:  # the same pixels as PIL's, in less time; torchvision plans to remove its decoder
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:
    decode_jpeg = None

SHAPES, SHAPES_TEST = 4096, 1000  # images of the generated data
CIFAR = {"cifar10": ("CIFAR-10", 10), "cifar100": ("CIFAR-100", 100)}
SUFFIXES = (".jpeg", ".jpg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels: red, green, blue
CENTRE = -1  # stands in place of a crop's random number, for the crop of validation
CHUNK = 64  # images that a worker process decodes at a time
POLL, PATIENCE = 5, 300  # seconds: between looks for a request to stop, and until missing images are an error


def fingerprint(*arrays: np.ndarray) -> str:
    """16 hexadecimal digits that change with any byte of the arrays."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:16]


def progress(items, what: str):
    """The items, with a progress bar where there is a terminal, on the first of a machine's ranks."""
    return tqdm(items, what, leave=False, disable=int(os.environ.get("LOCAL_RANK", 0)) > 0 or None)


# ---------------------------------------------------------------------------------------------------- small data sets


class Images:
    """A data set of uint8 images on the device; crop, flip and standardization are vectorized operations there.

    `train` and `test` are pairs of uint8 images (N, H, W, 3) and int64 labels (N,).
    """

    on_device = True

    def __init__(self, name, train, test, device, classes, pad_mode="zeros", train_size=None):
        self.name, self.fingerprint, self.device, self.classes = name, fingerprint(*train, *test), device, classes
        images, labels = train
        if train_size is not None:
            if train_size > len(images):
                raise UserError(f"--train-size {train_size} is more than the {len(images)} training images")
            chosen = np.random.default_rng(0).permutation(len(images))[:train_size]  # the same ones for every seed
            images, labels = images[chosen], labels[chosen]
        self.train_images, self.test_images = len(images), len(test[0])
        self.size, self.pad = images.shape[1], images.shape[1] // 8  # four pixels of zeros around 32x32
        self.mean, self.std = mean_and_deviation(images)
        self.scale, self.shift = scale_and_shift(self.mean, self.std, device)
        border = (0, 0), (self.pad, self.pad), (self.pad, self.pad), (0, 0)
        padded = np.pad(images, border, mode="constant" if pad_mode == "zeros" else "reflect")
        self.side = padded.shape[1]
        self.pixels, self.labels = torch.from_numpy(padded.reshape(-1, 3)).to(device), torch.from_numpy(labels)
        crop = torch.arange(self.size)[:, None] * self.side + torch.arange(self.size)
        crops = torch.stack([crop.flatten(), crop.flip(1).flatten()])  # a crop's pixels, as they are and flipped
        self.crop = crops.to(device)
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
        """The images and labels that rows describe: cropped, flipped, standardized, (B, 3, H, W) channels last."""
        first, flip, labels = rows.unbind(1)
        return self.standardize(self.pixels[first[:, None] + self.crop[flip]]), labels

    def test_batches(self, rank: int = 0, world: int = 1, bs: int = 500):
        """A rank's part of the test images, neither cropped nor flipped."""
        images, labels = (part[rank::world].to(self.device) for part in self.test)
        yield from zip(map(self.standardize, images.split(bs)), labels.split(bs), strict=True)

    def standardize(self, images):
        """uint8 (B, H * W, 3) to float (B, 3, H, W)."""
        images = torch.addcmul(self.shift, images, self.scale)
        return images.view(-1, self.size, self.size, 3).permute(0, 3, 1, 2)


def mean_and_deviation(images: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel of uint8 images (N, H, W, 3), for pixels in [0, 1].

    They come from exact integer sums: float32 sums stop growing at 2^24.
    """
    mean, std = [], []
    for channel in range(3):
        counts = torch.bincount(torch.from_numpy(images[..., channel].flatten()), minlength=256).tolist()
        n, total = sum(counts), sum(value * count for value, count in enumerate(counts))
        squares = sum(value**2 * count for value, count in enumerate(counts))
        mean.append(total / (255 * n))
        std.append(max(math.sqrt(n * squares - total**2) / (255 * n), 1e-6))
    return mean, std


def scale_and_shift(mean: list[float], std: list[float], device) -> list[torch.Tensor]:
    """The tensors (3,) that standardize uint8 pixels x as x * scale + shift."""
    pairs = [(1 / (255 * s), -m / s) for m, s in zip(mean, std, strict=True)]
    return [torch.tensor(values, device=device) for values in zip(*pairs, strict=True)]


def load_cifar(name: str, folder: Path):
    """CIFAR-10 ("cifar10") or CIFAR-100 ("cifar100") as (train, test, number of classes); downloaded if need be.

    torchvision checks MD5 sums before it unpickles anything. One process downloads at a time. Raises UserError.
    """
    from torchvision import datasets

    (title, classes), kind = CIFAR[name], getattr(datasets, name.upper())
    try:
        try:
            train = kind(folder, train=True)
        except RuntimeError:  # absent or corrupt
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / ".download.lock", "w") as lock, contextlib.redirect_stdout(sys.stderr):
                fcntl.flock(lock, fcntl.LOCK_EX)
                print(f"{title} is not in {folder}: downloading it", file=sys.stderr)
                train = kind(folder, train=True, download=True)
        test = kind(folder, train=False)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{title} is not in {folder} and could not be downloaded ({error}). Put {kind.filename} there, "
            "or give a folder of images with --data folder --data-dir DIR, or try --data shapes"
        ) from None
    return *((part.data, np.array(part.targets, dtype=np.int64)) for part in (train, test)), classes


def load_folder(folder: Path, size: int = 32):
    """Images of folder/{train,test}/CLASS/* as (train, test, number of classes), resized to `size` where they differ.

    Decoded images are kept in a file in the folder. Raises UserError.
    """
    found, cache = list_images(folder, ("train", "test")), folder / f"cache-{size}px.npz"
    (train, labels), (test, test_labels) = found.train, found.test
    key = found.fingerprint + fingerprint(np.array([os.stat(path).st_mtime_ns for path in (*train, *test)]))
    images = None
    try:
        with np.load(cache) as kept:
            if str(kept["key"]) == key:
                images = kept["train"], kept["test"]
    except FileNotFoundError:
        pass
    except Exception as error:  # a damaged file can be wrong in any way
        print(f"{shown(cache)} is damaged ({error}): decoding the images again", file=sys.stderr)
    if images is None:
        images = [np.stack([decode_to(p, size) for p in progress(paths, "decoding")]) for paths in (train, test)]
        try:
            with atomic_write(cache) as file:
                np.savez(file, key=key, train=images[0], test=images[1])
        except OSError as error:
            print(f"decoded images are not kept: {shown(cache)}: {error.strerror}", file=sys.stderr)
    return (images[0], labels), (images[1], test_labels), len(found.classes)


def decode_to(path: bytes, size: int) -> np.ndarray:
    """An image file as uint8 (size, size, 3)."""
    pixels = decode(path).numpy()
    if pixels.shape[:2] != (size, size):
        pixels = np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC))
    return pixels


def shapes(n: int, seed: int, size: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Draw n images of ten patterns: uint8 (n, size, size, 3) and balanced labels, int64 (n,).

    A pattern has six by six cells and is its own mirror image. Its place, height, width and colour vary, and so do
    the background's colour and the noise. All numbers are integers, so that every machine draws the same images.
    """
    half = np.random.default_rng(0).integers(0, 2, (10, 6, 3), dtype=np.uint8)
    patterns = np.concatenate([half, half[:, :, ::-1]], 2)
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n, dtype=np.int64) % 10)
    side = rng.integers(size // 2, size * 7 // 8 + 1, (2, n, 1))  # height and width
    start = rng.integers(0, size - side + 1)
    cell = (np.arange(size) - start) * 6 // side
    inside = ((cell >= 0) & (cell < 6)).astype(np.uint8)
    (y, x), label = cell.clip(0, 5), labels[:, None, None]
    cover = patterns[label, y[:, :, None], x[:, None, :]] * inside[0][:, :, None] * inside[1][:, None, :]
    colours = rng.integers(0, 192, (2, n, 1, 1, 3), dtype=np.uint8)
    noise = rng.integers(0, 64, (n, size, size, 3), dtype=np.uint8)
    return np.where(cover[..., None], *colours) + noise, labels


# -------------------------------------------------------------------------------------------------------------- files


@dataclass(frozen=True)
class Listing:
    """The image files of both parts of a data set."""

    train: tuple[np.ndarray, np.ndarray]  # paths, an array of bytes (N,), and labels, int64 (N,)
    test: tuple[np.ndarray, np.ndarray]
    classes: list[str]  # the names that labels stand for
    fingerprint: str  # of the files' names and sizes


def shown(path) -> str:
    """A path as text that can be printed, whatever the bytes of its name."""
    return os.fsencode(path).decode(errors="backslashreplace")


def is_image(entry: os.DirEntry) -> bool:
    """True for what is no folder and has an image's suffix."""
    return entry.name.lower().endswith(SUFFIXES) and not entry.is_dir()


def scan(folder: Path, wanted, layout: str) -> list[tuple[str, int]]:
    """The sorted names and sizes of a folder's entries that are wanted and not hidden. Raises UserError."""
    try:
        with os.scandir(folder) as entries:
            return sorted((e.name, e.stat().st_size) for e in entries if not e.name.startswith(".") and wanted(e))
    except OSError as error:
        raise UserError(f"--data-dir: {layout} ({shown(error.filename)}: {error.strerror})") from None


def list_images(folder: Path, parts: tuple[str, str]) -> Listing:
    """The images folder/PART/CLASS/* of two parts, ("train", "test") or ("train", "val").

    Hidden files and folders, and files without an image's suffix, are passed over. Raises UserError unless both parts
    have the same classes, and images in each.
    """
    layout = f"{shown(folder)} should hold images in {parts[0]}/CLASS/ and {parts[1]}/CLASS/"
    scan(folder, os.DirEntry.is_dir, layout)
    classes = {part: [name for name, _ in scan(folder / part, os.DirEntry.is_dir, layout)] for part in parts}
    for part, names in classes.items():
        if not names:
            raise UserError(f"--data-dir: {layout}, but there are no folders in {part}: sort its images into classes")
    if odd := sorted(set(classes[parts[0]]) ^ set(classes[parts[1]])):
        some = ", ".join(map(shown, odd[:5])) + (f" and {len(odd) - 5} more" if len(odd) > 5 else "")
        raise UserError(f"--data-dir: {layout}, with the same classes in both, but they differ in {some}")
    digest, found = hashlib.sha256(), []
    for part, names in classes.items():
        paths, labels = [], []
        for label, name in enumerate(progress(names, f"listing {part}")):
            files = scan(folder / part / name, is_image, layout)
            if not files:
                where = shown(folder / part / name)
                raise UserError(f"--data-dir: {where} holds no images ({', '.join(SUFFIXES)})")
            for file, size in files:
                digest.update(os.fsencode(f"{part}/{name}/{file} {size}\n"))
                paths.append(os.fsencode(folder / part / name / file))
            labels += [label] * len(files)
        # Worker processes share the memory of an array, but would copy a list as they count references to its items.
        found.append((np.array(paths), np.array(labels, dtype=np.int64)))
    return Listing(*found, classes[parts[0]], digest.hexdigest()[:16])


def count_images(data: str, folder: Path, parts: tuple[str, str] = ("train", "test")) -> tuple[int, int]:
    """How many training images and classes "cifar10", "cifar100", "shapes" or a "folder" has, without decoding any."""
    if data == "folder":
        found = list_images(folder, parts)
        return len(found.train[0]), len(found.classes)
    return (SHAPES, 10) if data == "shapes" else (50_000, CIFAR[data][1])


def decode(path) -> torch.Tensor:
    """An image file as RGB, uint8 (H, W, 3), whatever its format and mode; its rotation tag is ignored.

    Raises UserError if it cannot be read.
    """
    try:
        data = np.fromfile(path, np.uint8)
        if decode_jpeg and data[:3].tobytes() == b"\xff\xd8\xff":
            with contextlib.suppress(RuntimeError):  # PIL says what is wrong, or can read it
                return decode_jpeg(torch.from_numpy(data), ImageReadMode.RGB).permute(1, 2, 0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's are about metadata, and about large images
            with Image.open(path) as image:
                return torch.from_numpy(to_rgb(image))
    except Exception as error:  # a damaged file can be wrong in any way
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{shown(path)} is not a readable image ({reason})") from None


def to_rgb(image: Image.Image) -> np.ndarray:
    """A picture as uint8 (H, W, 3); 16-bit grey is scaled to 8 bits. Raises ValueError for values without a scale."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):  # convert() would clip
        grey = (np.asarray(image).astype(np.uint32) * 255 + 32767) // 65535
        return np.repeat(grey.astype(np.uint8)[:, :, None], 3, 2)
    if image.mode in ("I", "F"):
        raise ValueError("its 32-bit values have no agreed scale: save it with 8 or 16 bits")
    return np.array(image.convert("RGB"))


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
    """A uint8 image (H, W, 3) as (height, width, 3)."""
    image = image[None].permute(0, 3, 1, 2)  # in this order the memory layout is seen to be channels last
    return F.interpolate(image, (height, width), mode="bilinear", antialias=True)[0].permute(1, 2, 0)


# ----------------------------------------------------------------------------------------------------------- ImageNet


class Decoder(Dataset):
    """What worker processes do: decode and crop a chunk of images into memory that they share with the script.

    `sources` are paths (bytes), or uint8 images (N, H, W, 3). The memory, `slots` uint8 (slots, CHUNK, size, size, 3),
    is inherited by fork and has no name, so it takes nothing of /dev/shm, which is small in containers.
    """

    def __init__(self, sources, size: int, slots: int):
        self.sources, self.size = sources, size
        memory = mmap.mmap(-1, slots * CHUNK * size * size * 3)
        self.slots = torch.frombuffer(memory, dtype=torch.uint8).view(slots, CHUNK, size, size, 3)

    def __getitem__(self, task) -> str:
        """Fill a slot with the images that rows (B, 3) describe; returns what is wrong with a file, or "".

        `task` is (slot, rows). An error that is raised in a worker would come out inside a traceback.
        """
        slot, rows = task
        try:
            for image, (index, _, crop) in zip(self.slots[slot], rows.tolist(), strict=False):
                source = self.sources[index]
                whole = decode(source) if isinstance(source, bytes) else torch.from_numpy(source)
                image[:] = centre_crop(whole, self.size) if crop == CENTRE else random_crop(whole, crop, self.size)
        except UserError as error:
            return str(error)
        return ""


class ImageNet:
    """Images that worker processes decode and crop, and the device flips and standardizes.

    `train` and `val` are pairs of sources (see `Decoder`) and int64 labels (N,). A row of numbers says what becomes
    of an image: (index, flip, random number of the crop); validation images have the indices after the training ones.
    """

    on_device = False

    def __init__(self, name, train, val, fingerprint, device, classes, size=224, workers=0):
        self.name, self.fingerprint, self.device, self.classes = name, fingerprint, device, classes
        self.mean, self.std, self.size, self.workers = [*MEAN], [*STD], size, workers
        self.scale, self.shift = scale_and_shift(self.mean, self.std, device)
        self.train_images, self.test_images = len(train[0]), len(val[0])
        self.sources, labels = (np.concatenate(pair) for pair in zip(train, val, strict=True))
        self.labels, self.idle = torch.from_numpy(labels), []  # `idle` are loaders whose workers have nothing to do

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
        slots, ready, pinned = itertools.cycle(loader.dataset.slots), [], self.device.type == "cuda"
        for rows in batches:
            images = torch.empty((len(rows), self.size, self.size, 3), dtype=torch.uint8, pin_memory=pinned)
            for part, slot in zip(images.split(CHUNK), slots, strict=False):
                if problem := self.wait(answers):
                    raise UserError(problem)
                part.copy_(slot[: len(part)])
            parts = images, rows[:, 1] == 1, self.labels[rows[:, 0]]
            ready.append([part.to(self.device, non_blocking=True) for part in parts])
            if len(ready) > 1:
                yield ready.pop(0)
        self.idle.append(loader)  # before the last batch is handed on: a validation after it finds the workers free
        yield from ready

    def start(self, chunks: list[np.ndarray]):
        """Give workers the rows of chunks of images; returns their loader, and the iterator over their answers."""
        slots = 2 * self.workers + 1  # two chunks ahead for each worker, and the one that is copied to the device
        tasks = list(zip(itertools.cycle(range(slots)), chunks, strict=False))
        while self.idle:
            loader = self.idle.pop()
            loader.sampler[:] = tasks
            with contextlib.suppress(RuntimeError):  # workers that died or hang since
                return loader, iter(loader)
        try:
            loader = DataLoader(
                Decoder(self.sources, self.size, slots),
                sampler=tasks,
                batch_size=None,  # each task is a batch
                num_workers=self.workers,
                persistent_workers=self.workers > 0,
                multiprocessing_context="fork" if self.workers else None,
                worker_init_fn=leave_group,
                timeout=POLL if self.workers else 0,
                generator=torch.Generator(),  # leaves the global one alone
            )
            return loader, iter(loader)
        except OSError as error:
            raise UserError(f"--workers {self.workers}: cannot start these processes: {error.strerror}") from None

    def wait(self, answers) -> str:
        """The next of the workers' answers. Raises UserError after PATIENCE, KeyboardInterrupt if asked to stop."""
        began = time.monotonic()
        while True:
            try:
                return next(answers)
            except RuntimeError as error:
                problem = str(error).partition("\n")[0]
            if "x" in problem:
                raise
            # The DataLoader's own errors
            if "timed out" not in str(error) and "DataLoader worker (pid" not in str(error):
                raise


    def train_batch(self, images, flips, labels):
        """Images (B, 3, S, S), channels last, flipped where they should be and standardized, and their labels (B,)."""
        images = torch.where(flips[:, None, None, None], images.flip(2), images)
        return torch.addcmul(self.shift, images, self.scale).permute(0, 3, 1, 2), labels

    def test_batches(self, rank: int = 0, world: int = 1, bs: int = 128):
        """A rank's part of the validation images: all ranks together have each once."""
        index = torch.arange(self.train_images, self.train_images + self.test_images)[rank::world]
        rows = torch.stack([index, torch.zeros_like(index), torch.full_like(index, CENTRE)], 1)
        for parts in self.feed([part for part in rows.split(bs) if len(part)]):
            yield self.train_batch(*parts)


def leave_group(_worker: int):
    """Leave the script's process group: a signal to all of it is for the script, which still needs its workers."""
    os.setsid()
