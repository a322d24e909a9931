"""From flags to records: runs that are missing are made, many at once, and survive being killed at any moment.

    wrn16-4_zeroinit_bs64_lr2^-2_ep200_s07.json    a run's record: configuration, history, result; the only truth
    ....ckpt, ....ckpt.old                         the state of an unfinished run, and the one before it
    ....lock                                       held by the process that is making the run

Every file is complete or not there at all.
"""

import argparse
import contextlib
import errno
import fcntl
import functools
import hashlib
import io
import json
import math
import os
import pickle
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from common import (
    METHODS,
    Run,
    UserError,
    epoch_end,
    learning_rate,
    leave_ranks,
    outcome,
    pick_device,
    pick_precision,
    ranks,
    split_batch,
    stop_asked,
    stream_seed,
    train,
)


class Interrupted(Exception):
    """A signal asked for the end, and what was trained so far is saved: exit code 75."""


def exit_code(main) -> int:
    """Call main() and turn what ends it into an exit code: 0 done, 1 failed, 2 bad usage or data, 75 interrupted."""
    code = 0
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = error.filename or "the disk"
        print(f"error: {where}: {error.strerror}; free some space and run again", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, Interrupted):
        say("interrupted: the same command goes on from here")
        code = 75
    leave_ranks()
    return code


def say(text: str):
    """Print a line, on the first of torchrun's ranks only."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(text, flush=True)


# -------------------------------------------------------------------------------------------------------------- flags


def number(kind, low, high=math.inf):
    """The type of a numeric flag: a number in [low, high), which may be written as a power (2^-2)."""

    def parse(text: str):
        base, _, exponent = text.partition("^")
        value = kind(base) ** int(exponent or 1)
        if not low <= value < high:
            bounds = f"at least {low}" + (f" and below {high}" if high < math.inf else "")
            raise argparse.ArgumentTypeError(f"should be {bounds}, not {text}")
        return value

    parse.__name__ = kind.__name__
    return parse


natural, positive = number(int, 0), number(int, 1)
coefficient, fraction, rate = number(float, 0), number(float, 0, 1), number(float, 1e-12)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, once per machine: torchrun's ranks all have the same flags."""

    def error(self, message):
        first = int(os.environ.get("LOCAL_RANK", 0)) == 0
        self.exit(2, f"error: {message} (see --help)\n" if first else None)


def add_shared_flags(parser: Parser, **defaults):
    """Add the groups "optimization" and "runs", which both scripts have; `defaults` are those that differ."""
    add = parser.add_argument_group("optimization").add_argument
    add("--bs", "--batch-size", type=positive, help="images per update")
    add("--lr", type=rate, nargs="+", help="learning rates, one run each: 0.25 or 2^-2")
    add("--epochs", type=positive, help="the budget; the learning rate schedule scales with it")
    add("--momentum", type=fraction, default=0.9, help="heavy ball")
    add("--wd", type=coefficient, help="L2 coefficient")
    add("--l2-all", action="store_true", help="L2 also on biases, batch norm and scalars")
    add("--scalar-lr", type=rate, default=1.0, help="multiplies the learning rate of the 0-dim parameters")
    group = parser.add_argument_group("runs")
    seeds = group.add_mutually_exclusive_group()
    seeds.add_argument("--seeds", type=positive, default=1, help="run the seeds 0 to N-1")
    seeds.add_argument("--seed", type=natural, help="run this seed only")
    add = group.add_argument
    add("--out", type=Path, default=Path("results"), help="folder of the records")
    add("--eval-every", type=natural, default=0, help="epochs between evaluations; 0: a twentieth of the budget")
    add("--checkpoint-every", type=coefficient, default=10, help="minutes between checkpoints")
    add("--fresh", action="store_true", help="start interrupted runs from the beginning")
    add("--save-weights", action="store_true", help="leave the trained net beside its record, as NAME.pt")
    add("--device", help="cpu, cuda, cuda:1 ... [a GPU if there is one]")
    add("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto", help="precision of the passes")
    add("--micro", type=natural, default=0, help="images per pass, to save memory; 0: chosen for speed")
    add("--concurrent", type=natural, default=0, help="runs to train at once in this process; 0: chosen for speed")
    add("--compile", action="store_true", help="let torch.compile make the kernels")
    add("--eager", action="store_true", help="no CUDA graphs")
    add("--dry-run", action="store_true", help="print what would be run, and stop")
    add("--status", action="store_true", help="count the runs of such command lines, read from stdin")
    parser.set_defaults(**defaults)


