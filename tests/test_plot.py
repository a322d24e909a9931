"""Which runs belong where, and the report, its pictures and its tables from planted records."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from planted import Truth, config_of, draw, points, write

import paper
import plot
from paper import NO_L2, PAPER, TARGETS, WHOLE
from records import ACCURACY, LOSS

PLOT = Path(plot.__file__)
FIGURES = ("fig1", "fig2", "fig3", "fig4")
SHAPES = {"data": "shapes", "width": 1, "epochs": 2}


def run_plot(*arguments, **environment):
    command = [sys.executable, str(PLOT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


def sections(truth, **changes):
    return paper.make_sections(draw(0, truth, **changes))


def wide(methods, sizes, depth=16, **truth):
    """Planted points of Wide-ResNets of width 4."""
    truth = {"accuracy": 90.0, "seeds": 1} | truth
    return {("wide", method, depth, bs): Truth(**truth) for method in methods for bs in sizes}


# ------------------------------------------------------------------------------------- methods and sections


@pytest.mark.parametrize(
    "init, bs, changes, method, name",
    [
        ("bn", 16, {}, "bn", "Batch Normalization"),  # a ghost batch of 16 is the whole batch as well
        ("bn", 256, {}, "bn", "Batch Normalization"),
        ("bn", 256, {"ghost": 256}, WHOLE, "Batch Normalization (whole batch)"),
        ("bn", 256, {"ghost": 128}, "bn, ghost 128", "Batch Normalization, ghost 128"),
        ("zeroinit", 64, {"wd": 0.0}, NO_L2, "ZeroInit without L2"),
        ("zeroinit", 64, {"wd": 0.001}, "zeroinit, L2 0.001", "ZeroInit, L2 0.001"),
        ("zeroinit", 64, {"dropout": 0.3}, "zeroinit, dropout 0.3", "ZeroInit, dropout 0.3"),
        ("zeroinit", 64, {"alpha": 0.1}, "zeroinit, alpha 0.1", "ZeroInit, alpha 0.1"),
        ("scalar", 64, {"alpha": 1.0}, "scalar, alpha 1", "+ scalar multiplier, alpha 1"),
        ("none", 64, {"wd": 0.0}, "none without L2", "No Normalization without L2"),
        ("groupnorm", 64, {}, "groupnorm", "groupnorm"),
        ("groupnorm", 64, {"dropout": 0.6}, "groupnorm, dropout 0.6", "groupnorm, dropout 0.6"),
    ],
)
def test_methods_and_their_names(init, bs, changes, method, name):
    found = paper.method_of(config_of("wide", init, 16, bs, **changes))
    assert (found, paper.name_of(found)) == (method, name)


def test_methods_on_imagenet_have_their_own_defaults():
    for init, changes, method in (
        ("bn", {}, "bn"),
        ("bn", {"ghost": 64}, "bn, ghost 64"),
        ("zeroinit", {}, "zeroinit"),
        ("zeroinit", {"dropout": 0.6}, "zeroinit, dropout 0.6"),
    ):
        assert paper.method_of(config_of("v2", init, 50, 1024, **changes)) == method


def test_one_section_for_each_protocol():
    """Methods, depths and batch sizes share one; a precision, budget or data set has one of its own."""
    point = wide(["zeroinit"], (64,))
    others = wide(["bn", "none"], (64, 128)) | wide(["zeroinit, alpha 0.1", NO_L2], (64,), 100)
    records = draw(0, point | others)
    for changes in ({"precision": "bf16"}, {"precision": "fp16"}, {"width": 2}, {"epochs": 5}, {"data": "A"}):
        records += draw(0, point, **changes)
    for run in draw(0, wide(["bn"], (64,)), data="A"):
        records.append(run | {"data": run["data"] | {"fingerprint": "b" * 16}})
    records += draw(0, {("v1", "bn", 50, 256): Truth(75.0, seeds=1)})
    found = {section.title: len(section.grids) for section in paper.make_sections(records)}
    assert found == {
        "CIFAR-10, width 4, 200 epochs": 7,
        "CIFAR-10, width 4, 200 epochs, bf16": 1,
        "CIFAR-10, width 4, 200 epochs, fp16": 1,
        "CIFAR-10, width 2, 200 epochs": 1,
        "CIFAR-10, width 4, 5 epochs": 1,
        "A, width 4, 200 epochs, images 00000000": 1,
        "A, width 4, 200 epochs, images bbbbbbbb": 1,
        "ImageNet, ResNet-50-V1, 90 epochs": 1,
    }


def shown(truth, name, **changes):
    """{method: batch sizes or depths} of what a figure or table shows."""
    (section,) = sections(truth, **changes)
    lines = section.shown(TARGETS[name])
    return {method: [point.x for point in line] for method, line in lines.items()}


def test_batch_normalization_in_figures_1_and_3():
    truth = wide(["bn"], (8, 16, 64, 256, 2048)) | wide([WHOLE], (256,))
    assert shown(truth, "fig1") == {"bn": [16, 64, 256, 2048]}
    assert shown(truth, "fig3") == {WHOLE: [8, 16, 64, 256]}
    own = {key: replace(point, seeds=2) for key, point in truth.items()}
    records = draw(0, own)
    for record in records:
        record["config"]["init"] = "bnscalar"
    (section,) = paper.make_sections(records)
    lines = {name: section.lines(TARGETS[name], ACCURACY) for name in ("fig1", "fig3")}
    lines = {name: {m: [r.x for r in line] for m, line in found.items()} for name, found in lines.items()}
    assert lines["fig1"] == {"bnscalar": [16, 64, 256, 2048]}
    assert lines["fig3"] == {"bnscalar (whole batch)": [8, 16, 64, 256]}


@pytest.mark.parametrize("changes", [{"init": "bnscalar"}, {"wd": 0.001}])
def test_figure_3_of_batch_norm_with_options_of_its_own_is_drawn(changes, tmp_path):
    records = draw(0, wide(["bn"], (4, 16, 64))) + draw(0, wide(["none", "zeroinit"], (4, 16, 64)))
    for record in records[: len(records) // 3]:
        record["config"] |= changes
    path, _ = plot.report(tmp_path, paper.make_sections(records), {}, curves=False)
    assert "(whole batch)" in path.read_text()


def test_figures_1_and_3_need_runs_of_their_own():
    large = wide(["bn", "zeroinit"], (16, 64, 256))
    assert [name for name in FIGURES if shown(large, name)] == ["fig1", "fig2"]
    small = wide(["bn"], (4, 16)) | wide([WHOLE], (256,)) | wide(["zeroinit"], (4, 16, 256))
    assert [name for name in FIGURES if shown(small, name)] == ["fig3", "fig4"]
    assert not shown(wide(["bn", "zeroinit"], (64,)), "fig1")  # a single batch size
    shared = wide(["bn", "none"], (16, 32, 64))
    assert [name for name in FIGURES if shown(shared, name)] == ["fig1", "fig2"]
    assert [name for name in FIGURES if shown(shared | wide(["none"], (8,)), name)] == [*FIGURES]


def test_the_papers_saturation_is_shown_where_rates_saturate():
    for largest in (128, 4096):
        (section,) = sections(wide(["bn", "none", "zeroinit"], (16, largest)))
        panel = plot.figure_panel(section, TARGETS["fig2"], ACCURACY, rates=True)
        marks = {line.method: [(m.x, m.y) for m in line.marks] for line in panel.lines if line.paper}
        here = {"bn": [(4096, 16.0)], "none": [(4096, 0.125)], "zeroinit": [(4096, 2.0)]}
        assert marks == (here if largest == 4096 else {})


@pytest.mark.parametrize("names", [("кошки", "собаки"), ("CIFAR-10 (b)", "cifar-10 B")])
def test_each_section_has_pictures_of_its_own(tmp_path, names):
    records = [run for name in names for run in draw(0, wide(["bn"], (16, 64)), data=name)]
    for run in records:
        run["data"]["fingerprint"] = str(names.index(run["config"]["data"])) * 16
    path, _ = plot.report(tmp_path, paper.make_sections(records), {}, curves=False)
    pictures = re.findall(r"\]\((\S+\.png)\)", path.read_text())
    assert len(pictures) == len(set(pictures)) >= 4 and all((path.parent / it).exists() for it in pictures)


def test_one_name_written_in_two_ways_is_one_section():
    records = draw(0, wide(["bn"], (64,)), data="ImageNet") + draw(0, wide(["none"], (64,)), data="imagenet")
    assert len(paper.make_sections(records)) == 1


def test_a_sweep_that_begins_at_several_points_has_a_report(tmp_path):
    """No method has two depths yet, and no batch size has two methods."""
    deep = wide(["bn"], (64,)) | wide(["zeroinit"], (64,), depth=100)
    large = wide(["bn"], (16, 512)) | wide(["none"], (64, 2048))
    for n, (truth, changes) in enumerate(((deep, SHAPES), (deep, {}), (large, {}), (large, SHAPES))):
        path, _ = plot.report(tmp_path / str(n), sections(truth, **changes), {}, curves=False)
        assert path.exists()


def test_other_methods_appear_with_two_points():
    truth = wide(["bn", "none", "groupnorm", "zeroinit, alpha 0.1"], (16, 64)) | wide(["scalar"], (64,))
    assert list(shown(truth, "fig1")) == ["bn", "none", "groupnorm", "zeroinit, alpha 0.1"]
    assert {"groupnorm", "zeroinit, alpha 0.1", "scalar"} < shown(truth, "table1").keys()
    deep = wide(["bn", "groupnorm", "scalar"], (64,)) | wide(["bn", "groupnorm", "scalar"], (64,), depth=40)
    assert list(shown(deep, "table2", width=1)) == ["bn", "groupnorm"]  # Table 3 has the scalar
    assert list(shown(deep, "table3", width=1)) == ["scalar"]


def test_the_depth_of_the_figures_and_the_batch_size_of_the_tables():
    (section,) = sections(wide(["bn"], (64,)) | wide(["bn"], (16, 64, 256), depth=40))
    assert (section.depth, section.bs) == (40, 64)
    (section,) = sections(wide(["bn"], (16,)) | wide(["bn"], (16,), depth=52))
    assert (section.depth, section.bs) == (16, 16)
    (section,) = sections(wide(["bn", "none", "scalar"], (128,)) | wide(["bn"], (32,)))
    assert section.bs == 128  # a single run hides no table
    deep = [wide(["bn", "none"], (32,), depth=depth) for depth in (16, 40)]
    (section,) = sections(deep[0] | deep[1] | wide(["bn"], (64,)), epochs=20)
    assert section.bs == 32


def test_the_papers_tables_were_copied_twice_without_a_difference():
    truth = points()
    for (table, method, depth, bs), cell in PAPER.items():
        point = truth[{1: "wide", 2: "deep", 3: "deep", 4: "v2", 5: "v1"}[table], method, depth, bs]
        assert cell.accuracy == point.accuracy and (table > 3 or cell.std in (None, point.std))
        assert table != 1 or (cell.loss, cell.loss_std) == (point.loss, point.loss_std)
        assert table not in (2, 3) or cell.rates == (point.rate, *point.tied)
        assert table < 4 or cell.top5 == point.top5
    assert len(PAPER) == 6 + 6 + 6 + 12 + 12


# ------------------------------------------------------------------------------------------------- pictures


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draw rows of panels; returns the figure."""
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda *args, **kw: (figures.append(args[0]), save(*args, **kw)))

    def draw_rows(rows, looks=plot.LOOKS):
        plot.draw(tmp_path, "name", "caption", rows, looks)
        return figures[-1]

    return draw_rows


