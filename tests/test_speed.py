"""speed.py and cost.py: figures on tiny nets, arithmetic by hand. How fast anything is, is not tested."""

import io
import json
import math
import time

import numpy as np
import pytest
import torch
from PIL import Image

import common
import cost
import data
import points
import resnet_imagenet
import runner
import speed
import wrn_cifar
from cost import WHOLE, Row
from records import UserError

CPU, GPU = torch.device("cpu"), torch.device("cuda")
TINY = "--model wrn10-1 --rounds 1 --seconds 0 --device cpu --amp off"


def row(method, bs, engine, speed, precision="float32", runs=1):
    return Row(method, bs, engine, runs, precision, speed, 0.9 * speed, 1.1 * speed)


# ------------------------------------------------------------------------------------------- measurements


def test_record_table_and_picture(tmp_path, capsys):
    words = f"{TINY} --methods bn zeroinit --batches 4 8 --out {tmp_path}".split()
    assert runner.exit_code(lambda: speed.main(words)) == 0
    (path,) = tmp_path.glob("speed/*.json")
    record = json.loads(path.read_text())
    assert (record["kind"], record["model"], record["limit"]) == ("speed", "wrn10-1", {})
    assert record["device"] == points.device_name(CPU) and record["threads"] == torch.get_num_threads()
    rows = [Row(**r) for r in record["rows"]]
    ways = {("bn", "plain"), ("bn", "eager"), ("zeroinit", "eager")}
    assert {(r.method, r.bs, r.engine) for r in rows} == {(m, bs, e) for m, e in ways for bs in (4, 8)}
    assert all(0 < r.low <= r.images_per_second <= r.high and r.runs == 1 for r in rows)
    (check,) = record["checks"]
    assert check["what"].startswith("crop and flip") and check["met"] == (check["value"] >= 8)
    lines = capsys.readouterr().out.splitlines()
    printed = [line.split() for line in lines if line.startswith(("bn ", "zeroinit "))]
    assert [(cells[0], int(cells[1]), cells[2]) for cells in printed] == [
        (r.method, r.bs, r.engine) for r in rows
    ]
    assert float(printed[1][-1]) == pytest.approx(
        rows[1].images_per_second / rows[0].images_per_second, abs=0.01
    )
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_what_was_measured_before_an_interruption_is_kept(tmp_path, monkeypatch):
    measured = iter([[row("bn", 4, "eager", 10)]])

    def measure(*_):
        for rows in measured:
            return rows
        raise KeyboardInterrupt

    monkeypatch.setattr(speed, "measure", measure)
    words = f"{TINY} --batches 4 8 --out {tmp_path}".split()
    assert runner.exit_code(lambda: speed.main(words)) == 75
    (record,) = cost.read_records({tmp_path / "speed"})
    assert record["rows"] == [row("bn", 4, "eager", 10)]


def test_resnet50_is_measured(tmp_path):
    words = (
        "--model resnet50-v2 --image-size 32 --methods zeroinit --batches 2 --rounds 1 --seconds 0 --amp off"
    )
    speed.main([*words.split(), "--device", "cpu", "--out", str(tmp_path)])
    (record,) = cost.read_records({tmp_path / "speed"})
    assert [(r.method, r.bs, r.engine) for r in record["rows"]] == [("zeroinit", 2, "eager")]
    assert record["model"] == "resnet50-v2"


def test_what_is_compared_on_a_gpu():
    def ways(words, bs):
        args = speed.parse_args([*words.split(), "--device", "cpu"])
        args.precision = "bf16"
        return [(r.method, r.engine, r.runs, r.precision) for r in speed.list_rows(args, bs, GPU)]

    captured = ("bn", "captured", 1, "bf16")
    assert ways("--methods bn --short", 16) == [
        ("bn", "plain", 1, "float32"), captured, ("bn", "eager", 1, "bf16"), ("bn", "concurrent", 16, "bf16")
    ]  # fmt: skip
    assert ways("--methods zeroinit --compile", 2048) == [
        ("zeroinit", "captured", 1, "bf16"),
        ("zeroinit", "eager", 1, "bf16"),
        ("zeroinit", "compiled", 1, "bf16"),
        ("zeroinit", "captured", 1, "float32"),
    ]
    assert [WHOLE in {way[0] for way in ways("--short", bs)} for bs in (64, 512)] == [False, True]
    short = speed.parse_args(["--short", "--device", "cpu"])
    assert short.batches == [1, 16, 64, 512] and short.methods == ["bn", WHOLE, "none", "zeroinit"]
    assert ways("--model resnet50-v1 --methods bn", 256) == [
        ("bn", "eager", 1, "bf16"),
        ("bn", "eager", 1, "float32"),
    ]


