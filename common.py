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
    nets           the residual blocks, `WideResNet` and `ResNet50`
    optimization   initial weights, learning rate schedule, SGD with L2, precision
    engine         `Run`: one training run, its update and its state; `train`: the loop
"""

import functools
import itertools
import math
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn  # now: if the first group of ranks were there before it, it would hold that to the end
import torch.nn.functional as F
from torch import nn

# ------------------------------------------------------------------------------------------------------------ methods


@dataclass(frozen=True)
class Method:
    """What one row of the paper's tables adds to the plain residual network."""

    norm: bool = False  # ghost batch norm before each activation (sections 2 and 3)
    scalar: bool = False  # ZeroInit 1: a scalar multiplier ends each residual branch and starts at zero
    biases: bool = False  # ZeroInit 2: a bias on each convolution and on the classifier
    dropout: bool = False  # ZeroInit 3: dropout on the classifier's input
    last_bias: bool = False  # ResNet-V1 only: a scalar bias before each block's last ReLU (section 5)
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
    "zeroinit+bias": Method(scalar=True, biases=True, dropout=True, last_bias=True),
    "fixup": Method(fixup=True),
}

# ------------------------------------------------------------------------------------------------------------- layers


class SumOverRanks(torch.autograd.Function):
    """The sum of a tensor over a group of ranks (None: this one alone), also for its gradient."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        if group:
            dist.all_reduce(x := x.clone(), group=group)
        return x

    @staticmethod
    def backward(ctx, gradient):
        return SumOverRanks.apply(gradient, ctx.group), None


class GhostBatchNorm2d(nn.BatchNorm2d):
    """Batch norm of (B, C, H, W) over each consecutive `ghost` images (Hoffer et al., 2017; section 3 of the paper).

    `ghost=0` takes the whole batch, and so does a batch smaller than `ghost`; the last ghost batch may be short. The
    running statistics, which evaluation uses, are what sequential passes over the ghost batches leave.
    With a `group` of ranks, their inputs together are one ghost batch.
    """

    def __init__(self, channels: int, ghost: int = 0):
        super().__init__(channels)
        self.ghost, self.group = ghost, None

    def forward(self, x):
        several = self.training and 0 < self.ghost < len(x)
        if self.training and (self.group or (several and torch.compiler.is_compiling() and len(x) % self.ghost == 0)):
            return self.spell_out(x)
        return torch.cat([self.normalize(part) for part in x.split(self.ghost)]) if several else self.normalize(x)

    def spell_out(self, x):
        """The same for all ghost batches at once, as a compiler likes it and as ranks can share it."""
        parts = x.unflatten(0, (-1, self.ghost if 0 < self.ghost < len(x) else len(x)))
        parts = parts.float() if parts.dtype in (torch.bfloat16, torch.float16) else parts
        dims, size = (1, 3, 4), parts[0, :, 0].numel() * (dist.get_world_size(self.group) if self.group else 1)
        mean = SumOverRanks.apply(parts.sum(dims, keepdim=True), self.group) / size
        centred = parts - mean
        var = SumOverRanks.apply(centred.square().sum(dims, keepdim=True), self.group) / size
        with torch.no_grad():
            for i in range(len(parts)):
                self.running_mean.lerp_(mean[i].flatten(), self.momentum)
                self.running_var.lerp_(var[i].flatten() * (size / (size - 1)), self.momentum)
        scale = (var + self.eps).rsqrt() * self.weight[:, None, None]
        return (centred * scale + self.bias[:, None, None]).flatten(0, 1).to(x.dtype)

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
    return GhostBatchNorm2d(channels, ghost) if method.norm else before_weights(method)


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


class Bottleneck(nn.Module):
    """What the residual blocks of both ResNet-50s share: (B, inputs, H, W) to (B, 4 * width, H', W').

    The branch has a 1x1, a 3x3 and a 1x1 convolution; `stride_on` ("1x1" or "3x3") says which of the first two has the
    stride. A block that changes the number of channels, the first one of each group, has a 1x1 projection.
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
    """The residual block of ResNet-50-V1 (He et al., 2016a): each norm follows its convolution, a ReLU the sum."""

    def __init__(self, method: Method, inputs: int, width: int, stride: int, ghost: int, stride_on: str):
        super().__init__(method, inputs, width, stride, stride_on)
        self.norm1 = before_activation(method, width, ghost)
        self.norm2 = before_activation(method, width, ghost)
        self.norm3 = GhostBatchNorm2d(4 * width, ghost) if method.norm else nn.Identity()
        if self.projection is not None and method.norm:
            self.projection = nn.Sequential(self.projection, GhostBatchNorm2d(4 * width, ghost))
        self.last_bias = ScalarBias() if method.fixup or method.last_bias else nn.Identity()

    def forward(self, x):
        h = self.bias1(x)
        skip = x if self.projection is None else self.projection(h)
        h = self.conv2(self.bias2(F.relu(self.norm1(self.conv1(h)))))
        branch = self.norm3(self.conv3(self.bias3(F.relu(self.norm2(h)))))
        x = skip + branch if self.scale is None else skip + self.scale * branch
        return F.relu(self.last_bias(x))