def height(axes, y):
    """The height of a value in its axes, 0 at the bottom and 1 at the top."""
    return axes.transAxes.inverted().transform(axes.transData.transform((1, y)))[1]


def panel_of(values, metric, lost=()):
    """A panel with a line for each method: its values, and crosses for the methods in `lost`."""
    marks = {m: [plot.Mark(2.0**k, y) for k, y in enumerate(line)] for m, line in values.items()}
    lines = [plot.Line(m, line + [plot.Mark(16.0)] * (m in lost)) for m, line in marks.items()]
    return plot.Panel("", plot.SIZE, metric.name, lines, metric)


def test_small_differences_are_visible_beside_a_collapse(drawn):
    """0.1 of a point is a fiftieth of the height, and so is 0.008 of the training loss."""
    good = {
        "bn": [94.5, 94.5, 94.3, 93.9],
        "zeroinit": [94.4, 94.4, 94.2, 92.5],
        "none": [92.3, 92.0, 60.0, 10.0],
    }
    (axes,) = drawn([[panel_of(good, ACCURACY)]]).axes
    assert height(axes, 94.5) - height(axes, 94.4) > 0.02
    assert 0 < height(axes, 10.0) < height(axes, 60.0) < height(axes, 92.0) < height(axes, 94.5) < 1
    loss = {"bn": [0.150, 0.150, 0.155], "zeroinit": [0.181, 0.189, 0.25], "none": [0.212, 0.5, 2.3]}
    (axes,) = drawn([[panel_of(loss, LOSS)]]).axes
    assert height(axes, 0.189) - height(axes, 0.181) > 0.02
    (axes,) = drawn([[panel_of({"bn": [50.0, 60.0], "none": [55.0, 70.0]}, ACCURACY)]]).axes
    assert height(axes, 60) - height(axes, 55) == pytest.approx(height(axes, 65) - height(axes, 60))