def test_whole_batch_norm_and_flags_of_a_row():
    args = speed.parse_args(["--model", "wrn16-2", "--device", "cpu"])
    _, flags, config = speed.configure(Row(WHOLE, 128, "compiled", 1, "float32"), args, CPU, seed=3)
    assert flags.compile and (config["init"], config["ghost"], config["seed"]) == ("bn", 128, 3)
    assert (config["depth"], config["width"], config["precision"]) == (16, 2, "float32")


def test_a_rate_includes_the_wait_for_the_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: time.sleep(0.1))
    assert speed.rate(iter([7]), 0, GPU) < 7 / 0.1
    assert speed.rate(iter([7]), 0, CPU) > 7 / 0.1


def test_rounds_warm_up_and_what_does_not_fit(capsys):
    """The first round is slow and left out; the memory is full in the second."""

    def slow_at_first():
        time.sleep(0.3)
        while True:
            yield 1

    def too_large():
        yield 1
        raise torch.OutOfMemoryError("CUDA out of memory")

    args = speed.parse_args(["--rounds", "3", "--seconds", "0", "--device", "cpu"])
    found = speed.interleave({"slow": slow_at_first(), "large": too_large()}, args, CPU)
    assert found.keys() == {"slow"} and found["slow"][1] > 1 / 0.3
    assert found["slow"][1] <= found["slow"][0] <= found["slow"][2]
    assert "large" in capsys.readouterr().out


def test_decoding_is_measured_against_torchvision(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    for name in ("a.jpg", "b.JPEG", ".hidden.jpg"):
        Image.fromarray(pixels).save(tmp_path / name, "JPEG")
    args = speed.parse_args(["--rounds", "1", "--seconds", "0", "--device", "cpu"])
    found = list(speed.decoding(tmp_path, args))
    assert [c["least"] for c in found] == [1.5, 1.7, 1.8]
    assert all(c["value"] > 0 and c["met"] == (c["value"] >= c["least"]) for c in found)
    with pytest.raises(UserError, match="holds no photographs"):
        list(speed.decoding(tmp_path / "nowhere", args))


def test_checks():
    rows = [row("bn", 64, "plain", 100), row("bn", 64, "eager", 150), row("bn", 64, "eager", 500, "bf16")]
    rows += [row("none", 64, "eager", 210), row("none", 64, "eager", 600, "bf16")]
    found = {c["what"]: (c["value"], c["met"]) for c in speed.judge(rows, "cpu")}
    assert found == {
        "float32 against the plain loop, B 64": (1.5, True),
        "bf16 against the plain loop, B 64": (5, True),
        f"{speed.NORM}, B 64": (1.2, False),
    }
    rows = [row("bn", 1, engine, r) for engine, r in (("eager", 20), ("captured", 90), ("concurrent", 500))]
    rows += [row("bn", 512, "captured", 59_999), row(WHOLE, 512, "captured", 60_000)]
    found = {c["what"]: (c["value"], c["met"]) for c in speed.judge(rows, "cuda")}
    assert found == {
        "captured against eager, B 1": (4.5, False),
        "concurrent against in turn, B 1": (pytest.approx(5.56, abs=0.01), True),
        "images/s, B 512": (59_999, False),
        "ghost batches against the whole batch, B 512": (pytest.approx(1.0, abs=1e-4), True),
    }


def test_limit_by_memory_traffic(monkeypatch):
    """A GPU that copies 2.23 TB/s trains at most 100,000 images/s with batch norm, 22.3 MB each."""
    monkeypatch.setattr(speed, "rate", lambda *_: 2.23e12)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: torch.zeros(1))
    limits = speed.traffic_limits(CPU)
    assert limits["bn"] == pytest.approx(100_000) and limits["without norm"] == pytest.approx(159_286, abs=1)


