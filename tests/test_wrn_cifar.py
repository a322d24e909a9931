"""wrn_cifar.py as a user meets it: flags, records, repeated commands, the search, bad input."""

import json
import sys
from pathlib import Path

import pytest
import scripts
from scripts import all_records, computed, make_folder, results

import data
import runner
import wrn_cifar

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
        "ghost": None, "dropout": 0.6, "alpha": 0.0, "wd": 5e-4, "momentum": 0.9, "l2_all": False,
        "scalar_lr": 1.0, "base_init": "lecun", "pad_mode": "zeros", "train_size": 96,
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
    assert record["images_per_second"] > 0 and record["environment"]["device"] == "cpu"


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
    changes += "--scalar-lr 0.1,--pad-mode reflect,--train-size 50,--base-init he-in,--momentum 0.5,"
    changes += "--seed 1,--alpha 0.1,--amp bf16"
    changed = [name(f"--amp off --device cpu {flags}") for flags in changes.split(",")]
    assert len({*base, *changed}) == len(set(base)) + 17
    assert changed[-1] == "wrn16-4_zeroinit_bs64_lr2^-2_ep200_bf16_s00"
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
--momentum 1; --data mnist; --amp fp8; --train-size 0; --no-such-flag; --device meta
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
        assert script("--depth", 17) == 2
        assert capsys.readouterr().err.count("error: ") == (rank == "0")


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


def test_a_folder_that_cannot_be_written_stops_before_training(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runner, "train", None)
    (tmp_path / "file").write_text("")
    assert script("--out", tmp_path / "file") == 2  # (a read-only folder does not stop root)
    assert str(tmp_path / "file") in capsys.readouterr().err


def test_data_sets_have_their_own_folder(tmp_path):
    folder = tmp_path / "My Photos (small)"
    assert point("").folder == Path("results/cifar-10")
    assert point("--data cifar100").folder == Path("results/cifar-100")
    assert point("--data shapes").folder == Path("results/shapes")
    words = ["--data", "folder", "--data-dir", str(folder)]
    assert wrn_cifar.make_point(wrn_cifar.parse_args(words)).folder == Path("results/my-photos-small")
    words += ["--data-name", "CIFAR-10 (JPEG)"]
    assert wrn_cifar.make_point(wrn_cifar.parse_args(words)).folder == Path("results/cifar-10-jpeg")


# ------------------------------------------------------------------------------------------ command line


def test_status_reads_command_lines(tmp_path, capsys, monkeypatch):
    assert script("--lr", "2^-3", "--out", tmp_path) == 0
    line = f"python wrn_cifar.py {QUICK} --lr 2^-3 --out {tmp_path}"
    capsys.readouterr()
    monkeypatch.setattr(sys, "stdin", [f"{line} # table1\n", "\n", f"{line} --wd 0 --seeds 2 # table1\n"])
    assert script("--status", flags="") == 0
    assert capsys.readouterr().out.split() == ["table1", "1/2", "1", "0", "0", "0", "3"]
