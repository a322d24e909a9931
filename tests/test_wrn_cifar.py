"""The script as a user meets it: records, repeated commands, bad input, data sets."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import runner
import wrn_cifar
from common import UserError
from runner import exit_code

CPU = torch.device("cpu")
QUICK = "--data shapes --depth 10 --width 1 --train-size 96 --bs 32 --epochs 2 --amp off --device cpu"


def script(*argv, flags=QUICK):
    """Run wrn_cifar.py in this process."""
    sys.argv = ["wrn_cifar.py", *flags.split(), *map(str, argv)]
    return exit_code(wrn_cifar.main)


def records(out):
    return {path.stem: json.loads(path.read_text()) for path in sorted(Path(out).glob("*/*.json"))}


def without_times(record):
    history = [{k: v for k, v in entry.items() if k != "seconds"} for entry in record["history"]]
    return json.dumps([record["final"], history])


@pytest.fixture(autouse=True)
def small_shapes(monkeypatch):
    """A test set of 100 images in place of 1,000."""
    draw = wrn_cifar.shapes
    monkeypatch.setattr(wrn_cifar, "SHAPES", 96)
    monkeypatch.setattr(wrn_cifar, "shapes", lambda n, seed: draw(n if seed == 0 else 100, seed))


# ------------------------------------------------------------------------------------------------------------ records


def test_a_record_says_what_was_run_and_what_came_out(tmp_path):
    assert script("--init", "zeroinit", "--lr", "2^-3", "--seed", 4, "--out", tmp_path) == 0
    ((name, record),) = records(tmp_path).items()
    assert name == "wrn10-1_zeroinit_bs32_lr2^-3_ep2_trainsize96_s04"
    assert (tmp_path / "shapes" / f"{name}.json").exists()
    assert record["config"] == {
        "model": "wrn", "data": "shapes", "depth": 10, "width": 1, "init": "zeroinit", "bs": 32, "lr": 0.125,
        "epochs": 2, "seed": 4, "ghost": None, "dropout": 0.6, "wd": 5e-4, "momentum": 0.9, "l2_all": False,
        "scalar_lr": 1.0, "base_init": "lecun", "pad_mode": "zeros", "train_size": 96,
    }  # fmt: skip
    assert record["status"] == "done"
    assert [entry["epoch"] for entry in record["history"]] == [1, 2]
    assert [entry["lr"] for entry in record["history"]] == [0.125, 0.0625]
    last = record["history"][-1]
    assert record["final"]["test_accuracy"] == last["test_accuracy"]
    assert record["final"]["train_objective"] == pytest.approx(last["train_loss"] + last["l2"])
    assert record["data"]["train_images"] == 96 and record["data"]["test_images"] == 100
    assert record["environment"]["precision"] == "off" and record["images_per_second"] > 0


def test_same_seed_same_run_alone_or_among_others(tmp_path, capsys):
    assert script("--seeds", 3, "--out", tmp_path / "several") == 0
    assert script("--seed", 2, "--out", tmp_path / "alone") == 0
    assert script("--seeds", 3, "--out", tmp_path / "again") == 0
    several, alone, again = (records(tmp_path / out) for out in ("several", "alone", "again"))
    assert len(several) == 3 and len(alone) == 1
    assert without_times(next(iter(alone.values()))) == without_times(list(several.values())[2])
    assert [without_times(r) for r in several.values()] == [without_times(r) for r in again.values()]
    assert len({without_times(r) for r in several.values()}) == 3  # the seed matters


def test_what_is_done_is_skipped_and_what_is_missing_made(tmp_path, monkeypatch):
    assert script("--lr", "2^-3", "2^-4", "--seeds", 2, "--out", tmp_path) == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*.json")}
    assert len(before) == 4
    lost = next(iter(before))
    lost.unlink()
    assert script("--lr", "2^-3", "2^-4", "--seeds", 2, "--out", tmp_path) == 0
    assert {path for path, time in before.items() if path.stat().st_mtime_ns != time} == {lost}
    monkeypatch.setattr(wrn_cifar, "load_data", None)  # nothing is loaded if nothing is missing
    assert script("--lr", "2^-3", "2^-4", "--seeds", 2, "--out", tmp_path) == 0


def test_a_record_of_another_run_is_an_error(tmp_path, capsys):
    assert script("--out", tmp_path) == 0
    (path,) = tmp_path.glob("*/*.json")
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"config": record["config"] | {"wd": 0.25}}))
    assert script("--out", tmp_path) == 2
    assert "its wd is 0.25, not 0.0005" in capsys.readouterr().err
    path.write_text(json.dumps(record | {"data": record["data"] | {"fingerprint": "other"}}))
    assert script("--seeds", 2, "--out", tmp_path) == 2
    assert "other images" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "{", "[]", '{"config": {}}', '{"status": "done", "final": NaN}', "\xff"])
def test_a_broken_record_is_set_aside_and_made_again(tmp_path, text):
    assert script("--out", tmp_path) == 0
    (path,) = tmp_path.glob("*/*.json")
    whole = path.read_text()
    path.write_text(text, encoding="latin-1")
    assert script("--out", tmp_path) == 0
    assert without_times(json.loads(path.read_text())) == without_times(json.loads(whole))
    assert path.with_suffix(".json.broken").read_text(encoding="latin-1") == text


def test_a_diverged_run_is_a_result(tmp_path):
    assert script("--init", "none", "--lr", 1e6, 0.01, "--out", tmp_path) == 0
    diverged, done = sorted(records(tmp_path).values(), key=lambda record: record["status"] == "done")
    assert diverged["status"] == "diverged" and done["status"] == "done"
    assert set(diverged["final"].values()) == {None}
    assert 1 <= diverged["diverged_at_step"] <= 6 and len(diverged["history"]) < 2
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*.json")}
    assert script("--init", "none", "--lr", 1e6, 0.01, "--out", tmp_path) == 0  # and it is not tried again
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*.json")} == before


def test_a_run_whose_last_update_diverges_has_diverged(tmp_path):
    flags = "--data shapes --depth 10 --width 1 --train-size 96 --bs 96 --epochs 1 --lr 1e4 --wd 1e38 --amp off"
    assert script("--out", tmp_path, flags=flags) == 0
    (record,) = records(tmp_path).values()
    assert record["status"] == "diverged" and record["diverged_at_step"] == 1


def test_what_decides_the_result_is_in_the_name():
    def names(flags):
        return [path.stem for path in wrn_cifar.configurations(wrn_cifar.parse_args(flags.split()))]

    base = names("")
    assert base == ["wrn16-4_zeroinit_bs64_lr2^-2_ep200_s00"]
    for flags in ("--amp off", "--micro 16", "--eval-every 3", "--device cpu", "--ghost 8"):
        assert names(flags) == base
    changes = "--depth 22,--width 2,--init bn,--bs 32,--lr 1,--epochs 2,--dropout 0.1,--wd 0,--l2-all,--scalar-lr 0.1"
    changes += ",--pad-mode reflect,--train-size 50,--base-init he-in,--momentum 0.5,--seed 1"
    changed = [names(flags)[0] for flags in changes.split(",")]
    assert len({*base, *changed}) == 16
    # One ghost batch that holds the whole batch is full-batch statistics, whichever flag asked for it.
    assert names("--init bn --bs 16") == names("--init bn --bs 16 --ghost 0") == ["wrn16-4_bn_bs16_lr2^-2_ep200_s00"]
    assert names("--init bn --bs 256 --ghost 0") == ["wrn16-4_bn_bs256_lr2^-2_ep200_ghost256_s00"]


def test_micro_batches_are_only_about_memory(tmp_path):
    for micro in (8, 32):
        assert script("--init", "bn", "--ghost", 8, "--micro", micro, "--out", tmp_path / str(micro)) == 0
    small, large = (next(iter(records(tmp_path / str(micro)).values())) for micro in (8, 32))
    assert small["config"] == large["config"]
    assert small["final"]["train_objective"] == pytest.approx(large["final"]["train_objective"], rel=1e-3)


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "flags",
    ["--depth 17", "--depth 4", "--lr nan", "--lr 0", "--lr=-1", "--lr inf", "--lr 2^x", "--bs 0", "--bs -4",
     "--bs 1.5", "--epochs 0", "--width 0", "--seeds 0", "--seed -1", "--seeds 2 --seed 1",
     "--dropout 1", "--dropout nan",
     "--init bn --dropout 0.5", "--init batchnorm", "--ghost -1", "--init bn --bs 64 --ghost 16 --micro 24",
     "--wd -1", "--momentum 1", "--data mnist", "--amp fp8", "--train-size 0", "--no-such-flag",
     "--device meta", "--device tpu9"],
)  # fmt: skip
def test_bad_flags_end_in_one_line_and_exit_code_2(flags, tmp_path, capsys):
    try:
        code = script(*flags.split(), "--out", tmp_path)
    except SystemExit as end:
        code = end.code
    error = capsys.readouterr().err
    assert code == 2
    assert error.startswith("error: ") and error.count("\n") == 1
    assert flags.split()[0].split("=")[0] in error or flags.split()[-2] in error
    assert not records(tmp_path)


def test_of_ranks_with_bad_flags_one_per_machine_says_so(capsys, monkeypatch):
    for rank in "012":
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(SystemExit, match="2"):
            script("--depth", 17)
        assert capsys.readouterr().err.count("error: ") == (rank == "0")


def test_bad_data_ends_in_one_line(tmp_path, capsys, monkeypatch):
    def complaint(*argv):
        assert script("--out", tmp_path / "out", *argv, flags="--epochs 1 --depth 10 --width 1 --bs 4") == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    assert "train/CLASS" in complaint("--data", "folder", "--data-dir", tmp_path / "nowhere")
    folder = image_folder(tmp_path / "images")
    (folder / "test" / "zebra").mkdir()
    (folder / "test" / "zebra" / "0.png").write_bytes(b"")
    assert "zebra" in complaint("--data", "folder", "--data-dir", folder)
    (folder / "train" / "zebra").mkdir()
    (folder / "train" / "zebra" / "0.png").write_bytes(b"not an image")
    assert str(folder / "train" / "zebra" / "0.png") in complaint("--data", "folder", "--data-dir", folder)
    assert "--bs 200" in complaint("--data", "shapes", "--bs", 200)
    assert "--train-size 97" in complaint("--data", "shapes", "--train-size", 97)
    assert not records(tmp_path / "out")


def test_a_folder_that_cannot_be_written_stops_before_training(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runner, "train", None)
    (tmp_path / "file").write_text("")
    assert script("--out", tmp_path / "file") == 2  # (a read-only folder does not stop root)
    assert str(tmp_path / "file") in capsys.readouterr().err


def test_cifar10_that_is_absent_names_the_ways_out(tmp_path, capsys, monkeypatch):
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    assert script("--out", tmp_path / "out", "--data-dir", tmp_path / "data", flags="--epochs 1") == 2
    error = capsys.readouterr().err
    assert all(way in error for way in ("cifar-10-python.tar.gz", "--data folder", "--data shapes"))


# --------------------------------------------------------------------------------------------------------------- data


def image_folder(folder, size=32):
    """A folder of tiny PNG and JPEG files: 6 training and 4 test images of two classes."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for part, count in (("train", 3), ("test", 2)):
        for name in ("cat", "dog"):
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{i}.png")
    return folder


