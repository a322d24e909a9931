"""Images: statistics, augmentation, folders, decoding, crops, and batches from worker processes."""

import gc
import io
import math
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import zlib
from hashlib import md5
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision import transforms

import common
import data
from data import CENTRE, ImageNet, Images, crop, crop_box, decode, list_images, load_cifar, load_folder
from records import UserError

CPU = torch.device("cpu")
TRAIN_VAL = ("train", "val")
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


def noise(*shape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def picture(seed: int, height: int = 40, width: int = 50) -> np.ndarray:
    """Noise without high frequencies: uint8 (height, width, 3)."""
    return np.array(
        Image.fromarray(noise(8, 8, 3, seed=seed)).resize((width, height), Image.Resampling.BICUBIC)
    )


def make_folder(folder: Path, parts=TRAIN_VAL, counts=(3, 2), classes=("n01", "n02"), suffix="JPEG") -> Path:
    """Pictures of several sizes in folder/PART/CLASS."""
    for part, count in zip(parts, counts, strict=True):
        for label, name in enumerate(classes):
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = picture(100 * label + 10 * count + i, 40 + 3 * i, 50 - 4 * label)
                Image.fromarray(pixels).save(folder / part / name / f"{name}_{i}.{suffix}")
    return folder


def open_folder(folder: Path, size: int = 28, workers: int = 0) -> ImageNet:
    train, val, names, digest = list_images(folder, TRAIN_VAL)
    return ImageNet("photographs", train, val, digest, CPU, len(names), size, workers)


def collect(images: ImageNet, batches) -> list[torch.Tensor]:
    """All of a feed, joined: images, flips, labels."""
    return [torch.cat(parts) for parts in zip(*images.feed(batches), strict=True)]


def same(a, b) -> bool:
    return len(a) == len(b) == 3 and all(map(torch.equal, a, b))


def problem_of(call, *args) -> str:
    """The line with which a call is refused.

    No cycle keeps the frames of the call: where a loader is collected as part of one, a thread that tells its
    workers to end may write to pipes that are closed, and whose numbers others have.
    """
    try:
        call(*args)
    except UserError as error:
        line = str(error)
    else:
        pytest.fail("not refused")
    assert "\n" not in line
    return line


# -------------------------------------------------------------------------------------- images on the device


def test_mean_and_deviation_of_60_000_images_are_exact():
    # k values, equally frequent in each channel, have the variance (k^2 - 1) / 12.
    images = np.empty((60_000, 32, 32, 3), dtype=np.uint8)
    index = np.arange(60_000 * 32 * 32, dtype=np.int32)
    expected_mean, expected_std = [], []
    for channel, (low, k) in enumerate(((0, 240), (200, 48), (77, 2))):
        images[..., channel] = (low + index % k).astype(np.uint8).reshape(60_000, 32, 32)
        expected_mean.append((low + (k - 1) / 2) / 255)
        expected_std.append(math.sqrt((k * k - 1) / 12) / 255)
    test = noise(3, 32, 32, 3), np.arange(3)
    small = Images("generated", (images, np.zeros(60_000, dtype=np.int64)), test, CPU, 10)
    assert small.mean == pytest.approx(expected_mean, rel=1e-12)
    assert small.std == pytest.approx(expected_std, rel=1e-9)
    (standardized, _), *_ = small.test_batches()
    expected = (test[0] / 255 - expected_mean) / expected_std
    assert np.abs(standardized.numpy().transpose(0, 2, 3, 1) - expected).max() < 1e-4


@pytest.mark.parametrize("n", [1, 7, 300])
def test_mean_and_deviation_are_those_of_float64(n):
    images = noise(n, 9, 9, 3, seed=n)
    mean, std = data.mean_and_deviation(images)
    pixels = images.reshape(-1, 3).astype(np.float64) / 255
    assert mean == pytest.approx(pixels.mean(0), rel=1e-12) and std == pytest.approx(pixels.std(0), rel=1e-9)


def test_a_channel_of_one_value_is_near_zero():
    flat = np.full((5, 8, 8, 3), (0, 100, 255), dtype=np.uint8), np.zeros(5, dtype=np.int64)
    (images, _), *_ = Images("flat", flat, flat, CPU, 1).test_batches()
    assert images.abs().max() < 0.1


@pytest.mark.skipif(
    "CIFAR10_JPEG" not in os.environ, reason="CIFAR10_JPEG names no folder of the real images"
)
def test_mean_and_deviation_of_cifar10():
    train, test, classes = load_folder(Path(os.environ["CIFAR10_JPEG"]))
    images = Images("CIFAR-10 (JPEG)", train, test, CPU, classes)
    assert (images.train_images, images.test_images, images.classes) == (50_000, 10_000, 10)
    assert images.mean == pytest.approx([0.49125, 0.48209, 0.44652], abs=1e-5)
    assert images.std == pytest.approx([0.24523, 0.24278, 0.26063], abs=1e-5)


@pytest.mark.parametrize("pad_mode", ["zeros", "reflect"])
def test_training_images_are_cropped_flipped_and_standardized(pad_mode):
    train = noise(20, 16, 16, 3), np.arange(20) % 4
    images = Images("noise", train, train, CPU, 4, pad_mode)
    rows = images.draw(3, 1)
    batch, labels = images.train_batch(rows)
    assert batch.shape == (20, 3, 16, 16) and batch.is_contiguous(memory_format=torch.channels_last)
    padded = np.pad(
        train[0], ((0, 0), (2, 2), (2, 2), (0, 0)), "constant" if pad_mode == "zeros" else "reflect"
    )
    standardized = (padded.astype(np.float64) / 255 - images.mean) / images.std
    found = []
    for image, label in zip(batch.numpy().transpose(0, 2, 3, 1), labels.tolist(), strict=True):
        crops = (
            (i, y, x, flip)
            for i in range(20)
            for y in range(5)
            for x in range(5)
            for flip in (1, -1)
            if np.abs(standardized[i, y : y + 16, x : x + 16][:, ::flip] - image).max() < 1e-5
        )
        (match,) = crops
        assert label == train[1][match[0]]
        found.append(match)
    order, ys, xs, flips = map(np.array, zip(*found, strict=True))
    assert (
        sorted(order) == list(range(20)) and set(flips) == {1, -1} and len(set(zip(ys, xs, strict=True))) > 8
    )
    assert torch.equal(rows, images.draw(3, 1))
    assert not torch.equal(rows, images.draw(3, 2)) and not torch.equal(rows, images.draw(4, 1))


@pytest.mark.parametrize("world", [1, 2, 3, 9])
def test_all_ranks_together_test_each_small_image_once(world):
    train = noise(4, 8, 8, 3), np.arange(4)
    grey = np.arange(7, dtype=np.uint8)[:, None, None, None] * np.full((8, 8, 3), 30, dtype=np.uint8)
    images = Images("grey", train, (grey, np.arange(7)), CPU, 7)
    seen = []
    for rank in range(world):
        for batch, labels in images.test_batches(rank, world, bs=2):
            level = (batch[:, 0] * images.std[0] + images.mean[0]).mean((1, 2)) * 255 / 30
            seen += zip(level.round().int().tolist(), labels.tolist(), strict=True)
    assert sorted(seen) == [(i, i) for i in range(7)]


def test_a_part_of_the_training_images_is_the_same_for_every_seed():
    train = noise(30, 8, 8, 3), np.arange(30)
    images = Images("noise", train, train, CPU, 30, train_size=11)
    chosen = {*images.draw(0, 0)[:, 2].tolist()}
    assert images.train_images == 11 == len(chosen)
    assert chosen == {*images.draw(5, 3)[:, 2].tolist()}
    part = train[0][sorted(chosen)].reshape(-1, 3) / 255
    assert images.mean == pytest.approx(part.mean(0)) and images.std == pytest.approx(part.std(0))
    assert images.fingerprint == Images("noise", train, train, CPU, 30).fingerprint
    line = problem_of(lambda: Images("noise", train, train, CPU, 30, train_size=31))
    assert line == "--train-size 31 is more than the 30 training images"


def test_a_fingerprint_is_that_of_all_bytes():
    images, labels = noise(6, 8, 8, 3), np.arange(6)
    other = images.copy()
    other[5, 7, 7, 2] ^= 1
    prints = {
        data.fingerprint(*arrays) for arrays in ((images, labels), (other, labels), (images, labels[::-1]))
    }
    assert len(prints) == 3 and {len(digits) for digits in prints} == {16}
    assert data.fingerprint(np.asfortranarray(images), labels) == data.fingerprint(images, labels)


# --------------------------------------------------------------------------------------------- CIFAR, shapes


@pytest.mark.parametrize(
    ("name", "classes", "key"), [("cifar10", 10, b"labels"), ("cifar100", 100, b"fine_labels")]
)
def test_cifar_is_loaded_and_checked(tmp_path, monkeypatch, name, classes, key):
    kind = getattr(torchvision.datasets, name.upper())
    folder = tmp_path / kind.base_folder
    folder.mkdir()

    def write(file: str, content: dict) -> list[list[str]]:
        (folder / file).write_bytes(pickle.dumps(content))
        return [[file, md5((folder / file).read_bytes()).hexdigest()]]

    flat, labels = noise(8, 3 * 32 * 32), [classes - 1, 0, 1, 2, 3, 4, 5, 6]
    parts = [{"data": flat[a:b], key.decode(): labels[a:b]} for a, b in ((0, 5), (5, 8))]
    monkeypatch.setattr(kind, "train_list", write("train", parts[0]))
    monkeypatch.setattr(kind, "test_list", write("test", parts[1]))
    names = write("meta", {kind.meta["key"]: [str(i) for i in range(classes)]})
    monkeypatch.setattr(kind, "meta", {"filename": "meta", "key": kind.meta["key"], "md5": names[0][1]})
    monkeypatch.setattr(kind, "url", "http://127.0.0.1:9/archive.tar.gz")
    (images, train_labels), (test_images, test_labels), count = load_cifar(name, tmp_path)
    expected = flat.reshape(8, 3, 32, 32).transpose(0, 2, 3, 1)
    assert np.array_equal(np.concatenate([images, test_images]), expected) and images.dtype == np.uint8
    assert [*train_labels, *test_labels] == labels and train_labels.dtype == np.int64 and count == classes
    (folder / "train").write_bytes(pickle.dumps(parts[1]))  # not what its checksum says
    assert "cannot be downloaded" in problem_of(load_cifar, name, tmp_path)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_that_is_absent_names_the_ways_out(tmp_path, monkeypatch, capsys, name):
    kind = getattr(torchvision.datasets, name.upper())
    monkeypatch.setattr(kind, "url", "http://127.0.0.1:9/archive.tar.gz")
    line = problem_of(load_cifar, name, tmp_path / "data")
    title = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}[name]
    assert line.startswith(f"{title} is not in {tmp_path}/data and cannot be downloaded (")
    assert line.endswith(f"put {kind.filename} there, or try --data folder or --data shapes")
    said = capsys.readouterr()
    assert f"{title} is not in {tmp_path}/data: downloading it\n" in said.err and not said.out
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in problem_of(load_cifar, name, tmp_path / "file")


