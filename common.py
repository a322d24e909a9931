"""Residual networks with and without batch normalization: the methods, the nets and the training engine.

The paper's idea, ZeroInit, is one scalar at the end of each residual branch, which starts at zero:

    self.scale = nn.Parameter(torch.zeros(()))        # ZeroInit, component 1
    ...
    return skip + self.scale * branch                 # every block is the identity at initialization

plus biases on the convolutions and the classifier (component 2) and dropout before the classifier (component 3).
With it, Wide-ResNets of 1000 layers train without any normalization (section 4 of the paper).

In this file, in order:
    methods        the rows of the paper's tables, one `Method` each
    layers         ghost batch norm, scalar bias, dropout
    nets           the pre-activation block and `WideResNet`
    optimization   initial weights, learning rate schedule, SGD with L2, precision
    engine         `Run`: one training run; `train`: from a configuration to its record
    records        one JSON file per run, the only truth about what was run
"""

import contextlib
import errno
import fcntl
import json
import math
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------------------ methods


@dataclass(frozen=True)
class Method:
    """What one row of the paper's tables adds to the plain residual network."""

    norm: bool = False  # ghost batch norm before each activation (sections 2 and 3)
    scalar: bool = False  # ZeroInit 1: a scalar multiplier ends each residual branch and starts at zero
    biases: bool = False  # ZeroInit 2: a bias on each convolution and on the classifier
    dropout: bool = False  # ZeroInit 3: dropout on the classifier's input
    fixup: bool = False  # Fixup's four rules (Zhang et al., 2019)

    @property
    def classifier_bias(self) -> bool:
        """The classifier has a bias except where biases are what a row of Table 1 leaves out."""
        return self.norm or self.biases or self.fixup


METHODS = {
    "bn": Method(norm=True),
    "none": Method(),
    "biases": Method(biases=True),
    "dropout": Method(dropout=True),
    "scalar": Method(scalar=True),
    "biases+dropout": Method(biases=True, dropout=True),
    "zeroinit": Method(scalar=True, biases=True, dropout=True),
    "zeroinit-nodropout": Method(scalar=True, biases=True),
    "fixup": Method(fixup=True),
}

# ------------------------------------------------------------------------------------------------------------- layers


class GhostBatchNorm2d(nn.BatchNorm2d):
    """Batch norm of (B, C, H, W) over each consecutive `ghost` images (Hoffer et al., 2017; section 3 of the paper).

    `ghost=0` takes the whole batch, and so does a batch smaller than `ghost`; the last ghost batch may be short. The
    running statistics, which evaluation uses, are what sequential passes over the ghost batches leave.
    """

    def __init__(self, channels: int, ghost: int = 0):
        super().__init__(channels)
        self.ghost = ghost

    def forward(self, x):
        if not self.training:
            return self.normalize(x)
        return (
            torch.cat([self.normalize(part) for part in x.split(self.ghost)])
            if 0 < self.ghost < len(x)
            else self.normalize(x)
        )

    def normalize(self, x):
        """Plain batch norm; the batch's own statistics in training, which also move the running ones."""
        stats = self.running_mean, self.running_var
        return F.batch_norm(x, *stats, self.weight, self.bias, self.training, self.momentum, self.eps)


class ScalarBias(nn.Module):
    """x + b with one learned scalar b for all channels, which starts at zero (Fixup's rule 4)."""

    def __init__(self):
        super().__init__()
        # 0-dim, so that a bf16 x stays bf16 under autocast: a (1,) parameter would promote it to float32.
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return x + self.bias


def dropout(x, probability: float, noise=None):
    """Zero each entry of x with the given probability and rescale the rest.

    `noise`, uniform in [0, 1) and of x's shape, decides which: a run passes its own; without it the global generator
    is used.
    """
    noise = torch.rand_like(x) if noise is None else noise
    return x * ((noise >= probability) / (1 - probability)).to(x.dtype)


# --------------------------------------------------------------------------------------------------------------- nets


def conv(method: Method, inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    """A padded convolution, with a bias where the method has them."""
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=method.biases)