def check_shared_flags(parser: Parser, args: argparse.Namespace):
    """What must hold between the flags of either script."""
    method = METHODS[args.init]
    if args.dropout is not None and not method.dropout:
        parser.error(f"argument --dropout: --init {args.init} has no dropout")
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    try:
        split_batch(args.bs, args.ghost if method.norm else None, ranks, args.micro, "cpu")
    except UserError as error:
        parser.error(str(error))


# -------------------------------------------------------------------------------------------------------------- names


def power(value: float) -> str:
    """A learning rate as the paper writes it: 2^-2 for 0.25; other numbers as they are."""
    mantissa, exponent = math.frexp(value)
    return f"2^{exponent - 1}" if mantissa == 0.5 else f"{value:g}"


def run_name(model: str, config: dict, defaults: dict) -> str:
    """A run's name, from everything that decides its result; options that have their default value are left out."""
    name = f"{model}_{config['init']}_bs{config['bs']}_lr{power(config['lr'])}_ep{config['epochs']}"
    for key, default in defaults.items():
        value = config[key]
        if value != default:
            shown = "" if value is True else f"{value:g}" if isinstance(value, float) else value
            name += f"_{key.replace('_', '')}{shown}"
    return f"{name}_s{config['seed']:02d}"


def one_per_rate_and_seed(args: argparse.Namespace, prefix: str, net: dict, defaults: dict) -> dict:
    """The runs of either script: their names begin with `prefix` and hold each flag that is not as in `defaults`.

    Methods without batch norm have no ghost batches and those without dropout a probability of zero, by default.
    """
    method = METHODS[args.init]
    defaults["ghost"] = min(defaults["ghost"], args.bs) if method.norm else None
    defaults["dropout"] *= method.dropout
    shared = net | {key: getattr(args, key) for key in ("init", "bs", "epochs", *defaults)}
    shared["ghost"] = min(args.ghost or args.bs, args.bs) if method.norm else None
    shared["dropout"] = defaults["dropout"] if args.dropout is None else args.dropout
    slug = "-".join("".join(c if c.isalnum() else " " for c in args.data_name.lower()).split())
    runs = {}
    for lr in args.lr:
        for seed in range(args.seeds) if args.seed is None else [args.seed]:
            config = {"data": args.data_name, "lr": lr, "seed": seed} | shared
            runs[args.out / slug / f"{run_name(prefix, config, defaults)}.json"] = config
    return runs


@functools.cache
def environment() -> dict:
    """The commit of this code when the process began, with "-dirty" where it was changed, for a record."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return {"commit": subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None}


# ------------------------------------------------------------------------------------------------------------ records


def read_record(path: Path) -> dict | None:
    """The valid record at `path`, or None where there is no file or something else."""
    try:
        record = json.loads(path.read_text(), parse_constant=lambda name: float(name + "?"))
        valid = record["status"] in ("done", "diverged") and record["config"] and record["data"]["fingerprint"]
        return record if valid and "history" in record and "final" in record else None
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None


def is_done(path: Path, config: dict) -> bool:
    """Whether the run's record exists. Raises UserError if the record of that name has another configuration."""
    record = read_record(path)
    if record:
        check_same(path, record["config"], config)
    return record is not None


def check_same(path: Path, theirs: dict, ours: dict):
    """Raise UserError with the first difference between two configurations."""
    for key in sorted(ours.keys() | theirs.keys()):
        if theirs.get(key) != ours.get(key):
            raise UserError(f"{path} holds another run: its {key} is {theirs.get(key)}, not {ours.get(key)}")


def print_status(lines, configurations):
    """For each command line: done, diverged, running and all runs, the grid they belong to, and the line, tabs between.

    `configurations(argv)` gives the runs of what follows the script's name in a line; a grid is the runs that differ
    only in learning rate and seed. Diverged runs are among the done, and running ones are not.
    """
    for line in filter(None, map(str.strip, lines)):
        words = shlex.split(line, comments=True)
        script = next(i for i, word in enumerate(words) if word.endswith(".py"))
        runs = configurations(words[script + 1 :])
        records = {path: read_record(path) for path, config in runs.items() if is_done(path, config)}
        diverged = sum(record["status"] == "diverged" for record in records.values())
        running = sum(is_running(path) for path in runs.keys() - records.keys())
        path = next(iter(runs))
        grid = f"{path.parent.name}/" + re.sub(r"_lr[^_]+|_s\d+$", "", path.stem)
        print(len(records), diverged, running, len(runs), grid, line, sep="\t")


