"""resnet_imagenet.py as a user meets it: flags, plans, records, interruptions."""

import os
import re
import signal
from pathlib import Path

import pytest
import scripts
from scripts import all_records, computed, make_folder

import common
import data
import resnet_imagenet
from resnet_imagenet import parse_args

pytestmark = pytest.mark.filterwarnings(
    "ignore:The image decoding and encoding capabilities of TorchVision:DeprecationWarning",
    "ignore:This DataLoader will create:UserWarning",  # more workers than a small machine has cores
)


def script(flags: str, *more) -> int:
    return scripts.run(resnet_imagenet, f"--device cpu --amp off {flags}", *more)


def the_record(out: Path) -> dict:
    (record,) = all_records(out).values()
    return record


@pytest.fixture
def small_net(monkeypatch):
    """A network of the same interface that takes no time."""

    def build(version, init, num_classes, ghost, dropout, alpha, base_init, stride_on):
        assert (version, stride_on) == ("v2", "3x3")
        return common.WideResNet(10, 1, init, num_classes, ghost, dropout, alpha, base_init)

    monkeypatch.setattr(resnet_imagenet, "ResNet50", build)


# ------------------------------------------------------------------------------------------------- flags


def names(flags: str) -> list[str]:
    point = resnet_imagenet.make_point(parse_args(f"--device cpu --amp off {flags}".split()))
    return [point.path(key).stem for key in point.plan().asked]


def test_names_hold_what_decides_the_result():
    flags = "--init zeroinit --bs 1024 --lr 0.5"
    assert names(flags) == ["resnet50-v2_zeroinit_bs1024_lr2^-1_ep90_s00"]
    assert names(flags + " --stride-on 3x3") == names(flags + " --stride-on 3x3 --arch v2") == names(flags)
    assert names("--arch v1 --stride-on 1x1 --lr 0.1") == ["resnet50-v1_zeroinit_bs256_lr0.1_ep90_s00"]
    assert names("--arch v1 --stride-on 3x3") == ["resnet50-v1_zeroinit_bs256_lr2^0_ep90_3x3_s00"]
    assert names("--init bn --bs 64 --lr 1 --seed 3") == ["resnet50-v2_bn_bs64_lr2^0_ep90_s03"]
    assert names("--init bn --ghost 0 --bs 512 --lr 1 2") == [
        "resnet50-v2_bn_bs512_lr2^0_ep90_ghost512_s00",
        "resnet50-v2_bn_bs512_lr2^1_ep90_ghost512_s00",
    ]
    base = names("--init bn")
    for flag in ("--micro 256", "--workers 3", "--eval-every 2", "--data-dir elsewhere"):
        assert names(f"--init bn {flag}") == base
    changes = "--arch v1,--bs 32,--lr 2,--epochs 2,--ghost 8,--wd 0,--momentum 0.5,--dampening 0,--l2-all"
    changes += ",--scalar-lr 0.1,--base-init lecun,--stride-on 1x1,--image-size 64,--seed 1,--amp bf16"
    assert len({*base, *(names(f"--init bn {flag}")[0] for flag in changes.split(","))}) == 16
    assert len({*names("--dropout 0.5"), *names("--alpha 1"), *names("")}) == 3
    assert names("--arch v1 --init zeroinit+bias") == ["resnet50-v1_zeroinit+bias_bs256_lr2^0_ep90_s00"]


def test_the_rate_follows_the_batch_size():
    for bs, rate in ((32, "2^-3"), (256, "2^0"), (1024, "2^2"), (4096, "2^4")):
        assert f"_lr{rate}_" in names(f"--bs {bs}")[0]