def before_activation(method: Method, channels: int, ghost: int) -> nn.Module:
    """What stands between a convolution and its ReLU: batch norm, Fixup's scalar bias, or nothing."""
    if method.norm:
        return GhostBatchNorm2d(channels, ghost)
    return ScalarBias() if method.fixup else nn.Identity()


def before_weights(method: Method) -> nn.Module:
    """What stands before a convolution or the classifier: Fixup's scalar bias, or nothing."""
    return ScalarBias() if method.fixup else nn.Identity()


def branch_scale(method: Method) -> nn.Parameter | None:
    """The scalar at the end of a residual branch: zero for ZeroInit, one for Fixup, none elsewhere."""
    if method.scalar:
        return nn.Parameter(torch.zeros(()))
    return nn.Parameter(torch.ones(())) if method.fixup else None


class PreActivationBlock(nn.Module):
    """The residual block of Wide-ResNet (Zagoruyko & Komodakis, 2016): (B, inputs, H, W) to (B, outputs, H', W').

    A block that changes the shape, and the first one of each group, has a 1x1 projection on its skip path, which
    shares the first activation with the branch; every other skip path is the identity.
    """

    def __init__(self, method: Method, inputs: int, outputs: int, stride: int, ghost: int):
        super().__init__()
        self.norm1 = before_activation(method, inputs, ghost)
        self.bias1 = before_weights(method)
        self.conv1 = conv(method, inputs, outputs, 3, stride)
        self.norm2 = before_activation(method, outputs, ghost)
        self.bias2 = before_weights(method)
        self.conv2 = conv(method, outputs, outputs, 3)
        self.scale = branch_scale(method)
        changes = inputs != outputs or stride != 1
        self.projection = conv(method, inputs, outputs, 1, stride) if changes else None

    def forward(self, x):
        h = self.bias1(F.relu(self.norm1(x)))
        skip = x if self.projection is None else self.projection(h)
        branch = self.conv2(self.bias2(F.relu(self.norm2(self.conv1(h)))))
        return skip + branch if self.scale is None else skip + self.scale * branch

    def branch_convs(self) -> list[nn.Conv2d]:
        """The convolutions of the residual branch, in order."""
        return [self.conv1, self.conv2]


