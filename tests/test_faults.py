"""Everything that a cluster does to a job, done on purpose: nothing is lost, made twice or silently wrong."""

import contextlib
import errno
import functools
import io
import os
import pickle
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import scripts
import torch
from scripts import all_records, end, make_folder, results

import common
import data
import points
import resnet_imagenet
import runner
import wrn_cifar
from points import is_running, take_lock

HERE = Path(__file__).resolve().parent.parent
FLAGS = "--data shapes --depth 10 --width 1 --bs 16 --train-size 96 --epochs 3 --device cpu --amp off"
FLAGS += " --eval-every 1 --lr 2^-2"
NAME = "wrn10-1_zeroinit_bs16_lr2^-2_ep3_trainsize96_s00"


@pytest.fixture(autouse=True)
def small_shapes(monkeypatch):
    monkeypatch.setattr(data, "SHAPES", scripts.SIZES[0])
    monkeypatch.setattr(data, "SHAPES_TEST", scripts.SIZES[1])


def script(*more, flags=FLAGS) -> int:
    return scripts.run(wrn_cifar, flags, *more)


def start(out, *more, **environment):
    """A process that runs wrn_cifar.py; what it says is added to OUT.log."""
    return scripts.start(wrn_cifar, FLAGS, "--out", out, *more, log=f"{out}.log", **environment)


@functools.cache
def undisturbed(*more):
    """The results of runs that nothing happened to."""
    with tempfile.TemporaryDirectory() as out:
        assert script("--out", out, *more) == 0
        return results(out)


def before(method, action):
    """A method of Run that first calls action(run)."""
    real = getattr(common.Run, method)
    return lambda run, *args: (action(run), real(run, *args))[1]


def signal_at(*updates, number=signal.SIGTERM, times=1):
    """An action that sends this process a signal when a run comes to one of its updates, once for each."""
    left = list(updates)

    def act(run):
        if run.updates in left:
            left.remove(run.updates)
            for _ in range(times):
                os.kill(os.getpid(), number)

    return act


# ----------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("flags", [["--seeds", "1"], ["--seeds", "3", "--concurrent", "3"]])
@pytest.mark.parametrize("updates", [[7], [2, 12], [1, 5, 6, 10, 17]])
def test_a_run_that_was_stopped_several_times_ends_as_an_undisturbed_one(
    updates, flags, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(common.Run, "advance", before("advance", signal_at(*updates)))
    codes = [script("--out", tmp_path, *flags) for _ in range(len(updates) + 1)]
    assert codes == [75] * len(updates) + [0]
    assert results(tmp_path) == undisturbed(*flags)
    assert "goes on from epoch" in capsys.readouterr().out
    assert {path.suffix for path in tmp_path.glob("shapes/*")} == {".json"}  # no checkpoint or lock is left


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
@pytest.mark.parametrize("method", ["advance", "evaluate"])
def test_a_signal_in_mid_epoch_or_in_an_evaluation_or_twice(number, method, tmp_path, monkeypatch):
    monkeypatch.setattr(common.Run, method, before(method, signal_at(6, number=number, times=2)))
    assert script("--out", tmp_path) == 75
    assert [path.name for path in tmp_path.glob("shapes/*")] == [f"{NAME}.ckpt"]
    assert script("--out", tmp_path) == 0
    assert results(tmp_path) == undisturbed()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_while_images_are_read_ends_it_at_once(number, tmp_path, monkeypatch, capsys):
    def load(*_):
        os.kill(os.getpid(), number)
        time.sleep(10)

    monkeypatch.setattr(runner, "load_on_all_ranks", load)
    began = time.monotonic()
    assert script("--out", tmp_path / "out") == 75 and time.monotonic() - began < 5
    assert not (tmp_path / "out").exists()


def test_nohup_is_obeyed(tmp_path, monkeypatch):
    monkeypatch.setattr(common.Run, "advance", before("advance", signal_at(6, number=signal.SIGHUP)))
    usual = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert script("--out", tmp_path) == 0
    finally:
        signal.signal(signal.SIGHUP, usual)
    assert results(tmp_path) == undisturbed()


def test_a_terminal_that_is_closed_stops_a_run_as_other_signals_do(tmp_path):
    terminal = scripts.Terminal()
    more = ["--epochs", "5000", "--lr", "2^-9", "--out", tmp_path]  # neither ends nor diverges
    process = scripts.start(wrn_cifar, FLAGS, *more, log=terminal.path)
    terminal.read_until(lambda: "/5000" in terminal.seen)
    terminal.hang_up()
    assert end(process) == 75
    assert [path.suffix for path in tmp_path.glob("shapes/*")] == [".ckpt"]


def test_fresh_begins_again(tmp_path, monkeypatch, capsys):
    path = stopped(tmp_path, monkeypatch, 7)
    with monkeypatch.context() as patch:
        patch.setattr(
            common.Run, "advance", before("advance", lambda run: os.kill(os.getpid(), signal.SIGTERM))
        )
        patch.setattr(runner, "save", lambda jobs: None)  # killed before it saved anything
        capsys.readouterr()
        assert script("--out", tmp_path, "--fresh") == 75
    assert "the same command, without --fresh, goes on from here" in capsys.readouterr().out
    assert not path.exists()
    assert script("--out", tmp_path) == 0
    assert "goes on from epoch" not in capsys.readouterr().out and results(tmp_path) == undisturbed()


# ------------------------------------------------------------------------------------------- checkpoints


def stopped(out, monkeypatch, *updates):
    """Stop a run at these updates, so that it leaves a checkpoint, or two; returns the last one's path."""
    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "advance", before("advance", signal_at(*updates)))
        for _ in updates:
            assert script("--out", out) == 75
    return out / "shapes" / f"{NAME}.ckpt"