class BottleneckV2(Bottleneck):
    """The residual block of ResNet-50-V2 (He et al., 2016b): pre-activation, as in `PreActivationBlock`."""

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
    """What all nets share: a stem, residual blocks, an activation, and a classifier of its mean over the image."""

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
        """Logits of the images x; `noise` (B, features), uniform in [0, 1), decides the dropout of a training step."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        x = F.relu(self.norm(x)).mean((2, 3))
        if self.training and self.drop_probability > 0:
            x = dropout(x, self.drop_probability, noise)
        return self.classifier(self.bias(x))


class WideResNet(ResidualNet):
    """Wide-ResNet depth-width for (B, 3, H, W) images, logits (B, num_classes); depth must be 6n+4.

    `init` is a key of `METHODS`; `dropout` overrides the method's drop probability (0.6, section 4 of the paper), and
    `base_init` is the distribution of the initial weights (see `initialize`). Raises ValueError for another depth and
    for the method that is for ResNet-V1 only.
    """

    def __init__(self, depth, width, init="zeroinit", num_classes=10, ghost=64, dropout=None, base_init="lecun"):
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth should be 6n+4 (10, 16, 22, ..., 100, ..., 1000), not {depth}")
        method = METHODS[init]
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
    """ResNet-50 for (B, 3, H, W) images, logits (B, num_classes); `version` is "v1" or "v2" (He et al., 2016a or b).

    `init`, `dropout` (0.2 where the method has it, section 5 of the paper) and `base_init` are as in `WideResNet`. The
    groups after the first start with a stride of 2, on the first 1x1 convolution in v1 and on the 3x3 one in v2, which
    `stride_on` ("1x1" or "3x3") overrides. Raises ValueError for another `version` or `stride_on`, and for v2 with the
    method that is for v1 only.
    """

    def __init__(
        self, version, init="zeroinit", num_classes=1000, ghost=256, dropout=None, base_init="lecun", stride_on=None
    ):
        method = METHODS[init]
        if version not in ("v1", "v2") or stride_on not in (None, "1x1", "3x3"):
            raise ValueError(f"should be v1 or v2, with a stride on 1x1 or 3x3, not {version} and {stride_on}")
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


def make_optimizer(
    parameters, gradients, wd: float, l2_all: bool, scalar_lr: float, momentum: float
) -> torch.optim.SGD:
    """SGD with heavy ball by these gradients; L2 on convolution and linear weights only, with `l2_all` on everything.

    Each group's "lr" is a tensor on their device, to be filled with the scheduled rate times its "multiplier":
    `scalar_lr` for the 0-dim parameters, one for the rest.
    """
    device = parameters[0].device

    def group(members, decay, multiplier=1.0):
        rate = torch.zeros((), device=device)
        return {"params": members, "lr": rate, "weight_decay": decay, "multiplier": multiplier}

    rest_decay = wd if l2_all else 0.0
    groups = [
        group([p for p in parameters if p.ndim > 1], wd),
        group([p for p in parameters if p.ndim == 1], rest_decay),
        group([p for p in parameters if p.ndim == 0], rest_decay, scalar_lr),
    ]
    optimizer = torch.optim.SGD([g for g in groups if g["params"]], momentum=momentum, fused=True)
    for p, gradient in zip(parameters, gradients, strict=False):
        p.grad = gradient
        if momentum:
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


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
    cpuinfo = Path("/proc/cpuinfo")  # avx512_bf16 makes a step 1.6 times as fast, amx_bf16 about 3 times
    native = device.type == "cpu" and cpuinfo.exists() and "_bf16" in cpuinfo.read_text()
    return "bf16" if native else "off"


# ------------------------------------------------------------------------------------------------------------- engine


class UserError(Exception):
    """Something only the user can mend: shown as one line, exit code 2."""


def ranks() -> tuple[int, int]:
    """This process's rank and the number of ranks: torchrun's, or (0, 1)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@functools.cache
