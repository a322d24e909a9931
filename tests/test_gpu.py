"""What only a GPU can show, in less than four minutes; and rules for GPUs, which any machine can show."""

import functools
import gc
import os
import socket
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from scripts import run as run_script
from test_engine import concurrent, train_all
from test_ranks import a_norm, joined_input
from test_training import config_of, tiny_data

import common
import data
import points
import resnet_imagenet
import runner
import wrn_cifar
from common import GhostBatchNorm2d, Run
from records import UserError, find_record

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
pytestmark = pytest.mark.xdist_group("gpu")  # one process at a time: memory and time are measured

# ------------------------------------------------------------------------------------------- any machine


def test_a_run_that_ended_gives_its_memory_back_before_the_next_one_starts(tmp_path):
    alive, at_start = weakref.WeakSet(), []

    def make_run(*args, real=runner.make_run, **options):
        at_start.append(len(alive))
        alive.add(run := real(*args, **options))
        return run

    gc.disable()
    try:
        train_all(tmp_path, "--seeds 4 --concurrent 2", make_run=make_run)
    finally:
        gc.enable()
    assert at_start == [0, 1, 0, 1]


@pytest.mark.parametrize("free, runs", [((10, 8, 8, 6, 6, 4, 4, 2), 4), ((10, 7, 7, 4), 2), ((10, 1), 1)])
def test_runs_start_while_there_is_memory_for_two_more(free, runs, tmp_path):
    """`free` is the memory before and after the start of each run."""
    readings = iter([*free, *[100] * 100])
    flags = "--seeds 6 --epochs 1 --concurrent 6"
    done = train_all(tmp_path, flags, free_memory=lambda device: next(readings))
    assert max(concurrent(done)) == runs and len(done) == 6


@pytest.mark.parametrize("text", [
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "CUDA error: out of memory",
])  # fmt: skip
def test_words_for_too_little_memory(text):
    assert runner.is_out_of_memory(torch.AcceleratorError(text))
    assert not runner.is_out_of_memory(torch.AcceleratorError("CUDA error: an illegal memory access"))


def test_no_more_runs_at_once_than_cuda_has_streams(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(runner, "train_side_by_side", lambda point, limit, *_: asked.append(limit))
    assert train_all(tmp_path, "--concurrent 100") == {}
    assert asked == [32]


def test_a_run_is_waited_for_before_it_is_dropped(tmp_path):
    """A burst that follows a divergence would write into memory that is another's by then."""
    args = wrn_cifar.parse_args(f"--depth 10 --width 1 --bs 8 --device cpu --out {tmp_path}".split())
    point, waited = wrn_cifar.make_point(args), []
    key, point.folder = (point.rates[0], 0), tmp_path
    run = Run(point.config(key), wrn_cifar.make_net(point.config(key), 10), tiny_data(), CPU)
    run.diverged = True
    path = point.path(key)
    run.stream = SimpleNamespace(synchronize=lambda: waited.append(not path.exists()))
    lock = points.take_lock(path)
    runner.finish(point, key, runner.Job(path, "", run, None, lock), args, 1)
    assert waited == [True] and find_record(path)["status"] == "diverged"


def test_settings_of_a_gpu(monkeypatch):
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    for owner, name in ((torch.backends.cudnn, "benchmark"), (torch.backends.cudnn, "allow_tf32")):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # to be set back
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch, "zeros", None)  # a status or a dry run has no tensor on the GPU
    assert points.find_device("cuda:1") == torch.device("cuda", 1)
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "32"
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: None)
    points.pick_device("cuda:1")
    assert torch.backends.cudnn.benchmark and not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32

    def busy(*_, **__):
        raise RuntimeError("CUDA-capable device(s) is/are busy or unavailable\nmore")

    monkeypatch.setattr(torch, "zeros", busy)
    with pytest.raises(
        UserError, match=r"^cuda:1 cannot be used: CUDA-capable device\(s\) is/are busy or una"
    ):
        points.pick_device("cuda:1")
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    points.find_device("cpu")
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"


# ----------------------------------------------------------------------------------------------- updates


