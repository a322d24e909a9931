"""Residual networks with and without batch normalization: the methods, the nets and one training run.

The paper's idea, ZeroInit, is one scalar at the end of each residual branch, which starts at zero:

    self.scale = nn.Parameter(torch.zeros(()))        # ZeroInit, component 1
    ...
    return skip + self.scale * branch                 # at initialization, only the skip path

plus biases on the convolutions and the classifier (component 2) and dropout before the classifier
(component 3). With it, Wide-ResNets of 1000 layers train without any normalization (section 4 of the paper).

In this file, in order:
    methods        the rows of the paper's tables, one `Method` each
    layers         ghost batch norm, scalar bias, dropout
    nets           the residual blocks, `WideResNet` and `ResNet50`
    optimization   initial weights, learning rate schedule, SGD with L2, precision
    one run        `Run`: a training run, its update and its state; `train`: the loop over epochs
"""

import contextlib
import functools
import itertools
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._triton import has_triton

from ranks import BatchNormOverRanks, Division, SumOverRanks, combine_ranks, divide_batch, rank_group, ranks
from records import UserError

# ------------------------------------------------------------------------------------------------ methods


@dataclass(frozen=True)
class Method:
    """What one row of the paper's tables adds to the plain residual network."""

    norm: str = ""  # "batch": ghost batch norm before each activation (sections 2 and 3)
    scalar: bool = False  # ZeroInit 1: a scalar multiplier ends each residual branch and starts at `alpha`
    biases: bool = False  # ZeroInit 2: a bias on each convolution and on the classifier
    dropout: bool = False  # ZeroInit 3: dropout on the classifier's input
    last_bias: bool = False  # ResNet-V1 only: a scalar bias before each block's last ReLU (section 5)
    fixup: bool = False  # Fixup's four rules (Zhang et al., 2019)
    alpha: float = 0.0  # the paper's zero; other values are for studies of it

    @property
    def classifier_bias(self) -> bool:
        """The classifier has a bias except where biases are what a row of Table 1 leaves out."""
        return bool(self.norm) or self.biases or self.fixup


METHODS = {
    "bn": Method(norm="batch"),
    "none": Method(),
    "biases": Method(biases=True),
    "dropout": Method(dropout=True),
    "scalar": Method(scalar=True),
    "biases+dropout": Method(biases=True, dropout=True),
    "zeroinit": Method(scalar=True, biases=True, dropout=True),
    "zeroinit-nodropout": Method(scalar=True, biases=True),
    "zeroinit+bias": Method(scalar=True, biases=True, dropout=True, last_bias=True),
    "fixup": Method(fixup=True),
}

# ------------------------------------------------------------------------------------------------- layers