def kill_in_a_child(action):
    """Do something in a forked process, which is expected to kill itself."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            action()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_killed_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    path = stopped(tmp_path, monkeypatch, 7)
    whole = path.read_bytes()

    def write_half():
        with runner.atomic_write(path, path.with_suffix(".ckpt.old")) as file:
            file.write(whole[: len(whole) // 2])
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    kill_in_a_child(write_half)
    assert path.read_bytes() == whole and len(list(path.parent.iterdir())) == 2  # the half has another name
    assert script("--out", tmp_path) == 0
    assert results(tmp_path) == undisturbed()
    assert len(list(path.parent.iterdir())) == 1


def test_killed_between_the_record_and_the_removal_of_its_checkpoint(tmp_path, monkeypatch, capsys):
    path = stopped(tmp_path, monkeypatch, 7)
    shutil.copy(path, tmp_path / "kept")
    assert script("--out", tmp_path) == 0
    shutil.copy(tmp_path / "kept", path)
    path.with_suffix(".lock").touch()
    record = path.with_suffix(".json").read_bytes()
    monkeypatch.setattr(runner, "train", None)
    assert script("--out", tmp_path) == 0
    assert path.with_suffix(".json").read_bytes() == record
    assert list(path.parent.iterdir()) == [path.with_suffix(".json")]


def cut(share):
    return lambda content: content[: int(share * len(content))]


def flip_a_bit(content):
    """In the middle of the weights, where torch.load notices nothing."""
    content = bytearray(content)
    content[len(content) // 2] ^= 16
    return bytes(content)


DAMAGES = {"empty": cut(0), "a tenth": cut(0.1), "half": cut(0.5), "99%": cut(0.99), "one bit": flip_a_bit}


@pytest.mark.parametrize("both", [False, True], ids=["the last", "both"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_noticed(damage, both, tmp_path, monkeypatch, capsys):
    last = stopped(tmp_path, monkeypatch, 3, 7)
    for path in (last, last.with_suffix(".ckpt.old")) if both else (last,):
        path.write_bytes(DAMAGES[damage](path.read_bytes()))
    assert script("--out", tmp_path) == 0
    out = capsys.readouterr().out
    assert f"{last} is not used" in out
    assert ("goes on from epoch 1, update 5" in out.split("not used")[-1]) is not both
    assert results(tmp_path) == undisturbed()


def test_a_flipped_bit_anywhere_is_found_or_changes_no_tensor(tmp_path):
    """One flip in each of 600 places, and several in each part of the zip format."""
    path, generator, rng = tmp_path / "state.pt", torch.Generator().manual_seed(0), random.Random(0)
    state = {"config": {"lr": 0.25, "name": "a name"}, "tensors": [torch.rand(5, 7, generator=generator)]}
    state |= {"place": (3, 14, 0.5, [{"epoch": 1}])}
    torch.save(state, path)
    whole = path.read_bytes()
    places = {rng.randrange(len(whole)) for _ in range(600)} | {
        *range(80),
        *range(len(whole) - 400, len(whole)),
    }
    outcomes = {"refused": 0, "the same": 0}
    for place in sorted(places):
        content = bytearray(whole)
        content[place] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        try:
            loaded = runner.load_tensors(path)
        except ValueError as error:
            assert "\n" not in str(error)
            outcomes["refused"] += 1
        else:
            assert torch.equal(loaded["tensors"][0], state["tensors"][0])
            assert loaded | {"tensors": 0} == state | {"tensors": 0}
            outcomes["the same"] += 1
    assert min(outcomes.values()) > 20  # padding between the parts has no checksum


@pytest.mark.parametrize(
    "number, code", [(errno.EIO, 1), (errno.ESTALE, 1), (errno.EACCES, 2), (errno.ENOMEM, 1)]
)
def test_a_checkpoint_that_cannot_be_read_is_not_taken_for_a_damaged_one(
    number, code, tmp_path, monkeypatch, capsys
):
    path = stopped(tmp_path, monkeypatch, 7)
    whole = path.read_bytes()
    with monkeypatch.context() as patch:

        def fail(name):
            raise MemoryError if number == errno.ENOMEM else OSError(number, os.strerror(number))

        patch.setattr(runner.zipfile, "ZipFile", fail)
        capsys.readouterr()
        assert script("--out", tmp_path) == code
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and said.err.startswith("error: ") and "not used" not in said.out
    assert str(path) in said.err or number == errno.ENOMEM
    assert path.read_bytes() == whole
    assert script("--out", tmp_path) == 0 and results(tmp_path) == undisturbed()


def test_ranks_with_other_checkpoints_do_not_train_together(tmp_path, monkeypatch, capsys):
    stopped(tmp_path, monkeypatch, 7)
    # the first rank has no checkpoint: it begins at update 0
    monkeypatch.setattr(runner, "agreed", lambda value: 0 if isinstance(value, int) else value)
    assert script("--out", tmp_path) == 2
    assert "the ranks have other checkpoints" in capsys.readouterr().err


def test_too_little_memory_is_one_line(tmp_path, monkeypatch, capsys):
    def fail(run):
        torch.empty(1 << 60)

    monkeypatch.setattr(common.Run, "advance", before("advance", fail))
    assert script("--out", tmp_path) == 1
    assert capsys.readouterr().err == "error: not enough memory: try --micro, or fewer --concurrent\n"


def test_another_users_lock(tmp_path, monkeypatch):
    """A file that cannot be written to can be locked: what a process left that was killed is no obstacle."""

    def own_files_only(name, mode="r"):
        if mode == "a":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(name))
        return open(name, mode)

    path = tmp_path / "shapes" / f"{NAME}.json"
    held = take_lock(path)
    monkeypatch.setattr(points, "open", own_files_only, raising=False)
    assert take_lock(path) is None and is_running(path)
    began = time.monotonic()
    assert not any(take_lock(path) for _ in range(10)) and time.monotonic() - began < 1  # at once
    held.close()
    path.with_suffix(".lock").touch()  # left by a process that was killed
    with take_lock(path):
        assert is_running(path)
    assert not path.with_suffix(".lock").exists()


def test_a_rank_without_a_device_says_so(tmp_path):
    """The second of two ranks, on a machine with fewer GPUs."""
    command = [sys.executable, HERE / "wrn_cifar.py", *FLAGS.split(), "--device", "cuda:7", "--out", tmp_path]
    ranks = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    done = subprocess.run(command, env=os.environ | ranks, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.startswith("error: --device cuda:7: ")


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path, monkeypatch, capsys):
    class Malicious:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    path = stopped(tmp_path, monkeypatch, 7)
    buffer = io.BytesIO()
    torch.save({"config": {}, "extra": Malicious()}, buffer)
    for content in (buffer.getvalue(), pickle.dumps(Malicious())):
        path.write_bytes(content)
        assert runner.read_checkpoint(path.with_suffix(".json"), {}) is None
    assert script("--out", tmp_path) == 0
    assert not (tmp_path / "executed").exists() and "is not used" in capsys.readouterr().out
    assert results(tmp_path) == undisturbed()


def test_a_checkpoint_of_another_run_is_refused(tmp_path, monkeypatch, capsys):
    path = stopped(tmp_path, monkeypatch, 7)
    path.rename(path.with_name(path.name.replace("lr2^-2", "lr2^-3")))
    assert script("--out", tmp_path, "--lr", "2^-3") == 2
    assert "its lr is 0.25, not 0.125" in capsys.readouterr().err
    assert script("--out", tmp_path, "--lr", "2^-3", "--fresh") == 0


@pytest.mark.parametrize(
    ("key", "other", "complaint"),
    [
        ("precision", "bf16", "its precision is bf16, not float32"),
        ("device", "cuda", "its device is cuda, not cpu"),
        ("images", "0123456789abcdef", "its images is 0123456789abcdef, not "),
    ],
)
def test_a_checkpoint_of_another_precision_device_or_images_is_refused(
    key, other, complaint, tmp_path, monkeypatch, capsys
):
    path = stopped(tmp_path, monkeypatch, 7)
    state = runner.load_tensors(path)
    torch.save(state | {"config": state["config"] | {key: other}}, path)
    whole = path.read_bytes()
    assert script("--out", tmp_path) == 2
    error = capsys.readouterr().err
    assert complaint in error and error.count("\n") == 1
    assert path.read_bytes() == whole


def test_a_checkpoint_of_other_code_is_one_line(tmp_path, monkeypatch, capsys):
    path = stopped(tmp_path, monkeypatch, 7)
    state = runner.load_tensors(path)
    for other in (
        {key: value for key, value in state.items() if key != "scaler"},
        state | {"tensors": state["tensors"][:-1]},
        state | {"tensors": [torch.zeros(3, 3), *state["tensors"][1:]]},
    ):
        torch.save(other, path)
        assert script("--out", tmp_path) == 2
        error = capsys.readouterr().err
        assert f"{path} is of other code, --fresh begins again" in error and error.count("\n") == 1
    path.rename(path.with_suffix(".ckpt.old"))  # where the last checkpoint is damaged, this one is meant
    assert script("--out", tmp_path) == 2
    assert f"{path}.old is of other code" in capsys.readouterr().err
    assert script("--out", tmp_path, "--fresh") == 0


# -------------------------------------------------------------------------------------------------- disk


@pytest.fixture
def small_disk(tmp_path):
    """A file system of a megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(folder, left: int = 0):
    """Fill a disk but for some pages of four KB."""
    with contextlib.suppress(OSError), open(folder / "filler", "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    os.truncate(folder / "filler", (folder / "filler").stat().st_size - 4096 * left)


@pytest.mark.parametrize("left", [0, 1, 10, 50])
def test_a_disk_that_is_full_at_a_checkpoint(left, small_disk, monkeypatch, capsys):
    path = stopped(small_disk, monkeypatch, 3)
    whole = path.read_bytes()
    assert len(whole) > 51 * 4096
    fill(small_disk, left)
    monkeypatch.setattr(common.Run, "advance", before("advance", signal_at(7)))
    assert script("--out", small_disk) == 1
    error = capsys.readouterr().err
    assert "No space left" in error and "free some space" in error and path.name in error
    assert error.count("\n") == 1
    assert path.read_bytes() == whole and list(path.parent.iterdir()) == [path]  # and no half a file
    (small_disk / "filler").unlink()
    assert script("--out", small_disk) == 0 and results(small_disk) == undisturbed()


def test_a_folder_that_can_be_made_in_part_only_leaves_nothing(small_disk, capsys):
    subprocess.run(["mount", "-o", "remount,nr_inodes=3", small_disk], check=True)
    assert script("--out", small_disk / "a" / "b" / "c") == 2
    error = capsys.readouterr().err
    assert "No space left" in error and error.count("\n") == 1 and not any(small_disk.iterdir())


def test_a_disk_that_is_full_at_the_record(small_disk, monkeypatch, capsys):
    real = runner.finish

    def finish(*args):
        fill(small_disk)
        real(*args)

    stopped(small_disk, monkeypatch, 7)
    with monkeypatch.context() as patch:
        patch.setattr(runner, "finish", finish)
        assert script("--out", small_disk) == 1
    assert f"{NAME}.json: No space left" in capsys.readouterr().err
    assert not list(small_disk.glob("shapes/*.json")) and (small_disk / "shapes" / f"{NAME}.ckpt").exists()
    (small_disk / "filler").unlink()
    assert script("--out", small_disk) == 0 and results(small_disk) == undisturbed()


def test_a_results_folder_that_is_removed_takes_no_run_with_it(tmp_path, monkeypatch):
    out = tmp_path / "out"
    gone = before("advance", lambda run: run.updates == 7 and shutil.rmtree(out))
    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "advance", gone)
        assert script("--out", out, "--checkpoint-every", 0) == 0
    assert results(out) == undisturbed()
    assert {path.suffix for path in out.glob("shapes/*")} == {".json"}