def test_the_configuration_has_everything_resolved(tmp_path):
    flags = f"--arch v1 --init bn --lr 2^-2 --seed 2 --data-dir {tmp_path}/ILSVRC --amp off --device cpu"
    point = resnet_imagenet.make_point(parse_args([*flags.split(), "--out", "somewhere"]))
    (key,) = point.plan().asked
    assert point.path(key) == Path("somewhere/ilsvrc/resnet50-v1_bn_bs256_lr2^-2_ep90_s02.json")
    assert point.config(key) == {
        "data": "ILSVRC", "model": "resnet50", "version": "v1", "init": "bn", "bs": 256, "epochs": 90,
        "ghost": 256, "dropout": 0.0, "alpha": None, "wd": 1e-4, "momentum": 0.9, "dampening": 0.9,
        "l2_all": False, "scalar_lr": 1.0, "base_init": "he-in", "stride_on": "1x1", "image_size": 224,
        "precision": "float32", "lr": 0.25, "seed": 2,
    }  # fmt: skip
    shared = resnet_imagenet.make_point(parse_args(["--data", "shapes", "--image-size", "64"])).shared
    assert (shared["data"], shared["dropout"], shared["ghost"], shared["stride_on"]) == (
        "shapes",
        0.2,
        None,
        "3x3",
    )
    assert shared["alpha"] == 0.0


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ("--init bn --dropout 0.5", "argument --dropout: --init bn has no dropout"),
        ("--init bn --micro 100", "--micro 100 should be a multiple of a ghost batch's 256 images"),
        (
            "--init zeroinit+bias",
            "argument --init: zeroinit+bias is for --arch v1, whose blocks end with a ReLU",
        ),
        ("--arch v3", "argument --arch: invalid choice"),
        ("--data cifar10", "argument --data: invalid choice"),
        ("--init nonsense", "argument --init: invalid choice"),
        ("--image-size 0", "argument --image-size: should be a whole number of at least 1 and below"),
        ("--workers=-1", "argument --workers: should be a whole number of at least 0 and below"),
        ("--lr 0", "argument --lr: should be a number, such as 0.25 or 2^-2, of at least 1e-12"),
        ("--stride-on 7x7", "argument --stride-on: invalid choice"),
        ("--train-size 8", "unrecognized arguments: --train-size 8"),
        ("--init bn --bs 17 --ghost 16", "--bs 17 should be a multiple of --ghost 16, or smaller"),
        ("--init bn --bs 1 --image-size 32", "argument --bs: batch norm needs more than one image"),
        ("--data-dir /", "argument --data-name: the data set's name ''"),
    ],
)
def test_bad_flags_end_in_one_line_and_exit_code_2(flags, complaint, capsys):
    assert script(flags, "--dry-run") == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: {complaint}") and message.count("\n") == 1


def test_passes_may_be_a_ranks_part_of_a_ghost_batch(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "4")
    flags = "--init bn --bs 512 --device cpu --micro"
    assert parse_args([*flags.split(), "128"]).micro == 128  # half a ghost batch on each rank
    assert script(flags, "64", "--dry-run") == 2
    assert "--micro 64 should be a multiple of a ghost batch's 128 images" in capsys.readouterr().err


def test_workers_share_the_cores_of_a_machine(monkeypatch):
    for cores, ranks, workers in ((8, 1, 8), (8, 4, 2), (1, 8, 1), (256, 2, 32)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, n=cores: range(n), raising=False)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        monkeypatch.setenv("WORLD_SIZE", str(ranks))
        assert parse_args([]).workers == workers
        assert parse_args(["--workers", "5"]).workers == 5
        assert parse_args(["--data", "shapes"]).workers == 0


# ------------------------------------------------------------------------------------------------- plans


def test_the_plan_is_the_papers(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data, "SHAPES", 512 * 2500)  # as many as ImageNet has, or nearly
    monkeypatch.setenv("WORLD_SIZE", "8")
    flags = "--data shapes --arch v1 --init bn --bs 512 --lr 2^-2 2^-1 --micro 64 --dry-run --out"
    assert script(flags, tmp_path) == 0
    plan = capsys.readouterr().out
    size = f"{25_557_032 - 990 * 2049:,} parameters, 1,280,000 images of 10 classes"
    assert f"resnet50-v1 bn, {size}: B 512, 90 epochs, 2 rates 2^-2 to 2^-1, seed 0, float32 on cpu" in plan
    assert "\n225,000 updates; after 112,500 the rate is halved 9 times" in plan
    assert "8 ranks, each 64 images of a batch in passes of 64, ghost batches of 256 over 4 ranks" in plan
    assert (
        plan.count("missing") == 2 and f"{tmp_path}/shapes/resnet50-v1_bn_bs512_lr2^-2_ep90_s00.json" in plan
    )
    assert not any(tmp_path.iterdir())


def test_a_plan_counts_the_images_and_classes_of_the_folder(tmp_path, capsys):
    make_folder(tmp_path / "photographs", "val", classes=3)
    flags = "--arch v1 --bs 2 --epochs 4 --dry-run --data-dir"
    assert script(flags, tmp_path / "photographs") == 0
    plan = capsys.readouterr().out
    assert "B 2, 4 epochs, rate 2^-7 (the default), seed 0" in plan and "\n18 updates" in plan
    assert f"{25_530_488 - 997 * 2049:,} parameters, 9 images of 3 classes" in plan
    assert script(flags, tmp_path / "absent") == 2
    assert capsys.readouterr().err.count("\n") == 1


# -------------------------------------------------------------------------------------------------- runs


