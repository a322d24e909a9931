"""wrn_cifar.py as a user meets it: flags, records, repeated commands, the search, bad input."""

import io
import json
import os
import re
import select
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import scripts
import torch
from scripts import all_records, computed, make_folder, results

import common
import data
import resnet_imagenet
import runner
import wrn_cifar
from records import UserError

HERE = Path(wrn_cifar.__file__).resolve().parent
README = (HERE / "README.md").read_text()
QUICK = "--data shapes --depth 10 --width 1 --train-size 96 --bs 32 --epochs 2 --amp off --device cpu"


def script(*more, flags=QUICK) -> int:
    return scripts.run(wrn_cifar, flags, *more)


@pytest.fixture(autouse=True)
def small_shapes(monkeypatch):
    monkeypatch.setattr(data, "SHAPES", scripts.SIZES[0])
    monkeypatch.setattr(data, "SHAPES_TEST", scripts.SIZES[1])


def point(flags: str):
    """The point of flags."""
    return wrn_cifar.make_point(wrn_cifar.parse_args(flags.split()))


def name(flags: str) -> str:
    """The name of the one run that flags ask for."""
    (key,) = point(flags).plan().asked
    return point(flags).path(key).stem


# ----------------------------------------------------------------------------------------------- records


def test_a_record_says_what_was_run_and_what_came_out(tmp_path):
    assert script("--init", "zeroinit", "--lr", "2^-3", "--seed", 4, "--out", tmp_path) == 0
    ((found, record),) = all_records(tmp_path).items()
    assert found == "wrn10-1_zeroinit_bs32_lr2^-3_ep2_trainsize96_s04"
    assert record["config"] == {
        "data": "shapes", "model": "wrn", "depth": 10, "width": 1, "init": "zeroinit", "bs": 32, "epochs": 2,
        "ghost": None, "dropout": 0.6, "alpha": 0.0, "wd": 5e-4, "momentum": 0.9, "dampening": 0.9,
        "l2_all": False, "scalar_lr": 1.0, "base_init": "he-in", "pad_mode": "zeros", "train_size": 96,
        "precision": "float32", "lr": 0.125, "seed": 4,
    }  # fmt: skip
    assert record["status"] == "done"
    assert [entry["epoch"] for entry in record["history"]] == [1, 2]
    assert [entry["lr"] for entry in record["history"]] == [0.125, 0.0625]
    last = record["history"][-1]
    assert record["final"]["test_accuracy"] == last["test_accuracy"]
    assert record["final"]["train_objective"] == last["train_loss"] + last["l2"]
    assert record["data"]["name"] == "shapes" and record["data"]["classes"] == 10
    assert record["data"]["train_images"] == 96 and record["data"]["test_images"] == 100
    instructions = torch.backends.cpu.get_cpu_capability()
    assert record["images_per_second"] > 0 and record["environment"]["device"].endswith(instructions)


def test_the_same_seed_is_the_same_run_alone_and_among_others(tmp_path):
    assert script("--seeds", 3, "--concurrent", 3, "--out", tmp_path / "several") == 0
    assert script("--seed", 2, "--out", tmp_path / "alone") == 0
    several, alone = results(tmp_path / "several"), results(tmp_path / "alone")
    assert len(several) == 3 and alone.items() <= several.items()
    assert len(set(several.values())) == 3  # the seed matters


def test_what_is_done_is_skipped_and_what_is_missing_made(tmp_path, monkeypatch):
    flags = ["--lr", "2^-3", "2^-4", "--seeds", 2, "--out", tmp_path]
    assert script(*flags) == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*.json")}
    assert len(before) == 4
    lost = next(iter(before))
    lost.unlink()
    assert script(*flags) == 0
    assert {path for path, time in before.items() if path.stat().st_mtime_ns != time} == {lost}
    monkeypatch.setattr(runner, "make_run", None)
    monkeypatch.setattr(runner, "load_on_all_ranks", None)  # nothing is loaded if nothing is missing
    assert script(*flags) == 0


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