def test_memory_that_is_not_there_is_one_line(capsys):
    assert runner.exit_code(lambda: bytearray(2**62)) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: not enough memory") and error.count("\n") == 1


def test_a_decoding_process_that_was_killed_is_one_line(capsys):
    """As PyTorch's handler of signals says it, wherever this process is."""

    def fail():
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    assert runner.exit_code(fail) == 1
    assert capsys.readouterr().err.startswith(
        "error: DataLoader worker (pid 7) is killed by signal: Killed. Is"
    )


def test_a_compiler_that_is_not_there_is_one_line(capsys, monkeypatch):
    """Nothing else is compiled here."""
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, "nonsuch"))
    assert runner.exit_code(lambda: torch.compile(torch.sin)(torch.ones(9)) and None) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: torch.compile: ") and "C++ compiler" in error and error.count("\n") == 1


def test_a_failing_disk_is_one_line(capsys):
    def fail():
        raise OSError(errno.EIO, "Input/output error", "some.json")

    assert runner.exit_code(fail) == 1
    assert capsys.readouterr().err == "error: some.json: Input/output error; run again\n"


def test_errors_of_the_system_that_are_faults_of_this_code_are_not_hidden():
    def fail():
        raise OSError(errno.EBADF, "Bad file descriptor")

    with pytest.raises(OSError, match="Bad file"):
        runner.exit_code(fail)


