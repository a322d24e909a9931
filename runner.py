"""Makes the runs of a point that are missing, many at once, and lets them survive being killed at any moment.

    wrn16-4_zeroinit_bs64_lr2^-2_ep200_s07.json    a run's record (records.py); a run is done if it exists
    ....ckpt, ....ckpt.old                         the state of an unfinished run, and the one before it
    ....lock                                       held by the process that makes the run
    ....pt                                         its trained net, with --save-weights

Every file is complete or not there at all.
"""

import contextlib
import errno
import functools
import json
import math
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

import progress
import records
from common import Run, ranks, stop_asked, stream_seed, train
from points import (
    Display,
    Point,
    describe,
    device_name,
    leave_ranks,
    output_folder,
    pick_device,
    print_plan,
    say,
    take_lock,
)
from ranks import rank_variable
from records import OwnError, UserError, atomic_write, check_same, find_record, flush, plural

# -------------------------------------------------------------------------------- exit codes and signals

FULL_DISK = errno.ENOSPC, errno.EDQUOT, errno.EFBIG
WRONG_PATH = errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP
FAILING_DISK = errno.EIO, errno.ESTALE


def complain(text: str):
    """Print an error, if there still is somebody to see it."""
    with contextlib.suppress(OSError):
        print(f"error: {text}", file=sys.stderr)


def exit_code(main) -> int:
    """Call main() and turn what ends it, or what it returns, into an exit code.

    0 done, 1 failed, 2 bad usage or data, 75 interrupted, 76 the rest is in other processes' hands.
    """
    with contextlib.suppress(AttributeError):  # a stream in memory has no encoding
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = main() or 0
    except OwnError as error:
        complain(str(error))
        return 2  # without leave_ranks(): the other ranks are still at work
    except UserError as error:
        if rank_variable("LOCAL_RANK") == 0:
            complain(str(error))
        code = 2
    except OSError as error:
        where = f"{error.filename or 'the disk'}: {error.strerror}"
        if error.errno in WRONG_PATH:
            complain(where)
            return 2
        if error.errno not in (*FULL_DISK, *FAILING_DISK):
            raise
        complain(f"{where}; {'free some space and ' if error.errno in FULL_DISK else ''}run again")
        return 1
    except RuntimeError as error:
        if is_out_of_memory(error):
            complain("not enough memory: try --micro, or fewer --concurrent")
            return 1
        if str(error).startswith("DataLoader worker"):  # PyTorch says so wherever this process is
            complain(f"{' '.join(str(error).split())} Is the memory enough for so many --workers?")
            return 1
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        complain(f"torch.compile: {' '.join(str(error).split())[:200]}")
        return 2
    except MemoryError as error:
        complain(f"not enough memory: {error}".rstrip(": "))
        return 1
    except KeyboardInterrupt as hint:
        say(f"interrupted: the same command{hint} goes on from here")
        code = 75
    finally:
        flush(sys.stdout)
        flush(sys.stderr)
    leave_ranks()
    return code


@contextlib.contextmanager
def signals_ask_to_stop(at_once: bool = False):
    """Let signals finish the updates under way and save, rather than end the process.

    Where there is nothing to save, `at_once` has them raise KeyboardInterrupt.
    """

    def stop(*_):
        stop_asked.append(True)
        if at_once:
            raise KeyboardInterrupt

    stop_asked.clear()
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------------------------------- ranks


def agreed(value):
    """The first rank's value, on every rank."""
    box = [value]
    if ranks()[1] > 1:
        dist.broadcast_object_list(box, device=torch.device("cpu"))
    return box[0]


def load_on_all_ranks(script, args, device):
    """The data, after all ranks have compared what they read.

    Raises UserError on all ranks where one cannot read it, or has other images than the first.
    """
    data, error = None, None
    try:
        data = script.load_data(args, device)
    except UserError as its_error:
        error = str(its_error)
    every = [(data and data.fingerprint, error)] * ranks()[1]
    if len(every) > 1:
        dist.all_gather_object(every, every[0])
    for rank, (fingerprint, error) in enumerate(every):
        if error:
            raise UserError(f"rank {rank}: {error}" if len(every) > 1 else error)
        if fingerprint != every[0][0]:
            raise UserError(f"ranks 0 and {rank} read different images: give all ranks the same files")
    return data


