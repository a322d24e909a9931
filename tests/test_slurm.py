"""Sweeps as job arrays: what is submitted, by a stand-in for sbatch; what happens, by a Slurm of one node."""

import os
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
from pathlib import Path

import pytest
from standin import noted
from test_sweep import environment, fake, logs, make_sandbox, sweep, wait_for

pytestmark = pytest.mark.xdist_group("slurm")  # one node is all there is


@pytest.fixture
def sandbox(tmp_path):
    return make_sandbox(tmp_path)


def test_the_flags_of_sbatch(sandbox, tmp_path):
    path = fake(tmp_path / "bin", "sbatch", 'printf "%s\\n" "$@" >"$0.words"; pwd >"$0.folder"')
    flags = "--partition 'a b' --time=12:00:00 --signal=B:USR1@60"
    done = sweep("table1", "--slurm", flags, "--jobs", 7, "--out", "100% mine", folder=sandbox, **path)
    assert done.returncode == 0 and done.stderr == ""
    words = (tmp_path / "bin" / "sbatch.words").read_text().splitlines()
    assert words[:4] == [
        "--requeue",
        "--signal=B:USR1@300",
        "--open-mode",
        "append",
    ]  # before the user's, which win
    assert words[4:8] == ["--partition", "a b", "--time=12:00:00", "--signal=B:USR1@60"]
    options = dict(zip(words[8::2], words[9::2], strict=True))
    assert options["--job-name"] == "table1" and options["--array"] == "1-7"
    assert options["--chdir"] == str(sandbox) and "--comment" not in options
    assert (
        options["--output"] == "100%% mine/logs/slurm-%A_%a.out" and (sandbox / "100% mine" / "logs").is_dir()
    )
    task = [f"{sandbox}/sweep.sh", "table1", "--task", "--out", "100% mine"]
    assert shlex.split(options["--wrap"]) == ["exec", "bash", *task]


def test_an_error_of_sbatch_is_one_of_the_sweep(sandbox, tmp_path):
    path = fake(tmp_path / "bin", "sbatch", "echo no such partition >&2; exit 1")
    done = sweep("table1", "--slurm", "", folder=sandbox, **path)
    assert done.returncode == 1 and done.stderr == "no such partition\n"