class WideResNet(nn.Module):
    """Wide-ResNet depth-width for (B, 3, H, W) images, logits (B, num_classes); depth must be 6n+4.

    `init` is a key of `METHODS`; `dropout` overrides the method's drop probability (0.6, section 4 of the paper), and
    `base_init` is the distribution of the initial weights (see `initialize`). Raises ValueError for another depth.
    """

    def __init__(self, depth, width, init="zeroinit", num_classes=10, ghost=64, dropout=None, base_init="lecun"):
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth should be 6n+4 (10, 16, 22, ..., 100, ..., 1000), not {depth}")
        method = METHODS[init]
        self.drop_probability = (0.6 if method.dropout else 0.0) if dropout is None else dropout
        self.stem = conv(method, 3, 16, 3)
        blocks, channels = [], 16
        for group, outputs in enumerate((16 * width, 32 * width, 64 * width)):
            for i in range((depth - 4) // 6):
                stride = 2 if group > 0 and i == 0 else 1
                blocks.append(PreActivationBlock(method, channels, outputs, stride, ghost))
                channels = outputs
        self.blocks = nn.ModuleList(blocks)
        self.norm = before_activation(method, channels, ghost)
        self.bias = before_weights(method)
        self.classifier = nn.Linear(channels, num_classes, bias=method.classifier_bias)
        initialize(self, method, base_init)

    def forward(self, x, noise=None):
        """Logits of the images x; `noise` (B, features), uniform in [0, 1), decides the dropout of a training step."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        x = F.relu(self.norm(x)).mean((2, 3))
        if self.training and self.drop_probability > 0:
            x = dropout(x, self.drop_probability, noise)
        return self.classifier(self.bias(x))


# ------------------------------------------------------------------------------------------------------- optimization


def draw_weights(weight, base_init: str):
    """Fill a convolution's or the classifier's weight from the base distribution.

    The paper does not name it. "lecun", a normal of standard deviation 1/sqrt(fan_in) truncated at two standard
    deviations, is the default of the framework in which the authors' group publishes, and the plain network trains at
    the paper's learning rates with it. "he-in" and "he-out" are normals of sqrt(2/fan); no ReLU follows the classifier,
    so that one keeps 1/sqrt(fan_in).
    """
    fan_in, fan_out = weight[0].numel(), weight.numel() // weight.shape[1]
    if base_init == "lecun" or weight.ndim == 2:
        std = fan_in**-0.5
        nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
    else:
        nn.init.normal_(weight, std=math.sqrt(2 / (fan_in if base_init == "he-in" else fan_out)))


def initialize(net: nn.Module, method: Method, base_init: str):
    """Draw every weight, zero every bias; then, for Fixup, its rules 1 and 2 (section 2 of the paper)."""
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            draw_weights(module.weight, "he-out" if method.fixup else base_init)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    if method.fixup:
        nn.init.zeros_(net.classifier.weight)
        for block in net.blocks:
            *first, last = block.branch_convs()
            nn.init.zeros_(last.weight)
            for module in first:  # L^(-1/(2m-2)), m convolutions in each of L branches
                with torch.no_grad():
                    module.weight.mul_(len(net.blocks) ** (-1 / (2 * len(first))))


def learning_rate(base: float, seen: int, budget: int, drops: int = 10) -> float:
    """The rate after `seen` of `budget` images: constant for the first half, then halved `drops` times.

    The first halving comes half-way, the others follow evenly; 10 drops are the paper's schedule for CIFAR-10
    (section 3: epochs 100, 110, ..., 190 of 200) and 9 the one for ImageNet (section 5: 45, 50, ..., 85 of 90).
    """
    past_half = 2 * seen - budget
    return base * 0.5 ** (1 + past_half * drops // budget if past_half >= 0 else 0)


def make_optimizer(net: nn.Module, wd: float, l2_all: bool, scalar_lr: float, momentum: float) -> torch.optim.SGD:
    """SGD with heavy ball; L2 on convolution and linear weights only, or on everything with `l2_all`.

    Each group's "lr" is a tensor on the net's device, to be filled with the scheduled rate times its "multiplier":
    `scalar_lr` for the 0-dim parameters, one for the rest.
    """
    device = next(net.parameters()).device

    def group(members, decay, multiplier=1.0):
        rate = torch.zeros((), device=device)
        return {"params": members, "lr": rate, "weight_decay": decay, "multiplier": multiplier}

    parameters = list(net.parameters())
    rest_decay = wd if l2_all else 0.0
    groups = [
        group([p for p in parameters if p.ndim > 1], wd),
        group([p for p in parameters if p.ndim == 1], rest_decay),
        group([p for p in parameters if p.ndim == 0], rest_decay, scalar_lr),
    ]
    return torch.optim.SGD([g for g in groups if g["params"]], momentum=momentum, fused=True)


@torch.no_grad()
def l2_part(optimizer: torch.optim.SGD) -> float:
    """The L2 term of the objective, lambda/2 times the sum of squares of the decayed parameters."""
    groups = optimizer.param_groups
    return sum(0.5 * g["weight_decay"] * p.double().square().sum() for g in groups for p in g["params"]).item()


def pick_precision(amp: str, device: torch.device) -> str:
    """Resolve --amp: "auto" is bf16 where the device has it natively, fp16 on older GPUs, else float32 ("off")."""
    if amp != "auto":
        return amp
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    cpuinfo = Path("/proc/cpuinfo")
    return "bf16" if device.type == "cpu" and cpuinfo.exists() and "amx_bf16" in cpuinfo.read_text() else "off"


# ------------------------------------------------------------------------------------------------------------- engine


class UserError(Exception):
    """Something only the user can mend: shown as one line, exit code 2."""


def pick_device(name: str | None) -> torch.device:
    """The named device, or a GPU if there is one. Raises UserError where the name is of no device here."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("only cpu and cuda are supported")
        torch.zeros(1, device=device)
        return device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from None


def stream_seed(seed: int, purpose: str, epoch: int = 0) -> int:
    """An independent seed for each use that a run makes of random numbers ("weights", "data", "dropout")."""
    state = np.random.SeedSequence([seed, epoch, *purpose.encode()]).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))


