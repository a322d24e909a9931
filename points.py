"""What one command line asks for: its flags, its runs, which of them are done, and which are being made.

A point is one method, batch size and network, at some learning rates and seeds: a mark in a figure, a cell of
a table. What its search needs next follows from the records that exist (records.py).
"""

import argparse
import contextlib
import fcntl
import math
import os
import platform
import re
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import records
from common import METHODS, divide_batch, epoch_end, learning_rate, pick_precision, rank_group
from ranks import rank_variable
from records import OwnError, UserError, check_same, find_record, flush, plural, power, run_name, slug


def say(text: str):
    """Print a line, on the first of torchrun's ranks only; a progress bar stays below it."""
    if rank_variable("RANK") == 0:
        with contextlib.suppress(OSError):
            tqdm.write(text)
        flush(sys.stdout)


# ------------------------------------------------------------------------------------------------- flags


def number(kind, low, high):
    """The type of a numeric flag: a number in [low, high), which may be written as a power (2^-2)."""

    def parse(text: str):
        base, is_power, exponent = text.partition("^")
        try:
            value = kind(base)
            if is_power and value >= 0:
                value = float(value) ** int(exponent)
        except (OverflowError, ZeroDivisionError):
            value = math.inf
        except ValueError:
            value = math.nan
        if not low <= value < high or value != kind(value):
            what = "whole number" if kind is int else "number, such as 0.25 or 2^-2,"
            raise argparse.ArgumentTypeError(
                f"should be a {what} of at least {low} and below {high}, not {text}"
            )
        return kind(value)

    return parse


def power_of_two(n: int) -> int:
    """The smallest power of two that is n or more."""
    return 1 << (n - 1).bit_length()


natural, positive, few = number(int, 0, 2**31), number(int, 1, 2**31), number(int, 1, 1000)
coefficient, fraction, rate = number(float, 0, 1e30), number(float, 0, 1), number(float, 1e-12, 1e30)


class Parser(argparse.ArgumentParser):
    """A parser that raises UserError for bad flags, and for shortened ones, which sweep.sh does not know."""

    def __init__(self, description: str):
        super().__init__(description=description, formatter_class=Help, allow_abbrev=False)

    def error(self, message):
        raise UserError(f"{message} (see --help)")


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Help with the module's examples, and the default of every flag that has one."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def add_shared_flags(parser: Parser, inits, **defaults):
    """Add the groups "method", "optimization" and "runs", which both scripts have.

    `inits` are the methods to choose from, `defaults` those that differ.
    """
    add = parser.add_argument_group("method").add_argument
    add("--init", choices=inits, default="zeroinit", help="the method, a row of the paper's tables")
    add("--ghost", type=natural, help="images per ghost batch of batch norm; 0: the whole batch")
    add("--dropout", type=fraction, help="drop probability of methods with dropout [0.6; of ResNet-50 0.2]")
    add("--alpha", type=coefficient, help="starting value of ZeroInit's scalar [0]")
    add("--base-init", choices=("he-in", "he-out", "lecun"), default="he-in", help="of the initial weights")
    add = parser.add_argument_group("optimization").add_argument
    add("--bs", "--batch-size", type=positive, help="images per update")
    add("--lr", type=rate, nargs="+", help="learning rates: 0.25 or 2^-2 [the optimum to expect]")
    add("--epochs", type=positive, help="the budget; the learning rate schedule scales with it")
    add("--momentum", type=fraction, default=0.9, help="heavy ball")
    add(
        "--dampening",
        type=fraction,
        help="of the gradient in the heavy ball [as --momentum: so the paper's rates are read; with 0, "
        "PyTorch's default, the rates that do the same are a tenth, also of those expected here]",
    )
    add("--wd", type=coefficient, help="L2 coefficient")
    add("--l2-all", action="store_true", help="L2 also on biases, batch norm and scalars")
    add("--scalar-lr", type=rate, default=1.0, help="multiplies the learning rate of the 0-dim parameters")
    group = parser.add_argument_group("runs")
    seeds = group.add_mutually_exclusive_group()
    seeds.add_argument("--seeds", type=few, default=1, help="run the seeds 0 to N-1")
    seeds.add_argument("--seed", type=natural, help="run this seed only")
    add = group.add_argument
    add(
        "--search",
        choices=("best", "all"),
        help="find the optimal rate: all seeds around the best rate only, or at all rates; "
        "either goes beyond --lr while an optimum is on its edge [exactly the rates of --lr]",
    )
    add("--out", type=Path, default=Path("results"), help="folder of the records")
    add("--eval-every", type=natural, default=0, help="epochs between evaluations; 0: a twentieth of all")
    add("--checkpoint-every", type=coefficient, default=10, help="minutes between checkpoints")
    add("--fresh", action="store_true", help="discard checkpoints: start interrupted runs from the beginning")
    add("--save-weights", action="store_true", help="leave the trained net beside its record, as NAME.pt")
    add("--eval-only", action="store_true", help="print the accuracy of saved weights or checkpoints")
    add("--device", help="cpu, cuda, cuda:1 ... [a GPU if there is one]")
    add("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto", help="precision of the passes")
    add("--micro", type=natural, default=0, help="images per pass, to save memory; 0: chosen for speed")
    add("--concurrent", type=natural, default=0, help="runs to train at once; 0: chosen for speed")
    add("--compile", action="store_true", help="let torch.compile make the kernels")
    add("--eager", action="store_true", help="no CUDA graphs")
    add("--verbose", action="store_true", help="print all flags as JSON")
    add("--dry-run", action="store_true", help="print what would be run, and stop")
    add("--status", action="store_true", help="count the runs of such command lines, read from stdin")
    add("--watch", type=int, nargs="*", metavar="PID", help="print a line for each run that they finish")
    parser.set_defaults(**defaults)