def test_a_flag_that_no_script_has_is_not_submitted(sandbox, tmp_path):
    path = fake(tmp_path / "bin", "sbatch", 'touch "$0.called"')
    done = sweep("table1", "--slurm", "", "--widht", 1, folder=sandbox, **path)
    assert done.returncode == 2 and done.stderr == "error: target  unrecognized arguments: --widht\n"
    done = sweep("table1", "--slurm", "", "--fresh", folder=sandbox, **path)
    assert done.returncode == 2 and "--fresh" in done.stderr
    assert not (tmp_path / "bin" / "sbatch.called").exists()


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
KillWait=5
NodeName={host} NodeAddr=127.0.0.1 CPUs=2
PartitionName=main Nodes={host} Default=YES
"""


class Cluster:
    """A Slurm of one node with two CPUs, in a folder of its own."""

    def __init__(self, folder):
        self.folder, self.processes = folder, {}
        self.env = environment(SLURM_CONF=str(folder / "slurm.conf"))
        with socket.socket() as a, socket.socket() as b:
            a.bind(("127.0.0.1", 0)), b.bind(("127.0.0.1", 0))
            ports = a.getsockname()[1], b.getsockname()[1]
        user, host = (
            subprocess.check_output(["id", "-un"], text=True).strip(),
            socket.gethostname().split(".")[0],
        )
        text = CONFIGURATION.format(host=host, ports=ports, user=user, folder=folder)
        (folder / "slurm.conf").write_text(text)
        (folder / "state").mkdir()
        (folder / "spool").mkdir()
        (folder / "munge.key").write_bytes(os.urandom(64))
        (folder / "munge.key").chmod(0o600)

    def start(self, daemon):
        files = {
            "key-file": "key",
            "socket": "socket",
            "pid-file": "pid",
            "log-file": "log",
            "seed-file": "seed",
        }
        flags = ["-D"]
        if daemon == "munged":
            flags = ["-F", "--force", *(f"--{name}={self.folder}/munge.{end}" for name, end in files.items())]
        with open(self.folder / f"{daemon}.out", "a") as output:
            self.processes[daemon] = subprocess.Popen(
                [which(daemon), *flags], env=self.env, stdout=output, stderr=output
            )

    def stop(self, daemon, number=signal.SIGTERM):
        self.processes[daemon].send_signal(number)
        self.processes[daemon].wait(30)

    def ask(self, *command):
        return subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=60).stdout

    def tasks(self):
        """The tasks in the queue: {"7_1": "RUNNING"}."""
        return dict(
            map(str.split, self.ask("squeue", "--noheader", "--array", "--format", "%F_%K %T").splitlines())
        )

    def running(self):
        return [name for name, state in self.tasks().items() if state == "RUNNING"]

    def up(self):
        return self.ask("sinfo", "--noheader", "--format", "%T").strip() in ("idle", "mixed", "allocated")


def which(program):
    return shutil.which(program, path=os.environ["PATH"] + ":/usr/sbin:/sbin")


# ---------------------------------------------------------------------------------------------- what happens


@pytest.fixture(scope="module")
def cluster():
    absent = [
        name for name in (*DAEMONS, "sbatch", "squeue", "scontrol", "scancel", "sinfo") if not which(name)
    ]
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
    """Tasks are cancelled, requeued, submitted twice, their node's daemon killed: each run is made once."""
    sandbox = make_sandbox(tmp_path)
    out = sandbox / "the results"
    options = {"folder": sandbox, "INITS": "bn none scalar zeroinit", "SLURM_CONF": cluster.env["SLURM_CONF"]}
    flags = [
        "table1",
        "--seeds",
        3,
        "--nap",
        2.5,
        "--out",
        "the results",
        "--slurm",
        "--time 10:00",
        "--jobs",
        2,
    ]

    def submit():
        done = sweep(*flags, **options)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()[-1]

    first = submit()
    wait_for(lambda: len(noted(out / "begun")) == 2)
    assert cluster.tasks() == {f"{first}_1": "RUNNING", f"{first}_2": "RUNNING"}
    # What Slurm sends before the time limit: the task saves, ends and comes back.
    cluster.ask("scancel", "--batch", "--signal=USR1", f"{first}_1")
    wait_for(lambda: cluster.tasks().get(f"{first}_1") == "PENDING")
    second = submit()
    wait_for(lambda: f"{second}_1" in cluster.running())
    cluster.stop("slurmd", signal.SIGKILL)
    cluster.start("slurmd")
    cluster.ask("scontrol", "requeue", f"{second}_1")  # as an administrator would
    wait_for(lambda: f"{second}_2" in cluster.running())
    before = len(noted(out / "begun"))
    wait_for(lambda: len(noted(out / "begun")) > before)
    cluster.ask("scancel", f"{second}_2")
    wait_for(lambda: f"{second}_2" not in cluster.tasks())
    wait_for(lambda: not cluster.tasks(), seconds=120)

    inits = options["INITS"].split()
    assert sorted(noted(out / "made")) == sorted(f"{init}-64-{seed}" for init in inits for seed in range(3))
    ends = [
        word for rests in logs(out).values() for rest in rests for word in rest if word.startswith("exit")
    ]
    assert 2 <= ends.count("exit 75") <= 3 and set(ends) <= {"exit 75", "exit 76", "exit 0"}
    assert len(noted(out / "begun")) <= 12 + ends.count("exit 75")
    tasks = {log.stem.rpartition("-")[2] for log in (out / "logs").glob("table1-*.log")}
    assert tasks == {f"{first}_1", f"{first}_2", f"{second}_1", f"{second}_2"}
    printed = sweep(*flags[:-4], "--jobs", 1, **options).stdout
    assert printed == "plot.py the results --table table1\nplot.py the results\n"  # the table, the report


def test_a_line_that_fails_does_not_keep_a_task_from_the_others(tmp_path, cluster):
    sandbox = make_sandbox(tmp_path)
    options = {
        "folder": sandbox,
        "INITS": "bn scalar",
        "SLURM_CONF": cluster.env["SLURM_CONF"],
        "ENDS": '{"bn": -9}',
    }
    assert sweep("table1", "--seeds", 1, "--slurm", "--time 10:00", **options).returncode == 0
    wait_for(lambda: noted(sandbox / "results" / "made") and not cluster.tasks())
    assert noted(sandbox / "results" / "made") == ["scalar-64-0"]
    assert sorted(rest[-1] for rests in logs(sandbox / "results").values() for rest in rests) == [
        "exit 0",
        "exit 137",
    ]