@pytest.fixture
def same_kernels(monkeypatch):
    """What is equal in exact arithmetic is nearly equal on a GPU."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def small_run(flags, precision="float32", device=CUDA, capture=True, compiled=False):
    """A run of nine updates an epoch, in bursts of eight and a single one; its weights at the start."""
    line = f"--depth 10 --width 1 --bs 16 --lr 2^-8 --epochs 2 {flags}"
    config = config_of(line) | {"precision": precision}
    torch.manual_seed(common.stream_seed(config["seed"], "weights"))
    net, images = wrn_cifar.make_net(config, 10), tiny_data(144, 32, 100, device)
    run = Run(config, net, images, device, micro=16, compiled=compiled)
    run.burst = 8
    with runner.on_stream(run):
        if capture and device == CUDA:
            run.capture()
    return run


def make_bursts(run, bursts):
    with runner.on_stream(run):
        for _ in zip(range(bursts), common.train(run, 1), strict=False):
            pass
    if run.stream:
        run.stream.synchronize()  # the default stream, which reads the weights, does not wait for it
    return run


def weights(net):
    return torch.cat([parameter.detach().double().flatten().cpu() for parameter in net.parameters()])


def difference(ours, run):
    """How far weights are from those of a run, relative to the way that the run has gone."""
    torch.manual_seed(common.stream_seed(run.config["seed"], "weights"))
    start, its = weights(wrn_cifar.make_net(run.config, 10)), weights(run.net)
    return ((ours - its).norm() / (its - start).norm()).item()


INITS = ["bn --ghost 8", "none", "zeroinit", "fixup"]


@on_gpu
@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("precision, most", [("float32", 0.02), ("bf16", 0.1), ("fp16", 0.1)])
def test_captured_updates_are_the_eager_ones(init, precision, most, same_kernels):
    """An update that is left out, or made with old numbers, would be 0.1 or more."""
    captured, eager = (small_run(f"--init {init}", precision, capture=c) for c in (True, False))
    replayed = []
    for count, (rows, replay) in captured.graphs.items():
        captured.graphs[count] = rows, lambda count=count, replay=replay: (replay(), replayed.append(count))
    assert difference(weights(make_bursts(captured, 2).net), make_bursts(eager, 2)) < most
    assert replayed == [8, 1] and captured.updates == eager.updates == 9


@on_gpu
@pytest.mark.parametrize("init", ["bn --ghost 8", "none", "fixup"])  # dropout's noise is another one
def test_a_gpu_trains_as_a_cpu(init, same_kernels):
    gpu, cpu = (small_run(f"--init {init}", device=device) for device in (CUDA, CPU))
    make_bursts(gpu, 3)
    make_bursts(cpu, 3)  # an evaluation lies between
    assert difference(weights(gpu.net), cpu) < 0.05
    assert gpu.history[0]["train_loss"] == pytest.approx(cpu.history[0]["train_loss"], rel=1e-3)
    assert gpu.history[0]["l2"] == pytest.approx(cpu.history[0]["l2"], rel=1e-4)


@on_gpu
@pytest.mark.parametrize("init", ["bn --ghost 8", "zeroinit"])
def test_compiled_updates_are_the_eager_ones(init, same_kernels):
    torch.compiler.reset()
    compiled, eager = (small_run(f"--init {init}", capture=c, compiled=c) for c in (True, False))
    assert difference(weights(make_bursts(compiled, 2).net), make_bursts(eager, 2)) < 0.05


@on_gpu
@pytest.mark.parametrize("init, precision", [("bn --ghost 8", "bf16"), ("zeroinit", "fp16")])
def test_a_captured_run_goes_on_from_its_checkpoint(init, precision, tmp_path, same_kernels):
    straight, first, second = (small_run(f"--init {init}", precision) for _ in range(3))
    make_bursts(straight, 99)
    runner.save(
        [SimpleNamespace(run=make_bursts(first, 1), path=tmp_path / "run.json")]
    )  # a burst is under way
    with runner.on_stream(second):
        assert runner.resume(tmp_path / "run.json", second)
    assert second.updates == 8
    assert difference(weights(make_bursts(second, 99).net), straight) < 0.1
    assert len(second.history) == len(straight.history) == 2
    if precision == "fp16":
        assert second.scaler.state_dict() == straight.scaler.state_dict()


@on_gpu
def test_replays_take_no_memory():
    """Neither do those of the one-update graph: its memory is that of the burst's."""
    run = small_run("--init bn --bs 16")
    with runner.on_stream(run):
        run.begin_epoch()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for rate, rows in run.bursts():
            run.advance(rate, rows)
        torch.cuda.synchronize()
    assert run.updates == 9 and torch.cuda.max_memory_allocated() - before < 2**20