class GhostBatchNorm2d(nn.BatchNorm2d):
    """Batch norm of (B, C, H, W) over each consecutive `ghost` images (section 3; Hoffer et al., 2017).

    `ghost=0` takes the whole batch, and so does a batch smaller than `ghost`; a larger one should be a
    multiple of it. The running statistics, which evaluation uses, are what sequential passes over the ghost
    batches leave. With a `group` of ranks, the inputs of these ranks together are one ghost batch.
    """

    def __init__(self, channels: int, ghost: int = 0):
        super().__init__(channels)
        self.ghost, self.group = ghost, None

    def forward(self, x):
        if self.training and self.group:
            return self.normalize_over_ranks(x) if x.is_cuda else self.spell_out(x)
        if not self.training or self.ghost == 0 or len(x) <= self.ghost:
            return self.normalize(x)
        if torch.compiler.is_compiling():
            return self.spell_out(x)
        if x.is_cuda and has_triton():
            return fused()(self, x)
        return torch.cat([self.normalize(part) for part in x.split(self.ghost)])

    def normalize(self, x):
        """Plain batch norm; in training with the batch's own statistics, which also move the running ones."""
        statistics = self.running_mean, self.running_var
        return F.batch_norm(x, *statistics, self.weight, self.bias, self.training, self.momentum, self.eps)

    def normalize_over_ranks(self, x):
        statistics = self.running_mean, self.running_var
        return BatchNormOverRanks.apply(
            x, self.weight, self.bias, *statistics, self.momentum, self.eps, self.group
        )

    def spell_out(self, x):
        """All ghost batches at once in plain operations, which a compiler fuses and which ranks can share."""
        parts = x.unflatten(0, (-1, self.ghost if 0 < self.ghost < len(x) else len(x)))
        parts = parts.float() if parts.dtype in (torch.bfloat16, torch.float16) else parts
        dims, world = (1, 3, 4), dist.get_world_size(self.group) if self.group else 1
        size = parts[0, :, 0].numel() * world
        mean = SumOverRanks.apply(parts.sum(dims, keepdim=True), self.group) / size
        centred = parts - mean
        var = SumOverRanks.apply(centred.square().sum(dims, keepdim=True), self.group) / size
        with torch.no_grad():
            self.update_running(self.running_mean, mean.flatten(1))
            self.update_running(self.running_var, var.flatten(1) * (size / (size - 1)))
        scale = (var + self.eps).rsqrt() * self.weight[:, None, None]
        return (centred * scale + self.bias[:, None, None]).flatten(0, 1).to(x.dtype)

    def update_running(self, running, new):
        """Move a running statistic (C,) by those of S ghost batches (S, C), as S sequential steps would.

        r (1-m)^S + sum over i of m (1-m)^(S-1-i) new_i
        """
        # Not as a matrix product, which autocast would make in bf16 or fp16.
        steps = torch.arange(len(new) - 1, -1, -1, device=new.device, dtype=new.dtype)
        weights = self.momentum * (1 - self.momentum) ** steps
        running.mul_((1 - self.momentum) ** len(new)).add_((weights[:, None] * new).sum(0))


@functools.cache
def fused():
    """`spell_out`, compiled: PyTorch does so once for each shape of x, which takes some seconds.

    In a trial on an H200 an update of Wide-ResNet 16-4 with B 512 and ghost batches of 64 was 1.49 times as
    fast as with a loop over the ghost batches.
    """
    torch._dynamo.config.recompile_limit = 64  # PyTorch compiles for so many shapes, and no more
    return torch.compile(GhostBatchNorm2d.spell_out, dynamic=False)


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

    `noise`, uniform in [0, 1) and of x's shape, decides which entries; without it, it is drawn here.
    """
    noise = torch.rand_like(x) if noise is None else noise
    return x * ((noise >= probability) / (1 - probability)).to(x.dtype)


# -------------------------------------------------------------------------------------------------- nets


def conv(method: Method, inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    """A padded convolution, with a bias where the method has them."""
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=method.biases)


def norm(method: Method, channels: int, ghost: int) -> nn.Module:
    """The normalization of a method: batch norm, or nothing."""
    if method.norm == "batch":
        return GhostBatchNorm2d(channels, ghost)
    if method.norm:
        raise ValueError(f"norm() has no line for {method.norm!r}")
    return nn.Identity()


def before_activation(method: Method, channels: int, ghost: int) -> nn.Module:
    """What stands between a convolution and its ReLU: normalization, Fixup's scalar bias, or nothing."""
    return ScalarBias() if method.fixup else norm(method, channels, ghost)


def before_weights(method: Method) -> nn.Module:
    """What stands before a convolution or the classifier: Fixup's scalar bias, or nothing."""
    return ScalarBias() if method.fixup else nn.Identity()


def branch_scale(method: Method) -> nn.Parameter | None:
    """The scalar at the end of a residual branch: zero for ZeroInit, one for Fixup, none elsewhere."""
    if method.scalar:
        return nn.Parameter(torch.zeros(()) + method.alpha)
    return nn.Parameter(torch.ones(())) if method.fixup else None


