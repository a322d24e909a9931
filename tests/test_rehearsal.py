"""Runs on fake tensors of a GPU: finds on any machine what the capture of a CUDA graph would refuse."""

import contextlib
import functools
from unittest import mock

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import common
import data
import resnet_imagenet
import wrn_cifar

fake_tensor = pytest.importorskip("torch._subclasses.fake_tensor")
VERSION = tuple(map(int, torch.__version__.split(".")[:2]))
pytestmark = pytest.mark.skipif(
    VERSION < (2, 11), reason="PyTorch's older fake tensors (2.8's) abort the process"
)
CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
NO_FAKE = (
    "_fused_sgd_",
    "_amp_foreach_non_finite_check_and_unscale_",
    "_amp_update_scale_",
)  # these return nothing


class Refused(Exception):
    """A capture would fail, or its replay would use memory that may hold something else by then."""


class HostGenerator(torch.Generator):
    """A generator for any device, on the CPU; a class, because PyTorch names it in annotations."""

    def __new__(cls, device=CPU):
        return super().__new__(cls)


class Gpu(TorchDispatchMode):
    """Looks at each operation; `record` stands in for a capture and runs the work once."""

    def __init__(self):
        super().__init__()
        self.run, self.known, self.reads, self.replays = None, None, 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, given = function._schema.name.removeprefix("aten::"), tensors((args, kwargs))
        if name == "_local_scalar_dense":  # item(), tolist() and `if`
            if self.known is not None:
                raise Refused("the host waits for a value")
            self.reads += 1
            return 1
        if name == "_fused_sgd_" and len({layout(part) for part in args[:3] if part}) > 1:
            raise Refused("a gradient has another layout than its weight")
        made = None if name in NO_FAKE else function(*args, **(kwargs or {}))
        if self.known is not None:
            if not all(t.device == GPU for t in given + tensors(made)):
                raise Refused(f"{name} of the host's memory")
            if not all(memory(t) in self.known for t in given):
                raise Refused(f"{name} of memory from before the capture")
            self.known |= {memory(t): t for t in tensors(made)}
        return made

    def record(self, work, generator=None, pool=None):
        run, scaler = self.run, vars(self.run.scaler)
        rates = [group["lr"] for group in run.optimizer.param_groups]
        lasting = run.tensors, rates, list(vars(run.data).values()), list(scaler.values()), work.args
        self.known = {memory(t): t for t in tensors(lasting) if t.device == GPU}
        work()
        self.known = None
        return lambda: self.replays.append(len(work.args[0])), (pool or 0) + 1


def tensors(tree):
    return [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]


def memory(tensor):
    return tensor.untyped_storage()._cdata


def layout(tensors):
    return tuple(tuple(s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1) for t in tensors)


def backward(loss):
    """Tensor.backward in this thread: PyTorch's own needs a driver where tensors are a GPU's."""
    waiting = {loss.grad_fn: {0: torch.ones_like(loss)}}
    with torch.no_grad():
        while waiting:
            node = max(waiting, key=lambda n: n._sequence_nr())  # the order in which PyTorch goes back
            gradients = waiting.pop(node)
            found = node(*map(gradients.get, range(len(node._input_metadata))))
            for gradient, (to, i) in zip(tree_leaves(found), node.next_functions, strict=True):
                if gradient is not None and to is not None:
                    asked, sums = to._input_metadata[i], waiting.setdefault(to, {})
                    gradient = gradient.sum_to_size(asked.shape).to(asked.dtype)
                    sums[i] = sums[i] + gradient if i in sums else gradient


