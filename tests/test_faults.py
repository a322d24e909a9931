"""Everything that a cluster does to a job, done on purpose: nothing is lost, made twice or silently wrong."""

import contextlib
import errno
import functools
import hashlib
import http.server
import io
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import common
import runner
import wrn_cifar

HERE = Path(__file__).resolve().parent.parent
FLAGS = "--data shapes --depth 10 --width 1 --bs 16 --train-size 96 --epochs 3 --device cpu --amp off --eval-every 1"
NAME = "wrn10-1_zeroinit_bs16_lr2^-2_ep3_trainsize96_s00"


@pytest.fixture(autouse=True)
def few_test_images(monkeypatch):
    monkeypatch.setattr(wrn_cifar, "shapes", lambda n, seed, draw=wrn_cifar.shapes: draw(96 + seed, seed))


def script(*argv, flags=FLAGS):
    """Run wrn_cifar.py in this process; its exit code."""
    sys.argv = ["wrn_cifar.py", *flags.split(), *map(str, argv)]
    return runner.exit_code(wrn_cifar.main)


def results(out):
    """What all runs computed, without times."""
    found = {path.stem: runner.read_record(path) for path in Path(out).glob("shapes/*.json")}
    for record in found.values():
        for entry in record["history"]:
            del entry["seconds"]
    return {name: (record["status"], record["history"], record["final"]) for name, record in found.items()}


@functools.cache
def undisturbed(*argv):
    """The results of runs that nothing happened to."""
    with tempfile.TemporaryDirectory() as out:
        assert script("--out", out, *argv) == 0
        return results(out)


def before(method, action):
    """Replace a method of Run by one that calls action(run) first."""
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


# ------------------------------------------------------------------------------------------------------------ signals


@pytest.mark.parametrize("flags", [["--seeds", "1"], ["--seeds", "3", "--concurrent", "3"]])
@pytest.mark.parametrize("updates", [[7], [2, 12], [1, 5, 6, 10, 17]])
def test_a_run_that_was_stopped_several_times_ends_as_an_undisturbed_one(updates, flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common.Run, "advance", before("advance", signal_at(*updates)))
    codes = [script("--out", tmp_path, *flags) for _ in range(len(updates) + 1)]
    assert codes == [75] * len(updates) + [0]
    assert results(tmp_path) == undisturbed(*flags)
    assert "goes on from epoch" in capsys.readouterr().out
    assert {path.suffix for path in tmp_path.glob("shapes/*")} == {".json"}  # neither checkpoints nor locks are left


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("method", ["advance", "evaluate"])
def test_a_signal_in_mid_epoch_or_in_an_evaluation_or_twice(number, method, tmp_path, monkeypatch):
    monkeypatch.setattr(common.Run, method, before(method, signal_at(6, number=number, times=2)))
    assert script("--out", tmp_path) == 75
    assert not results(tmp_path) and (tmp_path / "shapes" / f"{NAME}.ckpt").exists()
    assert script("--out", tmp_path) == 0
    assert results(tmp_path) == undisturbed()


def test_fresh_begins_again(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "advance", before("advance", signal_at(7)))
        assert script("--out", tmp_path) == 75
    assert script("--out", tmp_path, "--fresh") == 0
    assert "goes on from epoch" not in capsys.readouterr().out and results(tmp_path) == undisturbed()


# -------------------------------------------------------------------------------------------------------- checkpoints


def stopped(out, monkeypatch, *updates):
    """Stop a run at these updates, so that it leaves a checkpoint (two, if at two); returns the last one's path."""
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
    assert path.read_bytes() == whole and len(list(path.parent.iterdir())) == 2  # the half one has another name
    assert script("--out", tmp_path) == 0
    assert results(tmp_path) == undisturbed()
    assert len(list(path.parent.iterdir())) == 1