def test_the_plain_loop_trains_the_same_net(monkeypatch):
    """Both loops have the same net, or their times would not compare; the plain one has no ghost batches."""
    nets = []
    monkeypatch.setattr(wrn_cifar, "WideResNet", lambda **k: nets.append(common.WideResNet(**k)) or nets[-1])
    args, pictures = speed.parse_args(TINY.split()), speed.Pictures(*data.shapes(200, 0, 32))
    images = data.Images("shapes", data.shapes(200, 0, 32), data.shapes(8, 1, 32), CPU, 10)
    steps = speed.plain(Row("bn", 128, "plain", 1, "float32"), args, images, pictures)
    assert [next(steps), next(steps)] == [128, 128]
    assert next(speed.ours(Row("bn", 128, "eager", 1, "float32"), args, images)) == 128
    theirs, mine = nets
    assert [p.shape for p in theirs.parameters()] == [p.shape for p in mine.parameters()]
    assert all(p.grad.abs().sum() > 0 for p in theirs.parameters())
    assert (theirs.norm.ghost, mine.norm.ghost) == (128, 64)


# -------------------------------------------------------------------------------------------------- costs


def write_record(folder, model, rows, made="2026-01-01 00:00:00 UTC", device=None, name=None):
    """A record of speed.py; the work of its net is known from a formula that is not the code's."""
    work = {"wrn16-4": wide_resnet_work(4), "resnet50-v2": 4.09e9}[model]
    record = {"kind": "speed", "made": made, "model": model, "multiplications": work}
    record |= {"device": device or points.device_name(CPU), "rows": [vars(r) for r in rows]}
    (folder / "speed").mkdir(parents=True, exist_ok=True)
    (folder / "speed" / f"{name or model}.json").write_text(json.dumps(record))


def wide_resnet_work(k, size=32):
    """Multiplications of Wide-ResNet 16-k: a stem, three groups of two blocks, a projection in each."""
    total, inputs = 27 * 16 * size**2, 16
    for group, outputs in enumerate((16 * k, 32 * k, 64 * k)):
        pixels = (size >> group) ** 2
        total += pixels * (9 * inputs * outputs + 3 * 9 * outputs**2 + inputs * outputs * (inputs != outputs))
        inputs = outputs
    return total


def cost_of(folder, capsys, *lines):
    """What the costs of lines are: {target: (points, runs, hours, runs, hours)}, and the lines below."""
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        cost.cost(folder / "speed")
    _, head, *rest = capsys.readouterr().out.splitlines()
    assert head.split() == ["target", "points", "runs", "hours", "runs", "hours"]
    table = [line.replace(",", "").split() for line in rest if len(line.split()) == 6]
    numbers = {cells[0]: [math.nan if c == "?" else float(c) for c in cells[1:]] for cells in table}
    return numbers, rest[len(table) :]


def test_work_of_nets():
    wrn = wrn_cifar.make_point(wrn_cifar.parse_args(["--depth", "16", "--width", "4", "--device", "cpu"]))
    assert cost.multiplications(wrn_cifar, wrn.config((1.0, 0)), 32) == wide_resnet_work(4)
    v1 = resnet_imagenet.make_point(
        resnet_imagenet.parse_args(["--arch", "v1", "--data", "shapes", "--device", "cpu"])
    )
    found = cost.multiplications(resnet_imagenet, v1.config((1.0, 0)), 224)
    assert found == pytest.approx(3.8e9, rel=0.02)  # He et al., 2016a, table 1