@pytest.fixture
def gpu():
    """A GPU for `run_of`; skips the test where a newer PyTorch has other internals than this file needs."""
    with contextlib.ExitStack() as stack:
        for owner, name, stand_in in [
            (torch.cuda, "Stream", mock.Mock()),
            (torch.cuda, "Event", mock.Mock()),
            (torch.cuda, "current_stream", mock.Mock()),
            (torch.cuda, "is_bf16_supported", lambda: True),
            (torch.cuda, "memory_allocated", lambda device: 0),
            (torch.cuda, "max_memory_allocated", lambda device: 7),
            (torch.cuda, "reset_peak_memory_stats", lambda device: None),
            (common, "has_triton", lambda: False),
            (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
            (torch, "Generator", HostGenerator),
            (torch.Tensor, "pin_memory", lambda tensor: tensor),
            (torch.Tensor, "backward", backward),
        ]:
            stack.enter_context(mock.patch.object(owner, name, stand_in))
        try:
            mode = fake_tensor.FakeTensorMode(allow_non_fake_inputs=True, allow_fallback_kernels=False)
            stack.enter_context(mode)
            weight = torch.ones(4, 3, 3, 3, device=GPU, requires_grad=True)
            torch.conv2d(torch.ones(1, 3, 8, 8, device=GPU), weight).sum().backward()
            assert weight.grad.device == GPU and weight.grad.shape == weight.shape
        except Exception as error:
            if VERSION <= (2, 14):
                raise
            pytest.skip(f"fake tensors are different in PyTorch {torch.__version__}: {error!r}")
        yield stack.enter_context(Gpu())


def run_of(gpu, script, words, micro=0):
    """A run of a command line on the GPU, with random images; the net and the images come from the CPU."""
    point = script.make_point(script.parse_args([*words.split(), "--bs", "8", "--device", "cpu"]))
    config, size = point.config((point.rates[0], 0)), 8 if script is wrn_cifar else 32
    with torch._C._DisableTorchDispatch():
        rng = np.random.default_rng(0)
        parts = [
            (rng.integers(0, 256, (n, size, size, 3), np.uint8), rng.integers(0, 10, n)) for n in (24, 10)
        ]
        images = (
            data.Images("", *parts, CPU, 10) if size == 8 else data.ImageNet("", *parts, "", CPU, 10, size)
        )
        with torch.device("meta"):
            net = script.make_net(config, 10)
        net.to_empty(device=CPU)
    moved = tree_map_only(torch.Tensor, lambda t: t.to(GPU), vars(images))
    vars(images).update(moved | {"labels": images.labels, "device": GPU})
    gpu.run = common.Run(config, net, images, GPU, micro)
    return gpu.run


def captured(gpu, init="zeroinit", precision="bf16", plant=lambda run: None):
    """A run whose burst of two updates and whose single update are graphs."""
    words = f"--depth 10 --width 1 --ghost 4 --epochs 1 --init {init} --amp {precision}"
    run = run_of(gpu, wrn_cifar, words, micro=4 if precision == "off" else 0)
    plant(run)
    run.burst = 2
    run.capture(gpu.record)
    return run


ALL = [(i, p) for i in wrn_cifar.INITS for p in ("off", "bf16", "fp16")]
MORE = [(i, p) for i, p in ALL if p != "bf16" and i not in ("bn", "zeroinit")]


@pytest.mark.parametrize("init, precision", [
    pytest.param(*case, marks=[pytest.mark.slow] if case in MORE else []) for case in ALL
])  # fmt: skip
def test_a_run(gpu, init, precision):
    run = captured(gpu, init, precision)
    gpu.reads = 0
    assert list(common.train(run, 1)) == [16, 8]  # the third update has a rate of its own
    assert gpu.replays == [2, 1] and len(run.history) == 1
    assert gpu.reads == 2 * 3 + 3 + 1 + 2  # the totals of both bursts and of the epoch, L2, two accuracies
    state = run.state()
    assert {t.device for t in tensors(state)} == {CPU}  # a file is written on another stream
    run.load(state)


@pytest.mark.parametrize("flags", ["--arch v1 --init zeroinit+bias", "--arch v2 --init bn"])
def test_resnet50(gpu, flags):
    run = run_of(gpu, resnet_imagenet, f"{flags} --data shapes --image-size 32 --amp bf16")

    def feed(batches):
        for rows in batches:
            pixels = torch.zeros(len(rows), 32, 32, 3, dtype=torch.uint8, device=GPU)
            yield pixels, (rows[:, 1] == 1).to(GPU), run.data.labels[rows[:, 0]].to(GPU)

    run.data.feed = feed
    run.begin_epoch()
    gpu.record(functools.partial(lambda batches: run.step(iter(batches)), [next(run.feed)]))
    gpu.reads = 0
    assert run.evaluate().keys() == {"test_accuracy", "test_top5"} and gpu.reads == 2


def in_updates(fault):
    """Plant fault(images, labels) where an update has just made its batch."""

    def plant(run, real=data.Images.train_batch):
        def train_batch(rows):
            fault(*(batch := real(run.data, rows)))
            return batch

        run.data.train_batch = train_batch

    return plant


DEVICES = "same device|different devices"  # as PyTorch 2.14 and 2.11 say it
FAULTS = [
    ("waits for a value", in_updates(lambda images, labels: labels[0].item())),
    ("waits for a value", in_updates(lambda images, labels: bool((labels > 0).all()))),
    ("_to_copy of the host", in_updates(lambda images, labels: labels.to(CPU, non_blocking=True))),
    ("nonzero", in_updates(lambda images, labels: images[labels > 0])),
    pytest.param(
        "lift_fresh of the host",
        in_updates(lambda images, labels: torch.tensor(1.0, device=GPU)),
        marks=pytest.mark.skipif(torch.cuda.is_available(), reason="with a driver it is made on the GPU"),
    ),
    ("lift_fresh of the host", in_updates(lambda images, labels: labels * torch.tensor(1))),
    (DEVICES, lambda run: setattr(run.data, "crop", run.data.crop.cpu())),
    (DEVICES, lambda run: setattr(run.data, "scale", run.data.scale.cpu())),
    (DEVICES, lambda run: setattr(run, "dropout_noise", lambda: [torch.rand(8, 64)])),
    ("_fused_sgd_ of the host", lambda run: run.optimizer.param_groups[0].update(lr=torch.zeros(()))),
    ("another layout", lambda run: run.net.stem.weight.register_post_accumulate_grad_hook(flatten)),
    ("before the capture", lambda run: setattr(run.optimizer, "zero_grad", lambda: None)),
]


def flatten(parameter):
    parameter.grad = parameter.grad.contiguous()


@pytest.mark.parametrize("said, plant", FAULTS)
def test_planted_faults_are_found(gpu, said, plant):
    with pytest.raises((Refused, RuntimeError), match=said):
        captured(gpu, plant=plant)


def test_too_little_memory_shows_before_the_capture(gpu, monkeypatch):
    def empty(size, real=torch.empty, **options):
        if size == 7:
            raise torch.OutOfMemoryError
        return real(size, **options)

    monkeypatch.setattr(torch, "empty", empty)
    with pytest.raises(torch.OutOfMemoryError):
        captured(gpu)
    assert not gpu.run.graphs and not gpu.run.updates


def test_casts_of_weights_that_outlive_an_update_are_found(gpu):
    with torch.autocast("cuda", torch.bfloat16), pytest.raises(Refused, match="before the capture"):
        captured(gpu)