def test_a_folder_with_another_number_of_images_is_not_taken_for_the_one_before(tmp_path, capsys):
    """Folders of one name have the same records; all images are read only where a run is missing."""
    for folder, number in (("one", 3), ("two", 4)):
        make_folder(tmp_path / folder / "mine", images=number)
    flags = (
        f"--depth 10 --width 1 --bs 2 --epochs 1 --device cpu --out {tmp_path}/out --data folder --data-dir"
    )
    (tmp_path / "empty" / "mine").mkdir(parents=True)
    for folder, code in (("one", 0), ("gone", 0), ("empty", 0), ("two", 2)):
        capsys.readouterr()
        assert script(tmp_path / folder / "mine", flags=flags) == code
    assert capsys.readouterr().err.endswith("was made with other images: choose another --data-name\n")


def half_records(record: dict) -> list[str]:
    """Texts that are no whole record of a run: what was cut off, ends early, or has another end."""
    ends_early = record | {"history": record["history"][:1]}
    other_end = record | {"final": record["final"] | {"test_accuracy": 0.12345}}
    not_a_number = '{"status": "done", "final": NaN}'
    texts = ["", json.dumps(record)[:300], "[]", '{"config": {}}', "\xff", not_a_number]
    return [*texts, json.dumps(ends_early), json.dumps(other_end)]


def test_a_half_record_is_set_aside_and_made_again(tmp_path, capsys):
    assert script("--out", tmp_path) == 0
    (path,) = tmp_path.glob("*/*.json")
    whole = json.loads(path.read_text())
    for text in half_records(whole):
        path.write_text(text, encoding="latin-1")
        capsys.readouterr()
        assert script("--out", tmp_path) == 0
        assert f"{path} was not a valid record: kept as {path.name}.broken" in capsys.readouterr().err
        assert computed(json.loads(path.read_text())) == computed(whole)
        assert path.with_suffix(".json.broken").read_text(encoding="latin-1") == text


def test_a_diverged_run_is_a_result_and_not_tried_again(tmp_path, monkeypatch, capsys):
    flags = ["--init", "none", "--lr", 1e6, 0.01, "--out", tmp_path]
    assert script(*flags) == 0
    diverged, done = sorted(all_records(tmp_path).values(), key=lambda record: record["status"] == "done")
    assert diverged["status"] == "diverged" and done["status"] == "done"
    assert set(diverged["final"].values()) == {None}
    assert 1 <= diverged["diverged_at_step"] <= 6 and len(diverged["history"]) < 2
    monkeypatch.setattr(runner, "train", None)
    capsys.readouterr()
    assert script(*flags) == 0
    line = f"wrn10-1 none B 32 1000000 seed 0: diverged at update {diverged['diverged_at_step']} ("
    assert line in capsys.readouterr().out


def test_a_run_whose_last_update_diverges_has_diverged(tmp_path):
    flags = "--data shapes --depth 10 --width 1 --bs 96 --epochs 1 --lr 1e12 --wd 1e29 --amp off --device cpu"
    assert script("--out", tmp_path, flags=flags) == 0
    (record,) = all_records(tmp_path).values()
    assert record["status"] == "diverged" and record["diverged_at_step"] == 1


def test_what_decides_the_result_is_in_the_name():
    base = "wrn16-4_zeroinit_bs64_lr2^-2_ep200_s00"
    for flags in ("--amp off", "--micro 16 --amp off", "--eval-every 3 --amp off", "--ghost 8 --amp off"):
        assert name(f"{flags} --device cpu") == base
    changes = "--depth 22,--width 2,--init bn,--bs 32,--lr 1,--epochs 2,--dropout 0.1,--wd 0,--l2-all,"
    changes += "--scalar-lr 0.1,--pad-mode reflect,--train-size 50,--base-init lecun,--momentum 0.5,"
    changes += "--dampening 0,--seed 1,--alpha 0.1,--amp bf16"
    changed = [name(f"--amp off --device cpu {flags}") for flags in changes.split(",")]
    assert len({*base, *changed}) == len(set(base)) + 18
    assert changed[-1] == "wrn16-4_zeroinit_bs64_lr2^-2_ep200_bf16_s00"
    assert name("--momentum 0 --dampening 0.5 --amp off") == name("--momentum 0 --amp off")  # as in PyTorch
    # One ghost batch that holds the whole batch is full-batch statistics, whichever flag asked for it.
    full = "wrn16-4_bn_bs16_lr2^-3_ep200_s00"
    assert name("--init bn --bs 16 --amp off") == name("--init bn --bs 16 --ghost 0 --amp off") == full
    full = "wrn16-4_bn_bs256_lr2^1_ep200_ghost256_s00"
    assert name("--init bn --bs 256 --ghost 0 --amp off") == full