def test_killed_between_the_record_and_the_removal_of_its_checkpoint(tmp_path, monkeypatch, capsys):
    path = stopped(tmp_path, monkeypatch, 7)
    shutil.copy(path, tmp_path / "kept")
    assert script("--out", tmp_path) == 0
    shutil.copy(tmp_path / "kept", path)
    record = path.with_suffix(".json").read_bytes()
    assert script("--out", tmp_path) == 0
    assert "1 runs, 1 done" in capsys.readouterr().out
    assert path.with_suffix(".json").read_bytes() == record and not path.exists()


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
    assert f"{last} is not used" in out and (
        ("goes on from epoch 1, update 5" in out.split("not used")[-1]) is not both
    )
    assert results(tmp_path) == undisturbed()


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path, monkeypatch, capsys):
    class Malicious:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    path = stopped(tmp_path, monkeypatch, 7)
    buffer = io.BytesIO()
    torch.save({"config": {}, "extra": Malicious()}, buffer)
    for content in (buffer.getvalue(), pickle.dumps(Malicious())):
        path.write_bytes(hashlib.sha256(content).digest() + content)
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


def test_a_checkpoint_of_other_images_is_refused(tmp_path, monkeypatch, capsys):
    stopped(tmp_path, monkeypatch, 7)
    monkeypatch.setattr(wrn_cifar, "shapes", lambda n, seed, draw=wrn_cifar.shapes: draw(n, seed + 7))
    assert script("--out", tmp_path) == 2
    assert "its images is" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------------- disk


@pytest.fixture
def small_disk(tmp_path):
    """A file system of a megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(folder):
    with contextlib.suppress(OSError), open(folder / "filler", "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def test_a_disk_that_is_full_at_a_checkpoint(small_disk, monkeypatch, capsys):
    path = stopped(small_disk, monkeypatch, 3)
    whole = path.read_bytes()
    fill(small_disk)
    monkeypatch.setattr(common.Run, "advance", before("advance", signal_at(7)))
    assert script("--out", small_disk) == 1
    error = capsys.readouterr().err
    assert "No space left" in error and "free some space" in error and path.name in error and "Traceback" not in error
    assert path.read_bytes() == whole and list(path.parent.iterdir()) == [path]  # and no half a file
    (small_disk / "filler").unlink()
    assert script("--out", small_disk) == 0 and results(small_disk) == undisturbed()


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


# ------------------------------------------------------------------------------------------------ many at the same time


def test_two_processes_share_the_runs_of_one_folder(tmp_path):
    command = [sys.executable, "wrn_cifar.py", *FLAGS.split(), "--seeds", "6", "--out", tmp_path]
    both = [subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    out = "".join(process.communicate()[0] for process in both)
    assert [process.returncode for process in both] == [0, 0]
    assert len(results(tmp_path)) == 6
    assert out.count("epoch 3/3") == 6  # of the last epoch there is a line for every run
    assert {path.suffix for path in tmp_path.glob("shapes/*")} == {".json"}


def test_a_run_that_another_process_makes_is_left_to_it(tmp_path, capsys):
    path = tmp_path / "shapes" / f"{NAME}.json"
    path.parent.mkdir()
    with contextlib.ExitStack() as held:
        assert runner.take_lock(path, held) and runner.is_running(path)
        assert script("--out", tmp_path, "--seeds", 2) == 0
        assert f"{NAME} is left to another process" in capsys.readouterr().out
        assert list(results(tmp_path)) == [NAME.replace("s00", "s01")]
    assert not runner.is_running(path) and script("--out", tmp_path) == 0


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path, capsys):
    path = tmp_path / "shapes" / f"{NAME}.json"
    path.parent.mkdir()

    def die_with_it():
        with contextlib.ExitStack() as held:
            runner.take_lock(path, held)
            os.kill(os.getpid(), signal.SIGKILL)

    kill_in_a_child(die_with_it)
    assert path.with_suffix(".lock").exists() and not runner.is_running(path)
    assert script("--out", tmp_path) == 0
    assert results(tmp_path) == undisturbed()


def test_a_lock_is_not_inherited(tmp_path):
    """A worker process that outlives its parent must not keep the parent's runs."""
    path = tmp_path / "run.json"
    read, write = os.pipe()
    parent = os.fork()
    if parent == 0:
        held = contextlib.ExitStack()
        runner.take_lock(path, held)
        worker = os.fork()
        if worker == 0:
            time.sleep(3)
            os._exit(0)
        os.write(write, b"x")
        os._exit(0)
    os.read(read, 1)
    os.waitpid(parent, 0)
    assert path.with_suffix(".lock").exists() and not runner.is_running(path)