def check_shared_flags(parser: Parser, args: argparse.Namespace):
    """Check what must hold between the flags of either script, and fill in what follows from others."""
    method = METHODS[args.init]
    if args.dropout is not None and not method.dropout:
        parser.error(f"argument --dropout: --init {args.init} has no dropout")
    if args.alpha is not None and not method.scalar:
        parser.error(f"argument --alpha: --init {args.init} has no scalar that starts at zero")
    if args.data_name is None:
        own_name = os.path.basename(os.path.realpath(args.data_dir))
        names = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "folder": own_name}
        args.data_name = names.get(args.data, args.data)
    try:
        slug(args.data_name)
    except UserError as error:
        parser.error(f"argument --data-name: {error}")
    world = rank_variable("WORLD_SIZE", 1)
    args.ghost = min(args.ghost or args.bs, args.bs) if method.norm == "batch" else None
    divide_batch(args.bs, args.ghost, world, args.micro, "cpu")
    args.precision = pick_precision(args.amp, find_device(args.device))


# ------------------------------------------------------------------------------------------------ device


def find_device(name: str | None) -> torch.device:
    """The named device, or a GPU if there is one; without a number ("cuda", or None) torchrun's rank's own.

    It does not touch the GPU, which may allow one process only. Raises OwnError if there is no such device.
    """
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")  # else 16 streams of runs share 8 queues
    own = f"cuda:{rank_variable('LOCAL_RANK')}"
    default = own if torch.cuda.is_available() else "cpu"
    if (name or default).partition(":")[0] not in ("cpu", "cuda"):
        raise OwnError(f"--device {name}: should be cpu, cuda, or cuda:N")
    try:
        device = torch.device(own if name == "cuda" else name or default)
        if device.type == "cuda" and device.index >= torch.cuda.device_count():
            torch.zeros(1, device=device)  # PyTorch says why
    except (RuntimeError, AssertionError) as error:
        raise OwnError(f"--device {name or default}: {str(error).splitlines()[0]}") from None
    return device