def test_rates_that_differ_in_the_last_digit_are_two_runs(tmp_path):
    assert script("--lr", "0.1234561", "0.1234562", "--epochs", 1, "--out", tmp_path) == 0
    rates = {found: record["config"]["lr"] for found, record in all_records(tmp_path).items()}
    assert rates == {
        f"wrn10-1_zeroinit_bs32_lr{rate}_ep1_trainsize96_s00": rate for rate in (0.1234561, 0.1234562)
    }


def test_a_rate_that_is_given_twice_is_one(tmp_path, capsys):
    assert script("--lr", "2^-3", "0.25", "2^-2", "--dry-run", "--out", tmp_path) == 0
    said = capsys.readouterr().out
    assert "2 rates 2^-3 to 2^-2" in said and "2 runs planned" in said


def test_runs_of_two_precisions_are_two_runs(tmp_path):
    assert script("--epochs", 1, "--out", tmp_path) == 0
    assert script("--epochs", 1, "--out", tmp_path, "--amp", "bf16") == 0
    found = all_records(tmp_path)
    assert [record["config"]["precision"] for record in found.values()] == ["bf16", "float32"]
    assert [each.removeprefix("wrn10-1_zeroinit_bs32_lr2^-3_ep1_trainsize96") for each in found] == [
        "_bf16_s00",
        "_s00",
    ]


def test_micro_batches_are_only_about_memory(tmp_path):
    for micro in (8, 32):
        assert script("--init", "bn", "--ghost", 8, "--micro", micro, "--out", tmp_path / str(micro)) == 0
    small, large = (next(iter(all_records(tmp_path / str(micro)).values())) for micro in (8, 32))
    assert small["config"] == large["config"]
    assert small["final"]["train_objective"] == pytest.approx(large["final"]["train_objective"], rel=1e-3)


# --------------------------------------------------------------------------------------------- bad input


BAD = """--depth 17; --depth 4; --lr nan; --lr 0; --lr=-1; --lr inf; --lr 2^x; --lr 2^9999; --lr 0^-1
--lr 1e39; --lr 2^-9999; --lr 2^; --lr=-2^2; --bs 0; --bs -4; --bs 1.5; --bs 2^-1
--bs 2^999999999; --epochs 0; --width 0; --seeds 0; --seed -1; --seed 2^-1; --seeds 2 --seed 1
--dropout 1; --dropout nan; --init bn --dropout 0.5; --init bn --alpha 1; --init batchnorm
--ghost -1; --init bn --bs 65 --ghost 16; --init bn --bs 64 --ghost 16 --micro 24; --wd -1
--momentum 1; --see 1; --data mnist; --amp fp8; --train-size 0; --no-such-flag; --device meta
--device tpu9; --device cuda:x; --data-name ***; --data-name report; --data-name logs"""
BAD = [*map(str.strip, BAD.replace("\n", ";").split(";")), "--data-name " + 300 * "x"]