# ----------------------------------------------------------------------------- checkpoints and weights


@functools.cache
def commit() -> str | None:
    """The commit of this code as the process began, with "-dirty" where it was changed; None outside git."""
    here = str(Path(__file__).resolve().parent)
    command = ["git", "-C", here, "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def load_tensors(path: Path) -> dict:
    """What torch.save wrote to a file, on the CPU. Raises ValueError for a damaged file, in one line.

    torch.load itself accepts flipped bits; the checksums of its zip format find them. A file that cannot be
    read, which may be whole, is an OSError.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if bad := archive.testzip():
                raise ValueError(f"the checksum of {bad} is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # a damaged file can be wrong in any way
        if getattr(error, "errno", None) in (errno.ENOENT, *WRONG_PATH, *FAILING_DISK):
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise ValueError(str(error).partition("\n")[0] or type(error).__name__) from None


def save_tensors(file, content: dict):
    """Write what load_tensors reads. Raises OSError for what is wrong with the disk."""
    try:
        torch.save(content, file)
    except RuntimeError as error:  # torch.save trips over the file that it could not write
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def checkpoint_files(path: Path) -> list[Path]:
    """The checkpoint of a record's run, and the one before it."""
    return [path.with_suffix(".ckpt"), path.with_suffix(".ckpt.old")]


def write_checkpoint(path: Path, state: dict):
    """Save the state of a record's run beside it; the last checkpoint is kept as well."""
    new, old = checkpoint_files(path)
    with atomic_write(new, old) as file:
        save_tensors(file, state)


def read_checkpoint(path: Path, config: dict) -> tuple[Path, dict] | None:
    """The last checkpoint of an interrupted run that is whole, with the state in it; None without one.

    Raises UserError for the checkpoint of another configuration.
    """
    for name in checkpoint_files(path):
        try:
            state = load_tensors(name)
            theirs = state["config"]
        except FileNotFoundError:
            continue
        except (ValueError, KeyError, TypeError) as error:
            say(f"{name} is not used: {error}")
            continue
        check_same(name, theirs, config)
        return name, state
    return None


def resume(path: Path, run: Run) -> bool:
    """Bring a run to where it was interrupted; False without a checkpoint.

    Raises UserError for one of another configuration or of other code.
    """
    if not (found := read_checkpoint(path, run.identity())):
        return False
    name, state = found
    try:
        if [t.shape for t in state["tensors"]] != [t.shape for t in run.tensors]:
            raise ValueError("tensors of other shapes")
        run.load(state)
    except (KeyError, AttributeError, ValueError, TypeError, RuntimeError) as error:
        problem = f"is of other code, --fresh begins again ({' '.join(str(error).split())[:100]})"
        raise UserError(f"{name} {problem}") from None
    return True


def clean_up(path: Path):
    """Remove what a process has left that was killed after it wrote its run's record."""
    remove_checkpoint(path)
    if path.with_suffix(".lock").exists() and (lock := take_lock(path)):
        lock.close()


def remove_checkpoint(path: Path):
    """The run is over, or begins again: its checkpoints are of no more use."""
    for name in checkpoint_files(path):
        if name.exists():  # unlink() fails on a disk that is read-only, also where there is nothing
            name.unlink(missing_ok=True)


def weights_file(path: Path) -> Path:
    """Where --save-weights leaves the net of a record's run."""
    return path.with_suffix(".pt")


def save_weights(path: Path, run: Run):
    """Leave a run's net beside its record, with what is needed to use it."""
    about = {key: getattr(run.data, key) for key in ("classes", "mean", "std")}
    state = {name: tensor.cpu() for name, tensor in run.net.state_dict().items()}
    with atomic_write(weights_file(path)) as file:
        save_tensors(file, {"config": run.config, **about, "state_dict": state})


def load_weights(path: Path, run: Run):
    """Give a run the net of a weights file. Raises UserError for one that is damaged or of another run."""
    try:
        saved = load_tensors(path)
        config, classes, state = saved["config"], saved["classes"], saved["state_dict"]
        check_same(path, config, run.config)
        if classes != run.data.classes:
            raise UserError(f"{path} is for {classes} classes, but the images have {run.data.classes}")
        run.net.load_state_dict(state)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"{path} is damaged, or not of this code: {' '.join(str(error).split())[:200]}"
        ) from None