def test_divergence_is_at_the_bad_end_and_each_method_has_its_height(drawn):
    values = {"bn": [0.9, 0.8], "none": [0.7, 0.6], "zeroinit": [0.5, 0.4]}
    for metric, bad in ((ACCURACY, 0.0), (LOSS, 1.0)):
        (axes,) = drawn([[panel_of(values, metric, lost=("bn", "none"))]]).axes
        crosses = [line for line in axes.lines if line.get_marker() == "x"]
        heights = [abs(bad - line.get_ydata()[0]) for line in crosses]
        assert len(set(heights)) == 2 and max(heights) < 0.12
        assert [line.get_color() for line in crosses] == [plot.LOOKS[m].color for m in ("bn", "none")]
        ends = [abs(bad - height(axes, y)) for line in values.values() for y in line]
        assert min(ends) > max(heights) + 0.02  # no mark hides them


def test_panels_with_the_same_labels_can_be_compared(drawn):
    """Where all runs of a panel diverged, it disturbs no other; a loss has another scale than an accuracy."""
    panels = [
        panel_of({"bn": line}, ACCURACY, lost)
        for line, lost in (([80.0], ()), ([20.0, 30.0], ()), ([], "bn"))
    ]
    panels[2] = plot.Panel("", plot.SIZE, ACCURACY.name, [plot.Line("bn", [plot.Mark(2.0**-3)])], ACCURACY)
    high, low, bare, loss = drawn([[*panels, panel_of({"bn": [1.0, 2.0]}, LOSS)]]).axes
    assert high.get_ylim() == low.get_ylim() == bare.get_ylim()
    assert high.get_xlim() == low.get_xlim() == bare.get_xlim() == loss.get_xlim()
    assert loss.get_ylim()[1] < 3
    assert [text.get_text() for text in high.get_xticklabels()] == ["0.125", "1", "2"]


