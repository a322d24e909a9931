"""Several processes make the update of one, whatever the division into ranks, ghost batches and passes."""

import contextlib
import functools
import io
import os
import socket
import subprocess
import sys
import time
import types

import pytest
import scripts
import torch
import torch.nn.functional as F
from scripts import make_folder
from test_engine import make_run
from test_training import running_statistics, tiny_data, tiny_run

import common
import resnet_imagenet
import runner
import wrn_cifar
from common import Division, GhostBatchNorm2d, Run, UserError, divide_batch
from data import Images
from records import read_record

CASES = {  # flags, and images per pass; each update has 8 images
    "none": ("--init none", 8),
    "none, passes": ("--init none", 1),
    "zeroinit": ("--init zeroinit", 8),
    "zeroinit, passes": ("--init zeroinit", 1),
    "fixup, passes": ("--init fixup", 1),
    "bn, ghost batches in each rank": ("--init bn --ghost 2", 8),
    "bn, ghost batches in each rank, passes": ("--init bn --ghost 2", 2),
    "bn, a ghost batch over half of the ranks": ("--init bn --ghost 4", 0),
    "bn, a ghost batch over all ranks": ("--init bn --ghost 8", 0),
    "bn, the whole batch": ("--init bn --ghost 0", 0),
}
RESNETS = {  # version, method, ghost batch, images per pass
    "bn, ghost batches in passes": ("v2", "bn", 2, 2),
    "bn, a ghost batch over both ranks": ("v1", "bn", 8, 0),
    "zeroinit+bias, passes": ("v1", "zeroinit+bias", None, 2),
}
STATISTICS = {
    "ghost batches in each rank": 2,
    "ghost batches over pairs of four ranks": 8,
}  # ghost; 16 images


# ----------------------------------------------------------------------------------- what each rank does


def train_some(case):
    """Four updates and an evaluation in float64: parameters, running statistics and history."""
    flags, micro = CASES[case]
    run = tiny_run(flags, tiny_data(test=11), micro=micro)
    for _ in zip(range(4), common.train(run, 1), strict=False):
        pass
    history = [{key: value for key, value in entry.items() if key != "seconds"} for entry in run.history]
    return [p.detach() for p in run.net.parameters()], running_statistics(run.net), history


def train_low(precision):
    """An update in low precision, in passes of two images; the parameters."""
    flags = "--depth 10 --width 1 --init zeroinit --bs 8 --lr 2^-4 --dampening 0"
    run = make_run(flags, precision, micro=2)
    for parameter in run.net.parameters():
        parameter.data += 0.5 * (parameter.ndim == 0)
    before = [p.detach().clone() for p in run.net.parameters()]
    # At the usual scale gradients can overflow on some ranks' passes, and then the update is left out.
    run.scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=precision == "fp16")
    next(common.train(run, 1))
    assert not any(map(torch.equal, before, run.net.parameters()))
    return [p.detach() for p in run.net.parameters()]


def train_resnet(case):
    """An update of ResNet-50 in float64: the steps of all parameters, and the tally of the losses.

    The net is far from its start, where Fixup and ZeroInit have gradients of zero.
    """
    version, init, ghost, micro = RESNETS[case]
    words = f"--data shapes --device cpu --amp off --arch {version} --init {init} --bs 8 --lr 2^-4 --epochs 1"
    point = resnet_imagenet.make_point(resnet_imagenet.parse_args(words.split()))
    config = point.config((2**-4, 0)) | {"ghost": ghost}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "initialize", lambda *_: None)  # takes a second, and other weights do as well
        torch.manual_seed(0)
        net = resnet_imagenet.make_net(config, 10).double()
    for parameter in net.parameters():
        noise = torch.randn_like(parameter)  # positive for scalars, so that no ReLU is dead
        parameter.data += 0.1 * noise / parameter[0].numel() ** 0.5 if parameter.ndim else 0.1 * noise.abs()
    run = Run(config, net, tiny_data(8, 48 if ghost else 32, test=3), torch.device("cpu"), micro=micro)
    before = [p.detach().clone() for p in net.parameters()]
    next(common.train(run, 1))
    steps = [(p.detach() - b) / 2**-4 for p, b in zip(net.parameters(), before, strict=True)]
    return steps, run.totals


