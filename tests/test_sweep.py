"""sweep.sh: its lines are the paper's grids, and its workers make every run once whatever happens to them."""

import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from standin import noted

import progress
import wrn_cifar

HERE = Path(wrn_cifar.__file__).parent
STANDIN = Path(__file__).parent / "standin.py"
TINY = [
    "--data",
    "shapes",
    "--depth",
    "10",
    "--width",
    "1",
    "--train-size",
    "64",
    "--bs",
    "32",
    "--epochs",
    "1",
]
TINY += ["--amp", "off", "--device", "cpu"]
POINTS = {"fig1": 30, "fig2": 30, "fig3": 33, "fig4": 33, "table1": 6, "table2": 6, "table3": 6}
POINTS |= {"table4": 12, "table5": 12, "demo": 6}


def environment(**changes):
    """The environment of a sweep: this Python, one thread, no Slurm and no choice of GPUs."""
    kept = {name: os.environ[name] for name in os.environ if not name.startswith(("SLURM", "CUDA_VISIBLE"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return kept | {"PATH": path, "OMP_NUM_THREADS": "1"} | changes


def start(*argv, folder=HERE, **changes):
    """A sweep in a session of its own, which Ctrl-C reaches even where the tests run in the background."""
    return subprocess.Popen(
        ["bash", str(folder / "sweep.sh"), *map(str, argv)],
        env=environment(**changes),
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
    """A folder with sweep.sh and stand-ins for the scripts; its name is a trial for quoting."""
    return make_sandbox(tmp_path)


def make_sandbox(tmp_path):
    folder = tmp_path / "it's a #1 sändbox"
    folder.mkdir()
    shutil.copy(HERE / "sweep.sh", folder)
    for name in ("wrn_cifar", "resnet_imagenet", "plot", "speed"):
        shutil.copy(STANDIN, folder / f"{name}.py")
    return folder


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


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


def logs(out):
    """The logs of a sweep: {command line: [what it printed and exit codes], ...}, one list per worker."""
    found = {}
    for log in sorted((out / "logs").glob("*.log")):
        line, *rest = filter(None, log.read_text().splitlines())
        found.setdefault(line, []).append(rest)
    return found


# ------------------------------------------------------------------------------------------------- the grids


def printed(*argv, **options):
    """The command lines of a target, without their comment."""
    done = sweep(argv[0], "--dry-run", *argv[1:], **options)
    assert done.returncode == 0 and done.stderr == ""
    lines = done.stdout.splitlines()
    assert all(line.endswith(f" # {argv[0]}") for line in lines)
    return [line.removesuffix(f" # {argv[0]}") for line in lines]


def points(*argv, **options):
    """The points of a target's lines, by the parsers of the real scripts."""
    return [progress.point_of(line) for line in printed(*argv, **options)]


@pytest.fixture(scope="module")
def paper():
    return {target: points(target) for target in POINTS}


@pytest.mark.parametrize("target", POINTS)
def test_a_target_has_a_line_for_each_of_its_points(target, paper):
    # Figure 1: ten batch sizes, three methods. Figure 3: eleven. Tables 4 and 5: three, four methods.
    assert len(paper[target]) == POINTS[target]
    names = {(str(point.path((1.0, 0))), point.search) for point in paper[target]}
    assert len(names) == POINTS[target]
    assert {search for _, search in names} == {None if target == "demo" else "best"}


def test_targets_share_their_points(paper):
    def names(target):
        return {str(point.path((1.0, 0))) for point in paper[target]}

    assert names("fig1") == names("fig2") and names("fig3") == names("fig4")
    # B = 16, 32, 64 of all methods, and B = 128, 256, 512, 1024 of those without batch norm.
    assert len(names("fig1") & names("fig3")) == 3 * 3 + 4 * 2
    assert len(names("fig1") & names("table1")) == 2  # plain and ZeroInit at B = 64


def test_the_grids_are_the_papers(paper):
    def values(target, key, **where):
        configs = [point.shared for point in paper[target]]
        return {config[key] for config in configs if all(config[k] == v for k, v in where.items())}

    assert values("fig1", "bs") == {2**k for k in range(4, 14)}
    assert values("fig3", "bs") == {2**k for k in range(11)}
    assert values("fig1", "init") == values("fig3", "init") == {"bn", "none", "zeroinit"}
    assert values("fig1", "ghost", init="bn") == {16, 32, 64}
    assert values("fig3", "ghost", init="bn", bs=512) == {512}
    methods = {"none", "biases", "dropout", "scalar", "biases+dropout", "zeroinit"}
    assert values("table1", "init") == methods and values("table1", "bs") == {64}
    assert values("table2", "depth") == values("table3", "depth") == {16, 100, 1000}
    assert values("table2", "width") == values("table3", "width") == {2} and values("fig1", "width") == {4}
    assert {(point.shared["init"], point.shared["wd"]) for point in paper["table3"]} == {
        ("zeroinit", 0),
        ("scalar", 5e-4),
    }
    for target in ("fig1", "fig3", "table1", "table2", "table3"):
        assert values(target, "epochs") == {200}
        assert {tuple(point.seeds) for point in paper[target]} == {tuple(range(15))}


def test_the_papers_optima_lie_in_the_starting_rates(paper):
    def inner(target, **where):
        (point,) = (p for p in paper[target] if all(p.shared[k] == v for k, v in where.items()))
        assert len(point.rates) == 7
        return sorted(point.rates)[1:-1]

    assert 2**-1 in inner("table2", init="bn", depth=1000) and 2**-2 in inner(
        "table2", init="zeroinit", depth=100
    )
    assert 2**4 in inner("fig1", init="bn", bs=8192) and 2**-3 in inner("fig1", init="none", bs=8192)
    assert 2**1 in inner("fig1", init="zeroinit", bs=8192) and 2**-3 in inner("table3", wd=0, depth=16)


# The columns of Tables 4 and 5, and powers of two around B / 256.
@pytest.mark.parametrize(
    "target, version, methods",
    [
        ("table4", "v2", ["bn", "fixup", "zeroinit-nodropout", "zeroinit"]),
        ("table5", "v1", ["bn", "fixup", "zeroinit", "zeroinit+bias"]),
    ],
)
def test_the_grids_of_imagenet(target, version, methods, paper):
    rates = {256: range(-2, 3), 1024: range(0, 5), 4096: range(2, 7)}
    for point, (bs, init) in zip(
        paper[target], [(bs, init) for bs in rates for init in methods], strict=True
    ):
        shared = point.shared
        assert (shared["version"], shared["bs"], shared["init"], shared["epochs"]) == (version, bs, init, 90)
        assert sorted(point.rates) == [2.0**exponent for exponent in rates[bs]] and point.seeds == [0]
    torchrun = "torchrun --standalone --nproc_per_node=8 resnet_imagenet.py "
    assert all(line.startswith(torchrun) for line in printed(target))
    assert all(line.startswith(torchrun.replace("8", "4")) for line in printed(target, NPROC="4"))
    assert all(line.startswith("python resnet_imagenet.py ") for line in printed(target, NPROC="1"))


def test_the_grid_can_be_chosen():
    lines = printed("fig1", BATCHES="64 256", INITS="bn none", LRS="2^-3 2^-2")
    shared = "--lr 2^-3 2^-2 --seeds 15"  # rates that were given are not extended
    assert lines == [
        f"python wrn_cifar.py --init {init} --bs {bs} {shared}" for bs in (64, 256) for init in ("bn", "none")
    ]
    assert [point.rates for point in points("fig1", BATCHES="64", INITS="bn", LRS="2^-3 2^-2")] == [
        [2**-3, 2**-2]
    ]
    depths = [point.shared["depth"] for point in points("table3", DEPTHS="16 40")]
    assert depths == [16, 16, 40, 40]
    assert {point.search for point in points("fig1", FULL="1")} == {"all"}
    assert {point.search for point in points("fig1", FULL="0")} == {"best"}
    one = "--arch v2 --init bn --bs 512 --lr 2^-2 --seeds 1"
    (line,) = printed("table4", NPROC="1", BATCHES="512", INITS="bn", LRS="2^-2")
    assert line == f"python resnet_imagenet.py {one}"


def test_what_follows_the_target_is_appended():
    found = points("fig1", "--epochs", 3, "--seeds", 2, "--out", "my results", BATCHES="64", INITS="bn none")
    assert [(p.shared["epochs"], p.seeds, str(p.folder)) for p in found] == [
        (3, [0, 1], "my results/cifar-10")
    ] * 2
    words = "--out=my results", "--jobs=2", "--epochs=3"
    assert printed("table1", *words, INITS="bn") == [
        "python wrn_cifar.py --init bn --bs 64 --search best --seeds 15 --out 'my results' --epochs=3"
    ]


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_any_word_can_be_appended(locale):
    words = [
        "--out",
        "it's #1 of Müller's",
        "--data-dir",
        'a\\b "c" $HOME `d` * # e',
        "--data-name",
        "",
        "--data=x y",
    ]
    line = printed("table1", *words, INITS="bn", LC_ALL=locale)[0]
    assert shlex.split(line)[-len(words) :] == words
    by_bash = subprocess.run(["bash", "-c", f"printf '%s\\n' {line}"], capture_output=True, text=True).stdout
    assert by_bash.splitlines()[-len(words) :] == words


# -------------------------------------------------------------------------------------------------- the user


def test_usage_errors(sandbox):
    for argv, word in (
        (["fig9"], "no target 'fig9'"),
        (["demo", "--jobs", "0"], "--jobs"),
        (["demo", "--jobs"], "--jobs"),
        (["demo", "--jobs", "two"], "--jobs"),
    ):
        done = sweep(*argv, folder=sandbox)
        assert done.returncode == 2 and word in done.stderr and done.stderr.count("\n") == 1, done.stderr
        assert done.stdout == "" and not (sandbox / "demo").exists()


def test_words_that_bash_would_take_for_more_are_refused(sandbox):
    (sandbox / "file").write_text("")
    for argv, changes in (
        (["demo"], {"LRS": "$(touch made)"}),
        (["demo"], {"BATCHES": "16; touch made"}),
        (["demo"], {"BATCHES": "16"}),  # it has one batch size
        (["table3"], {"INITS": "scalar"}),
        (["demo"], {"INITS": "*"}),
        (["demo", "--out", ""], {}),
        (["demo", "--out=-x"], {}),
        (["demo", "--out", "--epochs"], {}),
        (["demo", "--out", "two\nlines"], {}),
        (["demo", "--out", "file"], {}),
        (["demo"], {"PATH": "/usr/bin:/bin"}),  # of a shell where the environment is not active
    ):
        if changes.get("PATH") and shutil.which("python", path=changes["PATH"]):
            continue
        before = sorted(os.listdir(sandbox))
        done = sweep(*argv, folder=sandbox, **changes)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stdout == "", (argv, done)
        assert sorted(os.listdir(sandbox)) == before
    assert len(printed("fig1", "--lr", "1", INITS="bn", BATCHES="16\n32", LRS="2^-3\n2^-2")) == 2
    assert len(printed("demo", LRS="2^-3\n2^-2")) == 6


def test_a_sweep_may_be_called_through_a_link_from_any_shell(sandbox):
    (sandbox / "elsewhere").mkdir()
    link = sandbox / "elsewhere" / "link.sh"
    link.symlink_to("../sweep.sh")
    words = ["demo", "--seeds", "1", "--jobs", "1"]
    way = f"{sandbox.name}/sweep.sh"
    for *call, folder in (
        ("bash", "-eu", link.name, link.parent),
        ("bash", "-eu", way, sandbox.parent),
        ("sh", way, sandbox.parent),  # dash, on Debian
    ):
        surroundings = environment(CDPATH=f"{folder}:.", INITS="bn", DEPTHS="16")
        done = subprocess.run([*call, *words], cwd=folder, env=surroundings, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), done
        shutil.rmtree(folder / "demo")


def test_help_is_the_header(sandbox):
    for flag in ("-h", "--help"):
        done = sweep(flag, folder=sandbox)
        assert done.returncode == 0 and done.stdout.startswith("The paper's experiments.")
        assert "Exit codes: " in done.stdout and "#" not in done.stdout and "shellcheck" not in done.stdout


def test_cost_and_status_get_every_line(sandbox):
    for name in ("wrn_cifar", "speed"):
        (sandbox / f"{name}.py").write_text("import sys\nprint(sys.argv[1:], len(sys.stdin.readlines()))")
    assert sweep(folder=sandbox).stdout == f"['--status'] {sum(POINTS.values())}\n"
    assert sweep("table1", "--cost", "--epochs", 3, folder=sandbox).stdout == "['--cost'] 6\n"
    assert sweep("table1", "--status", "--epochs", 3, folder=sandbox).stdout == "['--status'] 6\n"


def test_a_bad_flag_ends_the_sweep(tmp_path):
    done = sweep("table1", "--depth", 17, "--out", tmp_path / "out", "--jobs", 1, INITS="bn")
    assert done.returncode == 2 and done.stdout == "", done
    assert done.stderr.count("\n") == 1 and "6n+4" in done.stderr


# ------------------------------------------------------------------------------------------------- mechanics


def test_workers_share_the_runs_of_every_line(sandbox):
    done = sweep("demo", "--seeds", 4, "--nap", 0.1, "--jobs", 3, folder=sandbox, INITS="bn none")
    assert done.returncode == 0 and done.stderr == "", done
    assert done.stdout == "plot.py demo --table demo\nplot.py demo\n"
    made = noted(sandbox / "demo" / "made")
    assert sorted(made) == sorted(
        f"{i}-8-{d}-{s}" for i in ("bn", "none") for d in (16, 40) for s in range(4)
    )
    workers = {log.stem.rpartition(".")[2] for log in (sandbox / "demo" / "logs").glob("*.log")}
    assert workers == {"0", "1", "2"}
    assert len(logs(sandbox / "demo")) == 4


def test_one_line_is_shared_too(sandbox):
    done = sweep("demo", "--seeds", 6, "--nap", 0.3, "--jobs", 2, folder=sandbox, INITS="bn", DEPTHS="16")
    assert done.returncode == 0
    (both,) = logs(sandbox / "demo").values()
    counts = [sum(word.startswith("bn-") for word in rest) for rest in both]
    assert len(counts) == 2 and sum(counts) == 6 and min(counts) >= 2
    # Each log: runs, then its exit code; a worker that finds the rest in other hands looks again.
    assert all(rest[-1] in ("exit 0", "exit 76", "exit 75") for rest in both)


def test_a_worker_looks_again_while_others_train(sandbox):
    """The other worker's process dies in the run, and this one makes it."""
    flags = ["demo", "--seeds", 1, "--nap", 1.5, "--jobs", 2]
    process = start(*flags, folder=sandbox, INITS="bn", DEPTHS="16")
    begun = sandbox / "demo" / "begun"
    wait_for(lambda: noted(begun))
    (first,) = [pid for pid in children_of(process.pid, "--nap") if holds_lock(pid)]
    os.kill(first, signal.SIGKILL)
    _output, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and len(noted(begun)) == 2 and len(noted(sandbox / "demo" / "made")) == 1
    ends = sorted(rest[-1] for rests in logs(sandbox / "demo").values() for rest in rests)
    # A sweep ends once all is made; the process that made the last run may be stopped as it leaves.
    assert ends in (["exit 0", "exit 137"], ["exit 137", "exit 75"])


def children_of(session, word):
    """The ids of a session's processes whose command line has a word."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            its_session = int(stat.read_text().rpartition(")")[2].split()[3])
            words = stat.with_name("cmdline").read_text().split("\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if its_session == session and word in words and words[0] == "python":
            found.append(int(stat.parent.name))
    return found


def holds_lock(pid):
    return any(f" {pid} " in line for line in Path("/proc/locks").read_text().splitlines())


def test_a_line_that_fails_harms_no_other(sandbox):
    out = sandbox / "demo"
    flags = ["demo", "--jobs", 2]
    done = sweep(*flags, folder=sandbox, DEPTHS="16", ENDS='{"none": -9, "bn": 255}')
    assert done.returncode == 1 and "--table demo" in done.stdout
    assert noted(out / "made") == ["scalar-8-16-0"]
    assert sorted(noted(out / "begun"))[:4] == ["bn-8-16-0"] * 2 + ["none-8-16-0"] * 2  # once by each worker
    again = sweep(*flags, folder=sandbox, DEPTHS="16")
    assert again.returncode == 0 and len(noted(out / "made")) == 3
    assert "Killed" not in done.stderr


def test_a_slurm_task_fails_with_its_lines(sandbox):
    task = {"SLURM_ARRAY_TASK_COUNT": "1", "SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_JOB_ID": "5"}
    for ends, code in (('{"bn": 2}', 2), ("{}", 0)):
        done = sweep("demo", "--task", folder=sandbox, DEPTHS="16", ENDS=ends, **task)
        assert done.returncode == code and "scalar-8-16-0" in noted(sandbox / "demo" / "made"), done


def test_a_sweep_that_failed_before_its_first_record_has_failed(sandbox):
    """That there is nothing to report is no bad usage."""
    (sandbox / "plot.py").write_text("raise SystemExit(2)")
    for ends, code in (('{"bn": -9}', 1), ("{}", 2)):
        done = sweep("demo", "--jobs", 1, folder=sandbox, DEPTHS="16", INITS="bn", ENDS=ends)
        assert done.returncode == code, done


def test_logs_tell_the_line_its_output_and_its_exit_code(sandbox):
    options = {"folder": sandbox, "INITS": "bn", "DEPTHS": "16"}
    for ends in ('{"bn": 3}', "{}"):
        sweep("demo", "--jobs", 1, **options, ENDS=ends)
    (line,) = printed("demo", **options)
    failed, done = (
        log.read_text().splitlines()
        for log in sorted((sandbox / "demo" / "logs").glob("*"), key=os.path.getmtime)
    )
    assert failed == [line, "error: bn is out of luck", "exit 3"]
    gpu = 0 if torch.cuda.is_available() else None  # the first, on a machine that has one
    assert done == [line, f"bn-8-16-0 on GPU {gpu}", "", "exit 0"]


def test_each_worker_has_its_gpu(sandbox):
    done = sweep("demo", "--nap", 0.3, folder=sandbox, CUDA_VISIBLE_DEVICES="4,7")
    assert done.returncode == 0
    text = "".join(log.read_text() for log in (sandbox / "demo" / "logs").iterdir())
    assert set(re.findall("on GPU (.*)", text)) == {"4", "7"}


def fake(folder, name, text):
    """A program of that name, in a folder that is to stand first in PATH."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{text}\n")
    (folder / name).chmod(0o755)
    return {"PATH": f"{folder}{os.pathsep}{environment()['PATH']}"}


def test_torchrun_has_the_whole_machine(sandbox, tmp_path):
    path = fake(
        tmp_path / "bin", "torchrun", 'echo "threads ${OMP_NUM_THREADS-}" >&2; shift 2; exec python "$@"'
    )
    done = sweep(
        "table5", folder=sandbox, BATCHES="256", INITS="bn fixup", CUDA_VISIBLE_DEVICES="0,1", **path
    )
    assert done.returncode == 0 and "--table table5" in done.stdout, done
    said = logs(sandbox / "results")
    assert [rests[0][1].split(" on ")[1] for rests in said.values()] == ["GPU 0,1"] * 2
    assert {len(rests) for rests in said.values()} == {1}  # one worker


def test_torchruns_processes_may_find_the_rest_in_other_hands(sandbox, tmp_path):
    """torchrun ends with 1 whatever its processes say; what they said is in its report."""
    text = '[ -e again ] && exec python "${@:3}"; touch again; echo "  exitcode  : 76 (pid: 9)"; exit 1'
    done = sweep(
        "table5", folder=sandbox, BATCHES="256", INITS="bn", **fake(tmp_path / "bin", "torchrun", text)
    )
    assert done.returncode == 0
    ((rest,),) = logs(sandbox / "results").values()
    assert [word for word in rest if word.startswith("exit ")] == ["exit 76", "exit 0"]


# ----------------------------------------------------------------------------------------------- interrupted


@pytest.mark.parametrize("name, group", [("SIGTERM", False), ("SIGINT", True), ("SIGHUP", True)])
def test_a_signal_ends_every_line_in_good_order(sandbox, name, group):
    out = sandbox / "demo"
    process = start("demo", "--jobs", 2, "--nap", 60, folder=sandbox)
    wait_for(lambda: len(noted(out / "begun")) == 2)
    (os.killpg if group else os.kill)(process.pid, getattr(signal, name))
    output, errors = process.communicate(timeout=30)
    assert process.returncode == 75 and errors == "" and alive(process.pid) == []
    assert output == "interrupted: the same sweep goes on from here\n"
    assert len(noted(out / "begun")) == 2 and noted(out / "made") == []
    ends = [rest for rests in logs(out).values() for rest in rests]
    assert ends == [["exit 75"]] * 2
    assert sweep("demo", folder=sandbox).returncode == 0 and len(noted(out / "made")) == 6


def test_a_signal_at_any_time_leaves_no_process_behind(sandbox):
    for delay in (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.5):
        process = start("demo", "--jobs", 3, "--nap", 60, folder=sandbox)
        time.sleep(delay)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
        # Before it has begun to listen it dies of the signal, without a process to leave behind.
        assert process.returncode in (75, -signal.SIGTERM)
        wait_for(lambda process=process: alive(process.pid) == [], seconds=5)


def test_workers_of_a_sweep_that_was_killed_end_after_their_line(sandbox):
    process = start("demo", "--jobs", 1, "--nap", 0.5, folder=sandbox)
    wait_for(lambda: noted(sandbox / "demo" / "begun"))
    process.kill()
    process.wait()
    wait_for(lambda: alive(process.pid) == [], seconds=10)
    assert len(noted(sandbox / "demo" / "made")) == 1


def test_two_sweeps_at_once_make_each_run_once(sandbox):
    flags = ["demo", "--jobs", 2, "--nap", 0.1, "--seeds", 2]
    processes = [start(*flags, folder=sandbox) for _ in range(2)]
    assert [process.communicate(timeout=60) and process.returncode for process in processes] == [0, 0]
    made = noted(sandbox / "demo" / "made")
    assert len(made) == len(set(made)) == 12
    assert all(line.endswith("--nap 0.1 --seeds 2") for line in logs(sandbox / "demo"))


# ------------------------------------------------------------------------------------------------- real runs


def outcomes(out):
    """All that records say of the runs themselves: not how long they took, and where."""
    found = {}
    for path in sorted(out.glob("*/*.json")):
        record = json.loads(path.read_text())
        for entry in record["history"]:
            del entry["seconds"]
        found[path.name] = {key: record[key] for key in ("config", "status", "history", "final", "data")}
    return found


def test_two_workers_make_one_point_together(tmp_path):
    out = tmp_path / "the results"
    flags = [*TINY, "--train-size", 1024, "--seeds", 3, "--out", out, "--jobs", 2]
    done = sweep("table1", *flags, INITS="biases+dropout", LRS="2^-5 2^-4 2^-3")
    assert done.returncode == 0, done
    (point,) = points("table1", *flags[:-2], INITS="biases+dropout", LRS="2^-5 2^-4 2^-3")
    assert point.plan().missing == [] and len(point.plan().asked) == 9
    assert {path.suffix for path in point.folder.iterdir()} == {".json"}
    first, *lines = done.stdout.splitlines()
    head = re.fullmatch("table1: 1 point, 9 runs planned, ([01]) of them done; 2 workers", first)
    early = int(head[1])  # a worker may be done with a run before the first look
    lines = [line for line in lines if line.startswith("[")]
    assert len(lines) == 9 - early and max(map(len, lines)) <= 80
    name = r"wrn10-1 biases\+dropout B 32 2\^-[345] seed [0-2]: [\d.]+%"
    assert re.fullmatch(rf"\[{1 + early}/9 runs, about \d+ min\] {name}", lines[0])
    assert re.fullmatch(rf"\[9/9 runs\] {name}", lines[-1])
    both = [sum(".json)" in word for word in rest) for rests in logs(out).values() for rest in rests]
    assert len(both) == 2 and sum(both) >= 9 and min(both) > 0


def test_ctrl_c_saves_a_checkpoint_and_the_same_sweep_goes_on(tmp_path):
    flags = [*TINY, "--epochs", 40, "--eval-every", 40, "--seeds", 1, "--out", tmp_path, "--jobs", 1]
    process = start("table1", *flags, INITS="scalar", LRS="2^-3")
    wait_for(lambda: any("epoch 1/40" in log.read_text() for log in tmp_path.glob("logs/*.log")))
    os.killpg(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 75 and errors == "" and alive(process.pid) == []
    assert output.splitlines()[1:] == ["interrupted: the same sweep goes on from here"]
    assert {path.suffix for path in (tmp_path / "shapes").iterdir()} <= {".ckpt", ".old", ".lock"}
    assert sweep("table1", *flags, INITS="scalar", LRS="2^-3").returncode == 0
    assert sum("goes on from epoch" in log.read_text() for log in tmp_path.glob("logs/*.log")) == 1
    assert {path.suffix for path in (tmp_path / "shapes").iterdir()} == {".json"}


@pytest.mark.slow
def test_kills_at_random_moments_change_nothing(tmp_path):
    """Two workers, all killed again and again: the records of one worker left alone, bit by bit."""
    flags = [
        *TINY,
        "--train-size",
        256,
        "--epochs",
        3,
        "--checkpoint-every",
        0,
        "--seeds",
        2,
        "--lr",
        "2^-7",
        "2^-6",
    ]
    options = {"INITS": "none scalar"}
    alone = start("table1", *flags, "--out", tmp_path / "one", "--jobs", 1, **options)
    chance, flags = random.Random(0), [*flags, "--out", tmp_path / "two", "--jobs", 2]
    for _ in range(6):
        process = start("table1", *flags, **options)
        time.sleep(chance.uniform(5, 15))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert sweep("table1", *flags, **options).returncode == 0
    alone.communicate()
    assert alone.returncode == 0
    assert outcomes(tmp_path / "two") == outcomes(tmp_path / "one") != {}
    assert {path.suffix for path in (tmp_path / "two" / "shapes").iterdir()} == {".json"}