def test_a_single_value_and_rates_between_powers_of_two_have_a_tick(drawn):
    marks = [plot.Mark(rate, 50.0) for rate in (0.3, 0.4)]
    (axes,) = drawn([[plot.Panel("", plot.RATE, "", [plot.Line("none", marks)], ACCURACY)]]).axes
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0.3", "0.4"]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["50"]


def test_marks_at_edges_are_hollow_and_the_optimum_has_a_ring(drawn):
    marks = [plot.Mark(1, 0.5, edge=True), plot.Mark(2, 0.6, best=True), plot.Mark(4, 0.7)]
    (axes,) = drawn([[plot.Panel("", plot.SIZE, "loss", [plot.Line("none", marks)], LOSS)]]).axes
    hollow = [line for line in axes.lines if line.get_markerfacecolor() == "white"]
    rings = [line for line in axes.lines if line.get_marker() == "o"]
    assert [line.get_xdata()[0] for line in hollow] == [1] and [line.get_xdata()[0] for line in rings] == [2]


def test_a_network_at_chance_has_no_optimal_rate():
    """Its best rate is noise and crossed out; what it reaches is shown."""
    noise = wide(["none"], (16,), 100, accuracy=10.2, std=0.05, rate=-3, tied=(-9, 0))
    truth = wide(["none", "bn"], (16,), accuracy=90.0) | wide(["bn"], (16,), 100, accuracy=90.0) | noise
    (section,) = sections(truth)
    (accuracy, rates), (_, deep) = plot.depth_panels(section)
    values, optima = (
        {line.method: [mark.y for mark in line.marks] for line in it.lines} for it in (accuracy, rates)
    )
    assert values["none"] == [pytest.approx(90, abs=1), pytest.approx(10, abs=1)]
    assert optima == {"bn": [2.0**-2] * 2, "none": [2.0**-2, None]}
    line = {line.method: line.marks for line in deep.lines}["none"]
    assert all(9 < mark.y < 11 and not mark.best for mark in line) and len(line) == 12
    row = plot.row_of(section, 100, 16, "none", section.lines(plot.BY_DEPTH, ACCURACY)["none"][1].grid)
    assert (row[3], row[5]) == ("at chance", "at 2^-10 to 2^1")


