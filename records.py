"""What runs leave on the disk: a record each, the only truth about what was run; until then a checkpoint and a lock.

    wrn16-4_zeroinit_bs64_lr2^-2_ep200_s07.json    the record: configuration, history, result; strict JSON
    ....ckpt, ....ckpt.old                         the state of an unfinished run, and the one before it
    ....lock                                       held by the process that is making the run

Every file is complete or not there at all, whenever the process is killed.
"""

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import math
import os
import pickle
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path


class UserError(Exception):
    """Something only the user can mend: shown as one line, exit code 2."""


class Interrupted(Exception):
    """A signal asked for the end, and what was trained so far is saved: exit code 75."""


def exit_code(main) -> int:
    """Call main() and turn what ends it into an exit code: 0 done, 1 failed, 2 bad usage or data, 75 interrupted."""
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
        return 75
    return 0


def say(text: str):
    """Print a line, on the first of torchrun's ranks only."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(text, flush=True)


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


def environment() -> dict:
    """The commit of this code, with "-dirty" where it was changed, for a record."""
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

    `configurations(argv)` gives a line's runs; a grid is the runs that differ only in learning rate and seed.
    """
    for line in filter(None, map(str.strip, lines)):
        runs = configurations(shlex.split(line, comments=True)[2:])
        records = [read_record(path) for path, config in runs.items() if is_done(path, config)]
        diverged = sum(record["status"] == "diverged" for record in records)
        running = sum(is_running(path) for path in runs)
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
    import torch

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
    import torch

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