def epoch_end(epoch: int, images: int, bs: int) -> int:
    """How many updates lie before the end of a 0-based epoch.

    The images are one endless reshuffled stream, cut into batches of exactly `bs`; a batch that crosses the end of an
    epoch belongs to that epoch, so nothing is ever dropped.
    """
    return -(-(epoch + 1) * images // bs)


class Run:
    """One training run: it owns its net, optimizer and random numbers, so its result depends on its configuration only.

    `data` offers `train_images` and `test_images` (how many), `draw(seed, epoch)` (a row of integers per training
    image, in that epoch's order: which image, and how it is augmented), and `train_batch(rows)` and `test_batches()`,
    which give (images, labels): (B, 3, H, W) float and (B,) int64 on the device.
    """

    def __init__(self, config, net, data, device, precision="off", micro=0, drops=10):
        if config["bs"] > data.train_images:
            raise UserError(f"--bs {config['bs']} is more than the {data.train_images} training images")
        self.config, self.data, self.device, self.drops = config, data, device, drops
        self.bs = config["bs"]
        # A CPU's caches want passes of one ghost batch (any multiple of it gives the same update); a GPU wants all.
        self.micro = micro or (min(self.bs, config["ghost"] or 64) if device.type == "cpu" else self.bs)
        self.net = net.to(device, memory_format=torch.channels_last)
        scalar_lr, momentum = config["scalar_lr"], config["momentum"]
        self.optimizer = make_optimizer(self.net, config["wd"], config["l2_all"], scalar_lr, momentum)
        self.rate = None
        self.generator = torch.Generator(device).manual_seed(stream_seed(config["seed"], "dropout"))
        self.autocast = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[precision]
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.totals = torch.zeros(2, device=device, dtype=torch.float64)  # summed loss, right answers
        self.mirror = self.totals if device.type == "cpu" else torch.zeros(2, dtype=torch.float64).pin_memory()

    def forward(self, images, noise=None):
        """Logits, in float32 or better also under autocast."""
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            logits = self.net(images, noise)
        return logits.float() if self.autocast else logits

    def batches(self, epoch: int):
        """The rows of each update of a 0-based epoch: batches of exactly `bs`, the last one reaching into the next."""
        images, bs = self.data.train_images, self.bs
        start, stop = epoch_end(epoch - 1, images, bs) * bs, epoch_end(epoch, images, bs) * bs
        rows = self.data.draw(self.config["seed"], epoch)
        if stop > (epoch + 1) * images:
            rows = torch.cat([rows, self.data.draw(self.config["seed"], epoch + 1)])
        return rows[start - epoch * images : stop - epoch * images].split(bs)

    def set_learning_rate(self, step: int) -> float:
        """Give every parameter group its rate for a 0-based update; returns the scheduled rate."""
        budget = self.config["epochs"] * self.data.train_images
        rate = learning_rate(self.config["lr"], step * self.bs, budget, self.drops)
        if rate != self.rate:
            self.rate = rate
            for group in self.optimizer.param_groups:
                group["lr"].fill_(rate * group["multiplier"])
        return rate

    def step(self, rows):
        """One update on the `bs` images that `rows` describe, `micro` of them per pass; never waits for the device."""
        self.optimizer.zero_grad(set_to_none=True)
        noise = [None] * self.bs
        if self.net.drop_probability > 0:
            shape = self.bs, self.net.classifier.in_features
            noise = torch.rand(shape, generator=self.generator, device=self.device).split(self.micro)
        for part, part_noise in zip(rows.split(self.micro), noise, strict=False):
            images, labels = self.data.train_batch(part)
            logits = self.forward(images, part_noise)
            loss = F.cross_entropy(logits, labels, reduction="sum")
            self.scaler.scale(loss / self.bs).backward()
            right = (logits.detach().argmax(1) == labels).sum()
            self.totals += torch.stack([loss.detach(), right])
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def diverged(self) -> bool:
        """Whether the loss has become non-finite, as far as the host knows without waiting for the device."""
        if self.mirror is not self.totals:
            self.mirror.copy_(self.totals, non_blocking=True)
        return not math.isfinite(self.mirror.numpy()[0])

    @torch.no_grad()
    def test_accuracy(self) -> float:
        """The share of test images classified rightly, with running statistics and without dropout."""
        self.net.eval()
        right = torch.zeros((), dtype=torch.int64, device=self.device)
        for images, labels in self.data.test_batches():
            right += (self.forward(images).argmax(1) == labels).sum()
        self.net.train()
        return right.item() / self.data.test_images


def train(run: Run, name: str, eval_every: int) -> dict:
    """Train a run for its whole budget; returns its record without "data" and "environment".

    The test accuracy is measured every `eval_every` epochs and after the last one. A non-finite loss ends the run at
    once, with the status "diverged".
    """
    epochs, images, bs = run.config["epochs"], run.data.train_images, run.bs
    history, busy, steps = [], 0.0, epoch_end(epochs - 1, images, bs)
    progress = Progress(name, epochs, steps * bs)
    for epoch in range(epochs):
        began, first = time.perf_counter(), epoch_end(epoch - 1, images, bs)
        run.totals.zero_()
        rate = run.set_learning_rate(first)
        batches = run.batches(epoch)
        for step, rows in enumerate(batches, first):
            run.set_learning_rate(step)
            run.step(rows)
            progress.update(bs)
            if run.diverged():
                progress.close(f"diverged at update {step + 1}")
                return outcome(run, "diverged", history, diverged_at_step=step + 1)
        loss, right = (run.totals / (len(batches) * bs)).tolist()
        busy += time.perf_counter() - began
        entry = {"epoch": epoch + 1, "lr": rate, "train_loss": loss, "l2": l2_part(run.optimizer)}
        if not math.isfinite(loss + entry["l2"]):  # the epoch's last update
            progress.close(f"diverged at update {step + 1}")
            return outcome(run, "diverged", history, diverged_at_step=step + 1)
        entry["train_accuracy"] = right
        if (epoch + 1) % eval_every == 0 or epoch + 1 == epochs:
            entry["test_accuracy"] = run.test_accuracy()
        history.append(entry | {"seconds": time.perf_counter() - began})
        progress.epoch(entry)
    progress.close()
    return outcome(run, "done", history, images_per_second=steps * bs / busy)


def outcome(run: Run, status: str, history: list, **extra) -> dict:
    """The part of a record that training decides; a diverged run has no final numbers."""
    final = dict.fromkeys(("test_accuracy", "train_loss", "train_objective"))
    if status == "done":
        last = history[-1]
        objective = last["train_loss"] + last["l2"]
        final = {"test_accuracy": last["test_accuracy"], "train_loss": last["train_loss"], "train_objective": objective}
    return {"config": run.config, "status": status, "history": history, "final": final} | extra


class Progress:
    """A progress bar on a terminal; elsewhere a line per epoch, at most one every ten seconds."""

    def __init__(self, name: str, epochs: int, images: int):
        self.name, self.epochs, self.said = name, epochs, -math.inf
        terminal = sys.stderr.isatty()
        self.bar = tqdm(total=images, desc=name, unit=" images", unit_scale=True, smoothing=0.1, disable=not terminal)

    def update(self, images: int):
        self.bar.update(images)

    def epoch(self, entry: dict):
        """Show an epoch's history entry."""
        text = f"loss {entry['train_loss']:.3f}, train {entry['train_accuracy']:.1%}"
        if "test_accuracy" in entry:
            text += f", test {entry['test_accuracy']:.1%}"
        last = entry["epoch"] == self.epochs
        if not self.bar.disable:
            self.bar.set_postfix_str(text)
        elif last or time.monotonic() - self.said > 10:
            self.said = time.monotonic()
            print(f"{self.name}: epoch {entry['epoch']}/{self.epochs}, {text}", flush=True)

    def close(self, text: str = ""):
        self.bar.close()
        if text:
            print(f"{self.name}: {text}", flush=True)


def train_missing(runs: dict, build, load_data, device, amp="auto", micro=0, eval_every=0):
    """Make every run that has no record yet: `runs` maps the path of each record to its configuration.

    `build(config)` makes a net and `load_data()` the data, which is loaded only if a run is missing. Raises UserError
    where a record holds another configuration or other images than it would be given now.
    """
    missing = {path: config for path, config in runs.items() if not is_done(path, config)}
    print(f"{len(runs)} runs, {len(runs) - len(missing)} done", flush=True)
    if not missing:
        return
    for path in missing:
        check_writable(path.parent)
    data = load_data()
    for path in runs.keys() - missing.keys():
        known = read_record(path)["data"]["fingerprint"]
        if known != data.fingerprint:
            raise UserError(
                f"{path} was made with other images ({known}, now {data.fingerprint}): choose another --out"
            )
    precision = pick_precision(amp, device)
    keys = ("name", "fingerprint", "train_images", "test_images")
    about = {"data": {key: getattr(data, key) for key in keys}, "environment": environment(device, precision)}
    for path, config in missing.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream_seed(config["seed"], "weights"))
            net = build(config)
        run = Run(config, net, data, device, precision, micro)
        record = train(run, path.stem, eval_every or math.ceil(config["epochs"] / 20))
        write_record(path, record | about)