def test_every_method_has_a_look_of_its_own():
    methods = ["groupnorm", "zeroinit, alpha 0.1", "zeroinit, alpha 1", "another"]
    looks = plot.looks_of(sections(wide(methods, (64,))))
    found = [(looks[method].color, looks[method].marker) for method in looks]
    assert looks.keys() == {*plot.LOOKS, *methods} and len(set(found)) == len(found)


def test_the_papers_numbers_are_light_marks_beside_its_data_and_network_only():
    truth = {key: point for key, point in points().items() if key[0] == "deep"}
    (section,) = sections(truth)
    (accuracy, rate), panels = plot.depth_panels(section)
    light = {line.method: [(mark.x, mark.y) for mark in line.marks] for line in accuracy.lines if line.paper}
    assert light["bn"] == [(16, 93.5), (100, 94.7), (1000, 94.6)] and "none" not in light
    light = {line.method: [(mark.x, mark.y) for mark in line.marks] for line in rate.lines if line.paper}
    assert light["scalar"] == [(16, 2**-2), (100, 2**-2), (1000, 2**-1)]
    light = {line.method: [(mark.x, mark.y) for mark in line.marks] for line in panels[1].lines if line.paper}
    assert light == {
        "bn": [(0.5, 94.7)],
        "zeroinit": [(0.25, 94.2)],
        NO_L2: [(0.125, 92.2)],
        "scalar": [(0.25, 94.1)],
    }
    (section,) = sections(truth, momentum=0.5, dampening=0.5)  # rates are effective ones, too
    assert (
        "dampening" not in section.title and plot.table_of(section, TARGETS["table2"])[0].count("Paper") == 2
    )
    (section,) = sections(truth, dampening=0.0)  # its rates mean something else
    (accuracy, rate), panels = plot.depth_panels(section)
    assert any(line.paper for line in accuracy.lines) and "dampening 0" in section.title
    assert not any(line.paper for panel in (rate, *panels) for line in panel.lines)
    assert plot.table_of(section, TARGETS["table2"])[0].count("Paper") == 1
    (section,) = sections(truth, data="CIFAR-10 (JPEG)")  # nearly the same images
    assert plot.table_of(section, TARGETS["table2"])[0].count("Paper") == 2
    for changes in ({"data": "shapes"}, {"width": 1}, {"data": "CIFAR-100 (JPEG)"}):
        (section,) = sections(truth, **changes)
        assert not any(
            line.paper for row in plot.depth_panels(section) for panel in row for line in panel.lines
        )
    (section,) = sections({key: point for key, point in points().items() if key[0] == "wide"})
    for name, metric, expected in (
        ("fig1", ACCURACY, {"none": (64, 92.3), "zeroinit": (64, 94.4)}),
        ("fig1", LOSS, {"none": (64, 0.212), "zeroinit": (64, 0.189)}),
        ("fig2", ACCURACY, {"bn": (8192, 2**4), "none": (8192, 2**-3), "zeroinit": (8192, 2**1)}),
        ("fig2", LOSS, {}),
        ("fig3", ACCURACY, {"none": (64, 92.3), "zeroinit": (64, 94.4)}),
    ):
        panel = plot.figure_panel(section, TARGETS[name], metric, TARGETS[name].rates)
        light = {line.method: (line.marks[0].x, line.marks[0].y) for line in panel.lines if line.paper}
        assert light == expected


# --------------------------------------------------------------------------------------------------- report