def test_a_results_folder_that_is_read_only():
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        out = Path(folder) / "results"
        (out / "shapes").mkdir(parents=True)
        os.chmod(out / "shapes", 0o555)
        child = os.fork()
        if child == 0:  # a process that is not root
            with contextlib.suppress(BaseException), open(os.devnull, "w") as sys.stderr:
                if os.getuid() == 0:
                    os.setuid(65534)
                runner.train = None  # nothing may be trained
                os._exit(script("--out", out))
            os._exit(99)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2


def test_finished_runs_on_a_disk_that_is_read_only(small_disk, capsys):
    assert script("--out", small_disk) == 0
    capsys.readouterr()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert script("--out", small_disk) == 0
    assert f"{NAME}.json)" in capsys.readouterr().out
    assert script("--out", small_disk, "--seeds", 2) == 2
    error = capsys.readouterr().err
    assert "Read-only file system" in error and error.count("\n") == 1


def test_a_file_system_without_locks_is_one_line(tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(points.fcntl, "flock", flock)
    assert script("--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "No locks available" in error and str(tmp_path / "out") in error
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------- many at the same time


def test_two_processes_share_the_runs_of_one_folder(tmp_path):
    both = [start(tmp_path / "out", "--seeds", 6) for _ in range(2)]
    codes = [end(process) for process in both]
    assert set(codes) <= {0, 76} and 0 in codes  # 76 if the other one still made the last run
    assert results(tmp_path / "out") == undisturbed("--seeds", "6")
    said = Path(f"{tmp_path}/out.log").read_text()
    assert said.count("epoch 3/3") == 6  # of the last epoch there is a line for every run
    assert {path.suffix for path in tmp_path.glob("out/shapes/*")} == {".json"}


def test_a_run_that_another_process_makes_is_left_to_it(tmp_path, capsys):
    path = tmp_path / "shapes" / f"{NAME}.json"
    with take_lock(path):
        assert is_running(path)
        assert script("--out", tmp_path, "--seeds", 2) == 76
        assert "the rest is in the hands of other processes (1 run)" in capsys.readouterr().out
        assert list(results(tmp_path)) == [NAME.replace("s00", "s01")]
    assert not is_running(path) and script("--out", tmp_path) == 0


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path):
    path = tmp_path / "shapes" / f"{NAME}.json"
    path.parent.mkdir()
    kill_in_a_child(lambda: (take_lock(path), os.kill(os.getpid(), signal.SIGKILL)))
    assert path.with_suffix(".lock").exists() and not is_running(path)
    assert script("--out", tmp_path) == 0
    assert results(tmp_path) == undisturbed()


def test_a_lock_is_not_inherited(tmp_path):
    """A worker process that outlives its parent must not keep the parent's runs."""
    path = tmp_path / "run.json"
    read, write = os.pipe()
    parent = os.fork()
    if parent == 0:
        held = take_lock(path)
        worker = os.fork()
        if worker == 0:
            time.sleep(3)
            os._exit(0)
        os.write(write, b"x" if held else b"")
        os._exit(0)
    assert os.read(read, 1) == b"x"
    os.waitpid(parent, 0)
    assert path.with_suffix(".lock").exists() and not is_running(path)


def test_killed_at_random_moments_by_two_at_a_time(tmp_path):
    """No record is written twice, whatever is killed when, and all end as if nothing had happened."""
    out, rng, written = tmp_path / "out", random.Random(0), {}
    flags = ["--seeds", "5", "--checkpoint-every", "0"]
    for _ in range(12):
        both = [start(out, *flags) for _ in range(2)]
        time.sleep(rng.uniform(0.1, 0.9))
        for process in both:
            process.kill()
            end(process)
        now = {path: path.stat().st_mtime_ns for path in out.glob("shapes/*.json")}
        assert written.items() <= now.items()
        written = now
    assert end(start(out, *flags)) == 0
    assert results(out) == undisturbed("--seeds", "5")
    assert {path.suffix for path in out.glob("shapes/*")} == {".json"}


# ------------------------------------------------------------------------------------------ what is there


def test_no_result_is_taken_for_another_configuration(tmp_path, capsys):
    """What decides a result is in the record's name, and checked in the record."""
    assert script("--out", tmp_path) == 0
    changes = "--lr 2^-3,--wd 1e-3,--ghost 8 --init bn,--dropout 0.5,--l2-all,--amp bf16"
    for edit in changes.split(","):
        capsys.readouterr()
        assert script("--out", tmp_path, "--dry-run", *edit.split()) == 0
        assert "missing" in capsys.readouterr().out
    path = tmp_path / "shapes" / f"{NAME}.json"
    path.rename(path.with_name(path.name.replace("lr2^-2", "lr2^-3")))
    assert script("--out", tmp_path, "--lr", "2^-3") == 0  # a record that its name denies is set aside
    assert [record["config"]["lr"] for record in all_records(tmp_path).values()] == [0.125]


@pytest.mark.parametrize("step", [-1e9, 1e9])
def test_clocks_may_jump(step, tmp_path, monkeypatch):
    now, calls, checkpoints = time.time(), iter(range(10**9)), []
    monkeypatch.setattr(time, "time", lambda: now + step * (next(calls) % 2))
    monkeypatch.setattr(runner, "write_checkpoint", lambda *_: checkpoints.append(1))
    monkeypatch.setenv("TZ", "Pacific/Kiritimati")
    assert script("--out", tmp_path, "--checkpoint-every", 10) == 0
    assert results(tmp_path) == undisturbed() and not checkpoints  # ten minutes have not passed


def test_names_with_spaces(tmp_path):
    folder, out = make_folder(tmp_path / "my images"), tmp_path / "my results"
    flags = "--depth 10 --width 1 --bs 4 --epochs 1 --device cpu --data folder"
    assert script("--data-dir", folder, "--out", out, flags=flags) == 0
    assert len(list(out.glob("my-images/*.json"))) == 1


# ------------------------------------------------------------------------------------------------- ranks


def ranks(out, world: int, *more, module=wrn_cifar, flags=FLAGS):
    """Processes that are ranks of one training, without torchrun."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world)}
    shared["LOCAL_WORLD_SIZE"] = str(world)
    every = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]
    flags = f"{flags} --out {out}"
    return [scripts.start(module, flags, *more, log=f"{out}.log", **each) for each in every]


def wait_for(text: str, log):
    """Wait until a log has a text."""
    until = time.monotonic() + 60
    while not Path(log).exists() or text not in Path(log).read_text():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_when_one_rank_dies_all_end_soon(tmp_path):
    log, command = tmp_path / "log", [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "wrn_cifar.py", *FLAGS.split()]
    command += ["--epochs", "400", "--out", str(tmp_path / "out")]
    with open(log, "w") as file:
        process = subprocess.Popen(command, cwd=HERE, stdout=file, stderr=file, start_new_session=True)
    wait_for("epoch 1/", log)
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    pids = [int(pid) for pid in found.stdout.split()]
    assert len(pids) == 2
    began = time.monotonic()
    os.kill(pids[1], signal.SIGKILL)
    assert process.wait(60) != 0
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() - began < 60
        time.sleep(0.1)
    assert not list((tmp_path / "out").glob("shapes/*.json"))


def test_a_rank_without_torchrun_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert script("--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: WORLD_SIZE is set") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_signal_to_one_rank_stops_all_at_one_update_and_they_go_on(tmp_path):
    out, flags = tmp_path / "out", ["--epochs", "12"]
    both = ranks(out, 2, *flags)
    wait_for("epoch 1/", f"{out}.log")
    os.kill(both[1].pid, signal.SIGTERM)
    assert [end(rank) for rank in both] == [75, 75]
    assert "interrupted: the same command goes on from here" in Path(f"{out}.log").read_text()
    assert list(out.glob("shapes/*.ckpt"))
    assert [end(rank) for rank in ranks(out, 2, *flags)] == [0, 0]
    assert "goes on from epoch" in Path(f"{out}.log").read_text()
    assert [end(rank) for rank in ranks(tmp_path / "straight", 2, *flags)] == [0, 0]
    assert results(out) == results(tmp_path / "straight") != {}


@pytest.mark.parametrize("interrupt", [False, True])
def test_ranks_leave_no_thread_that_could_abort_their_end(tmp_path, interrupt):
    """Gloo's threads may ask for the interpreter when it is no more (pytorch/pytorch#179291)."""
    # Ghost batches of 16 images lie on two ranks, which is a group of its own.
    more = ["--init", "bn", "--ghost", "16", "--epochs", "400" if interrupt else "2"]
    both, log = ranks(tmp_path / "out", 2, *more), f"{tmp_path}/out.log"
    if interrupt:
        wait_for("epoch 1/", log)
        os.kill(both[0].pid, signal.SIGTERM)
    assert [end(rank) for rank in both] == [75 * interrupt] * 2
    assert Path(log).read_text().count(f"ends with {75 * interrupt}, 0 gloo threads\n") == 2


def test_a_picture_that_one_rank_cannot_read_is_said_once(tmp_path):
    folder = make_folder(tmp_path / "photographs", "val", 8, 1)
    for path in folder.glob("train/n01/*"):
        path.write_bytes(b"no image")
    flags = "--arch v2 --bs 4 --epochs 1 --image-size 32 --workers 0 --device cpu --amp off --seed 1"
    both = ranks(tmp_path / "out", 2, "--data-dir", folder, module=resnet_imagenet, flags=flags)
    codes = [end(rank) for rank in both]
    said = [line for line in Path(f"{tmp_path}/out.log").read_text().splitlines() if "error: " in line]
    assert 2 in codes and codes.count(2) == len(said)
    assert all("is not a readable image" in line for line in said)


@pytest.mark.slow
def test_imagenet_on_two_ranks_goes_on_bit_by_bit_with_other_workers(tmp_path):
    """Stopped in the middle of an epoch, and taken up with another number of workers."""
    folder = make_folder(tmp_path / "my photographs", "val", 20, 3)
    flags = "--arch v2 --init bn --bs 8 --ghost 8 --lr 2^-6 --epochs 3 --image-size 32 --device cpu --amp off"
    for out, workers, more in (("out", 2, ["--checkpoint-every", "0"]), ("out", 0, []), ("straight", 1, [])):
        words = ["--data-dir", folder, "--workers", workers, "--save-weights", *more]
        both = ranks(tmp_path / out, 2, *words, module=resnet_imagenet, flags=flags)
        while more and not list((tmp_path / out).glob("*/*.ckpt")):
            time.sleep(0.1)
        if more:
            both[0].terminate()
        assert [end(rank, 300) for rank in both] == [75 if more else 0] * 2
    log = Path(f"{tmp_path}/out.log").read_text()
    assert "interrupted: the same command goes on" in log and "goes on from epoch 1, update" in log
    ours, straight = (
        torch.load(next((tmp_path / out).glob("*/*.pt")), weights_only=True)["state_dict"]
        for out in ("out", "straight")
    )
    assert ours.keys() == straight.keys() and all(torch.equal(ours[key], straight[key]) for key in ours)