class PreActivationBlock(nn.Module):
    """The block of Wide-ResNet (Zagoruyko & Komodakis, 2016): (B, inputs, H, W) to (B, outputs, H', W').

    A block that changes the shape has a 1x1 projection on its skip path, which shares the first activation
    with the branch; every other skip path is the identity.
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


class Bottleneck(nn.Module):
    """What the residual blocks of both ResNet-50s share: (B, inputs, H, W) to (B, 4 * width, H', W').

    The branch has a 1x1, a 3x3 and a 1x1 convolution; `stride_on` ("1x1" or "3x3") says which of the first
    two has the stride. A block that changes the number of channels has a 1x1 projection on its skip path.
    """

    def __init__(self, method: Method, inputs: int, width: int, stride: int, stride_on: str):
        super().__init__()
        self.bias1 = before_weights(method)
        self.conv1 = conv(method, inputs, width, 1, stride if stride_on == "1x1" else 1)
        self.bias2 = before_weights(method)
        self.conv2 = conv(method, width, width, 3, stride if stride_on == "3x3" else 1)
        self.bias3 = before_weights(method)
        self.conv3 = conv(method, width, 4 * width, 1)
        self.scale = branch_scale(method)
        self.projection = conv(method, inputs, 4 * width, 1, stride) if inputs != 4 * width else None

    def branch_convs(self) -> list[nn.Conv2d]:
        """The convolutions of the residual branch, in order."""
        return [self.conv1, self.conv2, self.conv3]


class BottleneckV1(Bottleneck):
    """The block of ResNet-50-V1 (He et al., 2016a): norms follow their convolutions, a ReLU the sum."""

    def __init__(self, method: Method, inputs: int, width: int, stride: int, ghost: int, stride_on: str):
        super().__init__(method, inputs, width, stride, stride_on)
        self.norm1 = before_activation(method, width, ghost)
        self.norm2 = before_activation(method, width, ghost)
        self.norm3 = norm(method, 4 * width, ghost)
        if self.projection is not None:
            self.projection = nn.Sequential(self.projection, norm(method, 4 * width, ghost))
        self.last_bias = ScalarBias() if method.fixup or method.last_bias else nn.Identity()

    def forward(self, x):
        h = self.bias1(x)
        skip = x if self.projection is None else self.projection(h)
        h = self.conv2(self.bias2(F.relu(self.norm1(self.conv1(h)))))
        branch = self.norm3(self.conv3(self.bias3(F.relu(self.norm2(h)))))
        x = skip + branch if self.scale is None else skip + self.scale * branch
        return F.relu(self.last_bias(x))


class BottleneckV2(Bottleneck):
    """The block of ResNet-50-V2 (He et al., 2016b): pre-activation, as in `PreActivationBlock`."""

    def __init__(self, method: Method, inputs: int, width: int, stride: int, ghost: int, stride_on: str):
        super().__init__(method, inputs, width, stride, stride_on)
        self.norm1 = before_activation(method, inputs, ghost)
        self.norm2 = before_activation(method, width, ghost)
        self.norm3 = before_activation(method, width, ghost)

    def forward(self, x):
        h = self.bias1(F.relu(self.norm1(x)))
        skip = x if self.projection is None else self.projection(h)
        h = self.conv2(self.bias2(F.relu(self.norm2(self.conv1(h)))))
        branch = self.conv3(self.bias3(F.relu(self.norm3(h))))
        return skip + branch if self.scale is None else skip + self.scale * branch


class ResidualNet(nn.Module):
    """What all nets share: stem, residual blocks, activation, and a classifier of its mean over the image."""

    def __init__(self, method, stem, blocks, norm, classifier, drop_probability, base_init):
        super().__init__()
        self.drop_probability = drop_probability
        self.stem = stem
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm
        self.bias = before_weights(method)
        self.classifier = classifier
        initialize(self, method, base_init)

    def forward(self, x, noise=None):
        """Logits of images x; `noise` (B, features), uniform in [0, 1), decides the dropout in training."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        x = F.relu(self.norm(x)).mean((2, 3))
        if self.training and self.drop_probability > 0:
            x = dropout(x, self.drop_probability, noise)
        return self.classifier(self.bias(x))