def small_set():
    """Three methods at two depths on generated images; the plain network needs another rate, or diverges."""
    run, lost = {"std": 0.5, "seeds": 1}, Truth(0.0, rate=-1, seeds=1, diverged=True)
    records = draw(1, wide(["bn", "zeroinit"], (16,), accuracy=95.0, **run), **SHAPES)
    records += draw(2, wide(["bn", "zeroinit"], (16,), 100, accuracy=94.0, **run), **SHAPES)
    records += draw(3, wide(["none"], (16,), accuracy=96.0, rate=-4, **run), **SHAPES)
    records += draw(4, wide(["none"], (16,), 100, accuracy=60.0, rate=-9, **run), **SHAPES)
    records += draw(5, {("wide", "none", depth, 16): lost for depth in (16, 100)}, **SHAPES)
    files = {json.dumps(run["config"], sort_keys=True): run for run in records}
    return list(files.values())


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A folder with runs of the paper's protocol but two epochs, a small set, and the report."""
    folder = tmp_path_factory.mktemp("results")
    truth = {key: point for key, point in points().items() if key[0] == "wide" and key[3] in (4, 64, 256)}
    del truth["wide", "dropout", 16, 64]
    write(folder, [run for run in draw(0, truth, epochs=2) if run["config"]["seed"] < 3])
    write(folder, small_set())
    write(folder, draw(0, {("v1", "fixup", 50, 256): Truth(74.41, 0.05, seeds=1, top5=91.65)}, epochs=2))
    (folder / "cifar-10" / "notes.json").write_text("{}")
    done = run_plot(folder)
    assert (done.returncode, len(done.stderr.splitlines())) == (0, 1), done.stderr
    assert "cifar-10/notes.json: not used: " in done.stderr
    tally, last = done.stdout.splitlines()
    assert tally.startswith("of 74 statements: ") and last == f"report: {folder / 'report' / 'REPORT.md'}"
    return folder, tally, (folder / "report" / "REPORT.md").read_text()


def test_report_begins_with_the_tally_and_the_pictures(results):
    _, tally, text = results
    start = text.split("\n## ")[0]
    assert start.startswith(f"# How much of the paper holds\n\n**{tally.capitalize()}.**")
    counts = [int(word) for word in tally.replace(",", "").split() if word.isdigit()]
    assert sum(counts[1:]) == counts[0] == 74
    assert [name for name in ("depth", "fig1", "fig2", "fig3", "fig4") if f"![{name}](" in start] == [
        *("depth", "fig1", "fig2", "fig3", "fig4")
    ]
    for word, count in zip(("Holds", "Does not hold"), counts[1:], strict=False):
        assert (f"## {word} ({count})" in text) == (count > 0)
    assert f"<details><summary><b>Undecided ({counts[4]})</b>, by what would decide it</summary>" in text


def test_report_tells_the_numbers_behind_each_verdict(results):
    _, _, text = results
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ") and line[2].isdigit()]
    statements = [row for row in rows if row[0].strip("| ").isdigit() and len(row) in (5, 6)]
    assert sorted(int(row[0].strip("| ")) for row in statements if "–" not in row[0])[:74] == list(
        range(1, 75)
    )
    (row,) = [
        row for row in statements if row[1] == "ZeroInit is better than + scalar multiplier in test accuracy"
    ]
    assert row[2] == "Table 1" and row[3].endswith("at B 64") and row[4] == "3 of 3"
    (row,) = [row for row in statements if row[1].startswith("ZeroInit trains very deep networks")]
    assert "ZeroInit" in row[3] and "(16, 100 layers)" in row[3] and row[5].startswith("S3")  # of shapes
    (row,) = [row for row in statements if row[1].startswith("Fixup is comparable")]
    assert row[3] == "not run" and command_above(row, text) == f"bash sweep.sh table4 --out {results[0]}"
    (row,) = [row for row in statements if row[1].startswith("The scalar multiplier alone achieves")]
    decides = f"bash sweep.sh table1 --epochs 2 --amp off --out {results[0]}"
    assert row[3] == "not run: + dropout" and command_above(row, text) == decides


def command_above(row, text):
    """The command that stands above the table of an undecided statement."""
    block = text.split(" | ".join(row[:2]))[0].rpartition("```bash\n")[2]
    command, end, table = block.partition("\n```\n\n| # | Statement | Place | Why | Ours so far |\n")
    assert end and "```" not in table
    return command


def test_report_tables(results):
    _, _, text = results
    wide_part, shapes = text.split("\n# S1. ")[1], text.split("\n# S3. ")[1]
    assert wide_part.startswith(
        "CIFAR-10, width 4, 2 epochs\n\nNot the paper's protocol: epochs 2 instead of 200, "
    )
    assert "| + dropout | not run | 93.2 ± 0.1 | – | – | 0.226 ± 0.001 | – | – | – |" in wide_part
    assert "| ZeroInit | 94." in wide_part and " | 94.4 ± 0.1 | 2^-2 | 0.1" in wide_part
    assert shapes.startswith(
        "shapes, width 1, 2 epochs\n\nNot the paper's protocol: data shapes instead of CIFAR-10, "
    )
    assert "width 1 instead of 4 (2 in Tables 2 and 3), seeds 1 instead of 15. 24 runs, 6 diverged" in shapes
    header = "| Layers | Method | Test accuracy (%) | Rate | Training loss | Rate | Seeds | Diverged |"
    assert header in shapes and "Paper" not in shapes.split("# Files")[0]  # never beside shapes
    assert "| 100 | No Normalization | " in shapes and "| 2^-9 |" in shapes
    assert "# Files that were not used\n\n- cifar-10/notes.json: not a record of a run" in text