def device_name(device: torch.device) -> str:
    """What a record calls a device; a CPU's name comes with its vector instructions."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    name = named[1] if named else platform.processor() or platform.machine()
    return f"{name} {torch.backends.cpu.get_cpu_capability()}"


def pick_device(name: str | None) -> torch.device:
    """The device of `find_device`, set up for training; joins the ranks of torchrun."""
    device = find_device(name)
    if device.type == "cuda":
        try:
            torch.zeros(1, device=device)
        except RuntimeError as error:
            raise OwnError(f"{device} cannot be used: {str(error).splitlines()[0]}") from None
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = False  # float32 means float32, in convolutions
        torch.backends.cuda.matmul.allow_tf32 = False  # and in products, whatever the environment says
    if rank_variable("WORLD_SIZE", 1) > 1 and not dist.is_initialized():
        if not dist.is_torchelastic_launched():
            print("WORLD_SIZE is set: waiting for the other ranks ...", flush=True)
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        except (ValueError, RuntimeError) as error:
            problem = str(error).partition("\n")[0]
            raise UserError(f"WORLD_SIZE is set, but the other ranks cannot be joined: {problem}") from None
    return device


def leave_ranks():
    """Destroy the process groups and so end their threads, which could abort the interpreter as it ends.

    See pytorch/pytorch#179291. Only where all ranks leave: after a fault of one, the others may be waiting.
    """
    rank_group.cache_clear()
    if dist.is_initialized():
        dist.destroy_process_group()


# ----------------------------------------------------------------------------------------------- a point


@dataclass
class Point:
    """The runs of one command line: they differ in learning rate and seed only."""

    folder: Path  # of the records
    prefix: str  # of their names: wrn16-4
    shared: dict  # the configuration without learning rate and seed
    defaults: dict  # the values of options that names leave out
    rates: list
    seeds: list
    search: str | None
    metrics: tuple  # what the search optimizes
    found: dict = field(default_factory=dict)  # (rate, seed) -> record

    def config(self, key) -> dict:
        """Everything that decides the result of the run with a (rate, seed)."""
        return self.shared | {"lr": key[0], "seed": key[1]}

    def path(self, key) -> Path:
        """The record of the run with a (rate, seed)."""
        return self.folder / f"{run_name(self.prefix, self.config(key), self.defaults)}.json"

    def title(self, key) -> str:
        """A run's short name for a person."""
        return f"{self.prefix} {self.shared['init']} B {self.shared['bs']} {power(key[0])} seed {key[1]}"

    def plan(self) -> records.Plan:
        """What the search asks for, given the records that exist; UserError for a record of another run."""
        while True:
            finals = {key: records.final_of(record) for key, record in self.found.items()}
            plan = records.plan(finals, self.rates, self.seeds, self.metrics, self.search)
            new = {key: find_record(self.path(key)) for key in plan.missing}
            new = {key: record for key, record in new.items() if record}
            for key, record in new.items():
                check_same(self.path(key), record["config"], self.config(key))
            if not new:
                return plan
            self.found |= new

    def result(self, key) -> str:
        """A line for a run that is done: what came of it, and where its record is."""
        record, final = self.found[key], self.found[key]["final"]
        if record["status"] == "diverged":
            text = f"diverged at update {record['diverged_at_step']}"
        else:
            text = f"test {final['test_accuracy']:.1%}, loss {final['train_objective']:.3f}"
        return f"{self.title(key)}: {text} ({self.path(key)})"


def make_point(
    args, prefix: str, net: dict, defaults: dict, expected_rate: float, around: int, metrics
) -> Point:
    """The point of either script's flags; names leave out what is as in `defaults`.

    Without --lr it has the expected rate, and with --search the powers of two `around` it as well. Methods
    without dropout have a probability of zero.
    """
    method = METHODS[args.init]
    defaults = defaults | {"momentum": 0.9, "l2_all": False, "scalar_lr": 1.0, "base_init": "he-in"}
    defaults["dampening"] = args.momentum
    defaults |= {"alpha": method.alpha if method.scalar else None, "precision": "float32"}
    defaults["ghost"] = min(defaults["ghost"], args.bs)
    defaults["dropout"] *= method.dropout
    flags = {key: getattr(args, key) for key in ("init", "bs", "epochs", *defaults)}
    shared = {"data": args.data_name} | net | flags
    for key in ("dropout", "alpha", "dampening"):
        shared[key] = defaults[key] if shared[key] is None else shared[key]
    shared["dampening"] *= args.momentum > 0  # without momentum PyTorch does not dampen
    steps = range(-around, around + 1) if args.search else [0]
    rates = sorted(set(args.lr or [expected_rate * 2.0**step for step in steps]))
    seeds = list(range(args.seeds)) if args.seed is None else [args.seed]
    folder = args.out / slug(args.data_name)
    return Point(folder, prefix, shared, defaults, rates, seeds, args.search, metrics)