def test_shapes_are_what_the_docstring_says():
    n, size = 40, 24
    images, labels = data.shapes(n, 7, size)
    assert images.dtype == np.uint8 and labels.dtype == np.int64 and np.bincount(labels).tolist() == [4] * 10
    assert all(map(np.array_equal, data.shapes(n, 7, size), (images, labels)))
    assert not np.array_equal(data.shapes(n, 8, size)[0], images)
    rng = np.random.default_rng(7)  # the same numbers, laid out pixel by pixel
    assert np.array_equal(labels, rng.permutation([i % 10 for i in range(n)]))
    side, start = rng.integers(size // 2, size + 1, (2, n)), rng.integers(0, size, (2, n))
    back = rng.integers(0, 48, (n, 3), dtype=np.uint8)
    colour = rng.integers(96, 176, (n, 3), dtype=np.uint8)
    grain = rng.integers(0, 32, images.shape, dtype=np.uint8)
    words = data.PATTERNS.split()
    for i in range(n):
        for y in range(size):
            for x in range(size):
                row, column = ((at + start[k, i]) * 4 // side[k, i] % 4 for k, at in enumerate((y, x)))
                lit = int(words[labels[i]][3 - row], 16) >> column & 1
                assert (images[i, y, x] == grain[i, y, x] + back[i] + lit * colour[i]).all()


def test_a_shape_keeps_its_class_when_it_is_flipped_or_shifted():
    words = data.PATTERNS.split()
    tiles = [np.array([[int(digit, 16) >> i & 1 for i in range(4)] for digit in word]) for word in words]

    def shifts(tile):
        return {np.roll(tile, (y, x), (0, 1)).tobytes() for y in range(4) for x in range(4)}

    assert len(tiles) == 10
    for i, tile in enumerate(tiles):
        assert tile[:, ::-1].tobytes() in shifts(tile)
        assert not any(tile.tobytes() in shifts(other) for other in tiles[:i])


def test_shapes_are_a_fair_problem():
    (x, y), (test_x, test_y) = (
        (torch.from_numpy(images).flatten(1) / 127.5 - 1, torch.from_numpy(labels))
        for images, labels in (data.shapes(4096, 0), data.shapes(1000, 1))
    )
    accuracies = []
    for l2 in (1e-2, 1e-1):  # logistic regression, trained to convergence
        weights, bias = torch.zeros(x.shape[1], 10, requires_grad=True), torch.zeros(10, requires_grad=True)
        optimizer = torch.optim.LBFGS([weights, bias], max_iter=40, line_search_fn="strong_wolfe")

        def objective(optimizer=optimizer, weights=weights, bias=bias, l2=l2):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(x @ weights + bias, y) + l2 * weights.square().sum()
            loss.backward()
            return loss

        optimizer.step(objective)
        accuracies.append(((test_x @ weights + bias).argmax(1) == test_y).float().mean().item())
    assert max(accuracies) < 0.5


def test_a_small_network_learns_shapes():
    train, test = data.shapes(4096, 0), data.shapes(1000, 1)
    images = Images("shapes", train, test, CPU, 10)
    torch.manual_seed(0)
    net = common.WideResNet(10, 1, "bn", ghost=16).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), lr=2**-4, momentum=0.9)
    for rows in images.draw(0, 0).split(16):  # one epoch
        batch, labels = images.train_batch(rows)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(batch), labels).backward()
        optimizer.step()
    net.eval()
    with torch.no_grad():
        right = sum((net(batch).argmax(1) == labels).sum().item() for batch, labels in images.test_batches())
    assert 600 < right < 1000