def rank_group(size: int):
    """The group of `size` consecutive ranks to which this one belongs; None for one."""
    return dist.new_subgroups(size)[0] if size > 1 else None


def pick_device(name: str | None) -> torch.device:
    """The named device, or a GPU if there is one; joins the ranks of torchrun.

    A GPU without a number ("cuda", or None) is under torchrun each rank's own. Raises UserError where the
    name is of no device here.
    """
    mine = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    default = mine if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(mine if name == "cuda" else name or default)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("only cpu and cuda are supported")
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return device


def leave_ranks():
    """Give up the groups of ranks and so end their threads, which could abort the interpreter as it ends.

    See pytorch/pytorch#179291. Only where all ranks leave: after a fault of one, the others may be waiting for it.
    """
    rank_group.cache_clear()
    if dist.is_initialized():
        dist.destroy_process_group()


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


def split_batch(bs: int, ghost: int | None, world: int, micro: int, device: str) -> tuple[int, int, int]:
    """How an update is divided: images per rank, images per pass, and the number of ranks that share a ghost batch.

    `ghost` is None for nets without batch norm. Every division gives the same update; raises UserError for one that
    would change the ghost batches.
    """
    share = bs // world
    if bs % world:
        raise UserError(f"--bs {bs} should be a multiple of the {world} ranks")
    if ghost is None:
        return share, min(micro or (64 if device == "cpu" else share), share), 1
    ghost = min(ghost or bs, bs)
    if world > 1 and share % ghost and (ghost % share or world % (ghost // share)):
        raise UserError(f"ghost batches of {ghost} images cannot be made of the {share} that each of {world} ranks has")
    local = min(ghost, share)
    if micro % local:
        raise UserError(f"--micro {micro} should be a multiple of the {local} images of a ghost batch on one rank")
    # A CPU's caches want passes of one ghost batch; a GPU wants all images at once.
    return share, min(micro or (local if device == "cpu" else share), share), -(-ghost // share)


def flat_views(tensors: list) -> tuple[torch.Tensor, list]:
    """One flat tensor of zeros, and its consecutive parts, each in the shape and memory layout of a (dense) tensor."""
    flat = tensors[0].new_zeros(sum(t.numel() for t in tensors))
    ends = itertools.accumulate(t.numel() for t in tensors)
    return flat, [flat.as_strided(t.size(), t.stride(), end - t.numel()) for t, end in zip(tensors, ends, strict=True)]


def cuda_graph(work, generator):
    """Record what work() asks of the GPU, on the current stream; returns what does it again in one launch."""
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(generator)
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        work()
    return graph.replay


stop_asked = threading.Event()  # by a signal


class Run:
    """One training run: it owns its net, optimizer and random numbers, so its result depends on its configuration only.

    `data` offers
        train_images, test_images    how many there are
        draw(seed, epoch)            a row of integers per training image, in that epoch's order: which one, and how it
                                     is augmented
        feed(batches)                an iterator with, for each of a list of such rows, the tensors train_batch takes
        train_batch(*tensors)        images (B, 3, H, W), float, and labels (B,), int64, on the device
        test_batches(rank, world)    the same for a rank's share of the test images
        on_device                    whether feed() only hands on the rows, so that the rest is work of the device

    Under torchrun each rank takes its share of every batch, and one all-reduce per update makes theirs one. In low
    `precision` ("bf16", "fp16") convolutions and classifier hold their parameters in it, and `masters` are the same in
    float32, which the optimizer moves.
    """

    def __init__(self, config, net, data, device, precision="off", micro=0, drops=10, compiled=False):
        if config["bs"] > data.train_images:
            raise UserError(f"--bs {config['bs']} is more than the {data.train_images} training images")
        self.config, self.data, self.device, self.drops, self.bs = config, data, device, drops, config["bs"]
        self.rank, self.world = ranks()
        norms = [m for m in net.modules() if isinstance(m, GhostBatchNorm2d)]
        ghost = config["ghost"] if norms else None
        self.share, self.micro, reach = split_batch(self.bs, ghost, self.world, micro, device.type)
        for norm in norms:
            norm.group = rank_group(reach)
        self.net = net.to(device, memory_format=torch.channels_last)
        self.compiled = torch.compile(self.net) if compiled else self.net
        self.generator = torch.Generator(device).manual_seed(stream_seed(config["seed"], "dropout"))
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.lay_out({"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision))
        self.epoch, self.updates, self.history, self.seconds = 0, 0, [], 0.0  # where the run is
        self.rate, self.diverged, self.stopped = None, False, False
        self.stream, self.copied, self.replay = None, None, None
        self.burst = 1  # updates from one look at the host to the next; on a GPU they become one graph
        if device.type == "cuda":
            self.stream, self.copied = torch.cuda.Stream(device), torch.cuda.Event()
            self.stream.wait_stream(torch.cuda.current_stream(device))  # the net and the data are made there
            self.burst = max(1, min(32, 512 // self.share))

    def lay_out(self, low: torch.dtype | None):
        """Make all tensors that an update moves.

        `flat` is what ranks sum up in one all-reduce: the gradients of the masters, the update's tally (summed loss,
        right answers, ranks asked to stop), and batch norm's running statistics. `tensors` are the run's state.
        """
        layers = [m for m in self.net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        weights = [p for m in layers for p in m.parameters()]
        known = {id(p) for p in weights}
        rest = [p for p in self.net.parameters() if id(p) not in known]
        self.parameters, self.masters = weights + rest, weights + rest
        if low:
            self.masters = [p.detach().clone() for p in weights] + rest
            for p in weights:
                p.data = p.data.to(low)
        self.dtype, self.lowered = weights[0].dtype, weights if low else []
        self.statistics = [b for name, b in self.net.named_buffers() if "running" in name and self.world > 1]
        self.flat, views = flat_views([*self.masters, self.masters[0].new_zeros(3), *self.statistics])
        count = len(self.masters)
        self.tally, self.averages = views[count], views[count + 1 :]
        self.slots = [*views[:count], self.tally[0], self.tally[1]]
        options = {key: self.config[key] for key in ("wd", "l2_all", "scalar_lr", "momentum")}
        self.optimizer = make_optimizer(self.masters, self.slots, **options)
        self.totals = torch.zeros(3, dtype=torch.float64, device=self.device)  # the epoch's tallies
        self.seen = (
            self.totals if self.device.type == "cpu" else torch.zeros_like(self.totals, device="cpu").pin_memory()
        )
        self.loss_weight = self.flat.new_tensor(1 / self.bs)
        momenta = [s["momentum_buffer"] for s in self.optimizer.state.values()]
        self.tensors = [*self.masters, *momenta, *self.net.buffers(), self.totals]

    def forward(self, images, noise=None):
        """Logits, in float32 or better."""
        return self.compiled(images.to(self.dtype), noise).to(self.flat.dtype)

    def step(self, feed):
        """One update on what comes next from `feed`, in passes of `micro` images; never waits for the device."""
        noise = [None] * self.share
        if self.net.drop_probability > 0:  # that of the whole batch, whatever the division
            shape = self.bs, self.net.classifier.in_features
            noise = torch.rand(shape, generator=self.generator, device=self.device)
            noise = noise[self.rank * self.share :][: self.share].split(self.micro)
        split = len(self.lowered)
        for i in range(-(-self.share // self.micro)):
            began = time.perf_counter()
            parts = next(feed)
            self.waited += time.perf_counter() - began
            images, labels = self.data.train_batch(*parts)
            logits = self.forward(images, noise[i])
            loss = F.cross_entropy(logits, labels, reduction="sum")
            gradients = torch.autograd.grad(loss, self.parameters, self.scaler.scale(self.loss_weight))
            right = (logits.detach().argmax(1) == labels).sum(dtype=loss.dtype)
            new = [*gradients, loss.detach(), right]
            add = torch._foreach_add_ if i else torch._foreach_copy_
            add(self.slots[split:], new[split:])
            if split:  # the same call would be one launch per tensor if it had two precisions
                add(self.slots[:split], new[:split])
        if self.world > 1:
            self.sum_over_ranks()
        self.totals += self.tally
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.lower()

    def sum_over_ranks(self):
        """Make the gradients and the tally sums over all ranks, and batch norm's running statistics their averages."""
        for here, there in zip(self.statistics, self.averages, strict=True):
            there.copy_(here / self.world)
        dist.all_reduce(self.flat)
        for here, there in zip(self.statistics, self.averages, strict=True):
            here.copy_(there)

    @torch.no_grad()
    def lower(self):
        """Give the net the masters' values in its own precision."""
        if self.lowered:
            torch._foreach_copy_(self.lowered, self.masters[: len(self.lowered)])

    def batches(self, epoch: int):
        """The rows of a 0-based epoch's updates (updates, share, columns): of `bs` images each, this rank's share.

        The last update reaches into the next epoch.
        """
        images, bs = self.data.train_images, self.bs
        start, stop = epoch_end(epoch - 1, images, bs) * bs, epoch_end(epoch, images, bs) * bs
        rows = self.data.draw(self.config["seed"], epoch)
        if stop > (epoch + 1) * images:
            rows = torch.cat([rows, self.data.draw(self.config["seed"], epoch + 1)])
        rows = rows[start - epoch * images : stop - epoch * images].unflatten(0, (-1, bs))
        return rows[:, self.rank * self.share : (self.rank + 1) * self.share]

    def scheduled(self, update: int) -> float:
        """The learning rate of a 0-based update."""
        budget = self.config["epochs"] * self.data.train_images
        return learning_rate(self.config["lr"], update * self.bs, budget, self.drops)

    def begin_epoch(self):
        """Draw the epoch's images, and take up what is left of them."""
        self.first = epoch_end(self.epoch - 1, self.data.train_images, self.bs)
        self.rows, self.marked, self.waited = self.batches(self.epoch), time.perf_counter(), 0.0
        left = self.rows[self.updates - self.first :]
        self.feed = (
            None if self.data.on_device else self.data.feed([p for rows in left for p in rows.split(self.micro)])
        )

    def advance(self, last: int) -> int:
        """The next burst of updates, up to update `last` or a change of the learning rate; returns how many."""
        rate, count, at = self.scheduled(self.updates), 1, self.updates - self.first
        while count < min(self.burst, last - self.updates) and self.scheduled(self.updates + count) == rate:
            count += 1
        if rate != self.rate:
            self.rate = rate
            for group in self.optimizer.param_groups:
                group["lr"].fill_(rate * group["multiplier"])
        if stop_asked.is_set():
            self.tally[2] = 1
        if self.replay and count == self.burst:
            self.static.copy_(self.rows[at : at + count])
            self.replay()
        else:
            self.train_rows(self.rows[at : at + count])
        self.updates += count
        self.look()
        now = time.perf_counter()
        self.seconds, self.marked = self.seconds + now - self.marked, now
        return count

    def train_rows(self, rows):
        """An update for each of the rows (updates, share, columns)."""
        for batch in rows:
            self.step(self.feed or self.data.feed(batch.split(self.micro)))

    def look(self):
        """See whether the loss is still finite, and whether to stop; on a GPU, as of one burst ago, without waiting."""
        if self.copied:
            self.copied.synchronize()
        loss, _, stops = self.seen.numpy()
        self.diverged, self.stopped = not math.isfinite(loss), stops > 0
        if self.copied:
            self.seen.copy_(self.totals, non_blocking=True)
            self.copied.record()

    def capture(self, record=cuda_graph):
        """Make each burst of updates one graph; the run stays where it is."""
        self.begin_epoch()
        self.burst = min(self.burst, len(self.rows))
        self.static, state = self.rows[: self.burst].clone(), self.state()
        for _ in range(3):  # lets cuDNN choose its algorithms
            self.train_rows(self.static[:1])
        self.load(state)
        self.replay = record(lambda: self.train_rows(self.static), self.generator)

    @torch.no_grad()
    def evaluate(self) -> dict:
        """The shares of test images classified rightly, with running statistics and without dropout."""
        self.net.eval()
        right = torch.zeros(2, dtype=torch.int64, device=self.device)
        for images, labels in self.data.test_batches(self.rank, self.world):
            logits = self.forward(images)
            hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
            right += torch.stack([hits[:, 0].sum(), hits.sum()])
        self.net.train()
        if self.world > 1:
            dist.all_reduce(right)
        top1, top5 = (right.double() / self.data.test_images).tolist()
        return {"test_accuracy": top1} | ({"test_top5": top5} if self.config["model"] == "resnet50" else {})

    def state(self) -> dict:
        """A copy of all that is needed to go on from here in another process."""
        images = {"images": self.data.fingerprint}
        return {
            "config": self.config | images,
            "tensors": [t.detach().clone() for t in self.tensors],
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
        self.totals[2] = 0  # whoever asked to stop has been heard
        self.lower()


def train(run: Run, eval_every: int):
    """Train a run from where it is to the end of its budget, measuring the test accuracy every `eval_every` epochs.

    A generator: it yields the number of new images after each burst of updates, when the run's state may be saved. It
    ends early, with `run.diverged`, once the loss is not finite.
    """
    epochs, images = run.config["epochs"], run.data.train_images
    while run.epoch < epochs:
        last = epoch_end(run.epoch, images, run.bs)
        run.begin_epoch()
        while run.updates < last:
            count = run.advance(last)
            if run.diverged:
                return
            yield count * run.bs
        loss, right, _ = (run.totals / ((last - run.first) * run.bs)).tolist()
        rate, l2 = run.scheduled(run.first), l2_part(run.optimizer)
        run.diverged = not math.isfinite(loss + l2)
        if run.diverged:
            return
        seconds = run.seconds + time.perf_counter() - run.marked
        entry = {"epoch": run.epoch + 1, "lr": rate, "train_loss": loss, "l2": l2, "train_accuracy": right}
        if (run.epoch + 1) % eval_every == 0 or run.epoch + 1 == epochs:
            entry |= run.evaluate()
        entry |= {"data_wait": run.waited / seconds} if run.feed else {}
        run.history.append(entry | {"seconds": seconds})
        run.epoch, run.seconds = run.epoch + 1, 0.0
        run.totals.zero_()


def outcome(run: Run) -> dict:
    """The part of a record that training decides; a diverged run has no final numbers."""
    record = {"config": run.config, "status": "diverged" if run.diverged else "done", "history": run.history}
    keys = ["test_accuracy", "train_loss", "train_objective"]
    if run.diverged:
        return record | {"final": dict.fromkeys(keys), "diverged_at_step": run.updates}
    last = run.history[-1]
    last = last | {"train_objective": last["train_loss"] + last["l2"]}
    final = {key: last[key] for key in (*keys, "test_top5") if key in last}
    speed = run.updates * run.bs / sum(entry["seconds"] for entry in run.history)
    return record | {"final": final, "images_per_second": speed}