# ------------------------------------------------------------------------------------------------------- what is there


def test_a_diverged_run_is_never_tried_again(tmp_path, capsys, monkeypatch):
    assert script("--out", tmp_path, "--init", "none", "--lr", "1e6", "2^-4") == 0
    (diverged, done) = sorted(results(tmp_path).values())
    assert diverged[0] == "diverged" and diverged[2] == dict.fromkeys(diverged[2]) and done[0] == "done"
    monkeypatch.setattr(runner, "train", None)
    assert script("--out", tmp_path, "--init", "none", "--lr", "1e6", "2^-4") == 0
    assert "2 runs, 2 done" in capsys.readouterr().out


def test_no_result_is_taken_for_another_configuration(tmp_path, capsys):
    """Whatever is edited between two calls: what decides a result is in the record's name and checked in the record."""
    assert script("--out", tmp_path) == 0
    for edit in (
        ["--lr", "2^-3"],
        ["--wd", "1e-3"],
        ["--ghost", "8", "--init", "bn"],
        ["--dropout", "0.5"],
        ["--l2-all"],
    ):
        capsys.readouterr()
        assert script("--out", tmp_path, "--dry-run", *edit) == 0
        assert "missing" in capsys.readouterr().out
    path = tmp_path / "shapes" / f"{NAME}.json"
    path.rename(path.with_name(path.name.replace("lr2^-2", "lr2^-3")))
    assert script("--out", tmp_path, "--lr", "2^-3") == 2
    assert "its lr is 0.25, not 0.125" in capsys.readouterr().err


@pytest.mark.parametrize("step", [-1e9, 1e9])
def test_clocks_may_jump(step, tmp_path, monkeypatch):
    now, calls, checkpoints = time.time(), iter(range(10**9)), []
    monkeypatch.setattr(time, "time", lambda: now + step * (next(calls) % 2))
    monkeypatch.setattr(runner, "write_checkpoint", lambda *_: checkpoints.append(1))
    monkeypatch.setenv("TZ", "Pacific/Kiritimati")
    assert script("--out", tmp_path, "--checkpoint-every", 10) == 0
    assert results(tmp_path) == undisturbed() and not checkpoints  # ten minutes have not passed


def test_names_with_spaces(tmp_path):
    from test_wrn_cifar import image_folder

    folder, out = image_folder(tmp_path / "my images"), tmp_path / "my results"
    flags = "--depth 10 --width 1 --bs 4 --epochs 1 --device cpu --data folder"
    assert script("--data-dir", folder, "--out", out, flags=flags) == 0
    assert len(list(out.glob("my-images/*.json"))) == 1


# ------------------------------------------------------------------------------------------------------------- CIFAR-10