# --------------------------------------------------------------------------------------------------- folders


def test_a_folder_is_listed_in_order_and_other_files_are_passed_over(tmp_path):
    make_folder(tmp_path, classes=("n02", "n01", "n10"))
    train, val, names, digest = list_images(tmp_path, TRAIN_VAL)
    assert names == ["n01", "n02", "n10"]
    expected = [f"{tmp_path}/train/{n}/{n}_{i}.JPEG".encode() for n in names for i in range(3)]
    assert train[0].tolist() == expected and train[1].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert len(val[0]) == 6 and val[1].tolist() == [0, 0, 1, 1, 2, 2] and val[1].dtype == np.int64
    assert data.count_images("folder", tmp_path, TRAIN_VAL) == (9, 3)
    (tmp_path / "README").write_text("about")
    for part in ("train", "train/n01", "val/n02"):
        for name in (
            "notes.txt",
            ".DS_Store",
            "Thumbs.db",
            "desktop.ini",
            "._n01_0.JPEG",
            ".hidden.png",
            "x.npz",
        ):
            (tmp_path / part / name).write_bytes(b"no image")
    (tmp_path / "train" / "n01" / "folder.png").mkdir()
    for part in TRAIN_VAL[:1]:  # in one part only: classes would differ
        (tmp_path / part / ".ipynb_checkpoints").mkdir()
        shutil.copy(expected[0].decode(), tmp_path / part / ".ipynb_checkpoints" / "n01_0.JPEG")
    again = list_images(tmp_path, TRAIN_VAL)
    assert again[0][0].tolist() == expected and again[2:] == (names, digest)
    assert data.count_images("folder", tmp_path, TRAIN_VAL) == (9, 3)


def test_both_scripts_pass_over_hidden_files(tmp_path):
    make_folder(tmp_path, ("train", "test"), classes=("a", "b"), suffix="png")
    for part in ("train", "test"):
        (tmp_path / part / ".ipynb_checkpoints").mkdir()
        for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._0.png", "notes.txt"):
            (tmp_path / part / "b" / name).write_bytes(b"no image")
    (images, labels), (_, test_labels), classes = load_folder(tmp_path)
    assert len(images) == 6 and labels.tolist() == [0, 0, 0, 1, 1, 1] and test_labels.tolist() == [0, 0, 1, 1]
    assert classes == 2


def test_counts_without_data_are_those_of_the_data_sets(tmp_path):
    assert data.count_images("cifar10", tmp_path) == (50_000, 10)
    assert data.count_images("cifar100", tmp_path) == (50_000, 100)
    assert data.count_images("shapes", tmp_path) == (data.SHAPES, 10)


def test_the_fingerprint_of_a_folder_is_that_of_names_and_sizes(tmp_path):
    def print_of(folder):
        return list_images(folder, TRAIN_VAL)[3]

    one, other = make_folder(tmp_path / "one"), make_folder(tmp_path / "other")
    assert print_of(one) == print_of(other)
    with open(other / "val" / "n02" / "n02_1.JPEG", "ab") as file:
        file.write(b"\0")
    longer = print_of(other)
    (one / "train" / "n01" / "n01_0.JPEG").rename(one / "train" / "n01" / "first.jpg")
    assert len({print_of(one), longer, print_of(make_folder(tmp_path / "third"))}) == 3
    third = print_of(tmp_path / "third")
    (tmp_path / "third" / "train" / "n01" / "n01_0.JPEG").rename(
        tmp_path / "third" / "train" / "n02" / "n01_0.JPEG"
    )
    assert print_of(tmp_path / "third") != third  # the same image of another class


@pytest.mark.parametrize("parts", [TRAIN_VAL, ("train", "test")])
def test_a_folder_of_another_layout_is_refused_in_one_line(tmp_path, parts):
    last = tmp_path / parts[1]
    layout = f"--data-dir: {tmp_path} should hold images in train/CLASS/ and {parts[1]}/CLASS/"
    absent = problem_of(list_images, tmp_path / "absent", parts)
    assert absent.endswith(f"({tmp_path}/absent: No such file or directory)")
    assert (
        problem_of(list_images, tmp_path, parts) == f"{layout} ({tmp_path}/train: No such file or directory)"
    )
    make_folder(tmp_path, parts)
    last.rename(tmp_path / "validation")
    assert problem_of(list_images, tmp_path, parts) == f"{layout} ({last}: No such file or directory)"
    last.write_text("")
    assert problem_of(list_images, tmp_path, parts) == f"{layout} ({last}: Not a directory)"
    last.unlink()
    last.mkdir()
    flat = f"{layout}, but {last} has no folders: sort its images into classes"
    assert problem_of(list_images, tmp_path, parts) == flat
    for i in range(3):
        (last / f"ILSVRC2012_val_{i:08}.JPEG").write_bytes(b"")
    assert problem_of(list_images, tmp_path, parts) == flat