def write_record(path: Path, record: dict):
    """Write a record as strict JSON, completely or not at all; a foreign file of that name is set aside."""
    text = json.dumps(record, allow_nan=False, indent=1)
    if path.exists():
        path.replace(path.with_suffix(".json.broken"))
        print(f"{path} was not a valid record: kept as {path.name}.broken", file=sys.stderr)
    with atomic_write(path) as file:
        file.write(text.encode())


@contextlib.contextmanager
def atomic_write(path: Path, previous: Path | None = None):
    """A binary file that takes the name `path` only once it is complete and on the disk.

    What had the name before becomes `previous`, where that is given.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    except BaseException as error:
        os.unlink(temporary)
        if isinstance(error, OSError):
            error.filename = error.filename or str(path)
        raise


def check_writable(folder: Path):
    """Make the folder if need be. Raises UserError if no file can be written in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"--out: cannot write to {folder}: {error.strerror}") from None


# -------------------------------------------------------------------------------------------------------- checkpoints


def checkpoint_files(path: Path) -> list[Path]:
    """The checkpoint of a record's run, and the one before it."""
    return [path.with_suffix(".ckpt"), path.with_suffix(".ckpt.old")]


def write_checkpoint(path: Path, state: dict):
    """Save the state of a record's run beside it, with a checksum (torch.load accepts flipped bits); keep the last."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    new, old = checkpoint_files(path)
    with atomic_write(new, old) as file:
        file.write(hashlib.sha256(buffer.getbuffer()).digest())
        file.write(buffer.getbuffer())


def read_checkpoint(path: Path, config: dict) -> dict | None:
    """The state of a run that was interrupted, from its last checkpoint that is whole; None without one.

    Raises UserError for the checkpoint of another configuration.
    """
    for name in checkpoint_files(path):
        try:
            content = name.read_bytes()
            if hashlib.sha256(content[32:]).digest() != content[:32]:
                raise ValueError("its checksum is wrong")
            state = torch.load(io.BytesIO(content[32:]), map_location="cpu", weights_only=True)
            theirs = state["config"]
        except FileNotFoundError:
            continue
        except (ValueError, KeyError, TypeError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            say(f"{name} is not used: {str(error).splitlines()[0]}")
            continue
        check_same(name, theirs, config)
        return state
    return None


def remove_checkpoint(path: Path):
    """The run is over, or begins again."""
    for name in checkpoint_files(path):
        name.unlink(missing_ok=True)


# -------------------------------------------------------------------------------------------------------------- locks


def take_lock(path: Path, held: contextlib.ExitStack) -> bool:
    """Make a run this process's own until `held` is closed; False where another process has it.

    The kernel frees the lock when its process dies, however that happens.
    """
    name = path.with_suffix(".lock")
    for _ in range(20):  # a look by is_running() holds it for a moment
        file = open(name, "a")  # noqa: SIM115
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(file.fileno()).st_ino == os.stat(name).st_ino:  # not one that was removed just now
                os.register_at_fork(after_in_child=file.close)  # or the workers of a DataLoader would hold it too
                held.enter_context(file)
                held.callback(name.unlink, missing_ok=True)
                for left in path.parent.glob(f".{path.stem}.*"):  # half a file, of a process that was killed
                    left.unlink()
                return True
        except FileNotFoundError:
            pass
        except BlockingIOError:
            time.sleep(0.01)
        file.close()
    return False


def is_running(path: Path) -> bool:
    """Whether some process is making the run now."""
    try:
        with open(path.with_suffix(".lock")) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True


# ----------------------------------------------------------------------------------------------------------- training


class Progress:
    """A progress bar on a terminal; elsewhere a line per epoch, at most one every ten seconds."""

    def __init__(self, title: str, images: int, done: int):
        self.said = -math.inf
        hidden = not sys.stderr.isatty() or ranks()[0] > 0
        options = {"unit": " images", "unit_scale": True, "smoothing": 0.1, "disable": hidden}
        self.bar = tqdm(total=images, initial=done, desc=title, **options)

    def epoch(self, name: str, run: Run):
        """Show the last entry of a run's history."""
        entry, epochs = run.history[-1], run.config["epochs"]
        text = f"loss {entry['train_loss']:.3f}, train {entry['train_accuracy']:.1%}"
        text += f", test {entry['test_accuracy']:.1%}" if "test_accuracy" in entry else ""
        text += f", {entry['data_wait']:.0%} waiting for data" if run.feed else ""
        if not self.bar.disable:
            self.bar.set_postfix_str(text)
        elif entry["epoch"] == epochs or time.monotonic() - self.said > 10:
            self.said = time.monotonic()
            say(f"{name}: epoch {entry['epoch']}/{epochs}, {text}")


