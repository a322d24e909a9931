"""sweep.sh: what it prints is what the scripts accept, and nothing that happens to one run harms the others."""

import json
import os
import shlex
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import wrn_cifar

HERE = Path(wrn_cifar.__file__).parent
TINY = ["--train-size", "64", "--bs", "32", "--epochs", "1", "--amp", "off", "--device", "cpu"]
RUNS = {"fig1": 3150, "fig2": 3150, "fig3": 3465, "fig4": 3465, "table1": 630, "table2": 630, "table3": 630, "demo": 12}


def sweep(*argv, python=sys.executable, **environment):
    return subprocess.run(
        ["bash", str(HERE / "sweep.sh"), *map(str, argv)],
        env=os.environ | {"PYTHON": str(python)} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def configurations(target, *argv, **environment):
    """The runs of a target's command lines, each parsed by the script's own parser."""
    printed = sweep(target, "--dry-run", *argv, **environment)
    assert printed.returncode == 0 and printed.stderr == ""
    runs = {}
    for line in printed.stdout.splitlines():
        python, script, *flags = shlex.split(line)
        assert (python, script) == ("python", "wrn_cifar.py")
        runs |= wrn_cifar.configurations(wrn_cifar.parse_args(flags))
    return runs


@pytest.fixture(scope="module")
def paper():
    return {target: configurations(target) for target in RUNS}


@pytest.mark.parametrize("target", RUNS)
def test_every_line_parses_and_the_runs_are_as_many_as_expected(target, paper):
    # Figure 1: 10 batch sizes x 3 methods x 7 rates x 15 seeds. Figure 3: 11 batch sizes. Tables: 6 rows x 7 x 15 each.
    assert len(paper[target]) == RUNS[target]


def test_the_targets_share_their_runs(paper):
    assert paper["fig1"].keys() == paper["fig2"].keys() and paper["fig3"].keys() == paper["fig4"].keys()
    shared = paper["fig1"].keys() & paper["fig3"].keys()
    # B = 16, 32, 64 of all methods, and B = 128, 256, 512, 1024 of those without batch norm.
    assert len(shared) == (3 * 3 + 4 * 2) * 7 * 15
    assert len(paper["fig1"].keys() & paper["table1"].keys()) == 2 * 7 * 15  # plain and ZeroInit at B = 64


def test_the_grids_are_the_papers(paper):
    def values(target, key, **where):
        return {c[key] for c in paper[target].values() if all(c[k] == v for k, v in where.items())}

    assert values("fig1", "bs") == {2**k for k in range(4, 14)} and values("fig3", "bs") == {2**k for k in range(11)}
    assert values("fig1", "ghost", init="bn") == {16, 32, 64}
    assert values("fig3", "ghost", init="bn", bs=512) == {512}
    assert values("table2", "depth") == values("table3", "depth") == {16, 100, 1000}
    assert {(c["init"], c["wd"]) for c in paper["table3"].values()} == {("zeroinit", 0), ("scalar", 5e-4)}
    for target in ("fig1", "fig3", "table1", "table2", "table3"):
        assert values(target, "epochs") == {200} and values(target, "seed") == set(range(15))
    # The optima that the paper states lie within the grids.
    assert 2**-1 in values("table2", "lr", init="bn") and 2**-2 in values("table2", "lr", init="zeroinit")
    assert 2**4 in values("fig1", "lr", init="bn", bs=8192) and 2**-3 in values("fig1", "lr", init="none", bs=8192)
    assert 2**1 in values("fig1", "lr", init="zeroinit", bs=8192) and 2**-3 in values("table3", "lr", wd=0)


def test_what_follows_the_target_is_appended_and_the_grid_narrows():
    runs = configurations(
        "fig1", "--epochs", 3, "--seeds", 2, "--out", "my results", BATCHES="64 256", LRS="2^-3 2^-2", INITS="bn none"
    )
    assert len(runs) == 2 * 2 * 2 * 2
    assert {c["epochs"] for c in runs.values()} == {3} and {c["lr"] for c in runs.values()} == {0.125, 0.25}
    assert {str(path.parent) for path in runs} == {"my results/cifar-10"}


def test_usage_errors():
    for argv, word in ((["fig9"], "fig9"), (["demo", "--jobs", "0"], "--jobs"), (["demo", "--depth", "17"], "6n+4")):
        done = sweep(*argv)
        assert done.returncode == 2 and word in done.stderr, done


def test_overview_counts_what_is_done(tmp_path):
    flags = [*TINY, "--out", tmp_path]
    assert sweep("demo", *flags, "--jobs", 2, INITS="bn", DEPTHS="10", LRS="2^-3").returncode == 0
    rows = sweep("status", *flags, DEPTHS="10", LRS="2^-3").stdout.splitlines()
    assert rows[0].split() == ["target", "runs", "done", "diverged"]
    assert rows[8].split() == ["demo", "3", "1", "0"]


def unreliable_python(tmp_path):
    """A python that is killed in the middle of `--init none` and exits with 255 in `--init bn`, once told to."""
    path = tmp_path / "python that fails"
    path.write_text(
        "#!/bin/bash\n"
        'case "$*" in *"--init none"*) kill -9 $$ ;; *"--init bn"*) exit 255 ;; esac\n'
        f'exec "{sys.executable}" "$@"\n'
    )
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return path


def test_a_killed_command_harms_no_other_and_is_made_up_for(tmp_path):
    out = tmp_path / "the results"
    flags = [*TINY, "--out", out, "--jobs", "1"]
    done = sweep("demo", *flags, python=unreliable_python(tmp_path), DEPTHS="10", LRS="2^-3 2^-2")
    assert done.returncode == 1
    assert "exit code 137" in done.stdout and "exit code 255" in done.stdout and "2 commands failed" in done.stdout
    made = {path: path.stat().st_mtime_ns for path in out.glob("shapes/*.json")}
    assert len(made) == 2 and all("zeroinit" in path.name for path in made)
    again = sweep("demo", *flags, DEPTHS="10", LRS="2^-3 2^-2")
    assert again.returncode == 0 and "4 runs to make by 2 commands" in again.stdout
    assert len(list(out.glob("shapes/*.json"))) == 6
    assert all(path.stat().st_mtime_ns == time for path, time in made.items())
    assert (out / "report" / "REPORT.md").exists()


def test_grids_grow_until_no_optimum_is_on_an_edge(tmp_path):
    flags = [
        *TINY,
        "--data",
        "shapes",
        "--depth",
        "10",
        "--width",
        "1",
        "--seeds",
        "1",
        "--out",
        tmp_path,
        "--jobs",
        "2",
    ]
    done = sweep("table1", *flags, INITS="none", LRS="2^-20", EXTEND="1")
    assert done.returncode == 0, done
    rates = {json.loads(path.read_text())["config"]["lr"] for path in tmp_path.glob("shapes/*.json")}
    # One rate is both edges, so both neighbours are tried; rates this small leave the optimum on an edge again.
    assert rates == {2**-19, 2**-20, 2**-21}
    assert "still on the edge" in done.stdout