# ------------------------------------------------------------------------------------------ side by side


def close(ours, theirs):
    """Whether records hold the same runs, but for rounding."""
    assert ours.keys() == theirs.keys()
    for name, record in theirs.items():
        assert ours[name]["status"] == record["status"]
        if record["status"] == "done":
            assert ours[name]["final"]["train_loss"] == pytest.approx(record["final"]["train_loss"], abs=5e-3)


@on_gpu
@pytest.mark.parametrize("amp", ["off", "auto"])
def test_together_as_alone(amp, tmp_path):
    flags = f"--init zeroinit --lr 2^-5 2^-6 --seeds 3 --amp {amp} --device cuda"
    together, alone = train_all(tmp_path / "6", flags), train_all(tmp_path / "1", f"{flags} --concurrent 1")
    assert concurrent(together) == [6] * 6 and concurrent(alone) == [1] * 6
    close(together, alone)
    assert len({record["final"]["train_loss"] for record in alone.values()}) == 6


@on_gpu
def test_runs_that_diverge_make_room_and_disturb_no_other(tmp_path):
    flags = "--init zeroinit --lr 2^20 2^-6 2^21 2^22 --epochs 8 --concurrent 2 --device cuda"
    together, alone = train_all(tmp_path / "4", flags), train_all(tmp_path / "1", f"{flags} --lr 2^-6")
    assert sorted(record["status"] for record in together.values()) == ["diverged"] * 3 + ["done"]
    close({name: together[name] for name in alone}, alone)


def in_little_memory(number, out):
    """With room for two runs and a half, six are trained in turn."""
    flags = "--init none --depth 16 --width 8 --bs 96 --epochs 1 --device cuda"  # a gigabyte
    train_all(f"{out}/0", flags)  # cuDNN tries its algorithms, which takes more than training
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    train_all(f"{out}/1", flags)
    one, total = torch.cuda.max_memory_reserved() - before, torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2.5 * one) / total)
    done = train_all(f"{out}/6", f"{flags} --seeds 6 --concurrent 6")
    assert len(done) == 6 and 1 <= max(concurrent(done)) < 6


@on_gpu
def test_too_little_memory_means_fewer_runs(tmp_path, capfd):
    """In a process of its own: blocks that other tests left half empty would hold a run more."""
    torch.multiprocessing.spawn(in_little_memory, (str(tmp_path),))
    assert "the device's memory holds" in capfd.readouterr().out


# ------------------------------------------------------------------------------------------------- parts