def test_report_pictures(results):
    folder, _, text = results
    report = folder / "report"
    found = sorted(path.relative_to(report).as_posix() for path in report.glob("*/*.png"))
    names = ["fig1", "fig2", "fig3", "fig4", "rates_test_accuracy", "rates_train_objective"]
    expected = [f"cifar-10-width-4-2-epochs/{name}.png" for name in names]
    expected += [f"shapes-width-1-2-epochs/{name}.png" for name in ("depth", "rates_train_objective")]
    assert found == sorted([*expected, "imagenet-resnet-50-v1-2-epochs/rates_test_accuracy.png"])
    for name in found:
        assert text.count(f"({name})") == 1
        assert (report / name).read_bytes().startswith(b"\x89PNG")
        assert b"<svg" in (report / name).with_suffix(".svg").read_bytes()[:600]
    assert not list(report.rglob(".*"))  # no temporary file is left


def test_each_grid_is_in_one_table(results):
    _, _, text = results
    shapes = text.split("\n# S3. ")[1]
    assert shapes.count("| ZeroInit |") == 2 and shapes.count("**Table") == 1  # at two depths


def test_no_pictures_of_a_single_point(tmp_path):
    truth = wide(["bn"], (64,), seeds=1)
    write(tmp_path, [run for run in draw(0, truth, epochs=1) if run["config"]["lr"] == 0.25])
    assert run_plot(tmp_path, "--curves").returncode == 0
    assert not list((tmp_path / "report").rglob("*.png"))
    text = (tmp_path / "report" / "REPORT.md").read_text()
    assert "| Batch Normalization | 8" in text or "| Batch Normalization | 9" in text


def test_same_bytes_each_time(tmp_path):
    truth = {("v2", method, 50, 256): Truth(75.0, rate=-1, seeds=1) for method in ("bn", "another", "more")}
    write(tmp_path, draw(0, truth, epochs=1))
    drawn = []
    for seed in ("1", "2"):
        assert run_plot(tmp_path, PYTHONHASHSEED=seed).returncode == 0
        report = tmp_path / "report"
        drawn.append({path.name: path.read_bytes() for path in report.rglob("*") if path.is_file()})
        shutil.rmtree(report)
    assert drawn[0].keys() == {"REPORT.md", "rates_test_accuracy.png", "rates_test_accuracy.svg"}
    assert drawn[0] == drawn[1]


# --------------------------------------------------------------------------------------------- command line


@pytest.mark.parametrize(
    "name, lines",
    [
        (
            "fig1",
            [
                "Figure 1. Test accuracy and training loss at the optimal rates, 16 layers",
                "Batch size",
                "No Norm",
            ],
        ),
        ("fig4", ["Figure 4. ", "Batch Normalization (whole batch)  2^-5"]),
        ("table1", ["Table 1. ", "Paper", "+ dropout            not run"]),
        (
            "demo",
            ["Depth. All methods, batch size 16\nshapes, width 1, 2 epochs\n", "No Normalization"],
        ),
        ("table4", ["Table 4: nothing was run yet (bash sweep.sh table4)"]),
    ],
)
def test_a_table_as_text(results, capsys, monkeypatch, name, lines):
    monkeypatch.setattr(sys, "argv", ["plot.py", str(results[0]), "--table", name])
    plot.main()
    out = capsys.readouterr().out
    assert [text for text in lines if text not in out] == [] and "*" not in out


def test_a_table_of_a_single_depth_or_batch_size_says_what_is_missing():
    one_depth = {key: point for key, point in points().items() if key[0] == "deep" and key[2] == 16}
    said = plot.print_table(sections(one_depth, width=1), "table2")
    assert (
        said
        == "Table 2: fewer than 2 of its depths were run (bash sweep.sh table2); the report shows all runs"
    )
    said = plot.print_table(sections(wide(["bn", "none"], (64,))), "fig1")
    assert said.startswith("Figure 1: fewer than 2 of its batch sizes were run")