# ---------------------------------------------------------------------------------------------- training


@dataclass
class Job:
    """A run that this process is making."""

    path: Path
    title: str
    run: Run
    training: object  # the generator of `train`
    lock: contextlib.ExitStack  # released when the run is over


def train_point(script, point: Point, args) -> int:
    """Make every run that the point still asks for; the images are loaded only if there is one.

    Returns the exit code, 76 if other processes make what is left. Raises UserError where a record holds
    another configuration or other images than it would be given now, KeyboardInterrupt after a signal.
    """
    device = pick_device(args.device)
    plan = agreed(point.plan())
    for key in sorted(point.found):
        clean_up(point.path(key))
        say(point.result(key))
    done = [key for key, record in point.found.items() if record["status"] == "done"]
    if args.save_weights and not all(weights_file(point.path(key)).exists() for key in done):
        say("--save-weights does nothing for runs that are done: with another --out they are trained again")
    if plan.missing:
        with output_folder(point.folder):
            say("loading the images ...")
            with signals_ask_to_stop(at_once=True):
                data = load_on_all_ranks(script, args, device)
            check_images(point, {"fingerprint": data.fingerprint})
            say(describe(script, point, args, data.train_images, data.classes))
            commit()  # the code as it is now: who edits it meanwhile does not change what was run
            limit = min(32, args.concurrent or side_by_side(device, point.shared["bs"]))  # CUDA streams
            with signals_ask_to_stop():
                train_side_by_side(point, limit, script, args, data)
        plan = agreed(point.plan())
    elif args.data == "folder" and point.shared["model"] == "wrn":  # to list ImageNet would take long
        check_images(point, counts(script, args))
    if plan.missing:
        say(f"the rest is in the hands of other processes ({plural(len(plan.missing), 'run')})")
        return 76
    for note in plan.notes:
        say(note)
    runs = plural(len(plan.asked), "run")
    say(f"all is done ({runs}): `python plot.py {point.folder.parent}` makes the report")
    return 0


def counts(script, args) -> dict:
    """What can be told of images without reading them; nothing where they are not there."""
    with contextlib.suppress(UserError):
        images, classes = script.count_images(args)
        return {"train_images": images, "classes": classes}
    return {}


def check_images(point: Point, ours: dict):
    """Raise UserError if a record of the point was made with images of which not all of `ours` is true."""
    for key, record in point.found.items():
        if any(record["data"][name] != value for name, value in ours.items()):
            raise UserError(f"{point.path(key)} was made with other images: choose another --data-name")