def fake_cifar10(folder):
    """An archive in CIFAR-10's format of random images; returns it and the MD5 sums that torchvision is to expect."""
    rng, sums, path = np.random.default_rng(0), {}, folder / "cifar-10-python.tar.gz"
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch", "batches.meta"]
    with tarfile.open(path, "w:gz") as archive:
        for name in names:
            pixels = rng.integers(0, 256, (4, 3072), dtype=np.uint8)
            meta = {"label_names": [str(i) for i in range(10)]}
            content = pickle.dumps(meta if name == "batches.meta" else {"data": pixels, "labels": [0, 1, 2, 3]})
            sums[name] = hashlib.md5(content).hexdigest()
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path, hashlib.md5(path.read_bytes()).hexdigest(), sums


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server of the fake archive from which torchvision believes to get CIFAR-10; yields the requests it had."""
    from torchvision.datasets import CIFAR10

    source = tmp_path / "server"
    source.mkdir()
    path, archive_sum, sums = fake_cifar10(source)
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.headers.get("Range") is None:
                requests.append(self.path)
            time.sleep(0.3)  # long enough for others to come
            content = path.read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{httpd.server_port}/cifar-10-python.tar.gz")
    monkeypatch.setattr(CIFAR10, "tgz_md5", archive_sum)
    monkeypatch.setattr(CIFAR10, "train_list", [[name, sums[name]] for name in sums if name.startswith("data")])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": sums["batches.meta"]})
    yield requests
    httpd.shutdown()


def test_of_several_first_downloads_one_is_made(server, tmp_path):
    wrn_cifar.load_cifar10(tmp_path / "alone")
    once, children = len(server), []
    for _ in range(3):
        children.append(os.fork())
        if children[-1] == 0:
            with contextlib.suppress(BaseException):
                (images, labels), _ = wrn_cifar.load_cifar10(tmp_path / "data")
                os._exit(0 if images.shape == (20, 32, 32, 3) and len(labels) == 20 else 1)
            os._exit(2)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0]
    assert len(server) == 2 * once > 0


def test_a_damaged_batch_is_never_unpickled(server, tmp_path, monkeypatch):
    """It is downloaded again, and where that cannot be, the error says what to do."""
    from torchvision.datasets import CIFAR10

    class Malicious:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    folder = tmp_path / "data"
    wrn_cifar.load_cifar10(folder)
    once = len(server)
    batch = folder / "cifar-10-batches-py" / "data_batch_3"
    batch.write_bytes(pickle.dumps(Malicious()))
    (folder / "cifar-10-python.tar.gz").write_bytes(b"not an archive")
    wrn_cifar.load_cifar10(folder)
    assert len(server) == 2 * once > 0
    batch.write_bytes(pickle.dumps(Malicious()))
    (folder / "cifar-10-python.tar.gz").write_bytes(b"not an archive")
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    with pytest.raises(common.UserError, match="Put cifar-10-python"):
        wrn_cifar.load_cifar10(folder)
    assert not (tmp_path / "executed").exists()


# --------------------------------------------------------------------------------------------------------------- ranks


def torchrun(out, *flags, script="wrn_cifar.py", usual=FLAGS):
    """Start two ranks in a process group of their own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=127.0.0.1:0", script, *usual.split(), "--out", str(out)]
    log = open(f"{out}.log", "a")  # noqa: SIM115
    return subprocess.Popen([*command, *flags], cwd=HERE, stdout=log, stderr=log, start_new_session=True)


def ranks_of(process, out, text="epoch 1/"):
    """The process ids of the ranks, once the log says something."""
    until = time.monotonic() + 60
    while text not in Path(f"{out}.log").read_text() and time.monotonic() < until:
        time.sleep(0.05)
    pids = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout.split()
    assert len(pids) == 2
    return [int(pid) for pid in pids]


def wait_for_all(process, pids):
    """Wait for the end of torchrun and of its ranks; returns the seconds it took."""
    began = time.monotonic()
    process.wait(90)
    for pid in pids:
        while Path(f"/proc/{pid}").exists() and time.monotonic() - began < 90:
            time.sleep(0.1)
    return time.monotonic() - began


LONG = ["--epochs", "100", "--train-size", "512", "--eval-every", "1"]


def test_when_one_rank_dies_all_end_soon(tmp_path):
    process = torchrun(tmp_path / "out", *LONG)
    pids = ranks_of(process, tmp_path / "out")
    os.kill(pids[1], signal.SIGKILL)
    assert wait_for_all(process, pids) < 60 and process.returncode != 0
    assert not list((tmp_path / "out").glob("shapes/*.json"))


def test_a_signal_to_one_rank_stops_all_at_one_step_and_they_go_on(tmp_path):
    flags = ["--train-size", "512", "--epochs", "12"]
    process = torchrun(tmp_path / "out", *flags)
    pids = ranks_of(process, tmp_path / "out")
    os.kill(pids[1], signal.SIGTERM)
    assert wait_for_all(process, pids) < 60 and process.returncode != 0
    log = Path(f"{tmp_path}/out.log").read_text()
    assert "interrupted: the same command goes on from here" in log and "exitcode  : 75" in log
    assert list((tmp_path / "out").glob("shapes/*.ckpt"))
    assert torchrun(tmp_path / "out", *flags).wait(120) == 0
    assert "goes on from epoch" in Path(f"{tmp_path}/out.log").read_text()
    assert torchrun(tmp_path / "straight", *flags).wait(120) == 0
    assert results(tmp_path / "out") == results(tmp_path / "straight") != {}