@pytest.mark.parametrize("flags", BAD)
def test_bad_flags_end_in_one_line_and_exit_code_2(flags, tmp_path, capsys):
    assert script(*flags.split(), "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and len(error) < 300
    assert flags.split()[0].split("=")[0] in error or flags.split()[-2] in error
    assert not any(tmp_path.iterdir())


def test_of_ranks_with_bad_flags_one_per_machine_says_so(capsys, monkeypatch):
    for rank in "012":
        monkeypatch.setenv("LOCAL_RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "3")
        assert script("--depth", 17) == 2
        assert capsys.readouterr().err.count("error: ") == (rank == "0")
        for world in ("1", "", "x"):  # what was left over in a shell
            monkeypatch.setenv("WORLD_SIZE", world)
            monkeypatch.setenv("RANK", rank)
            assert script("--depth", 17) == 2 and script("--dry-run") == 0
            said = capsys.readouterr()
            assert said.err.count("error: ") == 1 and "1 run planned," in said.out


def test_bad_data_ends_in_one_line(tmp_path, capsys):
    def complaint(*more):
        assert (
            script(
                "--out", tmp_path / "out", *more, flags="--epochs 1 --depth 10 --width 1 --bs 4 --device cpu"
            )
            == 2
        )
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    assert "train/CLASS" in complaint("--data", "folder", "--data-dir", tmp_path / "nowhere")
    folder = make_folder(tmp_path / "images")
    (folder / "test" / "zebra").mkdir()
    (folder / "test" / "zebra" / "0.png").write_bytes(b"")
    assert "zebra" in complaint("--data", "folder", "--data-dir", folder)
    (folder / "train" / "zebra").mkdir()
    (folder / "train" / "zebra" / "0.png").write_bytes(b"not an image")
    assert str(folder / "train" / "zebra" / "0.png") in complaint("--data", "folder", "--data-dir", folder)
    assert "--bs 200" in complaint("--data", "shapes", "--bs", 200)
    assert "--train-size 97" in complaint("--data", "shapes", "--train-size", 97)
    assert not (tmp_path / "out").exists()


def test_cifar10_that_is_absent_leaves_nothing(tmp_path, capsys, monkeypatch):
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    words = ["--out", tmp_path / "out", "--data-dir", tmp_path / "data"]
    assert script(*words, flags="--epochs 1 --device cpu") == 2
    error = capsys.readouterr().err
    assert all(way in error for way in ("cifar-10-python.tar.gz", "--data folder", "--data shapes"))
    assert not any(tmp_path.iterdir())
    assert script("--dry-run", *words, flags="--epochs 1 --device cpu") == 0  # which needs no images


def test_dry_run_refuses_what_the_run_refuses(tmp_path, capsys):
    folder = make_folder(tmp_path / "images")
    shapes, pictures = "--data shapes --device cpu", f"--data folder --data-dir {folder} --device cpu"
    for flags in (
        f"{shapes} --bs 1024", f"{shapes} --train-size 72 --bs 128", f"{shapes} --train-size 1000",
        f"{pictures} --bs 7", f"{pictures} --train-size 7 --bs 2", f"{pictures}/train --bs 2",
    ):  # fmt: skip
        said = []
        for more in ([], ["--dry-run"]):
            assert script("--out", tmp_path / "out", *more, flags=flags) == 2
            said.append(capsys.readouterr().err)
        assert said[0] == said[1] and said[0].count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_stops_before_training(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runner, "train", None)
    (tmp_path / "file").write_text("")
    assert script("--out", tmp_path / "file") == 2  # (a read-only folder does not stop root)
    assert str(tmp_path / "file") in capsys.readouterr().err


def test_paths_that_cannot_be_are_one_line(tmp_path, capsys):
    record = tmp_path / "shapes" / "wrn10-1_zeroinit_bs32_lr2^-3_ep2_trainsize96_s00.json"
    record.mkdir(parents=True)
    for out, problem in (
        (tmp_path / ("x" * 300), "File name too long"),
        (tmp_path, f"{record}: Is a directory"),
    ):
        assert script("--out", out) == 2
        error = capsys.readouterr().err
        assert problem in error and error.count("\n") == 1


def test_a_net_that_no_memory_holds_is_one_line(tmp_path, capsys):
    assert script("--width", 130_000, "--out", tmp_path / "out") == 2
    assert capsys.readouterr().err == "error: one run does not fit into the device's memory: try --micro\n"
    assert not (tmp_path / "out").exists()


def test_names_that_the_terminal_cannot_show_are_printed_all_the_same(tmp_path, monkeypatch):
    buffer = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(buffer, "ascii"))
    assert script("--data-name", "Größe 名", "--out", tmp_path) == 0
    assert b"gr\\xf6\\xdfe-\\u540d" in buffer.getvalue()
    assert len(list(tmp_path.glob("größe-名/*.json"))) == 1


def test_data_sets_have_their_own_folder(tmp_path):
    folder = tmp_path / "My Photos (small)"
    assert point("").folder == Path("results/cifar-10")
    assert point("--data cifar100").folder == Path("results/cifar-100")
    assert point("--data shapes").folder == Path("results/shapes")
    words = ["--data", "folder", "--data-dir", str(folder)]
    assert wrn_cifar.make_point(wrn_cifar.parse_args(words)).folder == Path("results/my-photos-small")
    words += ["--data-name", "CIFAR-10 (JPEG)"]
    assert wrn_cifar.make_point(wrn_cifar.parse_args(words)).folder == Path("results/cifar-10-jpeg")


# ------------------------------------------------------------------------------------- classes and search


@pytest.mark.parametrize("classes", [2, 11])
def test_classes_come_from_the_data(tmp_path, classes, capsys):
    folder = make_folder(tmp_path / "images", classes=classes)
    flags = f"--data folder --data-dir {folder} --depth 10 --width 1 --bs 6 --epochs 1 --device cpu --amp off"
    flags += f" --init none --out {tmp_path / 'out'}"
    assert script("--dry-run", flags=flags) == 0
    size = f"{77_360 + 64 * (classes - 10):,} parameters"  # the classifier has no bias
    size += f", {3 * classes} images of {classes} classes"
    assert size in capsys.readouterr().out
    assert script(flags=flags) == 0
    assert size in capsys.readouterr().out
    (record,) = all_records(tmp_path / "out").values()
    assert record["data"]["classes"] == classes and record["data"]["train_images"] == 3 * classes


SEARCH = f"{QUICK} --init bn --bs 8 --epochs 3 --lr 2^-2 2^0 --seeds 3 --search best"


def test_a_search_runs_to_its_end_in_one_process_and_in_two(tmp_path, capsys):
    one, two, log = tmp_path / "one", tmp_path / "two", tmp_path / "log"
    assert script("--out", one, flags=SEARCH) == 0
    assert script("--out", one, "--dry-run", flags=SEARCH) == 0
    plan = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in plan if ".json" in line and ".json)" not in line} == {"done"}
    both = [scripts.start(wrn_cifar, SEARCH, "--out", two, log=log) for _ in range(2)]
    codes = {scripts.end(process) for process in both}
    assert 0 in codes and codes <= {0, 76}
    assert results(two) == results(one)
    seeds = {}
    for record in all_records(one).values():
        seeds.setdefault(record["config"]["lr"], set()).add(record["config"]["seed"])
    assert len(seeds) >= 3 and [*seeds.values()].count({0, 1, 2}) >= 2  # the best rate and its neighbours
    assert all(0 in each for each in seeds.values())