def print_plan(runs: dict, build, images: int):
    """Print what `train_missing` would do on so many training images: the net, the updates, the schedule, the runs."""
    config = next(iter(runs.values()))
    bs, epochs = config["bs"], config["epochs"]
    with torch.device("meta"):
        net = build(config)
    weights = sum(p.numel() for p in net.parameters())
    budget, steps = epochs * images, epoch_end(epochs - 1, images, bs)
    halvings = math.log2(config["lr"] / learning_rate(config["lr"], (steps - 1) * bs, budget))
    print(f"{type(net).__name__} {config['init']}: {weights:,} trainable parameters")
    print(f"{images:,} images, batches of {bs}: {steps:,} updates in {epochs} epochs")
    print(f"learning rate constant for {-(-budget // (2 * bs)):,} updates, then halved {halvings:.0f} times")
    for path, config in runs.items():
        print("done   " if is_done(path, config) else "missing", path)


# ------------------------------------------------------------------------------------------------------------ records


def power(value: float) -> str:
    """A learning rate as the paper writes it: 2^-2 for 0.25; other numbers as they are."""
    mantissa, exponent = math.frexp(value)
    return f"2^{exponent - 1}" if mantissa == 0.5 else f"{value:g}"


def run_name(model: str, config: dict, defaults: dict) -> str:
    """A run's name, from everything that decides its result; options that have their default value are left out."""
    name = f"{model}_{config['init']}_bs{config['bs']}_lr{power(config['lr'])}_ep{config['epochs']}"
    for key, default in defaults.items():
        if config[key] != default:
            value = config[key]
            name += f"_{key.replace('_', '')}" + (
                "" if value is True else f"{value:g}" if isinstance(value, float) else str(value)
            )
    return f"{name}_s{config['seed']:02d}"


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
    if record is None:
        return False
    theirs = record["config"]
    for key in config.keys() | theirs.keys():
        if theirs.get(key) != config.get(key):
            raise UserError(f"{path} holds another run: its {key} is {theirs.get(key)}, not {config.get(key)}")
    return True


