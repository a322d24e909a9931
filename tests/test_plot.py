"""The statistics of plot.py against cases worked out by hand, and its report from made-up records."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import plot

PLOT = Path(plot.__file__)
NOTHING = (None, None)  # what a diverged run reaches


def write_run(folder, init="zeroinit", rate=-2, seed=0, reached=(0.9, 0.2), **options):
    """Write the record of one run at the learning rate 2^rate that reached a (test accuracy, training loss)."""
    base = {"depth": 16, "width": 4, "bs": 64, "epochs": 200, "wd": 5e-4, "data": "CIFAR-10", "fingerprint": "0" * 16}
    o = base | {"dropout": 0.6 if init in ("dropout", "biases+dropout", "zeroinit") else 0.0} | options
    ghost = options.get("ghost", min(64, o["bs"])) if init == "bn" else None
    config = {"model": "wrn", "init": init, "lr": 2.0**rate, "seed": seed, "ghost": ghost, "momentum": 0.9}
    config |= {"l2_all": False, "scalar_lr": 1.0, "base_init": "lecun", "pad_mode": "zeros", "train_size": None}
    config |= {key: o[key] for key in ("depth", "width", "bs", "epochs", "dropout", "wd", "data")}
    accuracy, loss = reached
    entry = {"epoch": 1, "lr": 2.0**rate, "train_loss": 2.0, "l2": 0.1, "train_accuracy": 0.3, "seconds": 1.0}
    record = {
        "config": config,
        "status": "diverged" if accuracy is None else "done",
        "history": [] if accuracy is None else [entry, entry | {"epoch": 2, "test_accuracy": accuracy}],
        "final": {"test_accuracy": accuracy, "train_loss": loss and loss / 2, "train_objective": loss},
        "data": {"name": o["data"], "fingerprint": o["fingerprint"], "train_images": 50000, "test_images": 10000},
        "environment": {"torch": "2.14", "device": "cpu", "precision": "bf16", "threads": 1, "commit": "abc1234"},
    }
    extra = f"_ghost{ghost}" if init == "bn" and ghost != min(64, o["bs"]) else ""
    extra += f"_wd{o['wd']:g}" if o["wd"] != 5e-4 else ""
    name = f"wrn{o['depth']}-{o['width']}_{init}_bs{o['bs']}_lr2^{rate}_ep{o['epochs']}{extra}_s{seed:02d}.json"
    path = Path(folder) / o["data"].lower().replace(" ", "-") / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))
    return path


def write_grid(folder, init="zeroinit", best=-2, accuracy=0.9, loss=0.2, seeds=1, noise=0.0, **options):
    """Write three learning rates around the best; of n seeds the i-th reaches i * noise less than the accuracy."""
    for rate in (best - 1, best, best + 1):
        for seed in range(seeds):
            worse = seed * noise + 0.01 * (rate != best)
            write_run(folder, init, rate, seed, (accuracy - worse, loss + worse), **options)


def sections(folder):
    return plot.make_sections(plot.read_records(Path(folder))[0])


def only_grid(folder):
    (section,) = sections(folder)
    (grid,) = section.grids
    return grid


def run_plot(*arguments, **environment):
    command = [sys.executable, str(PLOT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


# ---------------------------------------------------------------------------------------------------------- statistics


def runs(*reached):
    """Records with no more in them than the statistics read."""
    keys = ("test_accuracy", "train_objective")
    final = [dict(zip(keys, one, strict=True)) for one in reached]
    return [{"status": "diverged" if one["test_accuracy"] is None else "done", "final": one} for one in final]


def test_best_12_of_15_for_each_metric():
    fifteen = runs(*[(0.01 * i, 1.0 * i) for i in range(1, 16)])  # the best accuracy has the worst loss
    mean, std, kept = plot.mean_of_best(fifteen, plot.ACCURACY)
    assert (mean, std, kept) == (pytest.approx(0.095), pytest.approx(0.0360555, abs=1e-7), 12)  # 0.04 to 0.15
    mean, std, kept = plot.mean_of_best(fifteen, plot.LOSS)
    assert (mean, std, kept) == (pytest.approx(6.5), pytest.approx(3.60555, abs=1e-5), 12)  # 1 to 12


@pytest.mark.parametrize(
    "n, kept", [(1, 1), (2, 2), (3, 3), (4, 4), (5, 4), (6, 5), (9, 8), (10, 8), (15, 12), (20, 16)]
)
def test_how_many_are_kept(n, kept):
    assert plot.mean_of_best(runs(*[(0.5, 1.0)] * n), plot.ACCURACY)[2] == kept


def test_diverged_runs_are_the_worst():
    twelve = [(0.9, 0.2)] * 6 + [(0.8, 0.4)] * 6
    for metric, mean, std in ((plot.ACCURACY, 0.85, 0.0522233), (plot.LOSS, 0.3, 0.1044466)):
        assert plot.mean_of_best(runs(*twelve, *[NOTHING] * 3), metric)[:2] == (
            pytest.approx(mean),
            pytest.approx(std, abs=1e-7),
        )
        assert math.isnan(plot.mean_of_best(runs(*twelve[1:], *[NOTHING] * 4), metric)[0])


def test_optimum_bracket_and_the_form_of_the_paper(tmp_path):
    for rate, accuracies in {-3: (0.94, 0.94), -2: (0.94, 0.96), -1: (0.93, 0.93)}.items():
        for seed, accuracy in enumerate(accuracies):
            write_run(tmp_path, rate=rate, seed=seed, reached=(accuracy, 0.2))
    best = plot.optimum(only_grid(tmp_path), plot.ACCURACY)
    # the mean 0.95 has a standard deviation of 0.0141, so that 0.94 is tied with it and 0.93 is not
    assert (best.rate, best.tied, best.value) == (0.25, [0.125, 0.25], "95.0 ± 1.4")
    assert (best.bracketed, best.kept, best.total, best.edge) == ("2^-2 (2^-3 – 2^-2)", 2, 2, "")


def test_one_run_has_no_deviation_and_no_bracket(tmp_path):
    for rate in (-3, -2, -1):
        write_run(tmp_path, rate=rate, reached=(0.9 if rate > -3 else 0.8, 0.2))
    best = plot.optimum(only_grid(tmp_path), plot.ACCURACY)
    assert (best.std, best.tied, best.value, best.bracketed) == (
        None,
        [0.25],
        "90.0",
        "2^-2",
    )  # the lower of two equals


def test_a_diverged_rate_is_never_the_optimum(tmp_path):
    for seed in range(5):
        write_run(tmp_path, rate=-2, seed=seed, reached=(0.5, 0.5))
        write_run(tmp_path, rate=-1, seed=seed, reached=(0.9, 0.1) if seed < 3 else NOTHING)  # one of the best four
    assert [plot.optimum(only_grid(tmp_path), metric).rate for metric in (plot.ACCURACY, plot.LOSS)] == [0.25, 0.25]


def test_accuracy_and_loss_have_their_own_optimum(tmp_path):
    for rate, reached in {-3: (0.7, 0.4), -2: (0.9, 0.3), -1: (0.8, 0.1), 0: (0.6, 0.2)}.items():
        write_run(tmp_path, rate=rate, reached=reached)
    grid = only_grid(tmp_path)
    assert (plot.optimum(grid, plot.ACCURACY).power, plot.optimum(grid, plot.LOSS).power) == ("2^-2", "2^-1")
    assert plot.next_rates(grid) == []


@pytest.mark.parametrize(
    "reached, tried_next",
    [
        ({-3: (0.9, 0.2), -2: (0.8, 0.1), -1: (0.7, 0.3)}, [-4]),  # the accuracy is best at the lowest rate
        ({-3: (0.7, 0.2), -2: (0.8, 0.3), -1: (0.7, 0.1)}, [0]),  # the loss is best at the highest
        ({-3: (0.9, 0.3), -2: (0.8, 0.2), -1: (0.7, 0.1)}, [-4, 0]),
        ({-3: (0.9, 0.3)}, [-4, -2]),
        ({-3: (0.8, 0.3), -2: (0.9, 0.2), -1: NOTHING}, []),  # a rate that diverged was tried
        ({-3: NOTHING, -2: (0.9, 0.2), -1: NOTHING}, []),
        ({-3: NOTHING, -2: NOTHING}, [-4]),
    ],
)
def test_edges(tmp_path, capsys, monkeypatch, reached, tried_next):
    for rate, numbers in reached.items():
        write_run(tmp_path, "bn", rate, reached=numbers)
    monkeypatch.setattr(sys, "argv", ["plot.py", str(tmp_path), "--edges"])
    plot.main()
    expected = "".join(f"cifar-10/wrn16-4_bn_bs64_ep200\t2^{rate}\n" for rate in tried_next)
    assert capsys.readouterr() == (expected, "")


def test_learning_rates_that_are_no_powers_of_two():
    assert [plot.power(rate) for rate in (0.25, 1.0, 16, 0.3, 1e-5)] == ["2^-2", "2^0", "2^4", "0.3", "1e-05"]


# ------------------------------------------------------------------------------------------------- grids and sections


@pytest.mark.parametrize(
    "init, options, method",
    [
        ("bn", {"bs": 16}, "bn"),  # a ghost batch of 16 is the whole batch as well
        ("bn", {"bs": 256}, "bn"),
        ("bn", {"bs": 256, "ghost": 256}, "bn over the batch"),
        ("bn", {"bs": 256, "ghost": 128}, None),
        ("zeroinit", {}, "zeroinit"),
        ("zeroinit", {"wd": 0.0}, "zeroinit without L2"),
        ("zeroinit", {"wd": 0.001}, None),
        ("zeroinit", {"dropout": 0.3}, None),
        ("none", {"wd": 0.0}, None),
        ("fixup", {}, "fixup"),
        ("another", {}, None),
    ],
)
def test_which_method_a_grid_is(tmp_path, init, options, method):
    write_run(tmp_path, init, **options)
    assert only_grid(tmp_path).method == method


def test_one_section_for_each_protocol(tmp_path):
    for options in ({}, {"bs": 128}, {"depth": 100}, {"wd": 0.0}):  # these belong together
        write_run(tmp_path, **options)
    for options in ({"width": 2}, {"epochs": 5}, {"data": "shapes"}, {"data": "A", "fingerprint": "a" * 16}):
        write_run(tmp_path, **options)
    write_run(tmp_path, data="A", bs=128, fingerprint="b" * 16)
    assert {section.title: len(section.grids) for section in sections(tmp_path)} == {
        "A, width 4, 200 epochs, images aaaaaaaa": 1,
        "A, width 4, 200 epochs, images bbbbbbbb": 1,
        "CIFAR-10, width 2, 200 epochs": 1,
        "CIFAR-10, width 4, 200 epochs": 4,
        "CIFAR-10, width 4, 5 epochs": 1,
        "shapes, width 4, 200 epochs": 1,
    }


def test_batch_normalization_in_figures_1_and_3(tmp_path):
    for bs in (8, 16, 64, 256, 2048):
        write_run(tmp_path, "bn", bs=bs, reached=(bs / 10000, 1.0))
    write_run(tmp_path, "bn", bs=256, ghost=256, reached=(0.9, 1.0))
    (section,) = sections(tmp_path)
    lines = [{bs: best.mean for bs, best in section.line(figure, plot.ACCURACY, "bn").items()} for figure in (1, 3)]
    assert lines == [
        {16: 0.0016, 64: 0.0064, 256: 0.0256, 2048: 0.2048},
        {8: 0.0008, 16: 0.0016, 64: 0.0064, 256: 0.9},
    ]
    assert [section.has_figure(number) for number in (1, 2, 3, 4)] == [True, True, True, True]


def test_no_figure_3_from_the_runs_of_figure_1_alone(tmp_path):
    for bs in (16, 64, 256):
        write_run(tmp_path, "bn", bs=bs)
    (section,) = sections(tmp_path)
    assert [section.has_figure(number) for number in (1, 2, 3, 4)] == [True, True, False, False]
    write_lines(tmp_path, {"zeroinit": line([0.8] * 3, [0.3] * 3, sizes=(16, 64, 256))})
    assert verdict(tmp_path, "Fig. 3b") == ("not enough runs", "needs the batch sizes of Figure 3")


def test_the_depth_of_the_figures(tmp_path):
    for depth, sizes in ((16, (64,)), (40, (16, 64, 256))):
        for bs in sizes:
            write_run(tmp_path, "bn", depth=depth, bs=bs)
    assert sections(tmp_path)[0].depth == 40
    write_run(tmp_path, "bn", depth=16, bs=128)
    assert sections(tmp_path)[0].depth == 16


# ---------------------------------------------------------------------------------------------------------- bad files


def test_broken_files_are_named_and_left_out(tmp_path):
    good = write_run(tmp_path, seed=0)
    text = good.read_text()
    bad = {
        "empty.json": "",
        "nan_lr2^-2_ep200_s05.json": text.replace('"seed": 0', '"seed": 5').replace('"threads": 1', '"threads": NaN'),
        "truncated.json": text[: len(text) // 2],
        "list.json": "[1, 2]",
        "foreign.json": '{"config": {"lr": 0.1}, "results": []}',
        "binary.json": "\udcff\udcfe",
        "deep.json": "[" * 100_000,
        "wrn16-4_zeroinit_bs64_lr2^-2_ep200_s01.json": text.replace('"train_loss": 2.0', '"train_loss": NaN'),
        "wrn16-4_zeroinit_bs64_lr2^-2_ep200_s02.json": text,  # the seed is 0
        "wrn16-4_zeroinit_bs64_lr2^-3_ep200_s00.json": text,  # the learning rate is 2^-2
        "copy_lr2^-2_ep200_s00.json": text,
        "null_lr2^-2_ep200_s00.json": text.replace('"test_accuracy": 0.9, "train_loss"', '"test_accuracy": null, "x"'),
        "percent_lr2^-2_ep200_s00.json": text.replace('"test_accuracy": 0.9,', '"test_accuracy": 90.0,'),
        "status_lr2^-2_ep200_s00.json": text.replace('"done"', '"running"'),
        "depth_lr2^-2_ep200_s00.json": text.replace('"depth": 16', '"depth": "16"'),
    }
    for name, content in bad.items():
        (good.parent / name).write_bytes(content.encode(errors="surrogateescape"))
    (good.parent / "folder.json").mkdir()
    for ignored in ("report", "logs", "speed"):
        (tmp_path / ignored).mkdir()
        (tmp_path / ignored / "any.json").write_text("{")
    records, problems = plot.read_records(tmp_path)
    names = {name.removeprefix("cifar-10/") for name in problems}
    assert names == {*bad, "folder.json", good.name} - {"copy_lr2^-2_ep200_s00.json"}  # of two copies the first is used
    assert len(records) == 1
    done = run_plot(tmp_path)
    assert done.returncode == 0
    assert len(done.stderr.splitlines()) == 16
    report = (tmp_path / "report" / "REPORT.md").read_text()
    assert all(name in done.stderr and name in report for name in names)


@pytest.mark.parametrize("make", [False, True])
@pytest.mark.parametrize("flags", [(), ("--edges",)])
def test_no_records(tmp_path, make, flags):
    folder = tmp_path / "results"
    if make:
        (folder / "cifar-10").mkdir(parents=True)
    done = run_plot(folder, *flags)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert str(folder) in done.stderr


# --------------------------------------------------------------------------------------------------------------- claims


def verdict(folder, *words):
    """The verdict and numbers of the one claim whose place and statement hold these words, in the only section."""
    (section,) = sections(folder)
    (claim,) = [claim for claim in plot.CLAIMS if all(word in f"{claim[0]} {claim[1]}" for word in words)]
    return plot.judge(section, *claim)


def write_lines(folder, lines, **options):
    """Write grids from {method: {batch size: (test accuracy, training loss, exponent of the optimal rate)}}."""
    for init, line in lines.items():
        for bs, (accuracy, loss, best) in line.items():
            write_grid(folder, init, best, accuracy, loss, bs=bs, **options)


def line(accuracies, losses=None, rates=None, sizes=(16, 64, 256, 1024)):
    losses, rates = losses or [0.2] * len(sizes), rates or [-2] * len(sizes)
    return dict(zip(sizes, zip(accuracies, losses, rates, strict=True), strict=True))


def test_claim_batch_normalization_beats_none(tmp_path):
    lines = {"bn": line([0.95, 0.95, 0.95, 0.94]), "none": line([0.92, 0.92, 0.90, 0.80])}
    write_lines(tmp_path, lines)
    write_grid(tmp_path, "bn", bs=512)  # a batch size of one method only
    found, numbers = verdict(tmp_path, "beats no normalization")
    assert found == "holds"
    assert numbers == (
        "B 16, 64, 256, 1024: Batch Normalization 95.0, 95.0, 95.0, 94.0; "
        "No Normalization 92.0, 92.0, 90.0, 80.0; 1 seed"
    )
    write_grid(tmp_path, "bn", accuracy=0.70, bs=4096)
    write_grid(tmp_path, "none", accuracy=0.71, bs=4096)
    assert verdict(tmp_path, "beats no normalization")[0] == "does not hold"


def test_claim_needs_its_runs_and_a_rate_that_trains(tmp_path):
    write_grid(tmp_path, "bn", bs=16)
    write_grid(tmp_path, "bn", bs=64)
    write_grid(tmp_path, "none", bs=16, accuracy=0.8)
    assert verdict(tmp_path, "beats no normalization")[0] == "not enough runs"
    write_run(tmp_path, "none", bs=64, reached=NOTHING)
    assert verdict(tmp_path, "beats no normalization") == (
        "not enough runs",
        "needs at each batch size a rate at which No Normalization does not diverge",
    )
    write_run(tmp_path, "none", rate=-3, bs=64, reached=(0.8, 1.0))
    found, numbers = verdict(tmp_path, "beats no normalization")
    assert found == "holds"
    assert "80.0, 80.0 (*edge*)" in numbers


@pytest.mark.parametrize(
    "accuracies, expected",
    [((0.95, 0.95, 0.94, 0.90), "holds"), ((0.95, 0.93, 0.92, 0.90), "does not hold"), ((0.9,) * 4, "does not hold")],
)
def test_claim_flat_then_falls(tmp_path, accuracies, expected):
    write_lines(tmp_path, {"bn": line(accuracies), "none": line(accuracies), "zeroinit": line(accuracies)})
    assert verdict(tmp_path, "independent of the batch size")[0] == "not enough runs"  # no standard deviation
    shutil.rmtree(tmp_path / "cifar-10")
    lines = {init: line(accuracies) for init in ("bn", "none", "zeroinit")}
    write_lines(tmp_path, lines, seeds=2, noise=0.002)
    assert verdict(tmp_path, "independent of the batch size")[0] == expected


@pytest.mark.parametrize(
    "bn, zeroinit, expected",
    [
        ((0.95, 0.95, 0.945, 0.9), (0.95, 0.9, 0.8, 0.7), "holds"),  # 256 against 16
        ((0.95, 0.95, 0.9, 0.8), (0.94, 0.94, 0.8, 0.7), "does not hold"),  # 64 against 64
        ((0.95, 0.95, 0.95, 0.95), (0.94, 0.94, 0.94, 0.7), "not enough runs"),  # at least 1024 against 256
        ((0.95, 0.95, 0.9, 0.8), (0.94, 0.8, 0.7, 0.6), "not enough runs"),  # 64 against 16 or less
    ],
)
def test_claim_largest_efficient_batch_size(tmp_path, bn, zeroinit, expected):
    write_lines(tmp_path, {"bn": line(bn), "zeroinit": line(zeroinit)})
    assert verdict(tmp_path, "largest efficient")[0] == expected


@pytest.mark.parametrize("gap, expected", [(0.0014, "holds"), (0.0015, "does not hold")])
def test_claim_within_one_standard_deviation(tmp_path, gap, expected):
    top = 0.95  # two runs 0.002 apart have a standard deviation of 0.00141; the gap at B 1024 does not matter
    write_lines(tmp_path, {"bn": line([top] * 4)}, seeds=2, noise=0.002)
    write_lines(tmp_path, {"zeroinit": line([top - gap] * 3 + [0.5])}, seeds=2, noise=0.002)
    assert verdict(tmp_path, "at most one standard deviation")[0] == expected


@pytest.mark.parametrize("loss, expected", [(0.16, "holds"), (0.20, "does not hold")])
def test_claim_lowest_training_loss(tmp_path, loss, expected):
    lines = {"bn": line([0.9] * 4, [0.15, 0.15, 0.15, loss]), "none": line([0.9] * 4), "zeroinit": line([0.9] * 4)}
    lines["zeroinit"] = line([0.9] * 4, [0.19] * 4)
    write_lines(tmp_path, lines)
    assert verdict(tmp_path, "lowest training loss")[0] == expected


@pytest.mark.parametrize(
    "rates, expected",
    [
        ((-4, -2, 0, 0), "holds"),
        ((-4, -3, 0, 0), "holds"),  # as B^0.5 is still proportional in steps of two
        ((-4, -4, 0, 0), "does not hold"),
        ((-4, -2, 0, 2), "does not hold"),  # does not saturate
        ((-4, -2, 0, 1), "does not hold"),
    ],
)
def test_claim_proportional_then_saturates(tmp_path, rates, expected):
    write_lines(tmp_path, {init: line([0.9] * 4, rates=rates) for init in ("bn", "none", "zeroinit")})
    assert verdict(tmp_path, "proportional to the batch size")[0] == expected


@pytest.mark.parametrize(
    "bn, options, expected",
    [
        (4, {}, "holds"),
        (3, {}, "holds"),
        (2, {}, "does not hold"),
        (4, {"width": 2}, "not enough runs"),
        (4, {"data": "CIFAR-10 (JPEG)"}, "not enough runs"),
        (4, {"epochs": 100}, "not enough runs"),
    ],
)
def test_claim_saturates_at_the_rates_of_the_paper(tmp_path, bn, options, expected):
    sizes, rates = (64, 4096), {"bn": (-1, bn), "none": (-3, -3), "zeroinit": (-2, 1)}
    lines = {init: line([0.9] * 2, rates=pair, sizes=sizes) for init, pair in rates.items()}
    write_lines(tmp_path, lines, **options)
    assert verdict(tmp_path, "saturates at 2^-3")[0] == expected


def test_claim_saturates_needs_large_batches(tmp_path):
    lines = {"bn": (-1, 4), "none": (-3, -3), "zeroinit": (-2, 1)}
    write_lines(tmp_path, {init: line([0.9] * 2, rates=pair, sizes=(64, 2048)) for init, pair in lines.items()})
    assert verdict(tmp_path, "saturates at 2^-3") == ("not enough runs", "needs batch sizes up to 4096")


@pytest.mark.parametrize("figure, ghosts", [("Fig. 2a", (16, 64)), ("Fig. 4a", (4, 16))])
@pytest.mark.parametrize("none, expected", [(-5, "holds"), (-6, "does not hold")])
def test_claim_similar_rates(tmp_path, figure, ghosts, none, expected):
    rates = {"bn": (-3, 0), "none": (none, none), "zeroinit": (-4, -2)}
    write_lines(tmp_path, {init: line([0.9] * 2, rates=pair, sizes=ghosts) for init, pair in rates.items()})
    if figure == "Fig. 4a":  # at B 16 as well
        expected = {"holds": "does not hold"}.get(expected, expected)
    assert verdict(tmp_path, figure, "similar")[0] == expected


def test_claims_on_the_order_of_table_1(tmp_path):
    statements = [statement for place, statement, *_ in plot.CLAIMS if place == "Table 1"]
    assert statements == [
        "ZeroInit has a higher test accuracy than + scalar multiplier",
        "+ scalar multiplier has a higher test accuracy than + biases & dropout",
        "+ biases & dropout has a higher test accuracy than + dropout",
        "+ dropout has a higher test accuracy than No Normalization",
        "No Normalization has a higher test accuracy than + biases",
        "+ scalar multiplier has a lower training loss than ZeroInit",
        "ZeroInit has a lower training loss than + biases",
        "+ biases has a lower training loss than No Normalization",
        "+ biases & dropout has a lower training loss than + dropout",
    ]
    write_grid(tmp_path, "scalar", accuracy=0.940, loss=0.181)
    assert verdict(tmp_path, statements[0])[0] == "not enough runs"
    write_grid(tmp_path, "zeroinit", accuracy=0.944, loss=0.180)
    assert verdict(tmp_path, statements[0]) == ("holds", "B 64: ZeroInit 94.4; + scalar multiplier 94.0; 1 seed")
    assert verdict(tmp_path, statements[5])[0] == "does not hold"


def test_claims_on_depth(tmp_path):
    for depth, accuracy, rate in ((16, 0.935, -1), (1000, 0.946, -2)):
        write_grid(tmp_path, "bn", rate, accuracy, depth=depth, width=2)
        write_grid(tmp_path, "zeroinit", -2, accuracy - 0.003, depth=depth, width=2)
        write_grid(tmp_path, "scalar", -2, 0.5 if depth == 16 else 0.25, depth=depth, width=2)
    assert verdict(tmp_path, "and ZeroInit train very deep") == (
        "holds",
        "depth 16, 1000: Batch Normalization 93.5, 94.6; ZeroInit 93.2, 94.3; 1 seed",
    )
    assert verdict(tmp_path, "over 94%")[0] == "holds"
    assert verdict(tmp_path, "weakly dependent")[0] == "holds"
    assert verdict(tmp_path, "scalar multiplier alone")[0] == "does not hold"  # 25% are not over half of 50%
    assert verdict(tmp_path, "no L2")[0] == "not enough runs"
    write_grid(tmp_path, "bn", -3, 0.94, depth=100, width=2)
    assert verdict(tmp_path, "weakly dependent")[0] == "does not hold"


@pytest.mark.parametrize("plain, expected", [((0.1, 2.3), "holds"), (NOTHING, "holds"), ((0.5, 1.5), "does not hold")])
def test_claim_that_deep_networks_need_either(tmp_path, plain, expected):
    """Also where the tables have another batch size than 64."""
    write_grid(tmp_path, "none", accuracy=0.95, depth=16, bs=16)
    for init in ("bn", "zeroinit"):
        write_grid(tmp_path, init, accuracy=0.9, depth=52, bs=16)
    assert verdict(tmp_path, "not without")[0] == "not enough runs"
    write_run(tmp_path, "none", reached=plain, depth=52, bs=16)
    assert verdict(tmp_path, "not without")[0] == expected


def test_claim_94_percent_is_for_the_network_of_the_paper_only(tmp_path):
    for depth in (16, 1000):
        write_grid(tmp_path, "bn", accuracy=0.95, depth=depth, width=1)
        write_grid(tmp_path, "zeroinit", accuracy=0.95, depth=depth, width=1)
    found, reason = verdict(tmp_path, "over 94%")
    assert (found, reason) == ("not enough runs", "needs the paper's protocol (width 1 instead of 2)")


@pytest.mark.parametrize(
    "small, large, expected", [(0.91, 0.96, "holds"), (0.91, 0.93, "does not hold"), (0.96, 0.96, "does not hold")]
)
def test_claims_on_figure_3(tmp_path, small, large, expected):
    write_lines(tmp_path, {"bn": line([small, 0.94, 0.95], [0.16] * 3, sizes=(1, 8, 64))})
    write_lines(tmp_path, {"zeroinit": line([0.95, 0.95, 0.95, 0.94], sizes=(1, 8, 64, 1024))})
    write_grid(tmp_path, "bn", accuracy=0.2, bs=1024)  # ghost batch normalization is not in Figure 3
    write_grid(tmp_path, "bn", accuracy=large, loss=0.17, bs=1024, ghost=1024)
    assert verdict(tmp_path, "Fig. 3a")[0] == expected
    assert verdict(tmp_path, "Fig. 3b")[0] == "holds"


# --------------------------------------------------------------------------------------------------------------- report


@pytest.fixture(scope="module")
def paper(tmp_path_factory):
    """A small result folder in the paper's protocol, and another protocol beside it, both drawn."""
    folder = tmp_path_factory.mktemp("results")
    fifteen = {"seeds": 15, "noise": 0.001}
    for bs, drop in ((4, 0), (64, 0), (256, 0), (1024, 0.05)):
        write_grid(folder, "bn", -1, 0.96 - drop / 5 - (bs < 8) * 0.1, 0.15, bs=bs, **fifteen)
        write_grid(folder, "none", -4, 0.925 - drop * 2, 0.212, bs=bs, **fifteen)
        write_grid(folder, "zeroinit", -2, 0.9455 - drop, 0.189, bs=bs, **fifteen)
    write_grid(folder, "scalar", -2, 0.9455, 0.181, **fifteen)
    write_grid(folder, "biases", -4, 0.92, 0.205, **fifteen)
    for seed in range(15):
        write_run(folder, "none", -2, seed, NOTHING)
    for depth in (16, 100):
        write_grid(folder, "bn", accuracy=0.6, depth=depth, width=1, epochs=1, data="shapes")
        write_grid(folder, "zeroinit", accuracy=0.5, depth=depth, width=1, epochs=1, data="shapes")
        write_run(folder, "none", -4, depth % 3, NOTHING, depth=depth, width=1, epochs=1, data="shapes")
    (folder / "cifar-10" / "notes.json").write_text("{}")
    done = run_plot(folder)
    assert (done.returncode, len(done.stderr.splitlines())) == (0, 1)
    return folder