class WideResNet(ResidualNet):
    """Wide-ResNet depth-width for (B, 3, H, W) images, logits (B, num_classes); depth must be 6n+4.

    `init` is a key of `METHODS`; `dropout` overrides the method's drop probability (0.6, section 4), `alpha`
    its scalar's zero, and `base_init` is the distribution of the initial weights (see `draw_weights`).
    Raises ValueError for another depth and for the method that is for ResNet-V1 only.
    """

    def __init__(
        self,
        depth,
        width,
        init="zeroinit",
        num_classes=10,
        ghost=64,
        dropout=None,
        alpha=None,
        base_init="he-in",
    ):
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth should be 6n+4 (10, 16, 22, ..., 100, ..., 1000), not {depth}")
        method = METHODS[init] if alpha is None else replace(METHODS[init], alpha=alpha)
        if method.last_bias:
            raise ValueError(f"{init} is for ResNet-50-V1, whose blocks end with a ReLU")
        stem = conv(method, 3, 16, 3)
        blocks, channels = [], 16
        for group, outputs in enumerate((16 * width, 32 * width, 64 * width)):
            for i in range((depth - 4) // 6):
                stride = 2 if group > 0 and i == 0 else 1
                blocks.append(PreActivationBlock(method, channels, outputs, stride, ghost))
                channels = outputs
        norm = before_activation(method, channels, ghost)
        classifier = nn.Linear(channels, num_classes, bias=method.classifier_bias)
        dropout = 0.6 * method.dropout if dropout is None else dropout
        super().__init__(method, stem, blocks, norm, classifier, dropout, base_init)


class ResNet50(ResidualNet):
    """ResNet-50 "v1" or "v2" (He et al., 2016a, b) for (B, 3, H, W) images, logits (B, num_classes).

    `init`, `dropout` (0.2 where the method has it, section 5), `alpha` and `base_init` are as in
    `WideResNet`. Groups after the first start with a stride of 2, in v1 on the first 1x1 convolution and in
    v2 on the 3x3 one; `stride_on` ("1x1" or "3x3") overrides that. Raises ValueError for another `version`
    or `stride_on`, and for v2 with the method that is for v1 only.
    """

    def __init__(
        self,
        version,
        init="zeroinit",
        num_classes=1000,
        ghost=256,
        dropout=None,
        alpha=None,
        base_init="he-in",
        stride_on=None,
    ):
        method = METHODS[init] if alpha is None else replace(METHODS[init], alpha=alpha)
        if version not in ("v1", "v2") or stride_on not in (None, "1x1", "3x3"):
            raise ValueError(f"should be v1 or v2, stride on 1x1 or 3x3, not {version} and {stride_on}")
        if method.last_bias and version == "v2":
            raise ValueError(f"{init} is for ResNet-50-V1, whose blocks end with a ReLU")
        block, usual = (BottleneckV1, "1x1") if version == "v1" else (BottleneckV2, "3x3")
        stem_norm = before_activation(method, 64, ghost)
        stem = nn.Sequential(conv(method, 3, 64, 7, 2), stem_norm, nn.ReLU(), nn.MaxPool2d(3, 2, padding=1))
        blocks, channels = [], 64
        for width, count in (64, 3), (128, 4), (256, 6), (512, 3):
            for i in range(count):
                stride = 2 if width > 64 and i == 0 else 1
                blocks.append(block(method, channels, width, stride, ghost, stride_on or usual))
                channels = 4 * width
        # Where a ReLU has just been, after V2's stem and at the end of V1, the second one changes nothing.
        norm = nn.Identity() if version == "v1" else before_activation(method, channels, ghost)
        if version == "v2":
            blocks[0].norm1 = nn.Identity()
        classifier = nn.Linear(channels, num_classes, bias=method.classifier_bias)
        dropout = 0.2 * method.dropout if dropout is None else dropout
        super().__init__(method, stem, blocks, norm, classifier, dropout, base_init)


# ------------------------------------------------------------------------------------------- optimization


def draw_weights(weight, base_init: str):
    """Fill a convolution's or the classifier's weight from the base distribution.

    The paper does not name it. "he-in" (He et al., 2015) is a normal of standard deviation sqrt(2/fan_in):
    with it the plain Wide-ResNet 16-4 diverges within six updates of 64 images at a rate of 2^-2, and at 2^-3
    does not in twenty: the paper's optimal rate for it saturates at 2^-3. "he-out" is sqrt(2/fan_out),
    "lecun" 1/sqrt(fan_in) truncated at two standard deviations. No ReLU follows the classifier, so the
    classifier keeps 1/sqrt(fan_in).
    """
    fan_in, fan_out = weight[0].numel(), weight.numel() // weight.shape[1]
    if base_init == "lecun" or weight.ndim == 2:
        std = fan_in**-0.5
        nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
    else:
        nn.init.normal_(weight, std=math.sqrt(2 / (fan_in if base_init == "he-in" else fan_out)))


def initialize(net: nn.Module, method: Method, base_init: str):
    """Draw every weight, zero every bias; then, for Fixup, apply its rules 1 and 2 (section 2)."""
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


def learning_rate(base: float, seen: int, budget: int, halvings: int = 10) -> float:
    """The rate after `seen` of `budget` images: constant for the first half, then halved `halvings` times.

    The first halving comes half-way, the others follow evenly: as we read the paper, 10 on CIFAR-10
    (section 3: epochs 100, 110, ..., 190 of 200) and 9 on ImageNet (section 5: epochs 45, 50, ..., 85 of 90).
    """
    past_half = 2 * seen - budget
    return base * 0.5 ** (1 + past_half * halvings // budget if past_half >= 0 else 0)


def make_optimizer(net: nn.Module, config: dict) -> torch.optim.SGD:
    """SGD with heavy ball; L2 on convolution and classifier weights only, with `l2_all` on everything.

    The velocity v of a parameter w is m v + (1 - dampening) (gradient + L2 w), and w moves by -rate v. With
    dampening m, as by default, rates are "effective" ones: PyTorch's default of 0 needs (1 - m) times them.

    Each group's "lr" is a tensor on the device, to be filled with the scheduled rate times the group's
    "multiplier": `scalar_lr` for the 0-dim parameters, one for the rest.
    """
    wd, rest_wd = config["wd"], config["wd"] if config["l2_all"] else 0.0
    parameters, groups = list(net.parameters()), []
    for dims, decay, multiplier in ((2, wd, 1.0), (1, rest_wd, 1.0), (0, rest_wd, config["scalar_lr"])):
        if chosen := [p for p in parameters if min(p.ndim, 2) == dims]:
            rate = torch.zeros((), device=chosen[0].device)
            groups.append({"params": chosen, "weight_decay": decay, "multiplier": multiplier, "lr": rate})
    heavy_ball = {"momentum": config["momentum"], "dampening": config["dampening"]}
    optimizer = torch.optim.SGD(groups, **heavy_ball, fused=True)
    for p in parameters if config["momentum"] else ():  # made now, because they are part of a run's state
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


@torch.no_grad()
def l2_part(optimizer: torch.optim.SGD) -> float:
    """The L2 term of the objective, lambda/2 times the sum of squares of the decayed parameters."""
    groups = optimizer.param_groups
    return sum(g["weight_decay"] / 2 * p.double().square().sum() for g in groups for p in g["params"]).item()


AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}  # the other precision is "float32"


def pick_precision(amp: str, device: torch.device) -> str:
    """What --amp means on a device: "auto" is bf16 where it is native, fp16 on older GPUs, else float32."""
    if amp != "auto":
        return "float32" if amp == "off" else amp
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    cpuinfo = Path("/proc/cpuinfo")  # avx512_bf16 makes a step 1.6 times as fast, amx_bf16 about 3 times
    native = device.type == "cpu" and cpuinfo.exists() and "_bf16" in cpuinfo.read_text()
    return "bf16" if native else "float32"


# ------------------------------------------------------------------------------------------------ one run


def stream_seed(seed: int, purpose: str, epoch: int = 0) -> int:
    """An independent seed for each use that a run makes of random numbers ("weights", "data", "dropout")."""
    state = np.random.SeedSequence([seed, epoch, *purpose.encode()]).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))