def device_name(device: torch.device) -> str:
    """What a record calls a device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def agreed(value):
    """The first rank's value, on every rank."""
    box = [value]
    if ranks()[1] > 1:
        dist.broadcast_object_list(box, device=torch.device("cpu"))
    return box[0]


def train_missing(runs: dict, build, load_data, args, drops=10):
    """Make every run that has no record yet: `runs` maps the path of each record to its configuration.

    `build(config)` makes a net, `load_data(device)` the data, which is loaded only if a run is missing; `args` are the
    flags that the scripts share. Raises UserError where a record holds another configuration or other images than it
    would be given now, and Interrupted after a signal.
    """
    device = pick_device(args.device)
    say(json.dumps(vars(args), default=str))
    missing = agreed({path: config for path, config in runs.items() if not is_done(path, config)})
    for path in runs.keys() - missing.keys():
        remove_checkpoint(path)
    say(f"{len(runs)} runs, {len(runs) - len(missing)} done")
    environment()
    if not missing:
        return
    for folder in {path.parent for path in missing}:
        check_writable(folder)
    data = load_data(device)
    for path in runs.keys() - missing.keys():
        known = read_record(path)["data"]["fingerprint"]
        if known != data.fingerprint:
            raise UserError(f"{path} is of other images ({known}, these are {data.fingerprint}): choose another --out")
    precision, todo = pick_precision(args.amp, device), list(missing.items())

    def start(config):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream_seed(config["seed"], "weights"))
            net = build(config)
        return Run(config, net, data, device, precision, args.micro, drops, args.compile)

    limit = args.concurrent or side_by_side(device, todo[0][1]["bs"])
    with signals_ask_to_stop():
        while todo:
            limit = train_group(todo, limit, start, args)


