"""Sweeps as job arrays: what is submitted, by stand-ins for Slurm's commands; what happens, by a Slurm of our own."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

import pytest
from test_sweep import alive, environment, make_sandbox, noted, printed, start, sweep, wait_for

# -------------------------------------------------------------------------------------------------- what is submitted


@pytest.fixture
def sandbox(tmp_path):
    return make_sandbox(tmp_path)


@pytest.fixture
def fake(tmp_path):
    """A folder of commands that stand in for Slurm's: `calls` notes those of sbatch, `queue` is what squeue prints."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "queue").touch()
    commands = {
        "scontrol": "print('Configuration data as of now\\nMaxArraySize            = 101\\nMaxJobCount = 10000')",
        "squeue": "print(open(here / 'queue').read(), end='')",
        "sbatch": "open(here / 'calls', 'a').write(json.dumps(sys.argv[1:]) + '\\n')\nsys.exit('broken' in sys.argv)",
    }
    for name, text in commands.items():
        path = folder / name
        path.write_text(
            f"#!{sys.executable}\nimport json, pathlib, sys\nhere = pathlib.Path({str(folder)!r})\n{text}\n"
        )
        path.chmod(0o755)
    return folder


def path_with(folder):
    return {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


def calls(fake):
    """The calls of sbatch: each as its options, from --name to value."""
    found = [json.loads(line) for line in noted(fake / "calls")]
    return [dict(pairwise(call)) | {"argv": call} for call in found]


def test_arrays_are_smaller_than_the_cluster_allows(sandbox, fake):
    done = sweep("fig1", "--slurm", "--time 1:00", folder=sandbox, **path_with(fake))
    assert done.returncode == 0 and "fig1: 210 commands to submit, 0 in the queue" in done.stdout
    assert [call["--array"] for call in calls(fake)] == ["1-100", "1-100", "1-10"]
    lists = [Path(call["--comment"]) for call in calls(fake)]
    assert [line for file in lists for line in noted(file)] == printed("fig1", folder=sandbox)
    assert all(file.is_absolute() and file.parent == sandbox / "results" / "slurm" for file in lists)


def test_the_flags_of_sbatch(sandbox, fake):
    flags = "--partition 'a b' --time=12:00:00 --signal=B:USR1@60"
    sweep("table1", "--slurm", flags, "--out", "100% mine", folder=sandbox, INITS="bn", LRS="2^-3", **path_with(fake))
    (call,) = calls(fake)
    assert call["argv"][:2] == ["--requeue", "--signal=B:USR1@300"]  # before the user's, which win
    assert call["argv"][2:6] == ["--partition", "a b", "--time=12:00:00", "--signal=B:USR1@60"]
    assert call["--job-name"] == "table1" and call["--chdir"] == str(sandbox)
    assert call["--output"] == call["--comment"].replace("%", "%%") + ".out" and "100%% mine" in call["--output"]


def test_what_is_in_the_queue_is_not_submitted_again(sandbox, fake):
    options = {"folder": sandbox, "INITS": "bn scalar", "LRS": "2^-3 2^-2", "EXTEND": "0"} | path_with(fake)
    first, second, third, fourth = printed("table1", "--seeds", 1, **options)
    sweep("table1", "--seeds", 1, "--slurm", "", **options)
    submitted = calls(fake)[0]["--comment"]
    # Tasks 2 and 4 wait; so do an array of somebody else's and a job that is no array.
    (fake / "queue").write_text(f"2 {submitted}\n4 {submitted}\n1 /another/results/slurm/table1-abc\nN/A (null)\n")
    done = sweep("table1", "--seeds", 1, "--slurm=", **options)
    assert "2 commands to submit, 2 in the queue" in done.stdout
    assert noted(Path(calls(fake)[1]["--comment"])) == [first, third]
    # A later edit of the grid does not change what a task does.
    assert noted(Path(submitted)) == [first, second, third, fourth]


def test_a_task_does_its_line_and_what_is_done_is_not_submitted(sandbox, fake):
    out = "it's mine"
    options = {"folder": sandbox, "INITS": "bn none scalar", "LRS": "2^-3", "EXTEND": "0"} | path_with(fake)
    sweep("table1", "--seeds", 2, "--out", out, "--slurm", "--time 1:00", **options)
    (call,) = calls(fake)
    task = subprocess.run(
        ["/bin/sh", "-c", call["--wrap"]],
        cwd=call["--chdir"],
        env=environment(SLURM_ARRAY_TASK_ID="3", SLURM_ARRAY_JOB_ID="7", **path_with(fake)),
        capture_output=True,
        text=True,
    )
    assert task.returncode == 0 and task.stderr == "", task
    assert noted(sandbox / out / "made") == [f"wrn_cifar_scalar_bs64_lr2^-3_s0{seed}" for seed in range(2)]
    (log,) = (sandbox / out / "logs").iterdir()
    assert noted(log) == [noted(Path(call["--comment"]))[2], "exit 0"]
    assert "2 commands to submit" in sweep("table1", "--seeds", 2, "--out", out, "--slurm", "", **options).stdout


@pytest.mark.parametrize("name, requeued", [("SIGUSR1", ["requeue 7_1"]), ("SIGTERM", [])])
def test_a_task_comes_back_unless_it_was_cancelled(sandbox, fake, name, requeued):
    (fake / "scontrol").write_text(f'#!/bin/bash\necho "$*" >>"{fake}/requeued"\n')
    lists = sandbox / "results" / "slurm"
    lists.mkdir(parents=True)
    (lists / "list").write_text(printed("table1", "--nap", 60, folder=sandbox, INITS="bn", LRS="2^-3")[0] + "\n")
    task = start(
        "task",
        lists / "list",
        folder=sandbox,
        **path_with(fake) | {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_JOB_ID": "7", "SLURM_JOB_ID": "9"},
    )
    wait_for(lambda: noted(sandbox / "results" / "begun"))
    task.send_signal(getattr(signal, name))
    task.communicate(timeout=30)
    assert task.returncode == 75 and noted(fake / "requeued") == requeued and alive(task.pid) == []
    (log,) = (sandbox / "results" / "logs").iterdir()
    assert noted(log)[-1] == "exit 75"


def test_grids_grow_by_submitting_again(sandbox, fake):
    options = {"folder": sandbox, "INITS": "scalar", "LRS": "2^-3 2^-2", "BEST": "0"} | path_with(fake)
    sweep("table1", "--seeds", 1, **options | {"EXTEND": "0"})
    done = sweep("table1", "--seeds", 1, "--slurm", "", **options)
    assert done.returncode == 0
    assert [shlex.split(line)[7] for call in calls(fake) for line in noted(Path(call["--comment"]))] == ["2^-1"]


def test_errors_are_told_and_nothing_is_left(sandbox, fake):
    options = {"folder": sandbox, "INITS": "bn", "LRS": "2^-3"} | path_with(fake)
    assert sweep("table1", "--slurm", "broken", **options).returncode == 2
    assert list((sandbox / "results" / "slurm").iterdir()) == []
    for command in ("squeue", "scontrol"):
        shutil.copy(shutil.which("false"), fake / command)
        done = sweep("table1", "--slurm", "", **options)
        assert done.returncode == 2 and done.stderr.startswith("error: --slurm: no answer") and len(calls(fake)) == 1


# ------------------------------------------------------------------------------------------------------- what happens

DAEMONS = ("munged", "slurmctld", "slurmd")
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,batch_sched_delay=0,bf_interval=1
ReturnToService=2
MaxArraySize=4
KillWait=5
NodeName={host} NodeAddr=127.0.0.1 CPUs=2
PartitionName=main Nodes={host} Default=YES
"""


class Cluster:
    """A Slurm of one node with two CPUs and arrays of at most three tasks, in a folder of its own."""

    def __init__(self, folder):
        self.folder, self.processes = folder, {}
        self.env = environment(SLURM_CONF=str(folder / "slurm.conf"))
        with socket.socket() as a, socket.socket() as b:
            a.bind(("127.0.0.1", 0)), b.bind(("127.0.0.1", 0))
            ports = a.getsockname()[1], b.getsockname()[1]
        user, host = subprocess.check_output(["id", "-un"], text=True).strip(), socket.gethostname().split(".")[0]
        text = CONFIGURATION.format(host=host, ports=ports, user=user, folder=folder)
        (folder / "slurm.conf").write_text(text)
        (folder / "state").mkdir()
        (folder / "spool").mkdir()
        (folder / "munge.key").write_bytes(os.urandom(64))
        (folder / "munge.key").chmod(0o600)

    def start(self, daemon):
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        flags = ["-D"]
        if daemon == "munged":
            flags = ["-F", "--force", *(f"--{name}={self.folder}/munge.{end}" for name, end in files.items())]
        with open(self.folder / f"{daemon}.out", "a") as output:
            self.processes[daemon] = subprocess.Popen(
                [which(daemon), *flags], env=self.env, stdout=output, stderr=output
            )

    def stop(self, daemon):
        self.processes[daemon].terminate()
        self.processes[daemon].wait(30)

    def ask(self, *command):
        return subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=60).stdout

    def tasks(self):
        """The tasks in the queue: from the rate that a task's line has, to its id and state."""
        found = {}
        for row in self.ask("squeue", "--noheader", "--array", "--format", "%F_%K %K %T %k").splitlines():
            name, number, state, file = row.split(maxsplit=3)
            line = noted(Path(file))[int(number) - 1]
            found[int(re.search(r"--lr 2\^(-?\d+)", line)[1])] = name, state
        return found

    def up(self):
        return self.ask("sinfo", "--noheader", "--format", "%T").strip() in ("idle", "mixed", "allocated")


def which(program):
    return shutil.which(program, path=os.environ["PATH"] + ":/usr/sbin:/sbin")


@pytest.fixture(scope="module")
def cluster():
    absent = [name for name in (*DAEMONS, "sbatch", "squeue", "scontrol", "scancel", "sinfo") if not which(name)]
    if absent:
        pytest.skip(f"no {', '.join(absent)}: apt-get install slurmctld slurmd slurm-client munge")
    with tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as folder:
        cluster = Cluster(Path(folder))
        try:
            for daemon in DAEMONS:
                cluster.start(daemon)
            wait_for(cluster.up, seconds=60)
            yield cluster
            cluster.ask("scancel", "--user", str(os.getuid()))
            wait_for(lambda: not cluster.tasks(), seconds=60)
        finally:
            for daemon in reversed(cluster.processes):
                cluster.stop(daemon)


def test_an_array_survives_whatever_befalls_its_tasks(tmp_path, cluster):
    """Five commands, two at a time: each run is made once, though tasks are cancelled, requeued and left alone."""
    sandbox = make_sandbox(tmp_path)
    out = sandbox / "the results"
    options = {"folder": sandbox, "INITS": "scalar", "LRS": "2^-5 2^-4 2^-3 2^-2 2^-1", "EXTEND": "0"}
    options |= {"SLURM_CONF": cluster.env["SLURM_CONF"]}
    flags = ["table1", "--seeds", 2, "--nap", 2.5, "--out", "the results", "--slurm", "--time 10:00"]

    def begun(rate):
        return noted(out / "begun").count(f"wrn_cifar_scalar_bs64_lr2^{rate}_s00")

    submitted = sweep(*flags, **options)
    assert submitted.returncode == 0 and "5 commands to submit, 0 in the queue" in submitted.stdout, submitted.stderr
    assert submitted.stdout.count("Submitted batch job") == 2
    assert "0 commands to submit, 5 in the queue" in sweep(*flags, **options).stdout
    wait_for(lambda: begun(-5) and begun(-4), seconds=60)

    cluster.ask("scancel", cluster.tasks()[-5][0])
    # What Slurm sends before the time limit: the task saves, ends and comes back.
    cluster.ask("scancel", "--batch", "--signal=USR1", cluster.tasks()[-4][0])
    wait_for(lambda: begun(-3) and begun(-2), seconds=60)
    assert -5 not in cluster.tasks() and cluster.tasks()[-4][1] == "PENDING"
    cluster.stop("slurmd")
    cluster.start("slurmd")
    wait_for(lambda: begun(-1), seconds=60)
    cluster.ask("scontrol", "requeue", cluster.tasks()[-1][0])  # as an administrator would
    wait_for(lambda: not cluster.tasks(), seconds=90)
    assert begun(-4) == begun(-1) == 2 and begun(-3) == begun(-2) == 1

    made = noted(out / "made")
    assert sorted(made) == sorted(set(made)) and not any("lr2^-5_s01" in name for name in made)
    again = sweep(*flags, **options)
    assert "1 commands to submit, 0 in the queue" in again.stdout
    wait_for(lambda: not cluster.tasks(), seconds=60)
    made = noted(out / "made")
    assert sorted(made) == [
        f"wrn_cifar_scalar_bs64_lr2^{rate}_s0{seed}" for rate in range(-1, -6, -1) for seed in (0, 1)
    ]
    logs = [noted(log) for log in (out / "logs").iterdir()]
    ends = {log[0].split("--lr ")[1].split()[0]: [line for line in log if line.startswith("exit")] for log in logs}
    twice, once = ["exit 75", "exit 0"], ["exit 0"]
    assert ends == {"2^-5": twice, "2^-4": twice, "2^-3": once, "2^-2": once, "2^-1": twice}
    assert "0 commands to submit, 0 in the queue" in sweep(*flags, **options).stdout


def test_a_task_that_fails_is_told_and_submitted_again(tmp_path, cluster):
    sandbox = make_sandbox(tmp_path)
    options = {"folder": sandbox, "INITS": "bn scalar", "LRS": "2^-3", "EXTEND": "0"}
    options |= {"SLURM_CONF": cluster.env["SLURM_CONF"]}
    sweep("table1", "--seeds", 1, "--slurm", "--time 10:00", **options, ENDS='{"bn": -9}')
    wait_for(lambda: not cluster.tasks(), seconds=60)
    assert noted(sandbox / "results" / "made") == ["wrn_cifar_scalar_bs64_lr2^-3_s00"]
    assert "exit 137: error: bn is out of luck" in sweep("status", "--seeds", 1, **options).stdout
    assert "1 commands to submit, 0 in the queue" in sweep("table1", "--seeds", 1, "--slurm", "", **options).stdout
    wait_for(lambda: not cluster.tasks(), seconds=60)
    assert len(noted(sandbox / "results" / "made")) == 2
