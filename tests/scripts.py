"""How tests run the scripts: in this process, in others that may be stopped and killed, on a terminal."""

import atexit
import codecs
import contextlib
import fcntl
import importlib
import json
import multiprocessing
import os
import pty
import select
import struct
import sys
import termios
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import data
import records
import runner

FORKS = multiprocessing.get_context("forkserver")  # its server imports torch once, and trains nothing itself
FORKS.set_forkserver_preload(["wrn_cifar", "resnet_imagenet", "torch._dynamo"])  # which optimizers import
SIZES = 96, 100  # training and test images of `shapes` in tests


def run(script, flags: str, *more) -> int:
    """The exit code of a script, run in this process."""
    try:
        return runner.exit_code(lambda: runner.main(script, [*flags.split(), *map(str, more)]))
    except SystemExit as end:
        return end.code


def start(script, flags: str, *more, log: Path, **environment) -> multiprocessing.Process:
    """A process that runs a script, its output at the end of the file `log`."""
    words = flags, *map(str, more)
    process = FORKS.Process(target=child, args=(script.__name__, words, str(log), environment))
    process.start()
    atexit.register(process.kill)
    return process


def child(script: str, words, log: str, environment: dict):
    """What a process of `start` does, in a session of its own, whose terminal is `log` if that is one."""
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    if os.isatty(file):
        fcntl.ioctl(file, termios.TIOCSCTTY, 0)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    os.environ |= environment
    torch.set_num_threads(1)
    data.SHAPES, data.SHAPES_TEST = SIZES
    code = run(importlib.import_module(script), *words)
    threads = [(task / "comm").read_text() for task in Path("/proc/self/task").iterdir()]
    with contextlib.suppress(OSError):
        os.write(1, f"ends with {code}, {sum('gloo' in name for name in threads)} gloo threads\n".encode())
    sys.exit(code)


def end(process: multiprocessing.Process, seconds: float = 120) -> int:
    """Wait for a process; its exit code, or the negative number of the signal that killed it."""
    process.join(seconds)
    assert process.exitcode is not None
    return process.exitcode


class Terminal:
    """A terminal of so many columns; `path` is its device, `seen` all that was written to it."""

    def __init__(self, columns: int = 80):
        self.master, self.slave = pty.openpty()
        self.path, self.seen = os.ttyname(self.slave), ""
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def read_until(self, condition, seconds: float = 60):
        """Read what is written until condition() holds."""
        until = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < until, self.seen
            while select.select([self.master], [], [], 0.05)[0]:
                self.seen += self.decoder.decode(os.read(self.master, 4096))

    def hang_up(self):
        os.close(self.slave)
        os.close(self.master)

    def frames(self) -> list[str]:
        """All that was shown, each time that a line was written or written again."""
        return [part for line in self.seen.split("\n") for part in line.split("\r") if part.strip()]

    def screen(self) -> list[str]:
        """What a person sees at the end."""
        lines = []
        for line in self.seen.split("\n"):
            shown = ""
            for part in line.split("\r"):  # each begins again at the left
                shown = part + shown[len(part) :]
            lines.append(shown.rstrip())
        return lines


def all_records(out) -> dict[str, dict]:
    """The valid records in a results folder, by name."""
    found, problems = records.read_all(Path(out))
    assert not problems
    return {Path(record["file"]).stem: record for record in found}


def computed(record: dict) -> str:
    """What a run computed, without its times, as JSON: equal texts are bit-equal numbers."""
    times = "seconds", "data_wait"
    history = [{k: v for k, v in entry.items() if k not in times} for entry in record["history"]]
    return json.dumps([record["status"], record["final"], history])


def results(out) -> dict[str, str]:
    """What all runs in a results folder computed, by name."""
    return {name: computed(record) for name, record in all_records(out).items()}


def picture(seed: int, height: int = 40, width: int = 50) -> np.ndarray:
    """Noise without high frequencies: uint8 (height, width, 3)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def make_folder(folder: Path, test="test", images=3, test_images=2, classes=2, size=(40, 50)) -> Path:
    """Pictures folder/{train,TEST}/CLASS/NUMBER.png of a size (height, width)."""
    for part, count in (("train", images), (test, test_images)):
        for label in range(classes):
            (folder / part / f"n{label:02}").mkdir(parents=True)
            for i in range(count):
                pixels = picture(100 * label + 10 * count + i, *size)
                Image.fromarray(pixels).save(folder / part / f"n{label:02}" / f"{i}.png")
    return folder
