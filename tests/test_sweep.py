"""sweep.sh: what it prints is what the scripts accept, and nothing that happens to one run harms the others."""

import contextlib
import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

import resnet_imagenet
import wrn_cifar

HERE = Path(wrn_cifar.__file__).parent
STANDIN = Path(__file__).parent / "standin.py"
TINY = ["--train-size", "64", "--bs", "32", "--epochs", "1", "--amp", "off", "--device", "cpu"]
RUNS = {"fig1": 3150, "fig2": 3150, "fig3": 3465, "fig4": 3465, "table1": 630, "table2": 630, "table3": 630, "demo": 12}
RUNS |= {"table4": 60, "table5": 60}
SMALL = {"DEPTHS": "10", "LRS": "2^-3 2^-2", "EXTEND": "0"}  # the demo's three methods, a line of two runs each


def environment(**changes):
    cleared = {name: os.environ[name] for name in os.environ if not name.startswith(("SLURM", "CUDA_VISIBLE"))}
    return cleared | {"PYTHON": sys.executable} | changes


def start(*argv, folder=HERE, python=sys.executable, **changes):
    """A sweep in a session of its own, which Ctrl-C reaches even where the tests run in the background."""
    return subprocess.Popen(
        ["bash", str(folder / "sweep.sh"), *map(str, argv)],
        env=environment(**{"PYTHON": str(python)} | changes),
        cwd=None if folder == HERE else folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def sweep(*argv, **options):
    process = start(*argv, **options)
    process.stdout, process.stderr = process.communicate(timeout=300)
    return process


@pytest.fixture
def sandbox(tmp_path):
    """A folder with sweep.sh and, for the scripts, stand-ins that start in no time; its name is a trial for quoting."""
    return make_sandbox(tmp_path)


def make_sandbox(tmp_path):
    folder = tmp_path / "it's a #1 sändbox"
    folder.mkdir()
    shutil.copy(HERE / "sweep.sh", folder)
    for name in ("wrn_cifar", "resnet_imagenet", "plot"):
        shutil.copy(STANDIN, folder / f"{name}.py")
    return folder


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


def noted(file):
    return file.read_text().splitlines() if file.exists() else []


def alive(session):
    """The processes of a session that are still there, as their command lines."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, its_session = stat.read_text().rpartition(")")[2].split()[:4]
            if int(its_session) == session and state != "Z":
                found.append(stat.with_name("cmdline").read_text().replace("\0", " "))
        except (FileNotFoundError, ProcessLookupError):
            pass
    return found


# ---------------------------------------------------------------------------------------------------------- the grids


def printed(target, *argv, **options):
    done = sweep(target, "--dry-run", *argv, **options)
    assert done.returncode == 0 and done.stderr == ""
    return done.stdout.splitlines()


def configurations(target, *argv, **options):
    """The runs of a target's command lines, each parsed by the script's own parser."""
    runs = {}
    for line in printed(target, *argv, **options):
        command, *flags = re.split(r" (?=--arch|--init|--data)", line, maxsplit=1)
        script = {"python wrn_cifar.py": wrn_cifar, "torchrun --nproc_per_node=8 resnet_imagenet.py": resnet_imagenet}
        runs |= script[command].configurations(script[command].parse_args(shlex.split(flags[0])))
    return runs


@pytest.fixture(scope="module")
def paper():
    return {target: configurations(target) for target in RUNS}


@pytest.mark.parametrize("target", RUNS)
def test_every_line_parses_and_the_runs_are_as_many_as_expected(target, paper):
    # Figure 1: 10 batch sizes x 3 methods x 7 rates x 15 seeds. Figure 3: 11 batch sizes. Tables: 6 rows x 7 x 15 each.
    # On ImageNet: 3 batch sizes x 4 methods x 5 rates.
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


# The columns of Tables 4 and 5, and powers of two around 0.1 * B / 256: 0.1 is between 2^-4 and 2^-3, nearer to 2^-3.
@pytest.mark.parametrize(
    "target, version, methods",
    [
        ("table4", "v2", ["bn", "fixup", "zeroinit-nodropout", "zeroinit"]),
        ("table5", "v1", ["bn", "fixup", "zeroinit", "zeroinit+bias"]),
    ],
)
def test_the_grids_of_imagenet(target, version, methods):
    rates = {256: range(-5, 0), 1024: range(-3, 2), 4096: range(-1, 4)}
    expected = [
        f"--arch {version} --init {init} --bs {bs} --lr 2^{exponent} --seeds 1"
        for bs in rates
        for init in methods
        for exponent in rates[bs]
    ]
    assert printed(target) == [f"torchrun --nproc_per_node=8 resnet_imagenet.py {line}" for line in expected]
    assert printed(target, NPROC="4") == [f"torchrun --nproc_per_node=4 resnet_imagenet.py {line}" for line in expected]
    assert printed(target, NPROC="1") == [f"python resnet_imagenet.py {line}" for line in expected]
    narrowed = printed(target, BATCHES="512", INITS="bn", LRS="2^-2")
    assert narrowed == [
        f"torchrun --nproc_per_node=8 resnet_imagenet.py --arch {version} --init bn --bs 512 --lr 2^-2 --seeds 1"
    ]


def test_what_follows_the_target_is_appended_and_the_grid_narrows():
    runs = configurations(
        "fig1", "--epochs", 3, "--seeds", 2, "--out", "my results", BATCHES="64 256", LRS="2^-3 2^-2", INITS="bn none"
    )
    assert len(runs) == 2 * 2 * 2 * 2
    assert {c["epochs"] for c in runs.values()} == {3} and {c["lr"] for c in runs.values()} == {0.125, 0.25}
    assert {str(path.parent) for path in runs} == {"my results/cifar-10"}


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_any_word_can_be_appended(locale):
    words = ["--out", "it's #1 of Müller's", "--data-dir", 'a\\b "c" $HOME `d` *', "--data-name", "", "--data=x y"]
    line = printed("table1", *words, LRS="2^-3", INITS="bn", LC_ALL=locale)[0]
    expected = ["--seeds", "15", *words[:2], *words[2:]]
    assert shlex.split(line, comments=True)[-len(expected) :] == expected
    by_bash = subprocess.run(["bash", "-c", f"printf '%s\\n' {line}"], capture_output=True, text=True).stdout
    assert by_bash.splitlines()[-len(expected) :] == expected


def test_identical_lines_are_one():
    assert len(printed("table1", INITS="bn bn", LRS="2^-3 2^-2 2^-3")) == 2


# --------------------------------------------------------------------------------------------------- errors of the user


def test_usage_errors(sandbox):
    for argv, word in (
        (["fig9"], "no target 'fig9'"),
        (["demo", "--jobs", "0"], "--jobs"),
        (["demo", "--jobs"], "--jobs needs a value"),
        (["demo", "--slurm"], "--slurm needs a value"),
        (["--cost"], "run `python speed.py` first"),
    ):
        done = sweep(*argv, folder=sandbox)
        assert done.returncode == 2 and word in done.stderr and done.stderr.count("\n") == 1, done.stderr
        assert done.stdout == "" and not (sandbox / "results").exists() and not (sandbox / "demo").exists()


def test_a_bad_flag_is_told_before_anything_runs(tmp_path):
    done = sweep("demo", "--depth", 17, "--out", tmp_path / "out")
    assert done.returncode == 2 and "6n+4" in done.stderr and not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------------- running


def test_a_killed_command_harms_no_other_and_is_made_up_for(sandbox):
    out = sandbox / "demo"
    flags = ["demo", "--jobs", 2, "--nap", 0.05]
    done = sweep(*flags, folder=sandbox, ENDS='{"none": -9, "bn": 255}', **SMALL)
    assert done.returncode == 1 and "2 commands failed" in done.stdout
    for init, code in (("none", 137), ("bn", 255)):
        assert re.search(rf"^  .* --init {init} .*\(exit code {code}, see .*\.log\)$", done.stdout, re.M)
    made = {path: path.stat().st_mtime_ns for path in out.glob("naps/*.json")}
    assert len(made) == 2 and all("zeroinit" in path.name for path in made)
    again = sweep(*flags, folder=sandbox, **SMALL)
    assert again.returncode == 0 and "4 runs to make by 2 commands" in again.stdout
    assert len(set(noted(out / "made"))) == len(noted(out / "made")) == 6
    assert all(path.stat().st_mtime_ns == time for path, time in made.items())
    assert "report" in again.stdout
    assert sweep(*flags, folder=sandbox, **SMALL).stdout.startswith("demo: 0 runs to make by 0 commands")


def test_logs_tell_the_line_its_output_and_its_exit_code(sandbox):
    for ends in ('{"bn": 3}', "{}"):
        sweep("demo", folder=sandbox, ENDS=ends, INITS="bn", **SMALL)
    (log,) = (sandbox / "demo" / "logs").iterdir()
    (line,) = printed("demo", folder=sandbox, INITS="bn", **SMALL)
    assert log.read_text().splitlines() == [line, "error: bn is out of luck", "exit 3", line, "exit 0"]


def test_many_short_commands_are_all_noticed(sandbox):
    done = sweep("fig1", "--seeds", 1, "--jobs", 8, folder=sandbox, BATCHES="16 32 64", EXTEND="0")
    assert done.returncode == 0 and "[63/63 runs" in done.stdout
    assert len(set(noted(sandbox / "results" / "made"))) == len(noted(sandbox / "results" / "made")) == 3 * 3 * 7
    assert all(log.read_text().endswith("exit 0\n") for log in (sandbox / "results" / "logs").iterdir())


def test_each_slot_has_its_gpu(sandbox):
    assert (
        sweep(
            "demo", "--nap", 0.3, folder=sandbox, CUDA_VISIBLE_DEVICES="4,7", **SMALL | {"DEPTHS": "10 16"}
        ).returncode
        == 0
    )
    records = [json.loads(path.read_text()) for path in (sandbox / "demo").glob("naps/*.json")]
    assert {record["gpu"] for record in records} == {"4", "7"}


def test_torchrun_has_the_whole_machine(sandbox):
    """A stand-in for python that lets torchrun's launcher start the script once, and tells what it was started with."""
    python = sandbox / "python that is none"
    python.write_text(
        "#!/bin/bash\n"
        'case $1 in -m) echo "$*" >>starts; shift 4 ;; *"resnet_imagenet.py") [ "$2" = --status ] || exit 9 ;; esac\n'
        f'exec "{sys.executable}" "$@"\n'
    )
    python.chmod(0o755)
    done = sweep(
        "table5",
        *("--jobs", 3, "--nap", 0.2),
        folder=sandbox,
        python=python,
        **{"BATCHES": "256", "INITS": "bn", "LRS": "2^-3 2^-2", "CUDA_VISIBLE_DEVICES": "0,1", "EXTEND": "0"},
    )
    assert done.returncode == 0 and "2 runs to make by 2 commands, 1 at a time" in done.stdout
    starts = noted(sandbox / "starts")
    assert [line.split("resnet_imagenet.py")[0] for line in starts] == [
        f"-m torch.distributed.run --standalone --nproc_per_node=8 {sandbox}/"
    ] * 2
    records = [json.loads(path.read_text()) for path in (sandbox / "results").glob("naps/*.json")]
    assert [record["gpu"] for record in records] == ["0,1"] * 2
    begun = [path.stat().st_mtime for path in sorted((sandbox / "results").glob("naps/*.json"), key=os.path.getmtime)]
    assert begun[1] - begun[0] >= 0.2  # one after the other


def test_grids_grow_step_by_step_even_when_interrupted(sandbox):
    flags = ["table1", "--seeds", "2"]
    grid = {"INITS": "scalar", "LRS": "2^-3 2^-2", "BEST": "1"}

    def made():
        return {int(re.search(r"lr2\^(-?\d+)", name)[1]): None for name in noted(sandbox / "results" / "made")}

    done = sweep(*flags, folder=sandbox, EXTEND="2", **grid)
    assert done.returncode == 0 and list(made()) == [-3, -2, -1, 0]
    assert "still on the edge" in done.stdout and "--lr 2^1 --seeds 15 --seeds 2" in done.stdout
    # As if the sweep had been interrupted while it made 2^-1: that rate is completed before the next one is tried.
    lost = sandbox / "results" / "naps" / "wrn_cifar_scalar_bs64_lr2^-1_s01.json"
    lost.unlink()
    (sandbox / "results" / "made").unlink()
    done = sweep(*flags, folder=sandbox, EXTEND="6", **grid)
    assert done.returncode == 0 and list(made()) == [-1, 1] and lost.exists()
    # A grid that is not complete does not grow: 2^1 fails, so nobody knows whether 2^2 is worth a try.
    for path in (sandbox / "results" / "naps").glob("*lr2^1_*"):
        path.unlink()
    done = sweep(*flags, folder=sandbox, EXTEND="6", ENDS='{"scalar": 1}', **grid | {"LRS": "2^-3 2^1", "BEST": "2"})
    assert done.returncode == 1 and "extending" not in done.stdout


def test_grids_grow_until_no_optimum_is_on_an_edge(tmp_path):
    """The scripts themselves: training, status and report."""
    flags = [*TINY, "--data", "shapes", "--depth", 10, "--width", 1, "--seeds", 1, "--out", tmp_path, "--jobs", 2]
    done = sweep("table1", *flags, INITS="none", LRS="2^-20", EXTEND="1")
    assert done.returncode == 0, done
    rates = {json.loads(path.read_text())["config"]["lr"] for path in tmp_path.glob("shapes/*.json")}
    # One rate is both edges, so both neighbours are tried; rates this small leave the optimum on an edge again.
    assert rates == {2**-19, 2**-20, 2**-21}
    assert "still on the edge" in done.stdout and (tmp_path / "report" / "REPORT.md").exists()


# ---------------------------------------------------------------------------------------------------------- interrupted


@pytest.mark.parametrize("name, group", [("SIGTERM", False), ("SIGINT", True), ("SIGHUP", True)])
def test_a_signal_ends_every_command_in_good_order(sandbox, name, group):
    process = start("demo", "--jobs", 2, "--nap", 60, folder=sandbox, **SMALL)
    wait_for(lambda: len(noted(sandbox / "demo" / "begun")) == 2)
    time.sleep(0.2)
    (os.killpg if group else os.kill)(process.pid, getattr(signal, name))
    output, errors = process.communicate(timeout=30)
    assert process.returncode == 75 and errors == "" and alive(process.pid) == []
    assert output.endswith("interrupted: the same sweep makes what is missing\n") and "report" not in output
    assert len(noted(sandbox / "demo" / "begun")) == 2 and not list((sandbox / "demo").glob("naps/*.json"))
    logs = list((sandbox / "demo" / "logs").iterdir())
    assert len(logs) == 2 and all(log.read_text().endswith("\nexit 75\n") for log in logs)
    status = sweep(folder=sandbox, **SMALL).stdout
    assert "failed:" not in status  # an interruption is no failure
    assert sweep("demo", folder=sandbox, **SMALL).returncode == 0
    assert len(set(noted(sandbox / "demo" / "made"))) == 6


def test_a_signal_at_any_time_leaves_no_process_behind(sandbox):
    for delay in (0.02, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5):
        process = start("demo", "--jobs", 3, "--nap", 60, folder=sandbox, **SMALL)
        time.sleep(delay)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
        # Before it has begun to listen it dies of the signal, without a command to leave behind.
        assert process.returncode in (75, -signal.SIGTERM)
        wait_for(lambda process=process: alive(process.pid) == [], seconds=5)


def test_a_command_that_was_interrupted_alone_is_no_failure(sandbox):
    done = sweep("demo", folder=sandbox, ENDS='{"bn": 75}', **SMALL)
    assert done.returncode == 75 and "failed" not in done.stdout.lower() and len(noted(sandbox / "demo" / "made")) == 4


def test_torchrun_is_interrupted_as_well(sandbox):
    """The real launcher: its processes save and end with 75, it ends with 1, and that is an interruption."""
    process = start("table5", "--nap", 100, folder=sandbox, BATCHES="256", INITS="bn", LRS="2^-3 2^-2", NPROC="2")
    wait_for(lambda: noted(sandbox / "results" / "begun"), seconds=120)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75 and "FAILED" not in output and alive(process.pid) == []
    (log,) = (sandbox / "results" / "logs").iterdir()
    assert log.read_text().endswith("\nexit 75\n")


# ------------------------------------------------------------------------------------------------------------- counting


def rows(text):
    return {line.split()[0]: line.split()[1:] for line in text.splitlines() if line}


def test_overview(sandbox):
    options = {"folder": sandbox, "LRS": "2^-3 2^-2", "EXTEND": "0"}
    assert sweep("table1", "--seeds", 2, **options, INITS="bn none").returncode == 0
    assert (
        sweep("table1", "--seeds", 2, **options, INITS="zeroinit fixup", ENDS='{"zeroinit": 1, "fixup": -9}').returncode
        == 1
    )
    held = sandbox / "results" / "naps" / "wrn_cifar_biases_bs64_lr2^-3_s00.lock"
    with open(held, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = sweep(
            "status", "--seeds", 2, **options, INITS="bn none zeroinit fixup biases", BATCHES="64", DEPTHS="16"
        )
    assert done.returncode == 0 and done.stderr == ""
    table, _, reasons = done.stdout.partition("\n\nfailed:\n")
    counts = rows(table)
    assert list(counts) == ["target", *(f"fig{i}" for i in range(1, 5)), *(f"table{i}" for i in range(1, 6)), "demo"]
    assert counts["target"] == ["runs", "done", "running", "diverged", "failed", "missing"]
    # 5 methods x 2 rates x 2 seeds: bn and none are done (the stand-in's none diverges), a run of biases is locked.
    assert counts["table1"] == counts["fig1"] == ["20", "8", "1", "4", "8", "11"]
    assert counts["fig3"] == counts["table2"] == ["20", "0", "0", "0", "0", "20"]
    assert counts["demo"] == ["20", "0", "0", "0", "0", "20"]
    reasons = reasons.splitlines()
    assert len(reasons) == 4 and len(set(reasons)) == 4  # each command once, though three targets have it
    assert Counter(re.sub(r"^results/logs/\w+\.log: ", "", reason) for reason in reasons) == {
        "exit 1: error: zeroinit is out of luck": 2,
        "exit 137: error: fixup is out of luck": 2,
    }
    # What failed and was made up for is no failure any more.
    sweep("table1", "--seeds", 2, **options, INITS="zeroinit fixup")
    assert "failed:" not in sweep("--seeds", 2, **options, INITS="zeroinit fixup").stdout


def test_overview_with_flags_that_only_one_script_takes(sandbox):
    done = sweep("--width", 1, folder=sandbox)
    assert done.returncode == 0 and done.stderr.count("unrecognized arguments: --width 1") == 1
    assert rows(done.stdout)["table5"] == ["does", "not", "take", "these", "flags"]
    assert rows(done.stdout)["table1"] == ["630", "0", "0", "0", "0", "630"]
    assert sweep("--no-such-flag", folder=sandbox).returncode == 2


def test_runs_that_another_process_makes_are_left_to_it(sandbox):
    folder = sandbox / "demo" / "naps"
    folder.mkdir(parents=True)
    with contextlib.ExitStack() as stack:
        for k in (-3, -2):
            lock = stack.enter_context(open(folder / f"wrn_cifar_10_bn_bs16_lr2^{k}_s00.lock", "w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        done = sweep("demo", folder=sandbox, **SMALL)
    assert done.returncode == 0 and "4 runs to make by 2 commands" in done.stdout
    assert not any("_bn_" in name for name in noted(sandbox / "demo" / "begun"))


def test_two_sweeps_at_once_make_each_run_once(sandbox):
    flags = ["demo", "--jobs", 2, "--nap", 0.05]
    processes = [start(*flags, folder=sandbox, **SMALL) for _ in range(2)]
    assert [process.communicate(timeout=60) and process.returncode for process in processes] == [0, 0]
    assert len(noted(sandbox / "demo" / "made")) == len(set(noted(sandbox / "demo" / "made"))) == 6


def test_cost(sandbox):
    speed = sandbox / "results" / "speed"
    speed.mkdir(parents=True)
    for age, hours in ((100, 9.99), (0, 1.25)):
        cost = [{"target": "table1", "runs": 630, "hours": hours}, {"target": "demo", "runs": 12, "hours": 0.04}]
        path = speed / f"{age}.json"
        path.write_text(json.dumps({"kind": "speed", "cost": cost}))
        os.utime(path, (time.time() - age,) * 2)
    assert sweep("table1", "--seeds", 1, folder=sandbox, INITS="bn", LRS="2^-3", EXTEND="0").returncode == 0
    done = sweep("--cost", "--seeds", 1, folder=sandbox, INITS="bn none", LRS="2^-3 2^-2")
    assert done.returncode == 0 and done.stderr == ""
    counts = rows(done.stdout)
    assert counts["target"] == ["runs", "missing", "hours"]
    assert counts["table1"] == ["4", "3", "1.2"] and counts["demo"][2] == "0.0" and counts["fig1"][2] == "?"
    assert done.stdout.splitlines()[-1].endswith("results/speed/0.json")