def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    make_folder(tmp_path)
    scandir = os.scandir

    def forbidden(folder):
        if Path(folder).name == "n02":
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", forbidden)  # (root may read everything)
    assert problem_of(list_images, tmp_path, TRAIN_VAL).endswith(f"({tmp_path}/train/n02: Permission denied)")


def test_classes_must_be_the_same_and_have_images(tmp_path):
    make_folder(tmp_path)
    layout = f"--data-dir: {tmp_path} should hold images in train/CLASS/ and val/CLASS/"
    (tmp_path / "val" / "n02").rename(tmp_path / "val" / "n03")
    differ = f"{layout}, the same classes in both, but 2 differ: train/n02 is alone"
    assert problem_of(list_images, tmp_path, TRAIN_VAL) == differ
    line = problem_of(list_images, make_folder(tmp_path / "of cats", classes=["cats"]), TRAIN_VAL)
    assert line.endswith("images in train/CLASS/ and val/CLASS/, of more classes than cats")
    for part in TRAIN_VAL:
        for name in ("n02", "n03"):
            (tmp_path / part / name).mkdir(exist_ok=True)
    (tmp_path / "train" / "n03" / "README.txt").write_text("no image")
    line = problem_of(list_images, tmp_path, TRAIN_VAL)
    assert line.startswith(f"--data-dir: {tmp_path}/train/n03 holds no images (.jpeg, .jpg, .png, ")


def test_a_dead_link_is_named(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "train" / "n02" / "gone.JPEG").symlink_to(tmp_path / "nowhere.JPEG")
    line = problem_of(list_images, tmp_path, TRAIN_VAL)
    assert line.endswith(f"({tmp_path}/train/n02/gone.JPEG: No such file or directory)")


def test_names_may_be_any_bytes(tmp_path):
    try:
        os.mkdir(os.fsencode(tmp_path) + b"/caf\xe9")
    except OSError:
        pytest.skip("this file system holds UTF-8 names only")
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    classes = [os.fsdecode(b"\xfcber"), "été", "plain"]
    make_folder(folder, ("train", "test"), classes=classes)
    (images, labels), _, count = load_folder(folder)
    assert count == 3 and len(images) == 9 and labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    (folder / "test").rename(folder / "val")
    assert sum(len(labels) for _, labels in open_folder(folder, workers=1).test_batches()) == 6
    broken = folder / "val" / classes[0] / (classes[0] + "_0.JPEG")
    broken.write_bytes(b"404 Not Found")
    line = problem_of(lambda: list(open_folder(folder, workers=1).test_batches()))
    shown = line.encode(errors="backslashreplace").decode()  # as stderr shows it
    assert f"{tmp_path}/caf\\udce9/val/\\udcfcber/\\udcfcber_0.JPEG is not a readable image (" in shown


@pytest.mark.parametrize("classes", [2, 11])
def test_a_folder_of_images_is_decoded_once(tmp_path, monkeypatch, capsys, classes):
    names = [f"c{i:02}" for i in range(classes)]
    folder = make_folder(tmp_path / "images", ("train", "test"), classes=names, suffix="png")
    Image.fromarray(noise(32, 32, 3)).save(folder / "train" / "c01" / "c01_1.png")
    train, test, count = load_folder(folder)
    assert count == classes and train[0].shape == (3 * classes, 32, 32, 3) and train[0].dtype == np.uint8
    assert train[1].tolist() == [i for i in range(classes) for _ in range(3)]
    assert test[1].tolist() == [i for i in range(classes) for _ in range(2)]
    assert np.array_equal(train[0][4], noise(32, 32, 3))
    other = Image.open(folder / "test" / "c01" / "c01_0.png").resize((32, 32), Image.Resampling.BICUBIC)
    assert np.array_equal(test[0][2], np.asarray(other))
    with monkeypatch.context() as patch:
        patch.setattr(data, "decode", None)
        again = load_folder(folder)
        moved = load_folder(folder.rename(tmp_path / "moved"))
    for copy in (again, moved):
        assert all(map(np.array_equal, (*copy[0], *copy[1]), (*train, *test))) and copy[2] == classes
    folder, cache = tmp_path / "moved", tmp_path / "moved" / "cache-32px.npz"
    whole = cache.read_bytes()
    for damaged in (
        b"",
        whole[:100],
        whole[: len(whole) // 2],
        whole.replace(train[0].tobytes()[:8], bytes(8)),
    ):
        assert damaged != whole
        cache.write_bytes(damaged)
        assert np.array_equal(load_folder(folder)[0][0], train[0])  # decoded again
        assert f"{cache} is damaged" in capsys.readouterr().err
        assert cache.stat().st_size == len(whole)
    Image.fromarray(255 - train[0][4]).save(folder / "train" / "c01" / "c01_1.png")  # a changed file is seen
    assert np.array_equal(load_folder(folder)[0][0][4], 255 - train[0][4])


def test_a_folder_that_cannot_be_written_is_read_all_the_same(tmp_path, monkeypatch, capsys):
    folder = make_folder(tmp_path / "images", ("train", "test"))

    def full(path):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(data, "atomic_write", full)
    assert len(load_folder(folder)[0][0]) == 6
    note = f"decoded images are not kept: {folder}/cache-32px.npz: No space left on device\n"
    assert capsys.readouterr().err == note


# -------------------------------------------------------------------------------------------------- decoding


@pytest.fixture(params=["torchvision", "PIL"])
def decoder(request, monkeypatch):
    """Both ways to decode a JPEG."""
    if request.param == "PIL":
        monkeypatch.setattr(data, "jpeg_decoder", lambda: None)
    else:
        assert data.jpeg_decoder()


def test_photographs_are_decoded_as_pil_decodes_them(tmp_path, decoder):
    for seed, options in enumerate(({}, {"progressive": True}, {"subsampling": 0}, {"quality": 30})):
        path = tmp_path / f"{seed}.JPEG"
        Image.fromarray(picture(seed, 61, 47)).save(path, **options)
        assert np.array_equal(decode(path), np.asarray(Image.open(path)))
        assert torch.equal(decode(os.fsencode(path)), decode(str(path)))


def test_odd_images_load_as_rgb(tmp_path, decoder):
    def load(image, format="JPEG", **options):
        image.save(tmp_path / "odd.JPEG", format, **options)
        pixels = decode(tmp_path / "odd.JPEG")
        assert pixels.dtype == torch.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
        return pixels.numpy().astype(int)

    pixels = picture(0)
    grey = pixels[:, :, 1]
    loaded = load(Image.fromarray(grey), quality=100, subsampling=0)
    assert np.ptp(loaded, axis=2).max() == 0 and np.abs(loaded[:, :, 0] - grey).max() <= 2
    assert np.array_equal(load(Image.fromarray(pixels), "PNG"), pixels)  # a misnamed one
    assert np.array_equal(load(Image.fromarray(grey), "PNG"), np.stack([grey] * 3, 2))
    assert np.array_equal(load(Image.fromarray(np.dstack([pixels, grey])), "PNG"), pixels)  # alpha is dropped
    black = np.array([[True, False], [False, False]])
    assert np.array_equal(load(Image.fromarray(~black), "PNG")[:, :, 0], np.where(black, 0, 255))
    rgb = np.full((32, 48, 3), (200, 40, 90), dtype=np.uint8)
    assert np.abs(load(Image.fromarray(rgb).convert("CMYK"), quality=100) - rgb).max() <= 4
    palette = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4) % 3, "P")
    palette.putpalette([10, 20, 30, 255, 0, 0, 1, 2, 3])
    expected = np.array([[10, 20, 30], [255, 0, 0], [1, 2, 3]])[np.arange(12).reshape(3, 4) % 3]
    assert np.array_equal(load(palette, "PNG"), expected)
    assert np.array_equal(load(palette, "PNG", transparency=1), expected)
    assert np.array_equal(load(palette, "PNG", transparency=bytes([255, 0, 128])), expected)