def epoch_end(epoch: int, images: int, bs: int) -> int:
    """How many updates lie before the end of a 0-based epoch.

    The images are one endless reshuffled stream, cut into batches of exactly `bs`; a batch that crosses the
    end of an epoch belongs to that epoch, so nothing is ever dropped.
    """
    return -(-(epoch + 1) * images // bs)


def epoch_batches(data, seed: int, epoch: int, bs: int):
    """The rows of a 0-based epoch's updates, (updates, bs, columns); the last one reaches into the next."""
    images = data.train_images
    start, stop = epoch_end(epoch - 1, images, bs) * bs, epoch_end(epoch, images, bs) * bs
    rows = data.draw(seed, epoch)
    if stop > (epoch + 1) * images:
        rows = torch.cat([rows, data.draw(seed, epoch + 1)])
    return rows[start - epoch * images : stop - epoch * images].unflatten(0, (-1, bs))


def cuda_graph(work, generator, pool=None):
    """Record what work() asks of the GPU on the current stream; returns its replay and its memory pool."""
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(generator)
    with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.current_stream()):
        work()
    return graph.replay, graph.pool()


@contextlib.contextmanager
def room_for_a_graph(device):
    """Raise torch.OutOfMemoryError unless there is as much memory left as what is done within has taken.

    Within a capture, too little memory leaves the stream capturing, and runs beside this one fail as well.
    """
    if device.type == "cuda":
        used = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    yield
    if device.type == "cuda":
        torch.empty(torch.cuda.max_memory_allocated(device) - used, dtype=torch.uint8, device=device)


