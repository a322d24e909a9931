"""speed.py: its figures on tiny nets, and its arithmetic by hand. How fast anything is, is not tested."""

import json
import sys

import pytest
import torch

import common
import runner
import speed
import wrn_cifar


def row(method, bs, engine, rate, precision="off", runs=1):
    return {
        "method": method,
        "bs": bs,
        "engine": engine,
        "images_per_second": rate,
        "precision": precision,
        "runs": runs,
    }


def test_table_and_record(tmp_path, monkeypatch, capsys):
    flags = "--depth 10 --width 1 --methods bn none --batches 4 72 --rounds 2 --seconds 0 --images 200 --device cpu"
    monkeypatch.setattr(sys, "argv", ["speed.py", *flags.split(), "--amp", "off", "--out", str(tmp_path)])
    assert runner.exit_code(speed.main) == 0
    (path,) = tmp_path.glob("speed/*.json")
    record = json.loads(path.read_text())
    assert (record["kind"], record["model"], record["cost"]) == ("speed", "wrn10-1", [])
    assert {(r["method"], r["bs"], r["engine"]) for r in record["rows"]} == {
        (method, bs, engine) for method in ("bn", "none") for bs in (4, 72) for engine in ("plain", "ours")
    }
    for r in record["rows"]:
        assert 0 < r["low"] <= r["images_per_second"] <= r["high"]
        assert r["ms_per_step"] == pytest.approx(1000 * r["bs"] / r["images_per_second"])
    out = capsys.readouterr().out
    assert "without batch norm against with it" not in out and "crop and flip against PIL" in out
    assert len([line for line in out.splitlines() if line.startswith(("bn ", "none "))]) == 8


def test_the_input_pipeline(tmp_path, capsys):
    from test_resnet_imagenet import make_folder

    folder = make_folder(tmp_path / "photographs")
    args = speed.make_parser().parse_args(["--rounds", "1", "--seconds", "0"])
    found = speed.pipeline(folder, args)
    assert [c["target"] for c in found] == [1.5, 1.7, 1.8] and all(c["value"] > 0 for c in found)
    assert capsys.readouterr().out.count("by torchvision's transforms") == 3
    with pytest.raises(common.UserError, match="holds no photographs"):
        speed.pipeline(tmp_path / "photographs" / "nowhere", args)


def test_ratios():
    rows = [row("bn", 64, "plain", 100), row("bn", 64, "ours", 150), row("bn", 64, "ours", 500, "bf16")]
    rows += [row("zeroinit", 64, "ours", 600, "bf16"), row("none", 64, "ours", 210)]
    rows += [row("crop and flip", 64, engine, rate) for engine, rate in (("ours", 3000), ("PIL", 300))]
    found = speed.checks(rows, torch.device("cpu"))
    found = {c["what"]: (c["value"], c["met"]) for c in found}
    assert found["float32 against the plain loop, B 64"] == (1.5, True)
    assert found["bf16 against the plain loop, B 64"] == (5, True)
    assert found["ZeroInit against batch norm in bf16, B 64"] == (1.2, False)
    assert found["crop and flip against PIL, per core"] == (10, True)
    assert found["without batch norm against with it, B 64 (the paper: roughly 1.4)"] == (1.4, True)
    assert found["a step against its crop and flip, B 64"] == (3000 / 210, False)
    assert not any("B 256" in what for what in found)
    rows += [row("bn", 512, "ours", 9e4), row("bn", 64, "eager", 50)]
    found = {c["what"]: (c["value"], c["met"]) for c in speed.checks(rows, torch.device("cuda"))}
    assert found["captured against eager, B 64"] == (3, True) and found["images/s, B 512"] == (90_000, False)
    assert not any("float32" in what for what in found)


def test_speed_between_and_beyond_the_measured_batch_sizes():
    rows = [row("bn", 16, "ours", 100), row("bn", 64, "ours", 400), row("bn", 64, "plain", 9999)]
    rows += [row("bn", 64, "concurrent", 1600, runs=4)]
    assert speed.speed_at(rows, "bn", 16) == 100 and speed.speed_at(rows, "bn", 8) == 100
    assert speed.speed_at(rows, "bn", 32) == pytest.approx(400)  # half-way in the logarithms
    assert speed.speed_at(rows, "bn", 64) == speed.speed_at(rows, "bn", 8192) == 1600


def test_cost_of_a_target(monkeypatch):
    line = "python wrn_cifar.py --init none --bs 64 --lr 2^-3 2^-4 --seeds 15 --epochs 10 --depth 16 --width 2\n"
    done = type("Done", (), {"stdout": line})
    monkeypatch.setattr(speed.subprocess, "run", lambda *_, **__: done)
    args = speed.make_parser().parse_args([])
    first = speed.cost([row("none", 64, "ours", 1000)], args)[0]
    share = speed.work(16, 2) / speed.work(16, 4)
    assert 0.25 < share < 0.27  # the stem is the same
    assert first == {"target": "fig1", "runs": 30, "hours": pytest.approx(30 * 10 * 50_000 / 1000 * share / 3600)}


def test_the_plain_loop_learns_what_the_engine_does():
    """Both are the same net under the same rule, or their times would not compare."""
    torch.manual_seed(0)
    config, net = speed.make("none", speed.make_parser().parse_args(["--depth", "10", "--width", "1"]), 8)
    before = [p.clone() for p in net.parameters()]
    steps = speed.plain(net, speed.Pictures(*wrn_cifar.shapes(32, 0, 32), *speed.crop_32()), 8, torch.device("cpu"))
    assert [next(steps), next(steps)] == [8, 8]
    assert not any(map(torch.equal, before, net.parameters()))
    assert config["bs"] == 8 and isinstance(net, common.WideResNet)
