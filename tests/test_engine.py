"""The engine: what an update costs, runs side by side, precision, and runs that go on in another process."""

import contextlib
import json
from collections import Counter
from pathlib import Path

import pytest
import scripts
import torch
from test_training import config_of, tiny_data, tiny_run
from torch.utils._python_dispatch import TorchDispatchMode

import common
import data
import resnet_imagenet
import runner
import wrn_cifar
from common import Run, UserError

CPU = torch.device("cpu")
# Operations that only describe memory; `detach` is the mode's own, for tensors that a backward pass keeps.
NO_WORK = {"detach", "empty", "expand", "permute", "select", "slice", "split", "t", "unbind", "unsqueeze"}
NO_WORK |= {"view"}
HOST_READS = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal"}


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


def make_run(flags, precision="float32", images=None, micro=0):
    """A run of wrn_cifar.py with the given precision."""
    config = config_of(flags) | {"precision": precision}
    torch.manual_seed(common.stream_seed(config["seed"], "weights"))
    return Run(config, wrn_cifar.make_net(config, 10), images or tiny_data(), CPU, micro)


def operations(run):
    """The operations of a run's second update, data, metrics and optimizer included."""
    bursts = common.train(run, 1)
    next(bursts)
    with Count() as count:
        next(bursts)
    return count.names


# ------------------------------------------------------------------------------------- cost of an update