def share_ghost_batches(norms: list[GhostBatchNorm2d], division: Division, world: int):
    """Let batch norm take statistics over the ranks of a ghost batch, and forget as fast as on one rank.

    Of the S steps that the running statistics make in an update, each of W groups of ranks makes S/W.
    """
    for norm in norms:
        norm.group = rank_group(division.ranks_per_ghost)
        norm.momentum = 1 - (1 - norm.momentum) ** (world // division.ranks_per_ghost)


stop_asked = []  # not empty once a signal came, see runner.signals_ask_to_stop


class Run:
    """One training run. It owns its net, optimizer and random numbers: its configuration decides its result.

    `data` is `data.Images` or `data.ImageNet`, or has the same attributes and methods. A pass has at most
    `micro` images, 0: chosen for speed; `halvings` are those of `learning_rate`. Raises UserError for a batch
    larger than the data set, or one that cannot be divided (`divide_batch`).
    """

    def __init__(self, config, net, data, device, micro=0, halvings=10, compiled=False):
        if config["bs"] > data.train_images:
            raise UserError(f"--bs {config['bs']} is more than the {data.train_images} training images")
        self.config, self.data, self.device, self.bs = config, data, device, config["bs"]
        self.halvings = halvings
        self.rank, self.world = ranks()
        norms = [m for m in net.modules() if isinstance(m, GhostBatchNorm2d)]
        self.division = divide_batch(self.bs, config["ghost"], self.world, micro, device.type)
        share_ghost_batches(norms, self.division, self.world)
        self.own = self.division.own(self.rank)

        self.net = net.to(device, memory_format=torch.channels_last)
        self.dtype = net.classifier.weight.dtype
        self.model = torch.compile(self.net) if compiled else self.net
        if self.world > 1:
            self.model = DistributedDataParallel(self.model, gradient_as_bucket_view=True)
            self.model.broadcast_buffers = False  # `step` averages those of batch norm
        low = AUTOCAST.get(config["precision"])
        self.autocast = functools.partial(torch.autocast, device.type, low, enabled=low is not None)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config["precision"] == "fp16")
        self.optimizer = make_optimizer(net, config)
        self.generator = torch.Generator(device).manual_seed(stream_seed(config["seed"], "dropout"))

        self.epoch, self.updates, self.history, self.seconds = 0, 0, [], 0.0  # where the run is
        self.diverged, self.stopped, self.loss = False, False, None  # see `poll`
        self.totals = torch.zeros(3, dtype=torch.float64, device=device)  # of the epoch, see `step`
        self.statistics = [b for norm in norms for b in (norm.running_mean, norm.running_var)]
        momenta = [s["momentum_buffer"] for s in self.optimizer.state.values()]
        self.tensors = [*net.parameters(), *momenta, *net.buffers(), self.totals]  # what an update changes
        self.burst, self.graphs, self.stream = 1, {}, None  # updates per CUDA graph; graphs by that number
        if device.type == "cuda":
            self.burst = max(1, min(32, 512 // self.division.per_rank))
            made_on = torch.cuda.current_stream(device)  # the net and the data, and DistributedDataParallel
            self.stream = torch.cuda.Stream(device) if self.world == 1 else made_on
            self.stream.wait_stream(made_on)
            self.copied = torch.cuda.Event()
            self.seen, self.seen_images = torch.zeros_like(self.totals, device="cpu").pin_memory(), 0

    def logits(self, model, images, *noise):
        """Logits, in float32 or better."""
        with self.autocast():
            return model(images.to(self.dtype), *noise).to(self.dtype)

    def step(self, feed):
        """One update on the next images of `feed`, in passes of `micro`; never waits for the device."""
        noise = self.dropout_noise()
        tally = self.totals.new_zeros(3, dtype=self.dtype)  # summed loss, right answers, ranks asked to stop
        self.optimizer.zero_grad()
        with self.autocast():  # around all passes, so that each weight is cast once
            for i, its_noise in enumerate(noise, 1):
                images, labels = self.data.train_batch(*self.next_of(feed))
                last_or_only = i == len(noise) or self.world == 1
                with contextlib.nullcontext() if last_or_only else self.model.no_sync():
                    logits = self.logits(self.model, images, its_noise)
                    loss = F.cross_entropy(logits, labels, reduction="sum")
                    self.scaler.scale(loss * (self.world / self.bs)).backward()
                tally[0] += loss.detach()
                tally[1] += (logits.detach().argmax(1) == labels).sum()
        if self.world > 1:
            tally[2] += bool(stop_asked)
            combine_ranks([tally], self.statistics)
        self.totals += tally
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def dropout_noise(self):
        """Noise, or None, for each pass. Drawn for the whole batch: the division does not change it."""
        if self.net.drop_probability == 0:
            return [None] * -(-self.division.per_rank // self.division.micro)
        shape = self.bs, self.net.classifier.in_features
        noise = torch.rand(shape, generator=self.generator, device=self.device)
        return noise[self.own].split(self.division.micro)

    def next_of(self, feed):
        """The next item of a feed; the time that passes until it comes is counted."""
        began = time.perf_counter()
        item = next(feed)
        self.waited += time.perf_counter() - began
        return item

    def scheduled(self, update: int) -> float:
        """The learning rate of a 0-based update."""
        budget = self.config["epochs"] * self.data.train_images
        return learning_rate(self.config["lr"], update * self.bs, budget, self.halvings)

    def begin_epoch(self):
        """Draw the epoch's images; where a part of them was trained on already, the rest is fed."""
        self.first = epoch_end(self.epoch - 1, self.data.train_images, self.bs)
        self.rows = epoch_batches(self.data, self.config["seed"], self.epoch, self.bs)[:, self.own]
        left = () if self.data.on_device else self.rows[self.updates - self.first :]
        self.feed = self.data.feed([part for rows in left for part in rows.split(self.division.micro)])
        self.waited = 0.0

    def bursts(self):
        """The rest of the epoch in pieces of at most `burst` updates of one learning rate: (rate, rows)."""
        left = range(self.updates, self.first + len(self.rows))
        for rate, updates in itertools.groupby(left, self.scheduled):
            at = [update - self.first for update in updates]
            for rows in self.rows[at[0] : at[-1] + 1].split(self.burst):
                yield rate, rows

    def advance(self, rate: float, rows):
        """Make the updates of a burst."""
        for group in self.optimizer.param_groups:
            group["lr"].fill_(rate * group["multiplier"])
        if self.graphs:
            for part in rows.split(len(rows) if len(rows) in self.graphs else 1):
                static, replay = self.graphs[len(part)]
                static.copy_(part)
                replay()
        else:
            self.update_on(rows)
        self.updates += len(rows)
        self.poll()

    def update_on(self, rows):
        """An update on each of the rows (updates, images per rank, columns)."""
        for batch in rows:
            self.step(self.data.feed(batch.split(self.division.micro)) if self.data.on_device else self.feed)

    def poll(self):
        """Update `diverged`, `stopped`, and `loss`, the epoch's mean so far.

        On a GPU the values are one burst old, so the host never waits.
        """
        seen, images = self.totals, (self.updates - self.first) * self.bs
        if self.stream:
            self.copied.synchronize()
            seen = self.seen.clone()
            self.seen.copy_(self.totals, non_blocking=True)
            self.copied.record()
            images, self.seen_images = self.seen_images, images
        loss, _, stops = seen.tolist()
        self.loss = loss / images if images else None
        self.diverged = not math.isfinite(loss)
        self.stopped = stops > 0 if self.world > 1 else bool(stop_asked)

    def capture(self, record=cuda_graph):
        """Make a burst and a single update CUDA graphs in one memory pool; the run stays where it is."""
        self.begin_epoch()
        self.burst = min(self.burst, len(self.rows))
        state, pool = self.state(), None
        with room_for_a_graph(self.device):
            for _ in range(3):  # cuDNN chooses its algorithms
                self.update_on(self.rows[:1])
        self.load(state)
        for count in dict.fromkeys((self.burst, 1)):
            static = self.rows[:count].clone()
            replay, pool = record(functools.partial(self.update_on, static), self.generator, pool)
            self.graphs[count] = static, replay

    @torch.no_grad()
    def evaluate(self) -> dict:
        """The fractions of test images classified rightly, with running statistics and without dropout."""
        self.net.eval()
        right = torch.zeros(2, dtype=torch.int64, device=self.device)
        for images, labels in self.data.test_batches(self.rank, self.world):
            logits = self.logits(self.net, images)
            hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
            right += torch.stack([hits[:, 0].sum(), hits.sum()])
        self.net.train()
        if self.world > 1:
            dist.all_reduce(right)
        top1, top5 = (right.double() / self.data.test_images).tolist()
        return {"test_accuracy": top1} | ({"test_top5": top5} if self.config["model"] == "resnet50" else {})

    def identity(self) -> dict:
        """What a saved state must agree in with the run that goes on from it."""
        return self.config | {"images": self.data.fingerprint, "device": self.device.type}

    def state(self) -> dict:
        """A copy of all that is needed to go on from here in another process, in the host's memory."""
        return {
            "config": self.identity(),
            "tensors": [t.detach().to("cpu", copy=True) for t in self.tensors],  # on the run's own stream
            "generator": self.generator.get_state(),
            "scaler": self.scaler.state_dict(),
            "place": (self.epoch, self.updates, self.seconds, list(self.history)),
        }

    @torch.no_grad()
    def load(self, state: dict):
        """Go to where a state was taken."""
        for ours, theirs in zip(self.tensors, state["tensors"], strict=True):
            ours.copy_(theirs)
        self.generator.set_state(state["generator"])
        self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.updates, self.seconds, self.history = state["place"]
        self.totals[2] = 0  # requests to stop: they were obeyed when the state was saved


def train(run: Run, eval_every: int):
    """Train a run from where it is to the end of its budget; evaluate it every `eval_every` epochs.

    A generator: it yields the number of new images after each burst of updates, when the run's state may be
    saved. It ends early, with `run.diverged`, once the loss is not finite.
    """
    while run.epoch < run.config["epochs"]:
        began = time.perf_counter() - run.seconds
        run.begin_epoch()
        for rate, rows in run.bursts():
            run.advance(rate, rows)
            run.seconds = time.perf_counter() - began
            if run.diverged:
                return
            yield len(rows) * run.bs
        loss, right, _ = (run.totals / (len(run.rows) * run.bs)).tolist()
        l2 = l2_part(run.optimizer)
        run.diverged = not math.isfinite(loss + l2)
        if run.diverged:
            return
        seconds = time.perf_counter() - began
        entry = {"epoch": run.epoch + 1, "lr": run.scheduled(run.first)}
        entry |= {"train_loss": loss, "l2": l2, "train_accuracy": right}
        if (run.epoch + 1) % eval_every == 0 or run.epoch + 1 == run.config["epochs"]:
            entry |= run.evaluate()
        entry |= {} if run.data.on_device else {"data_wait": run.waited / seconds}
        run.history.append(entry | {"seconds": seconds})
        run.epoch, run.seconds = run.epoch + 1, 0.0
        run.totals.zero_()