def test_cost_of_the_full_protocol(tmp_path, capsys):
    """Two cells that were measured and one that was not; a run is 200 epochs of 50,000 images, 10^7."""
    write_record(tmp_path, "wrn16-4", [row("bn", 64, "eager", 100), row("zeroinit", 64, "eager", 200)])
    line = "wrn_cifar.py --init {} --bs 64 --seeds 15 --search best --amp off --device cpu # {}"
    wanted = [line.format(*words) for words in (("bn", "fig1"), ("zeroinit", "table1"), ("scalar", "table1"))]
    found, notes = cost_of(tmp_path, capsys, *wanted, line.format("zeroinit", "fig1"))
    # seven rates; "best" has a seed of each, then all 15 at three rates for each of two metrics at most
    best, every, hours = 7 + 2 * 3 * 14, 7 * 15, 1e7 / 3600
    bn, zero = hours / 100, hours / 200
    assert found["table1"] == pytest.approx(
        [2, 2 * best, 2 * best * zero, 2 * every, 2 * every * zero], abs=0.1
    )
    assert found["fig1"] == pytest.approx(
        [2, 2 * best, best * (bn + zero), 2 * every, every * (bn + zero)], abs=0.1
    )
    assert found["all"][:2] == [3, 3 * best]  # zeroinit counts once
    assert found["all"][4] == pytest.approx(every * (bn + 2 * zero), abs=0.1)
    (note,) = notes
    assert "wrn16-4.json" in note and points.device_name(CPU) in note


def test_cost_of_a_reduced_protocol(tmp_path, capsys):
    """Flags that a user appends to a sweep: epochs, width, training images, seeds; 196 updates of 64."""
    write_record(tmp_path, "wrn16-4", [row("none", 64, "eager", 10)])
    flags = "--epochs 5 --width 1 --train-size 2500 --seeds 3 --amp off --device cpu"
    found, _ = cost_of(tmp_path, capsys, f"wrn_cifar.py --init none --bs 64 --search best {flags} # table1")
    hours = math.ceil(5 * 2500 / 64) * 64 / 10 * wide_resnet_work(1) / wide_resnet_work(4) / 3600
    assert found["table1"] == pytest.approx([1, 7 + 6 * 2, 19 * hours, 7 * 3, 21 * hours], abs=0.05)
    flags = "--lr 2^-4 2^-3 --seeds 3 --epochs 100 --data shapes --amp off --device cpu"
    exact = f"wrn_cifar.py --init none --bs 64 {flags}"
    found, _ = cost_of(tmp_path, capsys, exact)
    hours = 100 * 4096 / 10 * wide_resnet_work(4, 16) / wide_resnet_work(4) / 3600
    assert found["these"] == pytest.approx([1, 6, 6 * hours, 6, 6 * hours], abs=0.05)


def test_cost_by_records_beside_the_results(tmp_path, capsys):
    write_record(tmp_path / "mine", "wrn16-4", [row("none", 64, "eager", 100)])
    line = "wrn_cifar.py --init none --bs 64 --epochs 18 --amp off --device cpu"
    found, _ = cost_of(tmp_path, capsys, f"{line} --out {tmp_path}/mine")
    assert found["these"][2] == pytest.approx(18 * 50_000 / 100 / 3600, abs=0.05)
    with pytest.raises(UserError, match="no record tells the speed of --init bn of wrn in float32"):
        cost_of(tmp_path, capsys, f"{line} --init bn --out {tmp_path}/mine")


def test_cost_of_resnet50(tmp_path, capsys):
    """Eight ranks have 128 of 1024 images each; hours are of one device; twice the side is fourfold work."""
    line = "resnet_imagenet.py --arch v2 --init bn --bs 1024 --search best --amp off --device cpu"
    wrn = "wrn_cifar.py --init bn --bs 64 --epochs 1 --amp off --device cpu # table1"
    write_record(tmp_path, "wrn16-4", [row("bn", 64, "eager", 100)])
    found, notes = cost_of(tmp_path, capsys, f"{line} # table4", wrn)
    assert found["table4"] == pytest.approx([1, 5, math.nan, 5, math.nan], nan_ok=True)
    assert found["table1"][2] == pytest.approx(50_000 / 100 / 3600, abs=0.05) and math.isnan(found["all"][2])
    assert notes[0].startswith("?: no record tells the speed of resnet50")
    assert "`python speed.py --model resnet50-v2`" in notes[0]
    rows = [row("bn", bs, "eager", images) for bs, images in ((64, 40), (128, 50))]
    write_record(tmp_path, "resnet50-v2", rows)
    lines = [
        f"torchrun --nproc_per_node=8 {line}",
        f"torchrun --nproc_per_node=8 {line} --image-size 448 # large",
    ]
    found, _ = cost_of(tmp_path, capsys, *lines)
    trained = math.ceil(90 * 1_281_167 / 1024) * 1024
    hours = 5 * trained / 50 / 3600
    assert found["these"] == pytest.approx([1, 5, hours, 5, hours], rel=0.001)
    assert found["large"] == pytest.approx([1, 5, 4 * hours, 5, 4 * hours], rel=0.001)