@contextlib.contextmanager
def output_folder(folder: Path):
    """A folder that can be written to, made if need be; after an error it is removed again if it is empty.

    Raises UserError if no file can be written in it.
    """
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise UserError(f"--out: cannot write to {folder}: {error.strerror}") from None
        yield
    except BaseException:
        for each in made:
            with contextlib.suppress(OSError):  # it is not empty, or was not made
                each.rmdir()
        raise


def take_lock(path: Path) -> contextlib.ExitStack | None:
    """Make a run this process's own until the returned stack is closed; None where another process has it.

    The kernel frees the lock when its process dies, however that happens.
    """
    name = path.with_suffix(".lock")
    for _ in range(20):  # is_running() holds a lock for a moment
        path.parent.mkdir(parents=True, exist_ok=True)  # a command that failed may have removed it
        is_new = not name.exists()
        with contextlib.ExitStack() as held:
            try:
                file = held.enter_context(open(name, "a"))
            except PermissionError:  # another user's
                if is_new:
                    raise
                file = held.enter_context(open(name))
            try:
                flock(file, fcntl.LOCK_EX)
                if os.fstat(file.fileno()).st_ino == os.stat(name).st_ino:  # not one that was just removed
                    os.register_at_fork(after_in_child=file.close)  # else DataLoader workers hold it, too
                    held.callback(name.unlink, missing_ok=True)
                    for left in path.parent.glob(f".{path.stem}.*"):  # half a file, of a killed process
                        left.unlink(missing_ok=True)
                    return held.pop_all()
            except FileNotFoundError:
                pass
            except BlockingIOError:
                if is_running(path):
                    return None
                time.sleep(0.01)
            except UserError:
                if is_new:
                    name.unlink(missing_ok=True)
                raise
    return None


