"""The engine: how much a step costs, runs side by side, and runs that are stopped and go on in another process."""

import contextlib
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from test_training import tiny_data, tiny_run
from torch.utils._python_dispatch import TorchDispatchMode

import common
import runner
import wrn_cifar

CPU = torch.device("cpu")
# Operations that only describe memory; `detach` is the mode's own, for each tensor that the backward pass keeps.
NO_WORK = {"detach", "empty", "expand", "permute", "select", "slice", "split", "t", "unbind", "unsqueeze", "view"}


class Count(TorchDispatchMode):
    """Counts ATen operations by name."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        namespace, name = function._schema.name.split("::")
        if namespace == "aten":
            self.names[name] += 1
        return function(*args, **(kwargs or {}))


def operations(init, precision):
    """The operations of one update of WRN-16-4, data, metrics and optimizer included."""
    (config,) = wrn_cifar.configurations(wrn_cifar.parse_args(f"--init {init} --bs 8 --epochs 1".split())).values()
    run = common.Run(config, wrn_cifar.make_net(config), tiny_data(24, 32), CPU, precision)
    bursts = common.train(run, 1)
    next(bursts)
    with Count() as count:
        next(bursts)
    return count.names


@pytest.mark.parametrize("init", ["bn", "none", "zeroinit"])
@pytest.mark.parametrize("precision", ["off", "bf16"])
def test_an_update_is_few_operations_and_never_read_by_the_host(init, precision):
    names = operations(init, precision)
    assert names["convolution"] == names["convolution_backward"] == 16 and names["_fused_sgd_"] >= 1  # all is counted
    at_most = 136 if (init, precision) == ("zeroinit", "bf16") else 125  # its scalars' gradients are cast one by one
    assert sum(n for name, n in names.items() if name not in NO_WORK) <= at_most
    assert not names.keys() & {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal"}


def train_all(out, flags, **options):
    """Run wrn_cifar on little generated data (flags may override these); returns the records by name."""
    line = f"--data shapes --depth 10 --width 1 --bs 16 --train-size 96 --epochs 2 --device cpu --out {out} {flags}"
    args = wrn_cifar.parse_args(line.split())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wrn_cifar, "shapes", lambda n, seed, draw=wrn_cifar.shapes: draw(96, seed))
        for name, value in options.items():
            patch.setattr(runner, name, value)
        runner.train_missing(
            wrn_cifar.configurations(args), wrn_cifar.make_net, lambda d: wrn_cifar.load_data(args, d), args
        )
    return {path.stem: json.loads(path.read_text()) for path in Path(out).glob("shapes/*.json")}


def results(records):
    """What the runs computed, without times."""
    timeless = {
        name: [{k: v for k, v in entry.items() if k != "seconds"} for entry in r["history"]]
        for name, r in records.items()
    }
    return timeless, {name: (r["status"], r["final"], r.get("diverged_at_step")) for name, r in records.items()}


@pytest.mark.parametrize("init", ["bn", "zeroinit"])
def test_runs_side_by_side_are_the_runs_alone_bit_by_bit(init, tmp_path):
    flags = f"--init {init} --lr 2^-3 2^-4 --seeds 2"
    alone = train_all(tmp_path / "alone", flags + " --concurrent 1")
    together = train_all(tmp_path / "together", flags + " --concurrent 3")  # a group of three and one of one
    assert results(alone) == results(together) and len(alone) == 4
    assert [r["environment"]["concurrent"] for _, r in sorted(together.items())].count(3) == 3


def test_a_run_that_diverges_does_not_disturb_the_others(tmp_path):
    alone = train_all(tmp_path / "alone", "--lr 2^-3")
    together = train_all(tmp_path / "together", "--lr 2^20 2^-3 2^30 --init zeroinit --concurrent 3")
    name = "wrn10-1_zeroinit_bs16_lr2^-3_ep2_trainsize96_s00"
    statuses = {r["config"]["lr"]: r["status"] for r in together.values()}
    assert statuses == {2**20: "diverged", 2**-3: "done", 2**30: "diverged"}
    assert results({name: together[name]}) == results(alone)


@pytest.mark.parametrize("in_capture", [False, True])
@pytest.mark.parametrize("fails_at", [0, 2])
def test_memory_that_is_too_small_means_fewer_runs_at_once(fails_at, in_capture, tmp_path, capsys):
    alive = []

    def prepare(path, run, args, real=runner.prepare):
        if len(alive) % 3 == fails_at:
            alive.append("failed")
            try:
                raise torch.OutOfMemoryError("CUDA out of memory")
            finally:
                if in_capture:
                    raise RuntimeError("operation failed due to a previous error during capture")
        alive.append(path.stem)
        return real(path, run, args)

    if fails_at == 0:
        with pytest.raises(common.UserError, match="--micro"):
            train_all(tmp_path, "--seeds 4 --concurrent 4", prepare=prepare)
        return
    done = train_all(tmp_path, "--seeds 4 --concurrent 4", prepare=prepare)
    assert "the device's memory holds 2 runs at a time" in capsys.readouterr().out
    assert len(done) == 4 and {r["environment"]["concurrent"] for r in done.values()} <= {1, 2}


def replayed(run):
    """Let a run on a CPU go through everything that a CUDA graph needs, but for the graph."""
    run.burst = 3
    run.capture(record=lambda work, generator: work)
    return run


@pytest.mark.parametrize("init", ["bn", "zeroinit"])
def test_the_path_of_captured_bursts_equals_single_updates(init):
    plain, burst = (tiny_run(f"--init {init} --bs 4 --epochs 3") for _ in range(2))
    counts = list(common.train(plain, 1)), list(common.train(replayed(burst), 1))
    # Of the 6 updates of an epoch, bursts take 3 at a time while the learning rate stays.
    assert counts == ([4] * 18, [12, 12, 12, *[4] * (sum(counts[0]) // 4 - 9)])
    assert len({plain.scheduled(i) for i in range(9, 18)}) == 9
    assert all(map(torch.equal, plain.tensors, burst.tensors))


def test_whatever_touches_a_runs_tensors_is_put_on_its_own_stream(tmp_path, monkeypatch):
    """Also the copies for a checkpoint: taken from another stream, they would not wait for the updates under way."""
    current, seen = [], set()

    @contextlib.contextmanager
    def on_stream(run):
        current.append(run)
        yield
        current.pop()

    def guard(name):
        real = getattr(common.Run, name)

        def called(run, *args):
            assert current[-1:] == [run], name
            seen.add(name)
            return real(run, *args)

        monkeypatch.setattr(common.Run, name, called)

    def write_and_stop(path, state, real=runner.write_checkpoint):
        real(path, state)
        common.stop_asked.set()

    for name in ("advance", "evaluate", "state", "load"):
        guard(name)
    flags = "--seeds 2 --concurrent 2 --checkpoint-every 0"
    with pytest.raises(runner.Interrupted):
        train_all(tmp_path, flags, on_stream=on_stream, write_checkpoint=write_and_stop)
    assert len(train_all(tmp_path, flags, on_stream=on_stream)) == 2
    assert seen == {"advance", "evaluate", "state", "load"}


def without_seconds(history):
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in history]


@pytest.mark.parametrize("flags", ["--init bn --ghost 4", "--init zeroinit", "--init fixup --momentum 0"])
@pytest.mark.parametrize("updates", [1, 3, 4, 7])
def test_a_run_goes_on_from_its_checkpoint_bit_by_bit(flags, updates, tmp_path):
    straight, first, second = (tiny_run(flags) for _ in range(3))
    for _ in common.train(straight, 2):
        pass
    bursts = common.train(first, 2)
    for _ in range(updates):
        next(bursts)
    runner.write_checkpoint(tmp_path / "run.json", first.state())
    second.load(runner.read_checkpoint(tmp_path / "run.json", first.state()["config"]))
    for _ in common.train(replayed(second) if updates == 3 else second, 2):
        pass
    assert all(map(torch.equal, straight.tensors, second.tensors))
    assert without_seconds(straight.history) == without_seconds(second.history) and len(second.history) == 4


def test_low_precision_keeps_masters_in_float32():
    run = common.Run(tiny_run().config, tiny_run().net.float(), tiny_data(), CPU, "bf16")
    before = [p.clone() for p in run.masters]
    with contextlib.suppress(StopIteration):
        next(common.train(run, 4))
    assert {p.dtype for p in run.masters} == {torch.float32} and run.net.stem.weight.dtype == torch.bfloat16
    assert run.net.blocks[0].scale.dtype == torch.float32
    for net, master in zip(run.parameters, run.masters, strict=True):
        assert torch.equal(net, master.to(net.dtype))
    assert not any(map(torch.equal, before, run.masters))
    logits = run.forward(torch.randn(2, 3, 8, 8))
    assert logits.dtype == torch.float32 and torch.isfinite(logits).all()


@pytest.mark.parametrize("name, number", [("cuda", 3), ("cuda:1", 1)])
def test_cuda_without_a_number_is_a_ranks_own_gpu(monkeypatch, name, number):
    """torch.cuda.set_device itself refuses a device without a number."""
    chosen = []
    monkeypatch.setattr(torch._C, "_cuda_setDevice", chosen.append, raising=False)
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: None)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert common.pick_device(name) == torch.device("cuda", number) and chosen == [number]