def test_an_optimum_on_the_edge_is_marked_in_figures_as_text():
    (section,) = sections(
        {key: p for key, p in points().items() if key[:2] == ("wide", "bn") and key[3] in (16, 64)}
    )
    lines = section.shown(TARGETS["fig1"])["bn"]
    assert "tried" not in plot.figure_text(lines[0], False)
    edge = replace(lines[0].best, edge="highest")
    lines[0].best = lines[0].grid.optima[lines[0].metric] = edge
    assert plot.figure_text(lines[0], False).endswith(" **(highest tried)**")


def test_csv_has_a_row_for_each_run_and_epoch(tmp_path, monkeypatch, capsys):
    runs = small_set()
    paths = write(tmp_path / "results", runs)
    at_once = paths[[run["status"] for run in runs].index("diverged")]  # in its first epoch
    at_once.write_text(json.dumps(json.loads(at_once.read_text()) | {"history": []}))
    monkeypatch.setattr(
        sys, "argv", ["plot.py", str(tmp_path / "results"), "--csv", str(tmp_path / "runs.csv")]
    )
    plot.main()
    with open(tmp_path / "runs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == sum(2 if run["status"] == "done" else 1 for run in runs)
    for key, value in runs[0]["config"].items():
        assert rows[0].keys() >= {key} and {row[key] for row in rows} >= {"" if value is None else str(value)}
    last = [row for row in rows if row["epoch"] == "2"]
    assert sorted(float(row["test_accuracy"]) for row in last) == sorted(
        run["final"]["test_accuracy"] for run in runs if run["status"] == "done"
    )
    assert [row["status"] for row in rows if not row["epoch"]] == ["diverged"]
    done = next(row for row in rows if row["status"] == "done")
    assert done["epoch_lr"] == done["lr"]
    assert not (tmp_path / "results" / "report").exists()


def test_csv_is_written_completely_or_not_at_all(tmp_path):
    write(tmp_path / "results", small_set()[:1])
    (tmp_path / "here").mkdir()
    done = run_plot(tmp_path / "results", "--csv", tmp_path / "here")  # a folder
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1) and "here" in done.stderr
    assert sorted(os.listdir(tmp_path)) == ["here", "results"]  # no temporary file


def test_an_output_that_is_full_is_one_line(tmp_path):
    write(tmp_path, small_set()[:1])
    with open("/dev/full", "w") as full:
        command = [sys.executable, PLOT, tmp_path, "--table", "table2"]
        buffered = os.environ | {"PYTHONUNBUFFERED": ""}
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=buffered)
    assert (done.returncode, done.stderr) == (2, "error: cannot write the output: No space left on device\n")


def test_names_that_are_no_text_are_written_all_the_same(tmp_path):
    home = tmp_path / "caf\udce9"
    write(home, small_set()[:1])
    (home / "shapes" / "\udce9.json").write_text("{}")
    done = run_plot(home, PYTHONIOENCODING="utf-8:strict")
    assert (done.returncode, len(done.stderr.splitlines())) == (0, 1), done.stderr
    assert "\n- shapes/\\udce9.json: " in (home / "report" / "REPORT.md").read_text()


@pytest.mark.parametrize("flags", [(), ("--table", "fig1"), ("--csv", "runs.csv")])
@pytest.mark.parametrize("make", [False, True])
def test_no_records(tmp_path, make, flags):
    folder = tmp_path / "results"
    if make:
        (folder / "cifar-10").mkdir(parents=True)
    done = run_plot(folder, *flags)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert str(folder) in done.stderr


def test_records_one_folder_deeper_are_pointed_at(tmp_path):
    for name in ("b", "a"):
        write(tmp_path / name, small_set()[:1])
    said = f"error: no records in {tmp_path} (there are some in {tmp_path}/a, {tmp_path}/b)\n"
    assert run_plot(tmp_path).stderr == said


def test_no_torch(tmp_path):
    write(tmp_path, small_set()[:2])
    code = "import sys, plot; plot.main(); print(sorted({'torch', 'matplotlib'} & sys.modules.keys()))"
    command = [sys.executable, "-c", code, str(tmp_path), "--table", "table2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PLOT.parent)
    assert done.stdout.splitlines()[-1] == "[]"