@pytest.mark.parametrize("init, float32", [("bn", 126), ("none", 97), ("zeroinit", 131)])
@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
def test_an_update_is_few_operations_and_never_read_by_the_host(init, float32, precision):
    run = make_run(f"--init {init} --bs 2 --epochs 1", precision, tiny_data())
    names = operations(run)
    assert names["convolution"] == names["convolution_backward"] == 16 and names["_fused_sgd_"] >= 1
    layers = [m for m in run.net.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    cast = sum(len(list(layer.parameters())) for layer in layers)  # and so are their gradients
    scalars = sum(p.ndim == 0 for p in run.net.parameters())  # cast: their gradients, images, noise, logits
    at_most = float32
    if precision != "float32":
        at_most += 2 * cast + scalars + 4
    if precision == "fp16":
        at_most += 10  # the gradient scaler's
    assert sum(n for name, n in names.items() if name not in NO_WORK) <= at_most
    assert not names.keys() & HOST_READS


@pytest.mark.parametrize("passes", [1, 2, 4])
def test_each_weight_is_cast_once_however_many_passes(passes):
    names = operations(make_run("--width 1 --init none --bs 8", "bf16", micro=8 // passes))
    # The weights; then in each pass their gradients, the images, the logits and the gradient of the logits.
    assert names["_to_copy"] == 16 + passes * (16 + 3)


def test_ghost_batches_are_one_pass_each_on_a_cpu():
    names = operations(make_run("--init bn --ghost 4 --bs 8"))
    assert names["native_batch_norm"] == 2 * 13 and names["cat"] == 0


# ------------------------------------------------------------------------------------------ side by side


def train_all(out, flags, **options):
    """Run wrn_cifar.py on little generated data (flags may override these); returns the records by name."""
    line = f"--data shapes --depth 10 --width 1 --bs 16 --epochs 2 --device cpu --amp off --out {out} {flags}"
    args = wrn_cifar.parse_args(line.split())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "SHAPES", 96)
        patch.setattr(data, "SHAPES_TEST", 96)
        for name, value in options.items():
            patch.setattr(runner, name, value)
        runner.train_point(wrn_cifar, wrn_cifar.make_point(args), args)
    return {path.stem: json.loads(path.read_text()) for path in Path(out).glob("shapes/*.json")}


def test_the_search_is_replayed_only_where_a_run_starts_or_ends(tmp_path, monkeypatch):
    """On a network disk a look at all records that are missing takes long."""
    looks = []
    real = runner.Display.expect
    monkeypatch.setattr(runner.Display, "expect", lambda *args: (looks.append(1), real(*args)))
    assert len(train_all(tmp_path, "--seeds 3 --concurrent 2 --eval-every 2")) == 3
    assert len(looks) <= 4


def without_seconds(history):
    """A history without what differs from time to time."""
    return [{key: value for key, value in entry.items() if key != "seconds"} for entry in history]


def results(records):
    """What the runs computed, without times."""
    return {
        name: (r["status"], r["final"], r.get("diverged_at_step"), without_seconds(r["history"]))
        for name, r in records.items()
    }


def concurrent(records):
    """How many runs were trained at once, for each record in the order of their names."""
    return [record["environment"]["concurrent"] for _, record in sorted(records.items())]


@pytest.mark.parametrize("init", ["bn", "zeroinit"])
def test_runs_side_by_side_are_the_runs_alone_bit_by_bit(init, tmp_path):
    flags = f"--init {init} --lr 2^-3 2^-4 --seeds 2 --bs 32"
    alone = train_all(tmp_path / "alone", flags + " --concurrent 1")
    together = train_all(tmp_path / "together", flags + " --concurrent 3")  # a group of three, then one alone
    assert results(alone) == results(together) and len(alone) == 4
    assert concurrent(alone) == [1] * 4 and sorted(concurrent(together)) == [1, 3, 3, 3]


def test_a_run_that_diverges_does_not_disturb_the_others(tmp_path):
    alone = train_all(tmp_path / "alone", "--lr 2^-3")
    together = train_all(tmp_path / "together", "--lr 2^20 2^-3 2^30 --init zeroinit --concurrent 3")
    name = "wrn10-1_zeroinit_bs16_lr2^-3_ep2_s00"
    statuses = {r["config"]["lr"]: r["status"] for r in together.values()}
    assert statuses == {2**20: "diverged", 2**-3: "done", 2**30: "diverged"}
    assert results({name: together[name]}) == results(alone)


def test_the_next_run_takes_the_place_of_one_that_diverges(tmp_path):
    """Of two places, one is the long run's; in the other, four that diverge early follow each other."""
    begun = []

    def make_run(script, config, *args, real=runner.make_run, **options):
        run = real(script, config, *args, **options)
        begun.append((run, [other.updates for other, _ in begun]))
        return run

    done = train_all(tmp_path, "--lr 2^-4 2^20 2^21 2^22 2^23 --epochs 4 --concurrent 2", make_run=make_run)
    assert Counter(record["status"] for record in done.values()) == {"done": 1, "diverged": 4}
    assert len(begun) == 5 and begun[0][0].config["lr"] == 2**-4
    long_run_at = [updates[0] for _, updates in begun[1:]]
    assert long_run_at == sorted(set(long_run_at)) and long_run_at[-1] < begun[0][0].updates == 24
    assert sorted(concurrent(done)) == [1, 2, 2, 2, 2]


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("GET was unable to find an engine to execute this computation"),
]


@pytest.mark.parametrize(
    "error, in_capture", [(error, False) for error in OUT_OF_MEMORY] + [(OUT_OF_MEMORY[0], True)]
)
def test_memory_that_is_too_small_means_fewer_runs_at_once(error, in_capture, tmp_path, capsys):
    calls = []

    def make_run(*args, real=runner.make_run, **options):
        calls.append(1)
        if len(calls) == 3:
            try:
                raise error
            finally:
                if in_capture:
                    raise RuntimeError("operation failed due to a previous error during capture")
        return real(*args, **options)

    done = train_all(tmp_path, "--seeds 4 --concurrent 4 --bs 32 --epochs 1", make_run=make_run)
    assert "the device's memory holds 2 runs at a time" in capsys.readouterr().out
    assert concurrent(done) == [2] * 4 and {record["status"] for record in done.values()} == {"done"}


def test_one_run_that_does_not_fit_is_a_users_error(tmp_path):
    def make_run(*_, **__):
        raise OUT_OF_MEMORY[0]

    with pytest.raises(UserError, match="--micro"):
        train_all(tmp_path, "--seeds 2", make_run=make_run)


def test_other_errors_are_not_taken_for_too_little_memory(tmp_path):
    def make_run(*_, **__):
        raise RuntimeError("an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal"):
        train_all(tmp_path, "--seeds 2", make_run=make_run)


def test_whatever_touches_a_runs_tensors_is_put_on_its_own_stream(tmp_path, monkeypatch):
    """Also a checkpoint's copies: on another stream, they would not wait for the updates under way."""
    current, seen = [], set()

    @contextlib.contextmanager
    def on_stream(run):
        current.append(run)
        yield
        current.pop()

    def guard(name):
        real = getattr(Run, name)

        def called(run, *args):
            assert current[-1:] == [run], name
            seen.add(name)
            return real(run, *args)

        monkeypatch.setattr(Run, name, called)

    def write_and_stop(path, state, real=runner.write_checkpoint):
        real(path, state)
        common.stop_asked.append(1)

    for name in ("advance", "evaluate", "state", "load"):
        guard(name)
    flags = "--seeds 2 --concurrent 2 --checkpoint-every 0"
    options = {"on_stream": on_stream, "write_checkpoint": write_and_stop}
    assert runner.exit_code(lambda: train_all(tmp_path, flags, **options)) == 75
    assert len(train_all(tmp_path, flags, on_stream=on_stream)) == 2
    assert seen == {"advance", "evaluate", "state", "load"}


def test_the_loss_so_far_is_the_epochs_at_its_end():
    run = tiny_run("--bs 4 --epochs 2")
    losses = [run.loss for _ in common.train(run, 1)]
    assert losses[5::6] == [entry["train_loss"] for entry in run.history]
    assert losses[0] != losses[5]


# -------------------------------------------------------------------------------------- captured updates


def captured(run, burst):
    """Let a run on a CPU go through everything that a CUDA graph needs, but for the graph."""
    run.burst = burst
    run.capture(record=lambda work, generator, pool: (work, pool))
    run.update_on = None  # from here on there are replays only
    return run


@pytest.mark.parametrize("init", ["bn", "zeroinit"])
@pytest.mark.parametrize("burst, expected", [(3, [12, 12, 12]), (4, [16, 8, 12]), (1, [4] * 9)])
def test_captured_updates_are_single_updates_bit_by_bit(init, burst, expected):
    """Of the 6 updates of an epoch, a burst takes up to `burst` while the learning rate stays."""
    plain, replays = (tiny_run(f"--init {init} --bs 4 --epochs 3") for _ in range(2))
    assert len({plain.scheduled(update) for update in range(9)}) == 1
    assert len({plain.scheduled(update) for update in range(9, 18)}) == 9
    assert list(common.train(plain, 1)) == [4] * 18
    assert list(common.train(captured(replays, burst), 1)) == expected + [4] * 9
    assert set(replays.graphs) == {burst, 1}
    assert all(map(torch.equal, plain.tensors, replays.tensors))
    assert without_seconds(plain.history) == without_seconds(replays.history)


@pytest.mark.parametrize("updates", [0, 2, 7])
def test_a_capture_leaves_the_run_where_it_was(updates):
    run = tiny_run("--init zeroinit")
    advance(run, updates)
    before = run.state()
    after = captured(run, 2).state()
    assert all(map(torch.equal, before.pop("tensors"), after.pop("tensors")))
    assert torch.equal(before.pop("generator"), after.pop("generator")) and before == after


def test_a_burst_is_no_longer_than_an_epoch():
    assert set(captured(tiny_run(), 32).graphs) == {3, 1}


# ---------------------------------------------------------------------------------------------- going on


def advance(run, updates):
    """Make some updates of a run, in as many bursts."""
    for _ in zip(range(updates), common.train(run, 2), strict=False):
        pass


def go_on(first, second, path):
    """Load the state of the first run into the second, through a checkpoint."""
    runner.write_checkpoint(path, first.state())
    assert runner.resume(path, second)
    return second


@pytest.mark.parametrize("capture", [False, True])
@pytest.mark.parametrize("flags", ["--init bn --ghost 4", "--init zeroinit", "--init fixup --momentum 0"])
@pytest.mark.parametrize("updates", [1, 3, 4, 7])
def test_a_run_goes_on_from_its_checkpoint_bit_by_bit(flags, updates, capture, tmp_path):
    straight, first, second = (tiny_run(flags) for _ in range(3))
    advance(straight, 100)
    advance(first, updates)
    go_on(first, second, tmp_path / "run.json")
    advance(captured(second, 2) if capture else second, 100)
    assert all(map(torch.equal, straight.tensors, second.tensors))
    assert without_seconds(straight.history) == without_seconds(second.history) and len(second.history) == 4


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_goes_on_bit_by_bit(precision, tmp_path):
    straight, first, second = (make_run("--width 1 --bs 8 --lr 2^-4 --epochs 2", precision) for _ in range(3))
    for run in (straight, first):
        run.scaler._init_scale = 2.0**20  # so large that the first updates overflow, and lower it
    advance(straight, 100)
    advance(first, 4)
    advance(go_on(first, second, tmp_path / "run.json"), 100)
    assert all(map(torch.equal, straight.tensors, second.tensors))
    assert straight.scaler.state_dict() == second.scaler.state_dict()
    assert without_seconds(straight.history) == without_seconds(second.history)


# --------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_trains_as_float32_does(precision):
    low, full = (make_run("--width 1 --bs 8 --lr 2^-5 --epochs 4", p) for p in (precision, "float32"))
    calls = []
    for run in (low, full):
        run.net.blocks[2].conv1.register_forward_hook(lambda _, x, y: calls.append((x[0].dtype, y.dtype)))
        advance(run, 100)
    low_type = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert set(calls) == {(low_type, low_type), (torch.float32, torch.float32)}
    assert {t.dtype for t in low.tensors if t.is_floating_point()} == {torch.float32, torch.float64}
    for ours, reference in zip(low.history, full.history, strict=True):
        assert ours["train_loss"] == pytest.approx(reference["train_loss"], rel=0.03)
        assert ours["train_loss"] != reference["train_loss"]
    logits = low.logits(low.model, torch.randn(2, 3, 8, 8))
    assert logits.dtype == torch.float32 and logits.isfinite().all()


def test_updates_whose_gradients_overflow_in_fp16_are_left_out():
    run = make_run("--width 1 --bs 8 --lr 2^-5 --epochs 4", "fp16")
    run.scaler._init_scale = 2.0**24  # PyTorch halves it at each update that overflows
    before = [p.detach().clone() for p in run.net.parameters()]
    advance(run, 3)
    assert run.scaler.get_scale() == 2.0**21 and all(map(torch.equal, before, run.net.parameters()))
    advance(run, 100)
    assert run.history and not run.diverged and not any(map(torch.equal, before, run.net.parameters()))


def test_a_checkpoint_of_another_precision_or_device_is_refused(tmp_path):
    run, path = make_run("--width 1 --bs 8"), tmp_path / "run.json"
    runner.write_checkpoint(path, run.state())
    for key, other, said in (
        ("precision", "bf16", "its precision is float32, not bf16"),
        ("device", "cuda", "its device is cpu, not cuda"),
        ("images", "0123", f"its images is {run.data.fingerprint}, not 0123"),
    ):
        with pytest.raises(UserError, match=f"run.ckpt holds another run: {said}"):
            runner.read_checkpoint(path, run.identity() | {key: other})
    assert runner.read_checkpoint(path, run.identity())[1]["place"] == (0, 0, 0.0, [])


def test_a_run_of_another_precision_is_another_run(tmp_path, capsys):
    """It has another name, and a checkpoint that was renamed to it is refused in one line."""

    def stop_at_once(path, state, real=runner.write_checkpoint):
        real(path, state)
        common.stop_asked.append(1)

    def script(amp):
        flags = f"--data shapes --width 1 --bs 16 --lr 1 --epochs 1 --device cpu --amp {amp} --out {tmp_path}"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(data, "SHAPES", 96)
            patch.setattr(data, "SHAPES_TEST", 96)
            patch.setattr(runner, "write_checkpoint", stop_at_once)
            code = scripts.run(wrn_cifar, flags, "--checkpoint-every", 0)
        return code, capsys.readouterr().err

    name = "wrn16-1_zeroinit_bs16_lr2^0_ep1{}_s00.{}"
    checkpoint = tmp_path / "shapes" / name.format("", "ckpt")
    assert script("off")[0] == 75 and checkpoint.exists()
    assert script("bf16")[0] == 75 and (tmp_path / "shapes" / name.format("_bf16", "ckpt")).exists()
    fp16 = checkpoint.rename(tmp_path / "shapes" / name.format("_fp16", "ckpt"))
    code, error = script("fp16")
    assert code == 2 and error == (f"error: {fp16} holds another run: its precision is float32, not fp16\n")


# ------------------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize("script", [wrn_cifar, resnet_imagenet])
@pytest.mark.parametrize(
    "flags, said",
    [
        ("--bs 17 --ghost 16", "--bs 17 should be a multiple of --ghost 16, or smaller"),
        ("--bs 96 --ghost 64", "--bs 96 should be a multiple of --ghost 64, or smaller"),
        ("--bs 64 --ghost 16 --micro 24", "--micro 24 should be a multiple of a ghost batch's 16"),
    ],
)
def test_batches_that_ghost_batches_do_not_divide_are_refused(script, flags, said, capsys):
    assert scripts.run(script, f"--data shapes --device cpu --init bn {flags}") == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


@pytest.mark.parametrize("name, number", [("cuda", 3), ("cuda:1", 1)])
def test_cuda_without_a_number_is_a_ranks_own_gpu(monkeypatch, name, number):
    """torch.cuda.set_device itself refuses a device without a number."""
    chosen = []
    monkeypatch.setattr(torch._C, "_cuda_setDevice", chosen.append, raising=False)
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: None)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert runner.pick_device(name) == torch.device("cuda", number) and chosen == [number]