def test_records_of_other_devices_and_broken_ones(tmp_path, capsys):
    line = "wrn_cifar.py --init bn --bs 64 --amp {} --device cpu"
    write_record(tmp_path, "wrn16-4", [row("bn", 64, "eager", 100)], device="NVIDIA H100")
    (tmp_path / "speed" / "old.json").write_text('{"kind": "speed", "rows": [{"precision": "off"}]}')
    with pytest.raises(UserError, match=r"wrn16-4.json is of NVIDIA H100\): `python speed.py` measures it"):
        cost_of(tmp_path, capsys, line.format("off"))
    assert "old.json is not used" in capsys.readouterr().err
    for day, images in ((2, 20), (3, 10), (1, 40)):
        made = f"2026-02-0{day} 00:00:00 UTC"
        write_record(tmp_path, "wrn16-4", [row("bn", 64, "eager", images)], made, name=str(day))
    found, notes = cost_of(tmp_path, capsys, line.format("off"))  # the newest says 10 images/s
    assert found["these"][2] == pytest.approx(1e7 / 10 / 3600, abs=0.1) and "3.json" in notes[0]
    with pytest.raises(UserError, match=r"speed\.py --amp bf16`"):
        cost_of(tmp_path, capsys, line.format("bf16"))
    with pytest.raises(UserError, match="no command line of this project: python nothing"):
        cost_of(tmp_path, capsys, "python nothing")
    with pytest.raises(UserError, match="no command lines"):
        cost_of(tmp_path, capsys)


def speed_of(rows, words, bs):
    flags = wrn_cifar.parse_args([*words.split(), "--amp", "off", "--device", "cpu", "--bs", str(bs)])
    return cost.speed_of({"rows": rows}, wrn_cifar.make_point(flags).config((1.0, 0)), flags, bs)


def test_speed_between_and_beyond_the_measured_batch_sizes():
    rows = [row("bn", 16, "eager", 100), row("bn", 64, "eager", 400), row("bn", 64, "plain", 9999)]
    rows += [
        row("bn", 64, "concurrent", 1600, runs=4),
        row("bn", 64, "compiled", 5000),
        row("bn", 64, "captured", 7, "bf16"),
    ]
    assert [speed_of(rows, "--init bn", bs) for bs in (8, 16, 64, 8192)] == pytest.approx(
        [100, 100, 1600, 1600]
    )
    assert speed_of(rows, "--init bn", 32) == pytest.approx(400)  # half-way in the logarithms
    assert speed_of(rows, "--init bn --eager", 64) == pytest.approx(400)
    assert speed_of(rows, "--init bn --compile", 64) == pytest.approx(5000)
    assert speed_of(rows, "--init none", 64) is None


def test_speed_of_methods_that_are_not_measured():
    rows = [row(method, 64, "eager", n + 1) for n, method in enumerate(("bn", "none", "zeroinit", "fixup"))]
    like = {"biases": 3, "dropout": 2, "scalar": 3, "biases+dropout": 3, "zeroinit-nodropout": 3, "fixup": 4}
    assert {m: speed_of(rows, f"--init {m}", 64) for m in like} == pytest.approx(like)
    rows += [row("bn", 1, "eager", 1), row("bn", 1024, "eager", 80), row(WHOLE, 1024, "eager", 16)]
    assert speed_of(rows, "--init bn --ghost 0", 1024) == pytest.approx(16)
    assert speed_of(rows, "--init bn --ghost 0", 256) == pytest.approx(4)  # from 1 at 64 to 16 at 1024
    assert speed_of(rows, "--init bn", 1024) == pytest.approx(80)