def test_report_has_every_claim_and_section(paper):
    text = (paper / "report" / "REPORT.md").read_text()
    for place, statement, *_ in plot.CLAIMS:
        assert f"**, {place}: {statement}. " in text
    claims, wide, shapes = [part for part in text.split("\n# ") if not part.startswith("Files")]
    assert wide.startswith("CIFAR-10, width 4, 200 epochs, 15 seeds\n")
    assert shapes.startswith("shapes, width 1, 1 epoch, 1 seed\n")
    assert "- 645 runs, 15 of them diverged\n" in wide
    assert "- device, precision, torch: cpu, bf16, 2.14; commit abc1234\n" in wide
    assert "*CIFAR-10, width 4, 200 epochs:* B 64, 256, 1024: Batch Normalization" in claims
    assert "CIFAR-10 instead" not in wide
    assert "Not the paper's protocol: data shapes instead of CIFAR-10, epochs 1 instead of 200, width 1" in shapes
    assert text.rstrip().endswith("- cifar-10/notes.json: not used (KeyError: 'config')")


def test_report_tables(paper):
    text = (paper / "report" / "REPORT.md").read_text()
    # the best 12 of the accuracies 0.9455, 0.9445 ... have the mean 0.94 and the standard deviation 0.0036
    rows = """
        | ZeroInit | 94.0 ± 0.4 | 94.4 ± 0.1 | 2^-2 | 0.195 ± 0.004 | 0.189 ± 0.001 | 2^-2 | 12/15 | 0 of 45 |
        | No Normalization | 92.0 ± 0.4 | 92.3 ± 0.3 | 2^-4 | 0.217 ± 0.004 | 0.212 ± 0.004 | 2^-4 | 12/15 | 15 of 60 |
        | + dropout | not run | 93.2 ± 0.1 | not run | not run | 0.226 ± 0.001 | not run | not run | not run |
        | Batch Normalization | 95.4 ± 0.4 | – | 2^-1 | 0.155 ± 0.004 | – | 2^-1 | 12/15 | 0 of 45 |
        | 100 | 64 | ZeroInit | 50.0 | 94.2 ± 0.1 | 2^-2 | 2^-2 | 0.200 | 2^-2 | 1/1 | 0 of 3 |
        | 100 | 64 | No Normalization | diverged | – | at 2^-4 | – | diverged | at 2^-4 | – | 1 of 1 |
    """
    for row in rows.strip().splitlines():
        assert row.strip() in text