# ----------------------------------------------------------------------------------------------- weights


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder of pictures, and the flags of a run on it that has left its weights."""
    out = tmp_path_factory.mktemp("trained")
    folder = make_folder(out / "images", classes=3, size=(32, 32))
    flags = f"--data folder --data-dir {folder} --depth 10 --width 1 --bs 3 --epochs 2 --device cpu --amp off"
    flags += f" --out {out / 'results'}"
    assert script("--save-weights", flags=flags) == 0
    return folder, flags, out / "results"


def test_the_lines_in_the_readme_classify_a_picture(trained, capsys):
    folder, flags, out = trained
    (path,) = out.glob("*/*.pt")
    (lines,) = (block for block in re.findall(r"```python\n(.+?)```", README, re.S) if "torch.load" in block)
    assert lines.count("\n") == 5 and '"NAME.pt"' in lines and '"picture.png"' in lines
    lines = lines.replace("NAME.pt", str(path)).replace("picture.png", str(folder / "test" / "n01" / "0.png"))
    names = {"torch": torch, "data": data, "wrn_cifar": wrn_cifar}
    exec(lines, names)
    assert capsys.readouterr().out.startswith("tensor([[")
    saved, net, image = (names[name] for name in ("saved", "net", "image"))
    assert saved.keys() == {"config", "classes", "mean", "std", "state_dict"} and saved["classes"] == 3
    images = wrn_cifar.load_data(wrn_cifar.parse_args(flags.split()), torch.device("cpu"))
    (batch, labels), *_ = images.test_batches()
    assert labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert torch.allclose(net(image.permute(2, 0, 1)[None]), net(batch)[2], atol=1e-5)


def test_eval_only_prints_the_accuracy_of_weights_and_of_checkpoints(trained, tmp_path, capsys, monkeypatch):
    _, flags, out = trained
    (record,) = all_records(out).values()
    assert script("--eval-only", flags=flags) == 0
    accuracy = f"test_accuracy {record['final']['test_accuracy']:.2%}"
    assert capsys.readouterr().out == f"wrn10-1 zeroinit B 3 2^-6 seed 0: {accuracy}\n"
    assert script("--eval-only", "--out", tmp_path / "none", flags=flags) == 2
    assert "--eval-only: there is neither" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_an_image_that_one_rank_cannot_read_is_told_by_that_rank(trained, monkeypatch, capsys):
    def fail(run):
        raise UserError("rank 1 reads it")

    _, flags, _ = trained
    monkeypatch.setattr(common.Run, "evaluate", fail)
    monkeypatch.setenv("LOCAL_RANK", "1")  # not the first, which tells the errors of all
    assert script("--eval-only", flags=flags) == 2
    assert capsys.readouterr().err == "error: rank 1 reads it\n"


def test_eval_only_beside_a_run_that_diverged_and_of_one_that_goes_on(tmp_path, capsys, monkeypatch):
    flags = f"{QUICK} --train-size 64 --bs 16 --epochs 2 --save-weights --out {tmp_path} --lr 2^-4"
    assert script("2^30", flags=flags) == 0
    capsys.readouterr()
    assert script("2^30", "--eval-only", flags=flags) == 0
    assert capsys.readouterr().out.count("\n") == 1  # of the run that did not
    assert script("--lr", "2^30", "--eval-only", flags=flags) == 2
    assert capsys.readouterr().err == "error: --eval-only: all of these runs diverged\n"
    real = common.Run.begin_epoch
    monkeypatch.setattr(common.Run, "begin_epoch", lambda run: (common.stop_asked.append(1), real(run))[1])
    assert script("--seed", "1", flags=flags) == 75
    capsys.readouterr()
    assert script("--seed", "1", "--eval-only", flags=flags) == 0
    assert capsys.readouterr().out.endswith(" after 1 update\n")


def test_weights_that_do_not_fit_are_one_line(trained, tmp_path, capsys):
    _, flags, out = trained
    (path,) = out.glob("*/*.pt")
    whole = path.read_bytes()
    saved = torch.load(path, weights_only=True)
    wd = saved["config"] | {"wd": 0.25}
    state = {name: tensor for name, tensor in saved["state_dict"].items() if name != "classifier.weight"}
    others = {
        "its wd is 0.25, not 0.0005": saved | {"config": wd},
        "is for 2 classes, but the images have 3": saved | {"classes": 2},
        "Missing key(s) in state_dict": saved | {"state_dict": state},
        "'config'": saved["state_dict"],
        "is damaged": [1, 2, 3],
    }
    altered = bytearray(whole)
    altered[len(whole) // 2] ^= 1
    contents = {"": whole[: len(whole) // 2], "is damaged": b"no weights", "checksum": bytes(altered)}
    for complaint, content in [*others.items(), *contents.items()]:
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        assert script("--eval-only", flags=flags) == 2
        error = capsys.readouterr().err
        assert complaint in error and str(path) in error and error.count("\n") == 1 and len(error) < 500
    path.write_bytes(whole)


def test_save_weights_on_a_run_that_is_done_says_what_would_help(tmp_path, capsys):
    said = "--save-weights does nothing for runs that are done: with another --out they are trained again"
    assert script("--save-weights", "--out", tmp_path / "a") == 0
    assert script("--save-weights", "--out", tmp_path / "a") == 0
    assert said not in capsys.readouterr().out  # the weights are there
    assert script("--out", tmp_path / "b") == 0
    assert script("--save-weights", "--out", tmp_path / "b") == 0
    assert said in capsys.readouterr().out
    assert not list((tmp_path / "b").glob("*/*.pt"))


# ------------------------------------------------------------------------------------------- a new method


def test_another_norm_is_a_row_and_a_line(tmp_path):
    """Group norm, by exactly the lines in README.md."""
    codes = re.findall(r"`([^`]+)`", README[README.index("- **A method**") :])
    row, line = (code for code in codes if '"group"' in code)
    places = {
        '    "none": Method(),\n': f"    {row},\n",
        '    if method.norm == "batch":\n        return Ghost': f"    {line}\n",
    }
    for path in HERE.glob("*.py"):
        shutil.copy(path, tmp_path)
    text = (tmp_path / "common.py").read_text()
    for place, new in places.items():
        assert text.count(place) == 1
        text = text.replace(place, new + place)
    (tmp_path / "common.py").write_text(text)
    command = [sys.executable, "wrn_cifar.py", *f"{QUICK} --bs 500 --train-size 1000 --epochs 1".split()]
    command += ["--init", "gn", "--lr", "2^-2", "--out", "results"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    affine = 2 * (16 + 16 + 16 + 32 + 32 + 64 + 64)  # two for each channel of each norm
    assert f"wrn10-1 gn, {77_370 + affine:,} parameters, 1,000 images of 10 classes" in done.stdout
    name = "wrn10-1_gn_bs500_lr2^-2_ep1_trainsize1000_s00"  # 500 is no multiple of 64: no ghost batches
    assert list(all_records(tmp_path / "results")) == [name]


def test_a_row_with_another_alpha_is_trained_with_it(monkeypatch):
    monkeypatch.setitem(common.METHODS, "one", common.Method(scalar=True, alpha=1.0))
    monkeypatch.setattr(wrn_cifar, "INITS", ["one"])
    for flags, alpha, suffix in (("", 1.0, ""), ("--alpha 0", 0.0, "_alpha0"), ("--alpha 2", 2.0, "_alpha2")):
        flags = f"--init one --width 1 --amp off {flags}"
        net = wrn_cifar.make_net(point(flags).config((1.0, 0)), 10)
        assert {block.scale.item() for block in net.blocks} == {alpha}
        assert name(flags) == f"wrn16-1_one_bs64_lr2^-2_ep200{suffix}_s00"


# ------------------------------------------------------------------------------------------ command line


def test_status_reads_command_lines(tmp_path, capsys, monkeypatch):
    assert script("--lr", "2^-3", "--out", tmp_path) == 0
    line = f"python wrn_cifar.py {QUICK} --lr 2^-3 --out {tmp_path}"
    capsys.readouterr()
    lines = f"{line} # table1\n\n{line} --wd 0 --seeds 2 # table1\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    assert script("--status", flags="") == 0
    header, counts = capsys.readouterr().out.splitlines()
    assert header == "target     points  failed  runs done  diverged  running  planned"
    assert counts.split() == ["table1", "1/2", "0", "1", "0", "0", "3"]


def test_status_names_lines_that_are_none(capsys, monkeypatch):
    lines = 'python wrn_cifar.py --data "shapes # a\nls -l # b\npython wrn_cifar.py --depth 17 # c\n'
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    assert script("--status", flags="") == 2
    _, a, b, c = capsys.readouterr().out.splitlines()
    assert a.startswith("a ") and "No closing quotation" in a and '--data "shapes' in a
    assert b.split()[0] == "b" and b.endswith("no command line of this project: ls -l")
    assert c.split()[0] == "c" and "argument --depth: should be 6n+4" in c


@pytest.mark.parametrize("together", [1, 2])
def test_a_terminal_shows_how_far_it_is_and_keeps_a_line_for_each_run(tmp_path, together):
    terminal, flags = scripts.Terminal(), f"{QUICK} --epochs 4 --eval-every 2 --seeds 2 --lr 2^-3"
    words = ["--concurrent", together, "--out", tmp_path]
    process = scripts.start(wrn_cifar, flags, *words, log=terminal.path)
    terminal.read_until(lambda: not process.is_alive())
    assert scripts.end(process) == 0
    screen, bars = terminal.screen(), [frame for frame in terminal.frames() if "images/s" in frame]
    assert all(len(bar) <= 80 for bar in bars)
    look = r"\[[01]/2\] epoch \d/4 loss \d\.\d{3} test \d+\.\d% .* [\d.]+k? images/s, [\d:]+ left"
    assert any(re.fullmatch(look, bar.strip()) for bar in bars)
    about = (
        "wrn10-1 zeroinit, 77,709 parameters, 96 images of 10 classes: "
        "B 32, 4 epochs, rate 2^-3, seeds 0 to 1, float32"
    )
    assert screen[:2] == ["loading the images ...", f"{about} on cpu"]
    for seed, line in enumerate(screen[2:4]):
        path = tmp_path / "shapes" / f"wrn10-1_zeroinit_bs32_lr2^-3_ep4_trainsize96_s0{seed}.json"
        final = all_records(tmp_path)[path.stem]["final"]
        result = f"test {final['test_accuracy']:.1%}, loss {final['train_objective']:.3f} ({path})"
        assert line == f"wrn10-1 zeroinit B 32 2^-3 seed {seed}: {result}"
    assert screen[4] == f"all is done (2 runs): `python plot.py {tmp_path}` makes the report"
    assert not any("images/s" in line for line in screen)


def test_what_was_there_already_has_its_line_too(tmp_path, capsys):
    assert script("--seeds", 2, "--out", tmp_path) == 0
    first = [line for line in capsys.readouterr().out.splitlines() if ".json)" in line]
    assert script("--seeds", 3, "--out", tmp_path) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if ".json)" in line]
    assert lines[:2] == first and len(lines) == 3 and "seed 2: test" in lines[2]


def test_all_flags_are_said_with_verbose_only(tmp_path, capsys):
    for more in ([], ["--verbose"]):
        assert script("--out", tmp_path, *more) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [json.loads(line)["wd"] for line in lines if line.startswith("{")] == [5e-4] * len(more)


@pytest.mark.parametrize("module", [wrn_cifar, resnet_imagenet])
def test_help_has_examples_and_no_empty_defaults(module, capsys):
    assert scripts.run(module, "--help") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert said.count(f" {module.__name__}.py ") >= 2
    assert "None" not in said and "(default: False)" not in said
    assert "(default: zeroinit)" in said and "[the optimum to expect]" in said


def test_closed_streams_do_not_end_a_run(tmp_path):
    """As those of some daemons."""
    words = sys.executable, HERE / "wrn_cifar.py", *QUICK.split(), "--out", tmp_path, "--dry-run"
    assert subprocess.run(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *words]).returncode == 0


def test_a_reader_that_goes_away_does_not_end_a_run(tmp_path):
    """As the `head` in `wrn_cifar.py ... | head`."""
    os.mkfifo(pipe := tmp_path / "pipe")
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    process = scripts.start(wrn_cifar, f"{QUICK} --seeds 3", "--out", tmp_path, log=pipe)
    while not select.select([reader], [], [], 1)[0]:
        pass
    os.close(reader)
    assert scripts.end(process) == 0
    assert len(all_records(tmp_path)) == 3