def is_running(path: Path) -> bool:
    """Whether another process holds the lock (fcntl) of the run whose record will be `path`."""
    try:
        with open(path.with_suffix(".lock"), "rb") as file:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except (BlockingIOError, PermissionError):  # both mean "locked", depending on the system
        return True
    return False


def print_status(lines, configurations):
    """For each command line: done, diverged, running and all runs, the grid and the line itself, separated by tabs.

    `configurations(argv)` gives the runs of what follows the script's name in a line; a grid is the runs that differ
    only in learning rate and seed. Diverged runs are among the done.
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
def atomic_write(path: Path):
    """A binary file that takes the name `path` only once it is complete and on the disk."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def check_writable(folder: Path):
    """Make the folder if need be. Raises UserError if no file can be written in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"--out: cannot write to {folder}: {error.strerror}") from None


def environment(device: torch.device, precision: str) -> dict:
    """What a run was made with, for its record."""
    here = Path(__file__).resolve().parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    return {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "precision": precision,
        "commit": commit,
    }


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
        print(
            f"error: {error.filename or 'the disk'}: {error.strerror}; free some space and run again", file=sys.stderr
        )
        return 1
    except KeyboardInterrupt:
        print("interrupted: the same command makes the runs that are missing", file=sys.stderr)
        return 75
    return 0