def flock(file, kind: int):
    """Lock an open file, or raise BlockingIOError. Raises UserError on a file system without locks."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        problem = f"this file system has no locks ({error.strerror}): choose --out on another"
        raise UserError(f"{file.name}: {problem}") from None


def is_running(path: Path) -> bool:
    """True if some process is making the run now."""
    try:
        with open(path.with_suffix(".lock")) as file:
            flock(file, fcntl.LOCK_SH)
        return False
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True


# ---------------------------------------------------------------------------------------- plan and status


def describe(script, point: Point, args, images: int, classes: int) -> str:
    """A line that says what is trained: net, images, batch, budget, rates, seeds, precision and device."""
    key = point.rates[0], point.seeds[0]
    with torch.device("meta"):
        net = script.make_net(point.config(key), classes)
    weights, epochs = sum(p.numel() for p in net.parameters()), plural(point.shared["epochs"], "epoch")
    rates, many = list(map(power, point.rates)), len(point.rates) > 1
    rates = f"{len(rates)} rates {rates[0]} to {rates[-1]}" if many else f"rate {rates[0]}"
    seeds = f"seeds 0 to {point.seeds[-1]}" if len(point.seeds) > 1 else f"seed {point.seeds[0]}"
    rates += "" if args.lr else " (the default)"
    text = f"{point.prefix} {point.shared['init']}, {weights:,} parameters, {images:,} images of {classes} "
    text += f"classes: B {point.shared['bs']}, {epochs}, {rates}, {seeds}, {point.shared['precision']}"
    return f"{text} on {find_device(args.device)}"


def print_plan(script, point: Point, args):
    """Print what `train_point` would do: the net, the updates, the division of a batch, the runs."""
    images, classes = script.count_images(args)
    plan, config = point.plan(), point.config((point.rates[0], point.seeds[0]))
    bs, epochs, world = config["bs"], config["epochs"], rank_variable("WORLD_SIZE", 1)
    if bs > images:
        raise UserError(f"--bs {bs} is more than the {images} training images")
    budget, steps = epochs * images, epoch_end(epochs - 1, images, bs)
    last = learning_rate(config["lr"], (steps - 1) * bs, budget, script.HALVINGS)
    division = divide_batch(bs, config["ghost"], world, args.micro, find_device(args.device).type)
    say(describe(script, point, args, images, classes))
    constant, halved = -(-budget // (2 * bs)), math.log2(config["lr"] / last)
    halved = plural(round(halved), "time")
    say(f"{plural(steps, 'update')}; after {constant:,} the rate is halved {halved}")
    each = f"{division.per_rank} images of a batch in passes of {division.micro}"
    text = f"{plural(world, 'rank')}, each {each}"
    text += f", ghost batches of {division.ghost}" if division.ghost else ""
    say(text + (f" over {division.ranks_per_ghost} ranks" if division.ranks_per_ghost > 1 else ""))
    say(f"{plural(plan.planned, 'run')} planned, {len(point.found)} of them done:")
    for key in plan.asked:
        say(f"{'done   ' if key in point.found else 'missing'} {point.path(key)}")


# ----------------------------------------------------------------------------------------------- display


class Display:
    """A progress bar on a terminal; elsewhere a line per epoch, at most one every ten seconds."""

    def __init__(self, point: Point):
        self.point, self.count, self.said = point, "", -math.inf
        hidden = not sys.stderr.isatty() or rank_variable("RANK") > 0
        look = "{desc}{bar} {rate_fmt}, {remaining} left"
        options = {"unit": " images", "unit_scale": True, "smoothing": 0.1, "bar_format": look}
        self.bar = tqdm(desc="starting ", total=0, disable=hidden, leave=False, dynamic_ncols=True, **options)

    def expect(self, runs: list):
        """Count the images to go, when a run among `runs`, those under way, has started or ended."""
        if self.bar.disable or not runs:
            return
        each = epoch_end(runs[0].config["epochs"] - 1, runs[0].data.train_images, runs[0].bs) * runs[0].bs
        most, done = self.point.plan().planned, len(self.point.found)
        self.bar.total = self.bar.n + each * (most - done) - sum(run.updates * run.bs for run in runs)
        self.count = f"[{done}/{most}] " if most > 1 else ""
        self.show(runs[-1])

    def show(self, run, refresh: bool = True):
        """Show where a run is, with the loss of its last epoch, or of the first one so far."""
        text = f"{self.count}epoch {min(run.epoch + 1, run.config['epochs'])}/{run.config['epochs']} "
        loss = run.history[-1]["train_loss"] if run.history else run.loss
        text += f"loss {loss:.3f} " if loss is not None else ""
        tested = [entry["test_accuracy"] for entry in run.history if "test_accuracy" in entry]
        self.bar.set_description_str(text + (f"test {tested[-1]:.1%} " if tested else ""), refresh)

    def burst(self, run, images: int):
        """Count the images of a burst of updates."""
        if not self.bar.disable and not run.history:
            self.show(run, refresh=False)
        self.bar.update(images)

    def epoch(self, title: str, run):
        """Show the last entry of a run's history."""
        entry, epochs = run.history[-1], run.config["epochs"]
        if not self.bar.disable:
            self.show(run)
        elif entry["epoch"] == epochs or time.monotonic() - self.said > 10:
            self.said = time.monotonic()
            text = f"{title}: epoch {entry['epoch']}/{epochs}, loss {entry['train_loss']:.3f}"
            text += f", test {entry['test_accuracy']:.1%}" if "test_accuracy" in entry else ""
            say(text + (f", {entry['data_wait']:.0%} waiting for data" if "data_wait" in entry else ""))