def make_run(script, config: dict, data, args) -> Run:
    """A run of a configuration, before its first update; its seed alone decides its initial weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(config["seed"], "weights"))
        net = script.make_net(config, data.classes)
    return Run(config, net, data, data.device, args.micro, script.HALVINGS, args.compile)


def side_by_side(device: torch.device, bs: int) -> int:
    """How many runs to train at once: small batches leave a GPU idle; on a CPU in turn is as fast."""
    return max(1, min(16, 1024 // bs)) if device.type == "cuda" and ranks()[1] == 1 else 1


def train_side_by_side(point: Point, limit: int, script, args, data):
    """Train what is missing, at most `limit` runs at a time; the next takes the place of one that ends."""
    jobs, display, saved, more = {}, Display(point), time.monotonic(), True
    try:
        while True:
            if more:
                limit, more = fill(point, jobs, limit, script, args, data), False
                display.expect([job.run for job in jobs.values()])
            if not jobs:
                return
            due, together = time.monotonic() - saved > 60 * args.checkpoint_every, len(jobs)
            for key, job in list(jobs.items()):
                epoch = job.run.epoch
                images = advance(job)
                display.burst(job.run, images or 0)
                if job.run.epoch > epoch:
                    display.epoch(job.title, job.run)
                    due = due or not data.on_device  # epochs of large images are long
                if images is None:
                    finish(point, key, job, args, together)
                    del jobs[key]
                    more = True
            job = None  # an ended run's memory is needed for the next one
            stop = any(job.run.stopped for job in jobs.values())
            if stop or due:
                save(jobs.values())
                saved = time.monotonic()
            if stop:
                agreed(None)  # torchrun ends the others soon after the first that leaves: all must be saved
                raise KeyboardInterrupt(", without --fresh," if args.fresh else "")
    finally:
        display.bar.close()
        for job in jobs.values():
            job.lock.close()


@contextlib.contextmanager
def reading_images():
    """What is wrong with images in here only this rank knows, which reads its share of them."""
    try:
        yield
    except UserError as error:
        raise OwnError(str(error)) from None


def advance(job: Job) -> int | None:
    """Train a run for a burst of updates: how many images these took, or None at the end of the run."""
    with on_stream(job.run), reading_images():
        return next(job.training, None)


def fill(point: Point, jobs: dict, limit: int, script, args, data) -> int:
    """Start runs until `limit` are under way or none is left; returns the limit, lower if no more fit."""
    while len(jobs) < limit:
        free = free_memory(data.device)
        try:
            key, job = start_next(point, jobs, script, args, data)
        except RuntimeError as error:
            if not is_out_of_memory(error) or ranks()[1] > 1:  # the other ranks may have room
                raise
            if not jobs:
                raise UserError("one run does not fit into the device's memory: try --micro") from None
            say(f"the device's memory holds {plural(len(jobs), 'run')} at a time")
            return len(jobs)
        if job is None:
            return limit
        jobs[key] = job
        left = free_memory(data.device)
        if left < 2 * (free - left):  # evaluation and other processes need some, too
            return len(jobs)
    return limit


def take_next(point: Point, jobs: dict):
    """Lock the next missing run that no other process makes: its (rate, seed) and lock, or (None, None)."""
    for key in point.plan().missing:
        lock = None if key in jobs else take_lock(point.path(key))
        if lock and find_record(point.path(key)):  # another process has made it since: the search may go on
            lock.close()
            return take_next(point, jobs)
        if lock:
            return key, lock
    return None, None


def start_next(point: Point, jobs: dict, script, args, data):
    """Start the next missing run that no other process makes: its (rate, seed) and job, or (None, None)."""
    key, lock = take_next(point, jobs) if ranks()[0] == 0 else (None, None)
    key, lock = agreed(key), lock or contextlib.ExitStack()
    if key is None:
        return None, None
    with lock:
        run, path = make_run(script, point.config(key), data, args), point.path(key)
        if args.fresh and run.rank == 0:
            remove_checkpoint(path)
        with on_stream(run):
            if not args.fresh and resume(path, run):
                say(f"{point.title(key)} goes on from epoch {run.epoch + 1}, update {run.updates + 1}")
            if agreed(run.updates) != run.updates:
                raise OwnError(f"{path}: the ranks have other checkpoints: give all of them the same --out")
            if run.stream and run.world == 1 and run.data.on_device and not args.eager:
                run.capture()
        every = args.eval_every or math.ceil(run.config["epochs"] / 20)
        return key, Job(path, point.title(key), run, train(run, every), lock.pop_all())


def free_memory(device: torch.device) -> float:
    """Bytes of a GPU's memory that nothing uses; infinite on a CPU, and for ranks, which must not differ."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" and ranks()[1] == 1 else math.inf


def is_out_of_memory(error: BaseException | None) -> bool:
    """True if this error, or one it was raised while handling, is out-of-memory; graph capture hides it so.

    The driver, cuBLAS and cuDNN have errors of their own for it.
    """
    if error is None:
        return False
    texts = "out of memory", "_ALLOC", "unable to find an engine", "can't allocate memory"
    by_text = isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
    return isinstance(error, torch.OutOfMemoryError) or by_text or is_out_of_memory(error.__context__)