def test_a_folder_of_images_is_decoded_once(tmp_path, monkeypatch, capsys):
    from PIL import Image

    folder = image_folder(tmp_path / "images")
    (images, labels), (test_images, test_labels) = wrn_cifar.load_folder(folder)
    assert (
        images.shape == (6, 32, 32, 3)
        and labels.tolist() == [0, 0, 0, 1, 1, 1]
        and test_labels.tolist() == [0, 0, 1, 1]
    )
    assert (images[4] == np.asarray(Image.open(folder / "train" / "dog" / "1.png"))).all()
    with monkeypatch.context() as patch:
        patch.setattr(wrn_cifar, "read_image", None)
        again = wrn_cifar.load_folder(folder)
    assert (again[0][0] == images).all() and (again[1][0] == test_images).all()
    cache = folder / "cache-32px.npz"
    whole = cache.read_bytes()
    for damaged in (b"", whole[:100], whole[: len(whole) // 2], whole.replace(images.tobytes()[:8], bytes(8))):
        assert damaged != whole
        cache.write_bytes(damaged)
        assert (wrn_cifar.load_folder(folder)[0][0] == images).all()  # decoded again
        assert "damaged" in capsys.readouterr().err
        assert cache.stat().st_size == len(whole)
    Image.fromarray(255 - images[4]).save(folder / "train" / "dog" / "1.png")  # a changed file is seen
    assert (wrn_cifar.load_folder(folder)[0][0][4] == 255 - images[4]).all()


def test_other_sizes_and_modes_are_converted(tmp_path):
    from PIL import Image

    for mode, size in (("L", (40, 60)), ("RGBA", (32, 32)), ("P", (10, 10)), ("CMYK", (32, 32))):
        path = tmp_path / f"{mode}.{'jpg' if mode == 'CMYK' else 'png'}"
        Image.new(mode, size, 0).save(path)
        pixels = wrn_cifar.read_image(path, 32)
        assert pixels.shape == (32, 32, 3) and pixels.dtype == np.uint8
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match="CMYK"):
        wrn_cifar.read_image(path, 32)


def test_data_sets_have_their_own_name_and_fingerprint(tmp_path):
    def path(*flags):
        return next(iter(wrn_cifar.configurations(wrn_cifar.parse_args(list(flags)))))

    folder = tmp_path / "My Photos (small)"
    assert path().parent == Path("results/cifar-10")
    assert path("--data", "shapes").parent == Path("results/shapes")
    assert path("--data", "folder", "--data-dir", str(folder)).parent == Path("results/my-photos-small")
    named = path("--data", "folder", "--data-dir", str(folder), "--data-name", "CIFAR-10 (JPEG)")
    assert named.parent == Path("results/cifar-10-jpeg")
    part = np.zeros((4, 8, 8, 3), dtype=np.uint8), np.zeros(4, dtype=np.int64)
    other = part[0] + np.uint8(1), part[1]
    first, second = (wrn_cifar.Images("x", part, test, CPU).fingerprint for test in (part, other))
    assert first != second and len(first) == 16


def test_shapes_are_a_fair_problem():
    draw, pixels = wrn_cifar.shapes, {}
    for part, n, seed in (("train", 4096, 0), ("test", 1000, 1)):
        images, labels = draw(n, seed)
        pixels[part] = torch.from_numpy(images.reshape(len(images), -1) / 127.5 - 1).float(), torch.from_numpy(labels)
        assert images.dtype == np.uint8 and np.bincount(labels).min() >= len(labels) // 10
        assert (draw(n, seed)[0] == images).all()
    (x, y), (test_x, test_y) = pixels["train"], pixels["test"]
    accuracies = []
    for l2 in (1e-3, 1e-2, 1e-1):  # logistic regression, trained to convergence
        weights = torch.zeros(x.shape[1], 10, requires_grad=True)
        bias = torch.zeros(10, requires_grad=True)
        optimizer = torch.optim.LBFGS([weights, bias], max_iter=60, line_search_fn="strong_wolfe")

        def objective(optimizer=optimizer, weights=weights, bias=bias, l2=l2):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(x @ weights + bias, y) + l2 * weights.square().sum()
            loss.backward()
            return loss

        optimizer.step(objective)
        accuracies.append(((test_x @ weights + bias).argmax(1) == test_y).float().mean().item())
    assert 0.12 < max(accuracies) < 0.5


# --------------------------------------------------------------------------------------------------- command line


def test_the_script_runs_as_a_command_and_leaves_the_terminal_plain(tmp_path):
    command = [
        sys.executable,
        wrn_cifar.__file__,
        *QUICK.split(),
        "--init",
        "bn",
        "--lr",
        "2^-2",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr == ""
    lines = done.stdout.splitlines()
    assert json.loads(lines[0])["lr"] == [0.25]
    assert lines[1] == "1 runs, 0 done" and "epoch 2/2" in lines[-1]
    planned = subprocess.run([*command, "--dry-run"], capture_output=True, text=True, timeout=120).stdout
    assert "done    " in planned and "6 updates in 2 epochs" in planned and "halved 10 times" not in planned


def test_status_reads_command_lines(tmp_path, capsys, monkeypatch):
    assert script("--lr", "2^-3", "--out", tmp_path) == 0
    line = f"python wrn_cifar.py {QUICK} --lr 2^-3 --seeds 2 --out {tmp_path}"
    capsys.readouterr()
    monkeypatch.setattr(sys, "stdin", [line + " # table1\n", "\n"])
    assert script("--status", flags="") == 0
    expected = f"1\t0\t0\t2\tshapes/wrn10-1_zeroinit_bs32_ep2_trainsize96\t{line} # table1\n"
    assert capsys.readouterr().out == expected