def statistics_of_updates(case):
    """Batch norm's running statistics after each of 15 updates, (15, values), and those of the batches.

    The latter, (15, ghost batches, values), are found where this is the only rank.
    """
    run = tiny_run(
        f"--init bn --bs 16 --base-init lecun --ghost {STATISTICS[case]}",
        tiny_data(96),
        micro=16 if common.ranks()[1] == 1 else 0,
    )
    norms = [m for m in run.net.modules() if isinstance(m, GhostBatchNorm2d)]
    own = []

    def note(norm, inputs):
        for moment in (torch.mean, torch.var):
            own.append(
                torch.stack([moment(part, (0, 2, 3)) for part in inputs[0].split(norm.ghost)]).detach()
            )

    for norm in norms if run.world == 1 else ():
        norm.register_forward_pre_hook(note)
    running, batches, bursts = [], [], common.train(run, 10)
    for _ in range(15):
        next(bursts)
        running.append(torch.cat(running_statistics(run.net)))
        if own:
            batches.append(torch.cat(own, 1))
            own.clear()
    return torch.stack(running), torch.stack(batches) if batches else None


def normalize_over_ranks(size):
    """This rank's output, gradients and running statistics of the batch norm that is for GPUs.

    It is over `size` ranks, each with the same number of images of `joined_input`.
    """
    (rank, world), group = common.ranks(), common.rank_group(size)
    x, direction = (part.chunk(world)[rank].clone() for part in joined_input())
    norm = a_norm()
    norm.group = group
    out = norm.normalize_over_ranks(x.requires_grad_())
    gradients = torch.autograd.grad((out * direction).sum(), [x, norm.weight, norm.bias])
    return [out.detach(), *gradients, norm.running_mean, norm.running_var]


def joined_input():
    """Images of all ranks, and what their batch norm is multiplied by."""
    generator = torch.Generator().manual_seed(0)
    x, direction = torch.randn(2, 16, 3, 5, 5, dtype=torch.float64, generator=generator)
    return (3 * x + torch.arange(16)[:, None, None, None]).to(memory_format=torch.channels_last), direction


def a_norm():
    """A batch norm whose parameters and statistics are not those of its start."""
    norm = GhostBatchNorm2d(3).double()
    norm.momentum = 0.3
    for i, tensor in enumerate((norm.weight, norm.bias, norm.running_mean, norm.running_var), 1):
        tensor.data.copy_(torch.tensor([0.5, 1.0, 1.5]) * i)
    return norm


def spread(channels):
    return channels[:, None, None]


# What PyTorch's kernels for GPUs compute (aten/src/ATen/native/cuda/Normalization.cuh), in float64.


def batch_norm_stats(x, eps):
    return x.mean((0, 2, 3)), (x.var((0, 2, 3), correction=0) + eps).rsqrt()


def batch_norm_gather_stats_with_counts(x, means, invstds, running_mean, running_var, momentum, eps, counts):
    counts, variances = counts[:, None], invstds**-2 - eps
    mean = (counts * means).sum(0) / counts.sum()
    squares = (counts * (variances + (means - mean) ** 2)).sum(0)
    running_mean.mul_(1 - momentum).add_(momentum * mean)
    running_var.mul_(1 - momentum).add_(momentum * squares / (counts.sum() - 1))
    return mean, (squares / counts.sum() + eps).rsqrt()


def batch_norm_elemt(x, weight, bias, mean, invstd, eps):
    return (x - spread(mean)) * spread(invstd * weight) + spread(bias)


def batch_norm_backward_reduce(gradient, x, mean, invstd, weight, *wanted):
    assert wanted == (True, True, True) and gradient.stride() == x.stride()
    total = gradient.sum((0, 2, 3))
    along = (gradient * (x - spread(mean))).sum((0, 2, 3))
    return total, along, along * invstd, total


def batch_norm_backward_elemt(gradient, x, mean, invstd, weight, total, along, counts):
    assert counts.dtype == torch.int32
    centred = (x - spread(mean)) * spread(invstd**2 * along / counts.sum())
    return (gradient - spread(total / counts.sum()) - centred) * spread(invstd * weight)


KERNELS = (
    batch_norm_stats,
    batch_norm_gather_stats_with_counts,
    batch_norm_elemt,
    batch_norm_backward_reduce,
    batch_norm_backward_elemt,
)


def with_a_rank_that_cannot_read(rank):
    """The error on this rank if rank 1 cannot read its images."""

    def load_data(*_):
        if rank == 1:
            raise UserError("no such folder")
        return types.SimpleNamespace(fingerprint="0123")

    with pytest.raises(UserError) as error:
        runner.load_on_all_ranks(types.SimpleNamespace(load_data=load_data), None, None)
    return str(error.value)