def on_stream(run: Run):
    """The context of a run's own CUDA stream."""
    return torch.cuda.stream(run.stream) if run.stream else contextlib.nullcontext()


def save(jobs):
    """Write the checkpoints of runs; all ranks call this together."""
    for job in jobs:
        with on_stream(job.run):  # after the updates that the device has yet to do
            state = job.run.state()
        if job.run.rank == 0:
            write_checkpoint(job.path, state)


def finish(point: Point, key, job: Job, args, concurrent: int):
    """Write the record of a run that came to its end, remove its checkpoint and free its lock."""
    run = job.run
    if run.stream:
        run.stream.synchronize()  # a burst after a divergence may still write into the run's memory
    if run.rank == 0:
        if args.save_weights and not run.diverged:
            save_weights(job.path, run)
        records.write_record(job.path, outcome(run, concurrent))
        remove_checkpoint(job.path)
        point.plan()
        say(point.result(key))
    job.lock.close()


def outcome(run: Run, concurrent: int) -> dict:
    """The record of a run; a diverged run has no final numbers."""
    record = {"config": run.config, "status": "diverged" if run.diverged else "done", "history": run.history}
    if run.diverged:
        record |= {"final": dict.fromkeys(records.FINAL), "diverged_at_step": run.updates}
    else:
        last = run.history[-1]
        last = last | {"train_objective": last["train_loss"] + last["l2"]}
        record["final"] = {key: last[key] for key in (*records.FINAL, "test_top5") if key in last}
        seconds = sum(entry["seconds"] for entry in run.history)
        record["images_per_second"] = run.updates * run.bs / seconds
    keys = ("name", "fingerprint", "classes", "train_images", "test_images")
    made_with = {"commit": commit(), "torch": torch.__version__, "device": device_name(run.device)}
    made_with |= {"threads": torch.get_num_threads(), "ranks": run.world, "concurrent": concurrent}
    return record | {"data": {key: getattr(run.data, key) for key in keys}, "environment": made_with}


def print_accuracy(script, point: Point, args):
    """Print the test accuracy of saved weights or checkpoints, but of runs that diverged.

    Raises UserError where there is neither.
    """
    device, asked = pick_device(args.device), point.plan().asked
    asked = [key for key in asked if point.found.get(key, {}).get("status") != "diverged"]
    if not asked:
        raise UserError("--eval-only: all of these runs diverged")
    for path in map(point.path, asked):
        if not any(each.exists() for each in (weights_file(path), *checkpoint_files(path))):
            raise UserError(
                f"--eval-only: there is neither {weights_file(path)}, which --save-weights leaves, "
                f"nor {checkpoint_files(path)[0]}"
            )
    data = load_on_all_ranks(script, args, device)
    for key in asked:
        path, run = point.path(key), make_run(script, point.config(key), data, args)
        if weights_file(path).exists():
            load_weights(weights_file(path), run)
        elif not resume(path, run):
            raise UserError(f"--eval-only: {checkpoint_files(path)[0]} is damaged")
        with reading_images():
            measured = run.evaluate()
        shares = ", ".join(f"{name} {share:.2%}" for name, share in measured.items())
        after = f" after {plural(run.updates, 'update')}" if run.updates else ""
        say(f"{point.title(key)}: {shares}{after}")


# ---------------------------------------------------------------------------------------------- a script


def main(script, argv=None):
    """Do what the flags ask for.

    `script` is the module wrn_cifar or resnet_imagenet. What differs between them is in their functions
    parse_args, make_point, make_net, load_data and count_images, and in HALVINGS, of the learning rate.
    """
    args = script.parse_args(argv)
    if args.status:
        return progress.print_status(progress.read_lines())
    if args.watch is not None:
        return progress.watch(progress.read_lines(), args.watch)
    if args.verbose:
        say(json.dumps(vars(args), default=str))
    point = script.make_point(args)
    if args.dry_run:
        return print_plan(script, point, args)
    if args.eval_only:
        return print_accuracy(script, point, args)
    return train_point(script, point, args)