def test_resnet50_trains_on_shapes(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SHAPES", 8)
    monkeypatch.setattr(data, "SHAPES_TEST", 20)
    flags = "--data shapes --image-size 32 --init zeroinit --bs 4 --lr 2^-6 --epochs 1 --seed 5 --out"
    assert script(flags, tmp_path) == 0
    record = the_record(tmp_path)
    assert (
        record["status"] == "done"
        and record["config"]["model"] == "resnet50"
        and record["config"]["seed"] == 5
    )
    assert 0 <= record["final"]["test_accuracy"] <= record["final"]["test_top5"] <= 1
    assert record["data"]["name"] == "shapes" and record["data"]["train_images"] == 8


def test_a_record_is_the_same_for_any_number_of_workers(tmp_path, small_net):
    folder = make_folder(tmp_path / "photographs", "val", 5, 1, classes=6)
    for workers in (0, 2):
        flags = f"--image-size 32 --bs 8 --lr 2^-4 --epochs 3 --workers {workers} --data-dir {folder} --out"
        assert script(flags, tmp_path / str(workers)) == 0
    alone, several = (the_record(tmp_path / str(workers)) for workers in (0, 2))
    assert computed(alone) == computed(several)
    fingerprint = data.list_images(folder, ("train", "val"))[-1]
    about = {"name": "photographs", "fingerprint": fingerprint, "classes": 6}
    assert alone["data"] == about | {"train_images": 30, "test_images": 6}


def test_the_learning_rate_is_halved_as_the_paper_says(tmp_path, small_net):
    folder = make_folder(tmp_path / "photographs", "val", 1, 1, classes=6)
    flags = f"--image-size 16 --bs 6 --lr 2^-4 --epochs 18 --workers 0 --data-dir {folder} --out"
    assert script(flags, tmp_path) == 0
    rates = [entry["lr"] for entry in the_record(tmp_path)["history"]]
    assert rates == [2.0**-4] * 9 + [2.0 ** -(5 + i) for i in range(9)]  # 45 and every 5 of 90 epochs


def test_an_interrupted_run_goes_on_in_the_middle_of_an_epoch(tmp_path, small_net, monkeypatch, capsys):
    folder = make_folder(tmp_path / "photographs", "val", 5, 2, classes=6)
    flags = f"--image-size 32 --bs 8 --lr 2^-4 --epochs 3 --workers 2 --data-dir {folder} --out"
    assert script(flags, tmp_path / "whole") == 0
    train_batch, passes = data.ImageNet.train_batch, iter(range(1000))

    def interrupted(self, *parts):
        if next(passes) == 5:  # the fifth update: four and a validation make the first epoch
            os.kill(os.getpid(), signal.SIGTERM)
        return train_batch(self, *parts)

    with monkeypatch.context() as patch:
        patch.setattr(data.ImageNet, "train_batch", interrupted)
        assert script(flags, tmp_path / "parts") == 75
    assert not list((tmp_path / "parts").glob("*/*.json"))
    capsys.readouterr()
    assert script(flags, tmp_path / "parts", "--eval-only") == 0  # which leaves the checkpoint as it is
    line = r"resnet50-v2 zeroinit B 8 2\^-4 seed 0: test_accuracy (\S+)%, test_top5 (\S+)% after [56] updates"
    accuracy, top5 = map(float, re.search(line, capsys.readouterr().out).groups())
    assert 0 <= accuracy <= top5 <= 100
    assert script(flags, tmp_path / "parts", "--save-weights") == 0
    assert re.search("goes on from epoch 2, update [67]\n", capsys.readouterr().out)
    whole, parts = (the_record(tmp_path / out) for out in ("whole", "parts"))
    assert computed(whole) == computed(parts)
    assert script(flags, tmp_path / "parts", "--eval-only") == 0  # of the weights at the end
    assert f"test_accuracy {parts['final']['test_accuracy']:.2%}" in capsys.readouterr().out
    assert script(flags, tmp_path / "whole", "--eval-only") == 2
    assert "--eval-only: there is neither" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_damaged_file_ends_a_run_without_a_record(tmp_path, small_net, part, capfd):
    folder = make_folder(tmp_path / "photographs", "val", 2, 2, classes=6)
    broken = folder / part / "n03" / "1.png"
    broken.write_bytes(broken.read_bytes()[:300])
    flags = f"--image-size 32 --bs 4 --epochs 1 --workers 1 --data-dir {folder} --out"
    assert script(flags, tmp_path / "out") == 2
    message = capfd.readouterr().err
    assert message.startswith(f"error: {broken} is not a readable image (") and message.count("\n") == 1
    assert not (tmp_path / "out").exists()