@on_gpu
def test_float32_is_float32():
    points.pick_device("cuda")
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(64, 64, 8, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    pairs = [
        (functools.partial(F.conv2d, padding=4), x, weight),
        (torch.matmul, x.flatten(1), weight.flatten(1).T),
    ]
    for function, *inputs in pairs:
        exact, ours = function(*inputs), function(*(t.to(CUDA, torch.float32) for t in inputs)).cpu()
        assert (ours - exact).norm() < 1e-5 * exact.norm()  # TF32 is 3e-4 away


@on_gpu
@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("form", ["forward", "spell_out", "compiled"])
def test_forms_of_ghost_batch_norm(form, dtype, most, layout):
    """Four ghost batches, against PyTorch's batch norm of each in float64."""
    generator = torch.Generator().manual_seed(0)
    x, direction = torch.randn(2, 64, 8, 16, 16, generator=generator, dtype=torch.float64)
    x = (3 * x + 1).to(dtype).double().requires_grad_()
    mean, var = torch.zeros(8).double(), torch.ones(8).double()
    expected = torch.cat([F.batch_norm(part, mean, var, training=True) for part in x.split(16)])
    (gradient,) = torch.autograd.grad((expected * direction).sum(), x)

    norm = GhostBatchNorm2d(8, 16).to(CUDA)
    apply = torch.compile(norm) if form == "compiled" else getattr(norm, form)
    image = x.detach().to(CUDA, dtype).contiguous(memory_format=layout).requires_grad_()
    out = apply(image)
    assert out.dtype == dtype
    (its_gradient,) = torch.autograd.grad((out.double() * direction.to(CUDA)).sum(), image)
    theirs = out, its_gradient, norm.running_mean, norm.running_var
    for ours, reference in zip(theirs, (expected, gradient, mean, var), strict=True):
        assert (ours.double().cpu() - reference).norm() <= most * reference.norm()


@on_gpu
def test_resnet50(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SHAPES", 96)
    monkeypatch.setattr(data, "SHAPES_TEST", 96)
    flags = "--data shapes --image-size 64 --bs 32 --epochs 2 --lr 2^-6 --device cuda"
    for more in ("--arch v2 --init bn --ghost 16", "--arch v1 --init zeroinit+bias --amp fp16"):
        assert run_script(resnet_imagenet, f"{flags} {more}", "--out", tmp_path) == 0
    records = [find_record(path) for path in sorted(tmp_path.glob("shapes/*.json"))]
    assert [record["config"]["precision"] for record in records] == ["fp16", "bf16"]
    assert all(record["status"] == "done" and 0 <= record["final"]["test_top5"] <= 1 for record in records)


# ------------------------------------------------------------------------------------------------- ranks


def rank(number, world, backend, port, out):
    """What each of several processes on one GPU finds: batch norm over all of them, and a run's weights."""
    os.environ |= {"RANK": str(number), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.backends.cudnn.allow_tf32 = False
    torch.distributed.init_process_group(backend)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        x, direction = (part.chunk(world)[number].to(CUDA) for part in joined_input())
        norm = a_norm().float().to(CUDA)
        norm.group = torch.distributed.group.WORLD
        image = x.to(dtype, memory_format=torch.channels_last).requires_grad_()
        its = norm.normalize_over_ranks(image)
        gradients = torch.autograd.grad((its.double() * direction).sum(), [image, norm.weight, norm.bias])
        found.append([its.detach(), *gradients, norm.running_mean, norm.running_var])
    runs = [small_run(f"--init {init}", capture=False) for init in ("bn --ghost 16", "zeroinit")]
    torch.save((found, [weights(make_bursts(run, 2).net) for run in runs]), f"{out}/{number}.pt")
    points.leave_ranks()


@on_gpu
@pytest.mark.parametrize("world, backend", [(1, "nccl"), (2, "gloo")])
def test_ranks_on_a_gpu(world, backend, tmp_path, same_kernels):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(rank, (world, backend, port, str(tmp_path)), nprocs=world)
    every = [torch.load(tmp_path / f"{number}.pt", map_location="cpu") for number in range(world)]

    x, direction = joined_input()
    norm = a_norm()
    out = norm.normalize(x.requires_grad_())
    gradients = torch.autograd.grad((out * direction).sum(), [x, norm.weight, norm.bias])
    whole = [out, *gradients, norm.running_mean, norm.running_var]
    for i, most in enumerate((1e-4, 3e-2)):
        images = [torch.cat([found[i][j] for found, _ in every]) for j in range(2)]
        sums = [sum(found[i][j].double() for found, _ in every) for j in (2, 3)]
        for ours, reference in zip([*images, *sums, *every[-1][0][i][4:]], whole, strict=True):
            assert (ours.double() - reference).norm() <= most * reference.norm()

    for i, init in enumerate(("bn --ghost 16", "zeroinit")):
        alone = make_bursts(small_run(f"--init {init}", capture=False), 2)
        assert all(difference(its[i], alone) < 0.02 for _, its in every)
