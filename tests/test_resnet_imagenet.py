"""ImageNet: flags, folders, decoding, crops, and batches from worker processes."""

import gc
import io
import json
import multiprocessing
import os
import re
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

import common
import resnet_imagenet
import runner
import wrn_cifar
from common import UserError
from resnet_imagenet import CENTRE, ImageNet, centre_crop, crop_box, decode, list_images, parse_args, random_crop

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings(
    "ignore:The image decoding and encoding capabilities of TorchVision:DeprecationWarning",
    "ignore:This DataLoader will create:UserWarning",  # more workers than a small machine has cores
)


def picture(seed: int, height: int = 40, width: int = 50) -> np.ndarray:
    """Noise without high frequencies: uint8 (height, width, 3)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def make_folder(folder: Path, train: int = 3, val: int = 2, classes=("n01", "n02")) -> Path:
    """JPEGs of several sizes in folder/{train,val}/CLASS."""
    for part, count in (("train", train), ("val", val)):
        for label, name in enumerate(classes):
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = picture(100 * label + 10 * count + i, 40 + 3 * i, 50 - 4 * label)
                Image.fromarray(pixels).save(folder / part / name / f"{name}_{i}.JPEG")
    return folder


def open_folder(folder: Path, size: int = 28, workers: int = 0) -> ImageNet:
    train, val, fingerprint = list_images(folder)
    return ImageNet("photographs", train, val, fingerprint, CPU, size, workers)


def collect(data: ImageNet, batches) -> list[torch.Tensor]:
    """All of a feed, joined: images, flips, labels."""
    return [torch.cat(parts) for parts in zip(*data.feed(batches), strict=True)]


def same(a, b) -> bool:
    return len(a) == len(b) == 3 and all(map(torch.equal, a, b))


# -------------------------------------------------------------------------------------------------------------- flags


def names(flags: str) -> list[str]:
    return [path.stem for path in resnet_imagenet.configurations(parse_args(flags.split()))]


def test_names_hold_what_decides_the_result():
    flags = "--init zeroinit --bs 1024 --lr 0.5"
    assert names(flags) == ["resnet50-v2_zeroinit_bs1024_lr2^-1_ep90_s00"]
    assert names(flags + " --stride-on 3x3") == names(flags + " --stride-on 3x3 --arch v2") == names(flags)
    assert names("--arch v1 --stride-on 1x1 --lr 0.1") == ["resnet50-v1_zeroinit_bs256_lr0.1_ep90_s00"]
    assert names("--arch v1 --stride-on 3x3 --lr 2^-2") == ["resnet50-v1_zeroinit_bs256_lr2^-2_ep90_strideon3x3_s00"]
    assert names("--init bn --bs 64 --lr 1 --seed 3") == ["resnet50-v2_bn_bs64_lr2^0_ep90_s03"]
    assert names("--init bn --ghost 0 --bs 512 --lr 1 2") == [
        "resnet50-v2_bn_bs512_lr2^0_ep90_ghost512_s00",
        "resnet50-v2_bn_bs512_lr2^1_ep90_ghost512_s00",
    ]
    base = names("--init bn")
    for flag in ("--amp off", "--micro 256", "--workers 3", "--eval-every 2", "--device cpu", "--data-dir elsewhere"):
        assert names(f"--init bn {flag}") == base
    changes = "--arch v1,--bs 32,--lr 1,--epochs 2,--ghost 8,--wd 0,--momentum 0.5,--l2-all,--scalar-lr 0.1"
    changes += ",--base-init he-in,--stride-on 1x1,--image-size 64,--seed 1"
    assert len({*base, *(names(f"--init bn {flag}")[0] for flag in changes.split(","))}) == 14
    assert names("--dropout 0.5") != names("")
    assert names("--arch v1 --init zeroinit+bias") == ["resnet50-v1_zeroinit+bias_bs256_lr2^-3_ep90_s00"]


def test_the_configuration_has_everything_resolved(tmp_path):
    flags = ["--arch", "v1", "--init", "bn", "--lr", "2^-2", "--seed", "2", "--data-dir", str(tmp_path / "ILSVRC")]
    ((path, config),) = resnet_imagenet.configurations(parse_args([*flags, "--out", "somewhere"])).items()
    assert path == Path("somewhere/ilsvrc/resnet50-v1_bn_bs256_lr2^-2_ep90_s02.json")
    assert config == {
        "model": "resnet50", "version": "v1", "data": "ILSVRC", "init": "bn", "bs": 256, "lr": 0.25, "epochs": 90,
        "seed": 2, "ghost": 256, "dropout": 0.0, "wd": 1e-4, "momentum": 0.9, "l2_all": False, "scalar_lr": 1.0,
        "base_init": "lecun", "stride_on": "1x1", "image_size": 224,
    }  # fmt: skip
    (config,) = resnet_imagenet.configurations(parse_args(["--data", "shapes", "--image-size", "64"])).values()
    assert (config["data"], config["dropout"], config["ghost"], config["stride_on"]) == ("shapes", 0.2, None, "3x3")


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ("--init bn --dropout 0.5", "argument --dropout: --init bn has no dropout"),
        ("--init bn --micro 100", "--micro 100 should be a multiple of the 256 images of a ghost batch"),
        ("--init zeroinit+bias", "argument --init: zeroinit+bias is for --arch v1, whose blocks end with a ReLU"),
        ("--arch v3", "argument --arch: invalid choice"),
        ("--data cifar10", "argument --data: invalid choice"),
        ("--init nonsense", "argument --init: invalid choice"),
        ("--image-size 0", "argument --image-size: should be at least 1, not 0"),
        ("--workers=-1", "argument --workers: should be at least 0, not -1"),
        ("--lr 0", "argument --lr: should be at least 1e-12, not 0"),
        ("--stride-on 7x7", "argument --stride-on: invalid choice"),
        ("--train-size 8", "unrecognized arguments: --train-size 8"),
    ],
)
def test_bad_flags_end_in_one_line_and_exit_code_2(flags, complaint, capsys):
    with pytest.raises(SystemExit) as end:
        parse_args(flags.split())
    message = capsys.readouterr().err
    assert end.value.code == 2
    assert message.startswith(f"error: {complaint}") and message.count("\n") == 1


def test_passes_may_be_a_ranks_part_of_a_ghost_batch(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert parse_args(["--init", "bn", "--bs", "512", "--micro", "128"]).micro == 128  # half a ghost batch on each rank
    with pytest.raises(SystemExit):
        parse_args(["--init", "bn", "--bs", "512", "--micro", "64"])
    assert "--micro 64 should be a multiple of the 128 images" in capsys.readouterr().err


def test_workers_share_the_cores_of_a_machine(monkeypatch):
    for cores, ranks, workers in ((8, 1, 8), (8, 4, 2), (1, 8, 1), (256, 2, 32)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, n=cores: range(n), raising=False)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        assert parse_args([]).workers == workers
        assert parse_args(["--workers", "5"]).workers == 5
        assert parse_args(["--data", "shapes"]).workers == 0


# ------------------------------------------------------------------------------------------------------------ folders


def test_a_folder_is_listed_in_order_and_other_files_are_passed_over(tmp_path):
    make_folder(tmp_path, classes=("n02", "n01", "n10"))
    train, val, fingerprint = list_images(tmp_path)
    expected = [f"{tmp_path}/train/{n}/{n}_{i}.JPEG".encode() for n in ("n01", "n02", "n10") for i in range(3)]
    assert train[0].tolist() == expected and train[1].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert len(val[0]) == 6 and val[1].tolist() == [0, 0, 1, 1, 2, 2]
    (tmp_path / "README").write_text("about")
    (tmp_path / "train" / "notes.txt").write_text("about")
    (tmp_path / "train" / "n01" / "notes.txt").write_text("about")
    assert list_images(tmp_path)[2] == fingerprint and len(list_images(tmp_path)[0][0]) == 9


def test_the_fingerprint_is_that_of_names_and_sizes(tmp_path):
    one, other = make_folder(tmp_path / "one"), make_folder(tmp_path / "other")
    assert list_images(one)[2] == list_images(other)[2]
    with open(other / "val" / "n02" / "n02_1.JPEG", "ab") as file:
        file.write(b"\0")
    longer = list_images(other)[2]
    (one / "train" / "n01" / "n01_0.JPEG").rename(one / "train" / "n01" / "first.jpg")
    assert len({list_images(one)[2], longer, list_images(make_folder(tmp_path / "third"))[2]}) == 3


def complaint(folder: Path, capsys) -> str:
    """The line with which the folder is refused."""
    assert runner.exit_code(lambda: list_images(folder)) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    return message.removeprefix("error: --data-dir: ").rstrip("\n")


def test_a_folder_of_another_layout_is_refused_in_one_line(tmp_path, capsys):
    layout = f"{tmp_path} should hold images in train/CLASS/ and val/CLASS/"
    assert complaint(tmp_path, capsys) == f"{layout} ({tmp_path}/train: No such file or directory)"
    make_folder(tmp_path)
    (tmp_path / "val").rename(tmp_path / "validation")
    assert complaint(tmp_path, capsys) == f"{layout} ({tmp_path}/val: No such file or directory)"
    (tmp_path / "val").write_text("")
    assert complaint(tmp_path, capsys) == f"{layout} ({tmp_path}/val: Not a directory)"
    (tmp_path / "val").unlink()
    (tmp_path / "val").mkdir()
    for i in range(3):
        (tmp_path / "val" / f"ILSVRC2012_val_{i:08}.JPEG").write_bytes(b"")
    assert complaint(tmp_path, capsys) == (
        f"{tmp_path}/val holds 3 files and no class folders: sort its images into val/CLASS/, with the same classes in "
        "train and val"
    )


def test_classes_must_be_the_same_and_have_images(tmp_path, capsys):
    make_folder(tmp_path)
    (tmp_path / "val" / "n02").rename(tmp_path / "val" / "n03")
    differ = f"{tmp_path}: train and val should hold the same classes, and differ in"
    assert complaint(tmp_path, capsys) == f"{differ} n02, n03"
    for i in range(4, 9):
        (tmp_path / "train" / f"n0{i}").mkdir()
    assert complaint(tmp_path, capsys) == f"{differ} n02, n03, n04, n05, n06 and 2 more"
    for i in (3, 4, 5, 6, 7, 8):
        (tmp_path / "train" / f"n0{i}").mkdir(exist_ok=True)
        (tmp_path / "val" / f"n0{i}").mkdir(exist_ok=True)
    (tmp_path / "val" / "n02").mkdir()
    (tmp_path / "train" / "n03" / "README.txt").write_text("no image")
    assert complaint(tmp_path, capsys).startswith(f"{tmp_path}/train/n03 holds no images (.jpeg, .jpg, .png, ")


def test_a_dead_link_is_named(tmp_path, capsys):
    make_folder(tmp_path)
    (tmp_path / "train" / "n02" / "gone.JPEG").symlink_to(tmp_path / "nowhere.JPEG")
    assert complaint(tmp_path, capsys) == f"{tmp_path}/train/n02/gone.JPEG: No such file or directory"


# ----------------------------------------------------------------------------------------------------------- decoding


@pytest.fixture(params=["torchvision", "PIL"])
def decoder(request, monkeypatch):
    """Both ways to decode a JPEG."""
    if request.param == "PIL":
        monkeypatch.setattr(resnet_imagenet, "decode_jpeg", None)
    else:
        assert resnet_imagenet.decode_jpeg


def test_photographs_are_decoded_as_pil_decodes_them(tmp_path, decoder):
    for seed, options in enumerate(({}, {"progressive": True}, {"subsampling": 0}, {"quality": 30})):
        path = tmp_path / f"{seed}.JPEG"
        Image.fromarray(picture(seed, 61, 47)).save(path, **options)
        assert np.array_equal(decode(str(path)), np.asarray(Image.open(path)))


def test_odd_images_load_as_rgb(tmp_path, decoder):
    def load(image, format="JPEG", **options):
        image.save(tmp_path / "odd.JPEG", format, **options)
        pixels = decode(str(tmp_path / "odd.JPEG"))
        assert pixels.dtype == torch.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
        return pixels.numpy().astype(int)

    pixels = picture(0)
    grey = pixels[:, :, 1]
    loaded = load(Image.fromarray(grey), quality=100, subsampling=0)
    assert np.ptp(loaded, axis=2).max() == 0 and np.abs(loaded[:, :, 0] - grey).max() <= 2
    assert np.array_equal(load(Image.fromarray(pixels), "PNG"), pixels)
    assert np.array_equal(load(Image.fromarray(grey), "PNG"), np.stack([grey] * 3, 2))
    assert np.array_equal(load(Image.fromarray(np.dstack([pixels, grey])), "PNG"), pixels)  # the alpha is dropped
    rgb = np.full((32, 48, 3), (200, 40, 90), dtype=np.uint8)
    assert np.abs(load(Image.fromarray(rgb).convert("CMYK"), quality=100) - rgb).max() <= 4
    palette = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4) % 3, "P")
    palette.putpalette([10, 20, 30, 255, 0, 0, 1, 2, 3])
    expected = np.array([[10, 20, 30], [255, 0, 0], [1, 2, 3]])[np.arange(12).reshape(3, 4) % 3]
    assert np.array_equal(load(palette, "PNG"), expected)
    assert np.array_equal(load(palette, "PNG", transparency=1), expected)


def test_a_rotation_tag_is_ignored(tmp_path, decoder):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to show
    Image.fromarray(picture(0, 30, 50)).save(tmp_path / "turned.JPEG", exif=exif)
    Image.fromarray(picture(0, 30, 50)).save(tmp_path / "plain.JPEG")
    assert torch.equal(decode(str(tmp_path / "turned.JPEG")), decode(str(tmp_path / "plain.JPEG")))


def test_damaged_files_are_named(tmp_path, decoder):
    whole = io.BytesIO()
    Image.fromarray(picture(0)).save(whole, "JPEG")
    for name, content in {
        "half": whole.getvalue()[: len(whole.getvalue()) // 2],
        "start": whole.getvalue()[:3],
        "text": b"404 Not Found",
        "empty": b"",
    }.items():
        path = tmp_path / f"{name}.JPEG"
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"^{path} is not a readable image \([^\n]+\)$"):
            decode(str(path))
    with pytest.raises(UserError, match=r"absent\.JPEG is not a readable image \(.*No such file"):
        decode(str(tmp_path / "absent.JPEG"))


# -------------------------------------------------------------------------------------------------------------- crops


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
    for shape, box in {(10, 1000): (0, 493, 10, 13), (1000, 10): (493, 0, 13, 10), (1, 1): (0, 0, 1, 1)}.items():
        assert crop_box(0, *shape) == box == tuple(get(torch.empty(3, *shape), (0.08, 1), (3 / 4, 4 / 3)))


def test_crops_are_what_pil_crops_and_resizes():
    pixels = picture(1, 90, 120)
    image = Image.fromarray(pixels)
    differences = []
    for number in range(40):
        top, left, height, width = crop_box(number, 90, 120)
        part = image.crop((left, top, left + width, top + height)).resize((28, 28), Image.Resampling.BILINEAR)
        ours = random_crop(torch.from_numpy(pixels), number, 28)
        differences.append(np.abs(ours.numpy().astype(int) - np.asarray(part)).max())
    assert len(differences) == 40 and max(differences) <= 1


@pytest.mark.parametrize("shape", [(40, 50), (51, 40), (32, 32), (17, 90), (333, 250), (20, 21)])
def test_validation_is_torchvisions(shape):
    pixels = picture(2, *shape)
    standard = transforms.Compose([transforms.Resize(32), transforms.CenterCrop(28)])
    theirs = np.asarray(standard(Image.fromarray(pixels))).astype(int)
    ours = centre_crop(torch.from_numpy(pixels), 28).numpy()
    assert ours.shape == (28, 28, 3) and np.abs(ours - theirs).max() <= 1
    ours = centre_crop(torch.from_numpy(pixels), 224).numpy()  # 256 and 224, the usual numbers
    standard = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])
    assert np.abs(ours - np.asarray(standard(Image.fromarray(pixels))).astype(int)).max() <= 1


# ------------------------------------------------------------------------------------------------------------ batches


def test_a_row_says_all_about_an_image(tmp_path):
    data = open_folder(make_folder(tmp_path))
    rows = data.draw(3, 1)
    assert rows.dtype == torch.int64 and rows.shape == (6, 3)
    assert torch.equal(rows, data.draw(3, 1)) and not torch.equal(rows, data.draw(3, 2))
    assert not torch.equal(rows, data.draw(4, 1))
    assert sorted(rows[:, 0].tolist()) == [0, 1, 2, 3, 4, 5]
    many = torch.cat([data.draw(seed, 0) for seed in range(100)])
    assert 240 < many[:, 1].sum() < 360 and set(many[:, 1].tolist()) == {0, 1}
    assert many[:, 2].min() >= 0 and 2**61 < many[:, 2].max() < 2**62 and len(many[:, 2].unique()) == 600
    images, flips, labels = collect(data, [rows])
    assert images.dtype == torch.uint8 and images.shape == (6, 28, 28, 3)
    for image, flip, label, (index, flipped, crop) in zip(images, flips, labels, rows.tolist(), strict=True):
        path = os.fsdecode(list_images(tmp_path)[0][0][index])
        assert torch.equal(image, random_crop(decode(path), crop, 28))
        assert bool(flip) == (flipped == 1) and f"train/n0{label + 1}/" in path


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_are_the_same_for_any_number_of_workers(tmp_path, workers):
    alone, data = open_folder(make_folder(tmp_path)), open_folder(tmp_path, workers=workers)
    before = torch.get_rng_state()
    for epoch in range(2):
        rows = data.draw(0, epoch)
        whole = collect(alone, [rows])
        batches = list(data.feed([*rows.split(2)]))
        assert [len(batch[0]) for batch in batches] == [2, 2, 2]
        assert same([torch.cat(parts) for parts in zip(*batches, strict=True)], whole)
        assert same(collect(data, [*rows.split(4)]), whole)  # the last one is short
        assert same(collect(data, [*rows[2:].split(1)]), [part[2:] for part in whole])  # an epoch taken up again
        ranks = [collect(data, [part[rank : rank + 1] for part in rows.split(2)]) for rank in range(2)]
        assert same([torch.stack(parts, 1).flatten(0, 1) for parts in zip(*ranks, strict=True)], whole)
        order = torch.tensor([5, 3, 1, 0, 2, 4])
        assert same(collect(data, [rows[order]]), [part[order] for part in whole])
    assert list(data.feed([])) == []
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_feed_may_be_left_and_several_used_side_by_side(tmp_path, workers):
    data = open_folder(make_folder(tmp_path), workers=workers)
    rows, others = data.draw(0, 0), data.draw(1, 0)
    expected, expected_others = collect(data, [rows]), collect(data, [others])
    left = data.feed([*others.split(1)])
    next(left)
    assert same(collect(data, [*rows.split(2)]), expected)
    del left
    assert same(collect(data, [*rows.split(2)]), expected)
    a, b = [], []
    for one, other in zip(data.feed([*rows.split(1)]), data.feed([*others.split(1)]), strict=True):
        a.append(one)
        b.append(other)
    assert same([torch.cat(parts) for parts in zip(*a, strict=True)], expected)
    assert same([torch.cat(parts) for parts in zip(*b, strict=True)], expected_others)


def test_the_same_workers_serve_all_epochs_and_validation_outside_the_process_group(tmp_path):
    gc.collect()
    before = {child.pid for child in multiprocessing.active_children()}

    def workers():
        return {child.pid for child in multiprocessing.active_children()} - before

    data = open_folder(make_folder(tmp_path), workers=2)
    feed = data.feed([*data.draw(0, 0).split(2)])
    for _ in range(3):  # to the last batch, but not beyond it
        next(feed)
    first = workers()
    assert len(first) == 2 and all(os.getpgid(pid) != os.getpgid(0) for pid in first)
    assert sum(len(labels) for _, labels in data.test_batches()) == 4
    collect(data, [data.draw(0, 1)])
    assert workers() == first
    del data, feed
    gc.collect()
    assert not workers()


def test_images_are_flipped_and_standardized(tmp_path):
    data = open_folder(make_folder(tmp_path))
    images, flips, labels = collect(data, [data.draw(0, 0)])
    assert 0 < flips.sum() < 6
    batch, same_labels = data.train_batch(images, flips, labels)
    assert batch.shape == (6, 3, 28, 28) and batch.dtype == torch.float32 and torch.equal(labels, same_labels)
    assert batch.is_contiguous(memory_format=torch.channels_last)
    expected = images.numpy().astype(np.float64) / 255
    expected[flips.numpy()] = expected[flips.numpy(), :, ::-1]
    expected = (expected - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    assert np.abs(batch.double().numpy() - expected.transpose(0, 3, 1, 2)).max() < 1e-5


@pytest.mark.parametrize("world", [1, 2, 3, 9])
def test_all_ranks_together_validate_each_image_once(tmp_path, world):
    for part in ("train", "val"):
        for label in range(2):
            (tmp_path / part / f"n{label}").mkdir(parents=True)
            for i in range(3 + label):
                grey = np.full((40, 40, 3), 30 * (4 * label + i), dtype=np.uint8)
                Image.fromarray(grey).save(tmp_path / part / f"n{label}" / f"{i}.png")
    data = open_folder(tmp_path)
    assert data.test_images == 7
    seen = []
    for rank in range(world):
        for images, labels in data.test_batches(rank, world, bs=2):
            assert 1 <= len(images) <= 2 and images.shape[1:] == (3, 28, 28)
            level = (images[:, 0] * 0.229 + 0.485).mean((1, 2)) * 255 / 30
            seen += zip(level.round().int().tolist(), labels.tolist(), strict=True)
    assert sorted(seen) == [(0, 0), (1, 0), (2, 0), (4, 1), (5, 1), (6, 1), (7, 1)]


def test_validation_takes_the_centre_unflipped(tmp_path):
    data = open_folder(make_folder(tmp_path))
    images = torch.cat([images for images, _ in data.test_batches(bs=3)])
    for image, path in zip(images, list_images(tmp_path)[1][0], strict=True):
        whole = torch.from_numpy(np.array(Image.open(os.fsdecode(path))))
        rows = torch.tensor(centre_crop(whole, 28)[None].tolist(), dtype=torch.uint8)
        expected, _ = data.train_batch(rows, torch.tensor([False]), torch.tensor([0]))
        assert torch.equal(image, expected[0])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_file_ends_in_one_line_from_a_worker_too(tmp_path, workers, capfd):
    data = open_folder(make_folder(tmp_path), workers=workers)
    broken = tmp_path / "train" / "n02" / "n02_1.JPEG"
    broken.write_bytes(broken.read_bytes()[:300])
    assert runner.exit_code(lambda: list(data.feed([*data.draw(0, 0).split(2)]))) == 2
    message = capfd.readouterr().err
    assert message.startswith(f"error: {broken} is not a readable image (") and message.count("\n") == 1
    text = tmp_path / "val" / "n01" / "n01_0.JPEG"
    text.write_text("404 Not Found")
    assert runner.exit_code(lambda: list(data.test_batches())) == 2
    message = capfd.readouterr().err
    assert message.startswith(f"error: {text} is not a readable image (") and message.count("\n") == 1


def test_shapes_go_the_same_way(monkeypatch):
    monkeypatch.setattr(resnet_imagenet, "SHAPES", 30)
    args = parse_args(["--data", "shapes", "--image-size", "32"])
    data = resnet_imagenet.load_data(args, CPU)
    assert (data.name, data.train_images, data.test_images) == ("shapes", 30, 1000)
    assert data.fingerprint == resnet_imagenet.load_data(args, CPU).fingerprint
    other = resnet_imagenet.load_data(parse_args(["--data", "shapes", "--image-size", "33"]), CPU)
    assert data.fingerprint != other.fingerprint
    pixels, labels = resnet_imagenet.shapes(30, seed=0, size=32)
    rows = data.draw(0, 0)
    images, _, given = collect(data, [*rows.split(8)])
    assert torch.equal(given, torch.from_numpy(labels)[rows[:, 0]])
    index, _, crop = rows[7].tolist()
    assert torch.equal(images[7], random_crop(torch.from_numpy(pixels[index]), crop, 32))
    batches = list(data.test_batches())
    assert sum(len(labels) for _, labels in batches) == 1000 and batches[0][0].shape[1:] == (3, 32, 32)
    assert torch.cat([labels for _, labels in batches]).bincount().tolist() == [100] * 10


def test_the_mark_of_validation_is_no_random_number(tmp_path):
    assert CENTRE < 0 <= open_folder(make_folder(tmp_path)).draw(0, 0).min()


# --------------------------------------------------------------------------------------------------------------- runs


def script(flags: str, *more) -> int:
    """Run resnet_imagenet.py in this process."""
    sys.argv = ["resnet_imagenet.py", "--device", "cpu", "--amp", "off", *flags.split(), *map(str, more)]
    return runner.exit_code(resnet_imagenet.main)


def the_record(out: Path) -> dict:
    (path,) = out.glob("*/*.json")
    return json.loads(path.read_text())


def without_times(history: list) -> list:
    return [{k: v for k, v in entry.items() if k not in ("seconds", "data_wait")} for entry in history]


@pytest.fixture
def small_net(monkeypatch):
    """A network of the same interface that takes no time."""

    def build(version, init, num_classes, ghost, dropout, base_init, stride_on):
        assert (version, stride_on) == ("v2", "3x3")
        return common.WideResNet(10, 1, init, num_classes, ghost, dropout, base_init)

    monkeypatch.setattr(common, "ResNet50", build)


def test_the_plan_is_the_papers(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(resnet_imagenet, "SHAPES", 512 * 2500)  # as many as ImageNet has, or nearly
    monkeypatch.setenv("WORLD_SIZE", "8")
    flags = "--data shapes --arch v1 --init bn --bs 512 --lr 2^-2 2^-1 --micro 64 --dry-run --out"
    assert script(flags, tmp_path) == 0
    plan = capsys.readouterr().out
    assert f"ResNet50 bn: {25_557_032 - 990 * 2049:,} trainable parameters" in plan  # ten classes, not 1,000
    assert "1,280,000 images, batches of 512: 225,000 updates in 90 epochs" in plan
    assert "constant for 112,500 updates, then halved 9 times" in plan
    assert "8 ranks, each 64 images of a batch in passes of 64, ghost batches of 256 over 4 ranks" in plan
    assert plan.count("missing") == 2 and f"{tmp_path}/shapes/resnet50-v1_bn_bs512_lr2^-2_ep90_s00.json" in plan
    assert not any(tmp_path.iterdir())


def test_a_plan_counts_the_images_and_classes_of_the_folder(tmp_path, capsys):
    make_folder(tmp_path / "photographs", classes=("a", "b", "c"))
    flags = "--arch v1 --bs 2 --epochs 4 --dry-run --data-dir"
    assert script(flags, tmp_path / "photographs") == 0
    plan = capsys.readouterr().out
    assert "9 images, batches of 2: 18 updates in 4 epochs" in plan
    assert f"ResNet50 zeroinit: {25_530_488 - 997 * 2049:,} trainable parameters" in plan
    assert script(flags, tmp_path / "absent") == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_resnet50_trains_on_shapes(tmp_path, monkeypatch):
    monkeypatch.setattr(resnet_imagenet, "SHAPES", 8)
    monkeypatch.setattr(resnet_imagenet, "shapes", lambda n, seed, size: wrn_cifar.shapes(min(n, 20), seed, size))
    flags = "--data shapes --image-size 32 --init zeroinit --bs 4 --lr 2^-6 --epochs 1 --seed 5 --out"
    assert script(flags, tmp_path) == 0
    record = the_record(tmp_path)
    assert record["status"] == "done" and record["config"]["model"] == "resnet50" and record["config"]["seed"] == 5
    assert 0 <= record["final"]["test_accuracy"] <= record["final"]["test_top5"] <= 1
    assert record["data"]["name"] == "shapes" and record["data"]["train_images"] == 8


def test_a_record_is_the_same_for_any_number_of_workers(tmp_path, small_net):
    classes = [f"n{i}" for i in range(6)]
    folder = make_folder(tmp_path / "photographs", train=5, val=1, classes=classes)
    for workers in (0, 2):
        flags = f"--image-size 32 --bs 8 --lr 2^-4 --epochs 3 --workers {workers} --data-dir {folder} --out"
        assert script(flags, tmp_path / str(workers)) == 0
    alone, several = (the_record(tmp_path / str(workers)) for workers in (0, 2))
    assert without_times(alone["history"]) == without_times(several["history"]) and alone["final"] == several["final"]
    about = {"name": "photographs", "fingerprint": list_images(folder)[2], "train_images": 30, "test_images": 6}
    assert alone["data"] == about


def test_the_learning_rate_is_halved_as_the_paper_says(tmp_path, small_net):
    folder = make_folder(tmp_path / "photographs", train=1, val=1, classes=[f"n{i}" for i in range(6)])
    flags = f"--image-size 16 --bs 6 --lr 2^-4 --epochs 18 --workers 0 --data-dir {folder} --out"
    assert script(flags, tmp_path) == 0
    rates = [entry["lr"] for entry in the_record(tmp_path)["history"]]
    assert rates == [2.0**-4] * 9 + [2.0 ** -(5 + i) for i in range(9)]  # 45 and every 5 of 90 epochs


def test_an_interrupted_run_goes_on_in_the_middle_of_an_epoch(tmp_path, small_net, monkeypatch, capsys):
    folder = make_folder(tmp_path / "photographs", train=5, val=2, classes=[f"n{i}" for i in range(6)])
    flags = f"--image-size 32 --bs 8 --lr 2^-4 --epochs 3 --workers 2 --data-dir {folder} --out"
    assert script(flags, tmp_path / "whole") == 0
    train_batch, passes = ImageNet.train_batch, iter(range(1000))

    def interrupted(self, *parts):
        if next(passes) == 5:  # the fifth update: four and a validation make the first epoch
            os.kill(os.getpid(), signal.SIGTERM)
        return train_batch(self, *parts)

    with monkeypatch.context() as patch:
        patch.setattr(ImageNet, "train_batch", interrupted)
        assert script(flags, tmp_path / "parts") == 75
    assert not list((tmp_path / "parts").glob("*/*.json"))
    capsys.readouterr()
    assert script(flags, tmp_path / "parts", "--eval-only") == 0  # which leaves the checkpoint as it is
    line = r"ep3_imagesize32_s00: test_accuracy (\S+)%, test_top5 (\S+)%\n"
    accuracy, top5 = map(float, re.search(line, capsys.readouterr().out).groups())
    assert 0 <= accuracy <= top5 <= 100
    assert script(flags, tmp_path / "parts", "--save-weights") == 0
    assert re.search("goes on from epoch 2, update [67]\n", capsys.readouterr().out)
    whole, parts = (the_record(tmp_path / out) for out in ("whole", "parts"))
    assert without_times(whole["history"]) == without_times(parts["history"])
    assert script(flags, tmp_path / "parts", "--eval-only") == 0  # of the weights at the end
    assert f"test_accuracy {parts['final']['test_accuracy']:.2%}" in capsys.readouterr().out
    assert script(flags, tmp_path / "whole", "--eval-only") == 2
    assert "--eval-only: there is neither" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_damaged_file_ends_a_run_without_a_record(tmp_path, small_net, part, capfd):
    folder = make_folder(tmp_path / "photographs", train=2, val=2, classes=[f"n{i}" for i in range(6)])
    broken = folder / part / "n3" / "n3_1.JPEG"
    broken.write_bytes(broken.read_bytes()[:300])
    flags = f"--image-size 32 --bs 4 --epochs 1 --workers 1 --data-dir {folder} --out"
    assert script(flags, tmp_path / "out") == 2
    message = capfd.readouterr().err
    assert message.startswith(f"error: {broken} is not a readable image (") and message.count("\n") == 1
    assert not list((tmp_path / "out").glob("*/*.json"))