def test_report_names_missing_seeds(tmp_path):
    for rate, present in ((-3, (0, 1, 2)), (-2, (0, 2)), (-1, (1,))):
        for seed in present:
            write_run(tmp_path, rate=rate, seed=seed)
    text = "\n".join(plot.what_was_run(sections(tmp_path)[0]))
    assert "wrn16-4_zeroinit_bs64_ep200 lacks at 2^-2 seed 1\n" in text
    assert text.endswith("wrn16-4_zeroinit_bs64_ep200 lacks at 2^-1 seed 0, 2")


def test_report_pictures(paper):
    report = paper / "report"
    pictures = sorted(path.relative_to(report).as_posix() for path in report.glob("*/*.png"))
    kinds = ["rates_test_accuracy", "rates_train_objective"]
    wide = [f"cifar-10-width-4-200-epochs/{name}.png" for name in ("fig1", "fig2", "fig3", "fig4", *kinds)]
    assert pictures == sorted(wide + [f"shapes-width-1-1-epoch/{name}.png" for name in kinds])
    text = (report / "REPORT.md").read_text()
    for name in pictures:
        assert f"({name})" in text
        assert (report / name).read_bytes().startswith(b"\x89PNG")
        assert b"<svg" in (report / name).with_suffix(".svg").read_bytes()[:600]
    assert not list(report.rglob(".*"))  # no temporary file is left


def test_same_bytes_each_time(paper, tmp_path):
    shutil.copytree(paper / "shapes", tmp_path / "results" / "shapes")
    drawn = []
    for seed in ("1", "2"):
        assert run_plot(tmp_path / "results", "--curves", PYTHONHASHSEED=seed).returncode == 0
        report = tmp_path / "results" / "report"
        drawn.append({path.name: path.read_bytes() for path in report.rglob("*") if path.is_file()})
        shutil.rmtree(report)
    assert len(drawn[0]) == 9  # four pictures of two kinds, and the report
    assert drawn[0] == drawn[1]


def test_no_torch_and_for_edges_no_matplotlib(tmp_path):
    write_run(tmp_path)
    code = "import sys, plot; plot.main(); print([name for name in ('torch', 'matplotlib') if name in sys.modules])"
    for flags, imported in (([], "['matplotlib']"), (["--edges"], "[]")):
        command = [sys.executable, "-c", code, str(tmp_path), *flags]
        done = subprocess.run(command, capture_output=True, text=True, cwd=PLOT.parent)
        assert done.stdout.splitlines()[-1] == imported