def side_by_side(device: torch.device, bs: int) -> int:
    """How many runs to train at once: small batches leave a GPU idle; on a CPU one after the other is as fast."""
    return max(1, min(16, 1024 // bs)) if device.type == "cuda" and ranks()[1] == 1 else 1


@contextlib.contextmanager
def signals_ask_to_stop():
    """Let SIGINT, SIGTERM and SIGUSR1 finish the updates under way and save, rather than end the process."""
    stop_asked.clear()
    before = {n: signal.signal(n, lambda *_: stop_asked.set()) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train_group(todo: list, limit: int, start, args) -> int:
    """Train the first runs of `todo`, at most `limit`, side by side to their records, and take them off the list.

    Returns how many runs fit into the device's memory.
    """
    with contextlib.ExitStack() as locks:
        jobs = {}
        while todo and len(jobs) < limit:
            path, config = todo[0]
            mine = ranks()[0] > 0 or (take_lock(path, locks) and not is_done(path, config))
            if agreed(mine):
                try:
                    jobs[path] = prepare(path, start(config), args)
                except RuntimeError as error:
                    if not is_out_of_memory(error):
                        raise
                    if not jobs:
                        raise UserError("one run does not fit into the device's memory: try --micro") from None
                    limit = len(jobs)
                    say(f"the device's memory holds {limit} runs at a time")
                    break
            else:
                say(f"{path.stem} is left to another process")
            todo.pop(0)
        if jobs:
            take_turns(jobs, args)
    return limit


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error is of that kind, or came while one was handled, as when it breaks the capture of a graph."""
    return error is not None and (isinstance(error, torch.OutOfMemoryError) or is_out_of_memory(error.__context__))


def on_stream(run: Run):
    """The context of a run's own CUDA stream."""
    return torch.cuda.stream(run.stream) if run.stream else contextlib.nullcontext()


def prepare(path: Path, run: Run, args) -> Run:
    """Bring a run to where its checkpoint left it, and make its bursts graphs where that can be."""
    with on_stream(run):
        state = None if args.fresh else read_checkpoint(path, run.state()["config"])
        if state:
            run.load(state)
            say(f"{path.stem} goes on from epoch {run.epoch + 1}, update {run.updates + 1}")
        if run.stream and run.world == 1 and run.data.on_device and not args.eager:
            run.capture()
    return run


def take_turns(jobs: dict, args):
    """Train the runs, a burst each in turn, to their records; or after a signal, to their checkpoints."""
    first = next(iter(jobs))
    config, images = jobs[first].config, jobs[first].data.train_images
    total = len(jobs) * epoch_end(config["epochs"] - 1, images, config["bs"]) * config["bs"]
    title = first.stem + (f" and {len(jobs) - 1} more" if len(jobs) > 1 else "")
    progress = Progress(title, total, sum(run.updates for run in jobs.values()) * config["bs"])
    training = {path: train(run, args.eval_every or math.ceil(config["epochs"] / 20)) for path, run in jobs.items()}
    saved = time.monotonic()
    while training:
        due = time.monotonic() - saved > 60 * args.checkpoint_every
        for path, run in [(path, jobs[path]) for path in training]:
            epoch = run.epoch
            with on_stream(run):
                images = next(training[path], None)
            progress.bar.update(images or 0)
            if run.epoch > epoch:
                progress.epoch(path.stem, run)
                due = due or not run.data.on_device  # epochs of large images are long
            if images is None:
                del training[path]
                finish(path, run, args, len(jobs))
        stop = any(jobs[path].stopped for path in training)
        if stop or due:
            for path in training if ranks()[0] == 0 else ():
                with on_stream(jobs[path]):  # after the updates that the device has yet to do
                    write_checkpoint(path, jobs[path].state())
            saved = time.monotonic()
        if stop:
            progress.bar.close()
            agreed(None)  # torchrun ends the others soon after the first that leaves: not before all is saved
            raise Interrupted
    progress.bar.close()


def finish(path: Path, run: Run, args, concurrent: int):
    """Write the record of a run that came to its end, and remove its checkpoint."""
    if run.diverged:
        say(f"{path.stem}: diverged at update {run.updates}")
    keys = ("name", "fingerprint", "train_images", "test_images")
    made_with = environment() | {
        "torch": torch.__version__,
        "device": device_name(run.device),
        "threads": torch.get_num_threads(),
        "precision": pick_precision(args.amp, run.device),
        "ranks": run.world,
        "concurrent": concurrent,
    }
    if run.rank == 0:
        if args.save_weights and not run.diverged:
            for parameter, master in zip(run.parameters, run.masters, strict=True):
                parameter.data = master.data
            with atomic_write(path.with_suffix(".pt")) as file:
                torch.save({"config": run.config, "state_dict": run.net.state_dict()}, file)
        about = {"data": {key: getattr(run.data, key) for key in keys}, "environment": made_with}
        write_record(path, outcome(run) | about)
        remove_checkpoint(path)


def print_plan(runs: dict, build, images: int, args, drops=10):
    """Print what `train_missing` would do on so many training images: the net, the updates, the schedule, the runs."""
    config = next(iter(runs.values()))
    bs, epochs, world = config["bs"], config["epochs"], int(os.environ.get("WORLD_SIZE", 1))
    with torch.device("meta"):
        net = build(config)
    weights = sum(p.numel() for p in net.parameters())
    budget, steps = epochs * images, epoch_end(epochs - 1, images, bs)
    halvings = math.log2(config["lr"] / learning_rate(config["lr"], (steps - 1) * bs, budget, drops))
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu")).type
    share, micro, reach = split_batch(bs, config["ghost"], world, args.micro, device)
    ghosts = f", ghost batches of {config['ghost']}" if config["ghost"] else ""
    say(f"{type(net).__name__} {config['init']}: {weights:,} trainable parameters")
    say(f"{images:,} images, batches of {bs}: {steps:,} updates in {epochs} epochs")
    say(f"learning rate constant for {-(-budget // (2 * bs)):,} updates, then halved {halvings:.0f} times")
    say(
        f"{world} ranks, each {share} images of a batch in passes of {micro}{ghosts}"
        + f" over {reach} ranks" * (reach > 1)
    )
    for path, config in runs.items():
        say(f"{'done   ' if is_done(path, config) else 'missing'} {path}")