def with_other_images(out, rank):
    """How wrn_cifar.py ends on this rank, what it says, whether it leaves the others, and within a minute.

    Each rank reads a folder of its own; there are two ranks on each machine.
    """
    began = time.monotonic()
    folder = f"{out}/{rank}/images"
    flags = f"--data folder --data-dir {folder} --init none --bs 4 --device cpu --out {out}/results"
    os.environ["LOCAL_RANK"] = str(rank % 2)
    with contextlib.redirect_stderr(io.StringIO()) as said:
        code = scripts.run(wrn_cifar, flags)
    return code, said.getvalue(), not torch.distributed.is_initialized(), time.monotonic() - began < 60


def rank(number, world, port, out):
    """What each of several processes does, as torchrun would start it."""
    os.environ |= {"RANK": str(number), "WORLD_SIZE": str(world), "LOCAL_RANK": str(number)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    runner.pick_device("cpu")
    for kernel in KERNELS:
        setattr(torch, kernel.__name__, kernel)
    found = {case: train_some(case) for case in CASES}
    found |= {precision: train_low(precision) for precision in ("bf16", "fp16")}
    found["statistics"] = {case: statistics_of_updates(case)[0] for case in STATISTICS}
    found["norms"] = {size: normalize_over_ranks(size) for size in (2, 4) if size <= world}
    if world == 2:
        found["resnet"] = {case: train_resnet(case) for case in RESNETS}
    found["no images"] = with_a_rank_that_cannot_read(number)
    if world == 4:
        found["other images"] = with_other_images(out, number)
    torch.save(found, f"{out}/{world}-{number}.pt")


# --------------------------------------------------------------------------------------------- the ranks


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What all ranks found, for each number of ranks."""
    out = tmp_path_factory.mktemp("ranks")
    for number in range(4):
        make_folder(out / str(number) / "images")
    (out / "2" / "images" / "train" / "n01" / "2.png").unlink()
    results = {}
    for world in (2, 4):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            given = world, free.getsockname()[1], str(out)
        torch.multiprocessing.start_processes(rank, given, nprocs=world, start_method="forkserver")
        results[world] = [torch.load(out / f"{world}-{i}.pt", weights_only=False) for i in range(world)]
    return results


@functools.cache
def alone(function, case):
    """What one process finds."""
    return function(case)


# ----------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_ranks_make_the_updates_of_one_process(case, world, found):
    parameters, statistics, history = alone(train_some, case)
    over_all = "over all" in case or "whole" in case
    for ours in (results[case] for results in found[world]):
        for mine, reference in zip(ours[0], parameters, strict=True):
            torch.testing.assert_close(mine, reference, rtol=0, atol=1e-9)
        for mine, reference in zip(ours[1], statistics, strict=True) if over_all else ():
            torch.testing.assert_close(mine, reference, rtol=0, atol=1e-9)
        for mine, reference in zip(ours[2], history, strict=True):
            for key in ("lr", "train_loss", "l2", "train_accuracy"):
                assert mine[key] == pytest.approx(reference[key], abs=1e-9), key
            if "bn" not in case or over_all:
                assert mine["test_accuracy"] == reference["test_accuracy"]  # of 11 images


@pytest.mark.parametrize("world", [2, 4])
def test_all_ranks_hold_the_same_bits(world, found):
    first, *others = found[world]
    for case in CASES:
        for theirs in (results[case] for results in others):
            assert all(map(torch.equal, first[case][0] + first[case][1], theirs[0] + theirs[1]))
            assert first[case][2] == theirs[2]


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_ranks_make_the_update_of_one_process_in_low_precision(precision, world, found):
    """The passes are the same; their gradients are summed in float32, in another order."""
    reference = alone(train_low, precision)
    for ours in (results[precision] for results in found[world]):
        assert all(map(torch.equal, ours, found[world][0][precision]))
        for mine, theirs in zip(ours, reference, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", RESNETS)
def test_two_ranks_make_the_update_of_one_on_resnet(case, found):
    version, init, ghost, _ = RESNETS[case]
    RESNETS["one rank"] = version, init, ghost, 0
    steps, totals = train_resnet("one rank")
    del RESNETS["one rank"]
    assert sum((step != 0).any().item() for step in steps) == len(steps)  # every parameter moves
    for theirs, their_totals in (results["resnet"][case] for results in found[2]):
        for ours, reference in zip(theirs, steps, strict=True):
            assert (ours - reference).abs().max() <= 1e-9 * reference.abs().max().clip(1)
        torch.testing.assert_close(their_totals, totals, rtol=1e-9, atol=0)


# ------------------------------------------------------------------------------------ running statistics


def averages(batches, running, groups, momentum):
    """Running statistics after each update if its ghost batches are divided among groups of ranks.

    Each group makes its steps one after the other; then all go on from the mean of the groups.
    """
    after = []
    for update in batches:
        ends = []
        for part in update.chunk(groups):
            end = running
            for batch in part:
                end = (1 - momentum) * end + momentum * batch
            ends.append(end)
        running = torch.stack(ends).mean(0)
        after.append(running)
    return torch.stack(after)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("case", STATISTICS)
def test_running_statistics_do_not_depend_on_the_number_of_ranks(case, world, found):
    """They differ by the order inside an update at most, however many updates there were.

    Of an update's S ghost batches, the i-th has weight a_i in one process and b_i with several ranks. Either
    weights' sum is 1 - q with q = (1-m)^S. So an update keeps q of an earlier difference, and adds at most
    d = sum |a_i - b_i| times half the range of the ghost batches' values. The sum d + q d + q^2 d + ... =
    d / (1 - q) bounds the difference after any number of updates.
    """
    one, batches = alone(statistics_of_updates, case)
    groups = world // max(1, STATISTICS[case] * world // 16)
    count, momentum = batches.shape[1], 0.1
    start = torch.cat(running_statistics(tiny_run("--init bn").net))
    torch.testing.assert_close(averages(batches, start, 1, momentum), one, rtol=0, atol=1e-10)
    a = averages(torch.eye(count)[None].double(), torch.zeros(count).double(), 1, momentum)[0]
    b = averages(torch.eye(count)[None].double(), torch.zeros(count).double(), groups, 1 - 0.9**groups)[0]
    assert a.sum().item() == pytest.approx(b.sum().item()) == pytest.approx(1 - 0.9**count)
    half_range = ((batches.amax(1) - batches.amin(1)) / 2).amax(0)
    bound = (a - b).abs().sum() * half_range / (1 - 0.9**count)
    for ours in (results["statistics"][case] for results in found[world]):
        assert ((ours - one).abs() <= bound + 1e-9).all()
    if groups > 1:  # the bound is not met if each rank keeps the momentum of one process
        unchanged = averages(batches, start, groups, momentum)
        assert ((unchanged - one).abs() > 2 * bound).double().mean() > 0.1


@pytest.mark.parametrize("world, size", [(2, 2), (4, 2), (4, 4)])
def test_batch_norm_over_gpus_is_that_of_their_joined_images(world, size, found):
    """PyTorch's kernels, which are for GPUs only, are replaced by what they compute."""
    x, direction = joined_input()
    for first in range(0, world, size):
        parts = [found[world][i]["norms"][size] for i in range(first, first + size)]
        images, weights = (t.chunk(world // size)[first // size] for t in (x, direction))
        norm, images = a_norm(), images.clone().requires_grad_()
        out = F.batch_norm(
            images, norm.running_mean, norm.running_var, norm.weight, norm.bias, True, norm.momentum, norm.eps
        )
        expected = torch.autograd.grad((out * weights).sum(), [images, norm.weight, norm.bias])
        torch.testing.assert_close(torch.cat([part[0] for part in parts]), out, rtol=0, atol=1e-12)
        torch.testing.assert_close(torch.cat([part[1] for part in parts]), expected[0], rtol=0, atol=1e-12)
        for i in (1, 2):  # DistributedDataParallel sums these over the ranks
            total = sum(part[1 + i] for part in parts)
            torch.testing.assert_close(total, expected[i], rtol=0, atol=1e-11)
        for part in parts:
            torch.testing.assert_close(part[4], norm.running_mean, rtol=0, atol=1e-12)
            torch.testing.assert_close(part[5], norm.running_var, rtol=0, atol=1e-12)


# ----------------------------------------------------------------------------------- errors and commands


def test_ranks_that_read_different_images_do_not_start(found):
    """All end with the code for bad data, and the first of each machine says why, in one line."""
    line = "error: ranks 0 and 2 read different images: give all ranks the same files\n"
    ends = [results["other images"] for results in found[4]]
    assert ends == [(2, line, True, True), (2, "", True, True)] * 2


@pytest.mark.parametrize("world", [2, 4])
def test_all_ranks_have_the_error_of_one_that_cannot_read_its_images(world, found):
    assert [results["no images"] for results in found[world]] == ["rank 1: no such folder"] * world


@pytest.mark.parametrize("local_rank", ["0", "1"])
def test_an_error_of_one_rank_is_said_by_that_rank(local_rank, monkeypatch, tmp_path, capsys):
    """Such as an image that only it reads. What all ranks find, the first of a machine says."""
    monkeypatch.setattr(runner, "rank_variable", lambda _: int(local_rank))
    flags = f"--data shapes --depth 10 --width 1 --init none --bs 16 --lr 1 --device cpu --out {tmp_path}"

    def fail(*_, **__):
        raise UserError("7.jpg is not a readable image")

    with monkeypatch.context() as patch:
        patch.setattr(Images, "train_batch", fail)
        assert scripts.run(wrn_cifar, flags) == 2
    assert capsys.readouterr().err == "error: 7.jpg is not a readable image\n"
    monkeypatch.setattr(wrn_cifar.data, "shapes", fail)
    assert scripts.run(wrn_cifar, flags) == 2
    assert capsys.readouterr().err == ("error: 7.jpg is not a readable image\n" if local_rank == "0" else "")


@pytest.mark.parametrize("script", [wrn_cifar, resnet_imagenet])
def test_both_scripts_run_under_torchrun(script, tmp_path):
    """The record of two ranks is that of one process."""
    test = "test" if script is wrn_cifar else "val"
    folder = make_folder(tmp_path / "images", test, images=4)
    flags = f"--data folder --data-dir {folder} --bs 8 --lr 2^-5 --device cpu --amp off"
    if script is wrn_cifar:
        flags += " --depth 10 --width 1 --init bn --ghost 8 --epochs 3"
    else:
        flags += " --init zeroinit --micro 2 --image-size 32 --workers 0 --epochs 1"
    command = "torch.distributed.run --nproc-per-node=2 --rdzv-backend=c10d --rdzv-endpoint=127.0.0.1:0"
    command = [sys.executable, "-m", *command.split(), script.__file__, *flags.split()]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--out", tmp_path / "two"], stderr=subprocess.PIPE, env=environment)
    assert done.returncode == 0, done.stderr
    assert scripts.run(script, flags, "--out", tmp_path / "one") == 0
    (path,) = tmp_path.glob("one/images/*.json")
    one, two = (read_record(tmp_path / name / "images" / path.name) for name in ("one", "two"))
    assert (one["environment"]["ranks"], two["environment"]["ranks"]) == (1, 2)
    assert one["config"] == two["config"] and one["data"] == two["data"]
    for key, value in one["final"].items():
        assert two["final"][key] == pytest.approx(value, rel=1e-3), key


# ----------------------------------------------------------------------------------- division of a batch


@pytest.mark.parametrize(
    "bs, ghost, world, micro, on_cpu, on_gpu",
    [
        (1024, 256, 8, 0, Division(128, 128, 256, 2), Division(128, 128, 256, 2)),
        (1024, 256, 2, 0, Division(512, 256, 256, 1), Division(512, 512, 256, 1)),
        (1024, 256, 2, 512, Division(512, 512, 256, 1), Division(512, 512, 256, 1)),
        (1024, None, 8, 32, Division(128, 32, None, 1), Division(128, 32, None, 1)),
        (1024, None, 1, 0, Division(1024, 64, None, 1), Division(1024, 1024, None, 1)),
        (32, 64, 4, 0, Division(8, 8, 32, 4), Division(8, 8, 32, 4)),
        (32, 0, 1, 0, Division(32, 32, 32, 1), Division(32, 32, 32, 1)),
        (1, 64, 1, 64, Division(1, 1, 1, 1), Division(1, 1, 1, 1)),
    ],
)
def test_division_of_a_batch(bs, ghost, world, micro, on_cpu, on_gpu):
    assert divide_batch(bs, ghost, world, micro, "cpu") == on_cpu
    assert divide_batch(bs, ghost, world, micro, "cuda") == on_gpu


@pytest.mark.parametrize(
    "bs, ghost, world, micro, said",
    [
        (30, None, 4, 0, "--bs 30 should be a multiple of the 4 ranks"),
        (100, 64, 1, 0, "--bs 100 should be a multiple of --ghost 64, or smaller"),
        (192, 64, 2, 0, "ghost batches of 64 cannot be made of 96 images on each of 2 ranks"),
        (192, 64, 6, 32, None),
        (160, 32, 10, 0, None),
        (96, 48, 3, 0, "ghost batches of 48 cannot be made of 32 images on each of 3 ranks"),
        (384, 128, 6, 96, "--micro 96 should be a multiple of a ghost batch's 64 images on one rank"),
        (128, 64, 1, 32, "--micro 32 should be a multiple of a ghost batch's 64 images on one rank"),
    ],
)
def test_divisions_that_would_change_the_update(bs, ghost, world, micro, said):
    with pytest.raises(UserError, match=said) if said else contextlib.nullcontext():
        divide_batch(bs, ghost, world, micro, "cpu")