def chunk(kind: bytes, content: bytes) -> bytes:
    """A chunk of a PNG file."""
    return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")


def png_of_16_bits(values: np.ndarray, channels: int) -> bytes:
    """A PNG file of values uint16 (H, W * channels): grey, grey and alpha, or RGB."""
    colour_type = {1: 0, 2: 4, 3: 2}[channels]
    height, width = values.shape[0], values.shape[1] // channels
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([16, colour_type, 0, 0, 0])
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def test_16_bits_are_scaled_to_8(tmp_path):
    values = np.random.default_rng(0).integers(0, 65536, (30, 24), dtype=np.uint16)
    values[0, :4] = 0, 65535, 128, 129  # 128 / 257 rounds to 0, 129 / 257 to 1
    expected = np.rint(values / 257)
    assert expected[0, :4].tolist() == [0, 255, 0, 1]
    Image.fromarray(values).save(tmp_path / "grey.tiff")
    Image.fromarray(values).save(tmp_path / "packed.tif", compression="tiff_lzw")
    (tmp_path / "grey.png").write_bytes(png_of_16_bits(values, 1))
    (tmp_path / "grey.pgm").write_bytes(b"P5 24 30 65535\n" + values.astype(">u2").tobytes())
    for path in sorted(tmp_path.iterdir()):
        assert np.array_equal(decode(path), np.stack([expected] * 3, 2)), path
    (tmp_path / "rgb.png").write_bytes(png_of_16_bits(values, 3))
    assert np.abs(decode(tmp_path / "rgb.png").numpy() - expected.reshape(30, 8, 3)).max() <= 1
    (tmp_path / "alpha.png").write_bytes(png_of_16_bits(values, 2))
    assert np.abs(decode(tmp_path / "alpha.png").numpy()[:, :, 0] - expected[:, ::2]).max() <= 1


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_values_without_an_agreed_scale_are_refused(tmp_path, kind):
    path = tmp_path / "map.tiff"
    Image.fromarray(np.linspace(0, 1000, 64).reshape(8, 8).astype(kind)).save(path)
    assert problem_of(decode, path) == (
        f"{path} is not a readable image (its 32-bit values have no agreed scale: save it with 8 or 16 bits)"
    )


def test_a_rotation_tag_is_ignored(tmp_path, decoder):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to show
    Image.fromarray(picture(0, 30, 50)).save(tmp_path / "turned.JPEG", exif=exif)
    Image.fromarray(picture(0, 30, 50)).save(tmp_path / "plain.JPEG")
    assert torch.equal(decode(tmp_path / "turned.JPEG"), decode(tmp_path / "plain.JPEG"))