@pytest.mark.parametrize("interrupt", [False, True])
def test_ranks_leave_no_thread_that_could_abort_their_end(tmp_path, interrupt):
    """Gloo's threads may ask for the interpreter when it is no more (pytorch/pytorch#179291)."""
    script = tmp_path / "script.py"
    script.write_text(
        f"import os, sys\nfrom pathlib import Path\nsys.path.insert(0, {str(HERE)!r})\nimport runner, wrn_cifar\n"
        "code = runner.exit_code(wrn_cifar.main)\n"
        "names = [(task / 'comm').read_text().strip() for task in Path('/proc/self/task').iterdir()]\n"
        "os.write(1, f'ends with {code}, {sum(\"gloo\" in name for name in names)} threads\\n'.encode())\n"
        "sys.exit(code)\n"
    )
    epochs = "400" if interrupt else "2"  # ghost batches of 16 images lie on two ranks, which is a group of its own
    process = torchrun(tmp_path / "out", "--init", "bn", "--ghost", "16", "--epochs", epochs, script=str(script))
    if interrupt:
        os.kill(ranks_of(process, tmp_path / "out")[0], signal.SIGTERM)
    assert (process.wait(120) != 0) is interrupt
    assert Path(f"{tmp_path}/out.log").read_text().count(f"ends with {75 * interrupt}, 0 threads\n") == 2


@pytest.mark.slow
def test_imagenet_on_two_ranks_goes_on_bit_by_bit_with_other_workers(tmp_path):
    """Stopped in the middle of an epoch, and taken up with another number of workers."""
    from test_resnet_imagenet import make_folder

    folder = make_folder(tmp_path / "my photographs", train=20, val=3)
    usual = "--arch v2 --init bn --bs 8 --ghost 8 --lr 2^-6 --epochs 3 --image-size 32 --device cpu --save-weights"
    for out, workers, more in (("out", 2, ["--checkpoint-every", "0"]), ("out", 0, []), ("straight", 1, [])):
        flags = ["--data-dir", str(folder), "--workers", str(workers), *more]
        process = torchrun(tmp_path / out, *flags, script="resnet_imagenet.py", usual=usual)
        while more and not list((tmp_path / out).glob("*/*.ckpt")):
            time.sleep(0.1)
        if more:
            process.terminate()
        assert (process.wait(300) != 0) is bool(more)
    log = Path(f"{tmp_path}/out.log").read_text()
    assert "interrupted: the same command goes on" in log and "goes on from epoch 1, update" in log
    ours, straight = (
        torch.load(next((tmp_path / out).glob("*/*.pt")), weights_only=True)["state_dict"]
        for out in ("out", "straight")
    )
    assert ours.keys() == straight.keys() and all(torch.equal(ours[key], straight[key]) for key in ours)


# --------------------------------------------------------------------------------------------------------------- sweeps


@pytest.mark.slow
def test_a_sweep_that_is_killed_twenty_times(tmp_path):
    out, rng = tmp_path / "my results", random.Random(0)
    flags = ["--train-size", "1024", "--epochs", "4", "--checkpoint-every", "0.005", "--jobs", "2", "--out", str(out)]
    environment = os.environ | {"DEPTHS": "16", "LRS": "2^-4 2^-5", "INITS": "bn zeroinit", "PYTHON": sys.executable}

    def sweep(**options):
        command = ["bash", "sweep.sh", "demo", *flags]
        return subprocess.Popen(command, cwd=HERE, env=environment, start_new_session=True, **options)

    made, made_before = [], set()
    for _ in range(20):
        process = sweep(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(3, 9))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        now = {path: path.stat().st_mtime_ns for path in out.glob("shapes/*.json")}
        made.append(now)
        assert made_before <= now.items()  # no record is ever written again
        made_before = set(now.items())
    assert sweep(stdout=subprocess.DEVNULL).wait(300) == 0
    assert {path.suffix for path in out.glob("shapes/*")} == {".json"}
    straight = tmp_path / "straight"
    flags[-1] = str(straight)
    assert sweep(stdout=subprocess.DEVNULL).wait(300) == 0
    assert results(out) == results(straight) and len(results(out)) == 4


def test_errors_of_the_disk_that_are_not_about_space_are_not_hidden():
    def fail():
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(OSError, match="Input/output"):
        runner.exit_code(fail)