def test_damaged_files_are_named(tmp_path, decoder):
    def file(format, **options):
        with io.BytesIO() as buffer:
            Image.fromarray(picture(0)).save(buffer, format, **options)
            return buffer.getvalue()

    jpeg, png = file("JPEG"), file("PNG")
    big = (14_000).to_bytes(4, "big")
    header = png[:8] + chunk(b"IHDR", big + big + bytes([8, 2, 0, 0, 0]))
    text = chunk(b"zTXt", b"comment\0\0" + zlib.compress(bytes(80_000_000)))
    for name, content in {
        "half.JPEG": jpeg[: len(jpeg) // 2],
        "start.JPEG": jpeg[:3],
        "text.JPEG": b"404 Not Found",
        "empty.JPEG": b"",
        "half.png": png[: len(png) // 2],
        "header.png": png[:20] + bytes(4) + png[24:],
        "broken-header.png": png[:16] + b"\xff" * 13 + png[29:],
        "long-text.png": png[:33] + text + png[33:],
        "large.png": header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b""),
        "short.ppm": b"P6 40 30 255\n" + bytes(100),
        "letters.ppm": b"P6 40 x 255\n" + bytes(3600),
        "header.ppm": b"P6 " + b"9" * 5000,
        "half.tiff": file("TIFF")[:3000],
        "half.webp": file("WEBP")[:200],
        "half.bmp": file("BMP")[:500],
    }.items():
        (tmp_path / name).write_bytes(content)
        line = problem_of(decode, tmp_path / name)
        assert line.startswith(f"{tmp_path / name} is not a readable image (") and line[-2:] != "()", line
    assert "No such file" in problem_of(decode, tmp_path / "absent.JPEG")
    assert "Is a directory" in problem_of(decode, tmp_path)


def test_whatever_bytes_are_in_a_file_it_loads_or_is_refused_in_silence(tmp_path, decoder, capfd, recwarn):
    rng, refused = np.random.default_rng(0), 0
    exif = Image.Exif()
    exif[0x0112] = 6
    formats = {"JPEG": {"exif": exif}, "PNG": {"exif": exif}, "TIFF": {"compression": "tiff_lzw"}, "WEBP": {}}
    for format, options in (formats | {"BMP": {}, "PPM": {}, "GIF": {}}).items():
        with io.BytesIO() as buffer:
            Image.fromarray(picture(0)).save(buffer, format, **options)
            whole = np.frombuffer(buffer.getvalue(), np.uint8)
        for i in range(40):
            damaged = whole.copy()
            reach = 120 if i % 2 else len(whole)  # every other time in the header
            damaged[rng.integers(0, reach, 1 + i % 4)] = rng.integers(0, 256, 1 + i % 4)
            (tmp_path / "image").write_bytes(damaged.tobytes())
            try:
                pixels = decode(tmp_path / "image")
                assert pixels.dtype == torch.uint8 and pixels.shape[2:] == (3,)
            except UserError as error:
                assert str(error).startswith(f"{tmp_path}/image is not a readable image (")
                refused += 1
    assert 30 < refused < 250
    assert not recwarn.list
    said = capfd.readouterr()  # libjpeg and libtiff may say something
    assert not said.out and "Warning" not in said.err and "Traceback" not in said.err


def test_a_picture_of_many_pixels_loads_in_silence(tmp_path, recwarn):
    Image.new("1", (10_000, 9_000)).save(tmp_path / "large.png")  # PIL warns from 89 million pixels on
    assert decode(tmp_path / "large.png").shape == (9_000, 10_000, 3)
    assert not recwarn.list


# ----------------------------------------------------------------------------------------------------- crops


def distance(a, b) -> float:
    """Kolmogorov and Smirnov's: the largest difference between two samples' cumulative distributions."""
    at = np.concatenate([a, b])
    shares = (np.searchsorted(np.sort(sample), at, "right") / len(sample) for sample in (a, b))
    return np.abs(next(shares) - next(shares)).max()


@pytest.mark.parametrize("shape", [(300, 400), (90, 200), (400, 160)])
def test_crops_are_distributed_as_torchvisions(shape):
    height, width = shape
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(2**62, (4000,), generator=generator).tolist()
    ours = np.array([crop_box(number, height, width) for number in numbers])
    torch.manual_seed(1)
    get = transforms.RandomResizedCrop.get_params
    theirs = np.array([get(torch.empty(3, *shape), (0.08, 1), (3 / 4, 4 / 3)) for _ in numbers])
    for column in range(4):
        assert distance(ours[:, column], theirs[:, column]) < 0.044  # exceeded once in a thousand
    top, left, h, w = ours.T
    assert (top >= 0).all() and (left >= 0).all() and (top + h <= height).all() and (left + w <= width).all()
    area, ratio = h * w / (height * width), w / h
    assert 0.075 < area.min() < 0.085 and area.max() <= 1
    assert 0.72 < ratio.min() < 0.77 and 1.3 < ratio.max() < 1.38
    assert crop_box(7, *shape) == crop_box(7, *shape)


def test_images_that_no_crop_fits_give_their_central_part():
    get = transforms.RandomResizedCrop.get_params
    for shape, box in {
        (10, 1000): (0, 493, 10, 13),
        (1000, 10): (493, 0, 13, 10),
        (1, 1): (0, 0, 1, 1),
    }.items():
        assert crop_box(0, *shape) == box == tuple(get(torch.empty(3, *shape), (0.08, 1), (3 / 4, 4 / 3)))


def test_crops_are_what_pil_crops_and_resizes():
    pixels = picture(1, 90, 120)
    image = Image.fromarray(pixels)
    differences = []
    for number in range(40):
        top, left, height, width = crop_box(number, 90, 120)
        part = image.crop((left, top, left + width, top + height)).resize((28, 28), Image.Resampling.BILINEAR)
        ours = crop(torch.from_numpy(pixels), number, 28)
        differences.append(np.abs(ours.numpy().astype(int) - np.asarray(part)).max())
    assert len(differences) == 40 and max(differences) <= 1


@pytest.mark.parametrize("shape", [(40, 50), (51, 40), (32, 32), (17, 90), (333, 250), (20, 21)])
def test_validation_is_torchvisions(shape):
    pixels = picture(2, *shape)
    for size, side in ((28, 32), (224, 256)):
        standard = transforms.Compose([transforms.Resize(side), transforms.CenterCrop(size)])
        ours = crop(torch.from_numpy(pixels), CENTRE, size).numpy()
        assert ours.shape == (size, size, 3)
        assert np.abs(ours - np.asarray(standard(Image.fromarray(pixels))).astype(int)).max() <= 1


# --------------------------------------------------------------------------------------------------- batches


def test_a_row_says_all_about_an_image(tmp_path):
    images = open_folder(make_folder(tmp_path))
    assert (images.on_device, images.classes, images.train_images, images.test_images) == (False, 2, 6, 4)
    assert images.mean == [0.485, 0.456, 0.406] and images.std == [0.229, 0.224, 0.225]
    rows = images.draw(3, 1)
    assert rows.dtype == torch.int64 and rows.shape == (6, 3)
    assert torch.equal(rows, images.draw(3, 1)) and not torch.equal(rows, images.draw(3, 2))
    assert not torch.equal(rows, images.draw(4, 1))
    assert sorted(rows[:, 0].tolist()) == [0, 1, 2, 3, 4, 5]
    many = torch.cat([images.draw(seed, 0) for seed in range(100)])
    assert 240 < many[:, 1].sum() < 360 and set(many[:, 1].tolist()) == {0, 1}
    assert CENTRE < 0 <= many[:, 2].min() and 2**61 < many[:, 2].max() < 2**62
    assert len(many[:, 2].unique()) == 600
    pixels, flips, labels = collect(images, [rows])
    assert pixels.dtype == torch.uint8 and pixels.shape == (6, 28, 28, 3)
    paths = list_images(tmp_path, TRAIN_VAL)[0][0]
    for image, flip, label, (index, flipped, number) in zip(
        pixels, flips, labels, rows.tolist(), strict=True
    ):
        assert torch.equal(image, crop(decode(paths[index]), number, 28))
        assert bool(flip) == (flipped == 1) and f"train/n0{label + 1}/".encode() in paths[index]


@pytest.mark.parametrize("chunk", [1, 2, 64])
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_are_the_same_for_any_number_of_workers(tmp_path, monkeypatch, workers, chunk):
    alone, images = open_folder(make_folder(tmp_path)), open_folder(tmp_path, workers=workers)
    before = torch.get_rng_state()
    for epoch in range(2):
        rows = alone.draw(0, epoch)
        whole = collect(alone, [rows])
        monkeypatch.setattr(data, "CHUNK", chunk)
        assert torch.equal(rows, images.draw(0, epoch))
        batches = list(images.feed([*rows.split(2)]))
        assert [len(batch[0]) for batch in batches] == [2, 2, 2]
        assert same([torch.cat(parts) for parts in zip(*batches, strict=True)], whole)
        assert same(collect(images, [*rows.split(4)]), whole)  # the last one is short
        assert same(
            collect(images, [*rows[2:].split(1)]), [part[2:] for part in whole]
        )  # an epoch taken up again
        ranks = [collect(images, [part[rank : rank + 1] for part in rows.split(2)]) for rank in range(2)]
        assert same([torch.stack(parts, 1).flatten(0, 1) for parts in zip(*ranks, strict=True)], whole)
        order = torch.tensor([5, 3, 1, 0, 2, 4])
        assert same(collect(images, [rows[order]]), [part[order] for part in whole])
        monkeypatch.undo()
        alone.idle.clear()
    assert list(images.feed([])) == []
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_feed_may_be_left_and_several_used_side_by_side(tmp_path, workers):
    images = open_folder(make_folder(tmp_path), workers=workers)
    rows, others = images.draw(0, 0), images.draw(1, 0)
    expected, expected_others = collect(images, [rows]), collect(images, [others])
    left = images.feed([*others.split(1)])
    next(left)
    assert same(collect(images, [*rows.split(2)]), expected)
    del left
    assert same(collect(images, [*rows.split(2)]), expected)
    a, b = [], []
    for one, other in zip(images.feed([*rows.split(1)]), images.feed([*others.split(1)]), strict=True):
        a.append(one)
        b.append(other)
    assert same([torch.cat(parts) for parts in zip(*a, strict=True)], expected)
    assert same([torch.cat(parts) for parts in zip(*b, strict=True)], expected_others)


def test_many_chunks_go_through_few_slots():
    """Workers of unlike speed never overwrite what was not yet copied."""
    sources, labels = noise(200, 8, 8, 3), np.arange(200)
    alone, images = (ImageNet("x", (sources, labels), (sources, labels), "", CPU, 200, 8, n) for n in (0, 2))
    rows = alone.draw(0, 0)
    expected = collect(alone, [rows])
    chunk, data.CHUNK = data.CHUNK, 3
    try:
        for bs in (1, 7, 200):
            assert same(collect(images, [*rows.split(bs)]), expected)
    finally:
        data.CHUNK = chunk


def test_the_same_workers_serve_all_epochs_and_validation_outside_the_process_group(tmp_path):
    gc.collect()
    before = {child.pid for child in multiprocessing.active_children()}

    def workers():
        return {child.pid for child in multiprocessing.active_children()} - before

    images = open_folder(make_folder(tmp_path), workers=2)
    feed = images.feed([*images.draw(0, 0).split(2)])
    for _ in range(3):  # to the last batch, but not beyond it
        next(feed)
    first = workers()
    assert len(first) == 2 and all(os.getpgid(pid) != os.getpgid(0) for pid in first)
    assert sum(len(labels) for _, labels in images.test_batches()) == 4
    collect(images, [images.draw(0, 1)])
    assert workers() == first
    del images, feed
    gc.collect()
    assert not workers()


def test_large_images_are_flipped_and_standardized(tmp_path):
    images = open_folder(make_folder(tmp_path))
    pixels, flips, labels = collect(images, [images.draw(0, 0)])
    assert 0 < flips.sum() < 6
    batch, same_labels = images.train_batch(pixels, flips, labels)
    assert batch.shape == (6, 3, 28, 28) and batch.dtype == torch.float32 and torch.equal(labels, same_labels)
    assert batch.is_contiguous(memory_format=torch.channels_last)
    expected = pixels.numpy().astype(np.float64) / 255
    expected[flips.numpy()] = expected[flips.numpy(), :, ::-1]
    expected = (expected - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    assert np.abs(batch.double().numpy() - expected.transpose(0, 3, 1, 2)).max() < 1e-5


@pytest.mark.parametrize("world", [1, 2, 3, 9])
def test_all_ranks_together_validate_each_image_once(tmp_path, world):
    for part in TRAIN_VAL:
        for label in range(2):
            (tmp_path / part / f"n{label}").mkdir(parents=True)
            for i in range(3 + label):
                grey = np.full((40, 40, 3), 30 * (4 * label + i), dtype=np.uint8)
                Image.fromarray(grey).save(tmp_path / part / f"n{label}" / f"{i}.png")
    images = open_folder(tmp_path)
    assert images.test_images == 7
    seen = []
    for rank in range(world):
        for batch, labels in images.test_batches(rank, world, bs=2):
            assert 1 <= len(batch) <= 2 and batch.shape[1:] == (3, 28, 28)
            level = (batch[:, 0] * 0.229 + 0.485).mean((1, 2)) * 255 / 30
            seen += zip(level.round().int().tolist(), labels.tolist(), strict=True)
    assert sorted(seen) == [(0, 0), (1, 0), (2, 0), (4, 1), (5, 1), (6, 1), (7, 1)]


def test_validation_takes_the_centre_unflipped(tmp_path):
    images = open_folder(make_folder(tmp_path))
    batch = torch.cat([part for part, _ in images.test_batches(bs=3)])
    for image, path in zip(batch, list_images(tmp_path, TRAIN_VAL)[1][0], strict=True):
        whole = torch.from_numpy(np.array(Image.open(os.fsdecode(path))))
        expected, _ = images.train_batch(
            crop(whole, CENTRE, 28)[None], torch.tensor([False]), torch.tensor([0])
        )
        assert torch.equal(image, expected[0])


def test_generated_images_go_the_same_way():
    train, val = data.shapes(30, 0, 32), data.shapes(300, 1, 32)
    images = ImageNet("shapes", train, val, data.fingerprint(*train, *val), CPU, 10, 32)
    rows = images.draw(0, 0)
    pixels, _, labels = collect(images, [*rows.split(8)])
    assert torch.equal(labels, torch.from_numpy(train[1])[rows[:, 0]])
    index, _, number = rows[7].tolist()
    assert torch.equal(pixels[7], crop(torch.from_numpy(train[0][index]), number, 32))
    assert torch.cat([labels for _, labels in images.test_batches()]).bincount().tolist() == [30] * 10


# ---------------------------------------------------------------------------------------- workers in trouble


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_file_ends_in_one_line_from_a_worker_too(tmp_path, workers, capfd):
    images = open_folder(make_folder(tmp_path), workers=workers)
    broken = tmp_path / "train" / "n02" / "n02_1.JPEG"
    broken.write_bytes(broken.read_bytes()[:300])
    line = problem_of(lambda: list(images.feed([*images.draw(0, 0).split(2)])))
    assert line.startswith(f"{broken} is not a readable image (")
    text = tmp_path / "val" / "n01" / "n01_0.JPEG"
    text.write_text("404 Not Found")
    assert problem_of(lambda: list(images.test_batches())).startswith(f"{text} is not a readable image (")
    assert capfd.readouterr() == ("", "")


@pytest.fixture
def hang(monkeypatch):
    """Lets each image take so many seconds in a worker, and polls ten times a second."""
    read, before = data.decode, {*multiprocessing.active_children()}

    def start(seconds: float):
        def slow(path):
            time.sleep(seconds)
            return read(path)

        monkeypatch.setattr(data, "decode", slow)
        monkeypatch.setattr(data, "POLL", 0.1)

    yield start
    for worker in {*multiprocessing.active_children()} - before:
        worker.terminate()


def test_slow_workers_are_waited_for(tmp_path, hang):
    alone = open_folder(make_folder(tmp_path))
    rows = alone.draw(0, 0)
    expected = collect(alone, [rows])
    hang(0.25)
    assert same(collect(open_folder(tmp_path, workers=2), [*rows.split(2)]), expected)


def test_workers_that_never_deliver_end_in_one_line(tmp_path, hang, monkeypatch):
    images = open_folder(make_folder(tmp_path), workers=2)
    hang(600)
    monkeypatch.setattr(data, "PATIENCE", 1)
    began = time.monotonic()
    line = problem_of(lambda: list(images.feed([images.draw(0, 0)])))
    assert line.startswith(
        "--workers 2: no images came from them (nothing for 1 seconds): can the disk be read"
    )
    assert 1 <= time.monotonic() - began < 4


STOPPED = """
import signal, sys, time
import numpy as np, torch
import common, data
signal.signal(signal.SIGTERM, lambda *_: common.stop_asked.append(1))
data.decode = lambda path: time.sleep(600)
data.POLL, data.GRACE = 0.5, 1
sources, labels = np.array([b"absent.jpeg"] * 8), np.arange(8)
images = data.ImageNet("x", (sources, labels), (sources, labels), "", torch.device("cpu"), 8, 32, 4)
print("waiting", flush=True)
try:
    list(images.feed([*images.draw(0, 0).split(2)]))
except KeyboardInterrupt:
    del images
    sys.exit(75)
"""


def test_a_signal_is_obeyed_while_waiting():
    command = [sys.executable, "-W", "ignore", "-c", STOPPED]
    folder = Path(data.__file__).parent
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder
    ) as script:
        assert script.stdout.readline() == "waiting\n"
        time.sleep(1)
        script.terminate()
        began = time.monotonic()
        _, said = script.communicate(timeout=60)
        assert (script.returncode, said) == (75, "") and time.monotonic() - began < 8


@pytest.mark.parametrize("seconds", [0, 0.2])
def test_a_request_to_stop_does_not_lose_images_that_come(tmp_path, hang, seconds):
    """Also where they come late: the update is finished, and saved."""
    hang(seconds)
    images = open_folder(make_folder(tmp_path), workers=1)
    common.stop_asked.append(1)
    try:
        assert len(list(images.feed([*images.draw(0, 0).split(2)]))) == 3
    finally:
        common.stop_asked.clear()


def test_a_worker_that_is_killed_ends_in_one_line(tmp_path, monkeypatch):
    images = open_folder(make_folder(tmp_path), workers=2)
    monkeypatch.setattr(data, "decode", lambda path: os.kill(os.getpid(), signal.SIGKILL))
    line = problem_of(lambda: list(images.feed([images.draw(0, 0)])))
    assert line.startswith("--workers 2: no images came from them (DataLoader worker") and "memory" in line


def test_workers_that_died_while_idle_are_replaced(tmp_path):
    before = {*multiprocessing.active_children()}
    images = open_folder(make_folder(tmp_path), workers=1)
    rows = images.draw(0, 0)
    expected = collect(images, [rows])
    (worker,) = {*multiprocessing.active_children()} - before
    worker.terminate()
    worker.join()
    assert same(collect(images, [rows]), expected)


def test_processes_that_cannot_start_are_one_line(tmp_path, monkeypatch):
    def refuse(self):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(multiprocessing.context.ForkProcess, "start", refuse)
    images = open_folder(make_folder(tmp_path), workers=2)
    line = problem_of(lambda: list(images.test_batches()))
    assert line == "--workers 2 cannot be started: No space left on device"


SMALL_SHM = """
import numpy as np, torch
from data import ImageNet
rng = np.random.default_rng(0)
sources, labels = rng.integers(0, 256, (300, 224, 224, 3), dtype=np.uint8), np.arange(300)
images = ImageNet("x", (sources, labels), (sources, labels), "", torch.device("cpu"), 300, 224, 2)
rows = images.draw(0, 0)
seen = [label for _, _, labels in images.feed([*rows.split(100)]) for label in labels.tolist()]
assert seen == rows[:, 0].tolist()
print(len(seen), "images")
"""


def test_a_small_shared_memory_is_enough():
    """Containers have 64 MB of /dev/shm: one MB is enough for 45 MB of images on their way."""
    mount = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"', "sh"]
    if not shutil.which("unshare") or subprocess.run([*mount, "true"], capture_output=True).returncode:
        pytest.skip("a small /dev/shm cannot be mounted here (it needs root)")
    command = [*mount, sys.executable, "-c", SMALL_SHM]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=Path(data.__file__).parent)
    assert (done.returncode, done.stdout, done.stderr) == (0, "300 images\n", "")
