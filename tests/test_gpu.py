"""What only a GPU can show; without one, these tests skip themselves."""

import pytest
import torch
from test_engine import train_all
from test_training import tiny_data

import common
import runner
import wrn_cifar
from common import GhostBatchNorm2d

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def full_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def gpu_run(flags, precision="off", capture=True):
    """A run on a GPU, with its stream current."""
    line = f"--depth 10 --width 1 --bs 16 --lr 2^-4 --epochs 3 {flags}"
    (config,) = wrn_cifar.configurations(wrn_cifar.parse_args(line.split())).values()
    torch.manual_seed(common.stream_seed(config["seed"], "weights"))
    run = common.Run(config, wrn_cifar.make_net(config), tiny_data(512, 32, 100, CUDA), CUDA, precision)
    with runner.on_stream(run):
        if capture:
            run.burst = 8
            run.capture()
    return run


def finish(run):
    with runner.on_stream(run):
        for _ in common.train(run, 1):
            pass
    return run


def close(one, other, rel):
    for ours, theirs in zip(one.history, other.history, strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=rel)


@pytest.mark.parametrize("init", ["bn --ghost 8", "none", "zeroinit", "fixup"])
@pytest.mark.parametrize("precision, rel", [("off", 1e-3), ("bf16", 0.1), ("fp16", 0.1)])
def test_captured_updates_are_the_eager_ones(init, precision, rel):
    captured, eager = (finish(gpu_run(f"--init {init}", precision, c)) for c in (True, False))
    assert captured.replay and not eager.replay and captured.updates == eager.updates == 96
    close(captured, eager, rel)


def test_a_gpu_trains_as_a_cpu():
    run = gpu_run("--init bn --epochs 1")
    torch.manual_seed(common.stream_seed(0, "weights"))
    other = common.Run(
        run.config, wrn_cifar.make_net(run.config), tiny_data(512, 32, 100), torch.device("cpu")
    )
    for _ in common.train(other, 1):
        pass
    close(finish(run), other, 1e-2)


def test_together_as_alone(tmp_path):
    flags = "--init zeroinit --lr 2^-3 2^-4 --seeds 3 --epochs 1 --amp off --device cuda"
    together = train_all(tmp_path / "together", flags)
    alone = train_all(tmp_path / "alone", flags + " --concurrent 1")
    assert {r["environment"]["concurrent"] for r in together.values()} == {6}
    for name, record in alone.items():
        assert together[name]["final"]["train_loss"] == pytest.approx(record["final"]["train_loss"], abs=1e-3)


def test_a_run_that_diverges_is_dropped(tmp_path):
    together = train_all(tmp_path / "together", "--lr 2^20 2^-4 --amp off --device cuda")
    alone = train_all(tmp_path / "alone", "--lr 2^-4 --amp off --device cuda")
    assert sorted(r["status"] for r in together.values()) == ["diverged", "done"]
    (record,) = alone.values()
    (other,) = (r for r in together.values() if r["status"] == "done")
    assert other["final"]["train_loss"] == pytest.approx(record["final"]["train_loss"], abs=1e-2)


def test_too_little_memory_means_fewer_runs(tmp_path, capsys):
    """With most of the memory taken away, as many runs train at once as fit."""
    flags = "--depth 16 --width 16 --bs 96 --seeds 6 --epochs 1 --concurrent 6 --device cuda"  # a gigabyte each, or more
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1, 4e9 / total))
    try:
        done = train_all(tmp_path, flags)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert len(done) == 6 and max(r["environment"]["concurrent"] for r in done.values()) < 6
    assert "the device's memory holds" in capsys.readouterr().out


def test_a_captured_run_goes_on_from_its_checkpoint(tmp_path):
    straight, first, second = (gpu_run("--init zeroinit") for _ in range(3))
    finish(straight)
    with runner.on_stream(first):
        bursts = common.train(first, 1)
        for _ in range(6):
            next(bursts)
        runner.write_checkpoint(tmp_path / "run.json", first.state())
    with runner.on_stream(second):
        second.load(runner.read_checkpoint(tmp_path / "run.json", first.state()["config"]))
    close(finish(second), straight, 1e-3)
    assert len(second.history) == len(straight.history) == 3


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_forms_of_ghost_batch_norm(dtype, tolerance, layout):
    torch.manual_seed(0)
    x = torch.randn(64, 8, 16, 16, dtype=torch.float64)
    outputs = []
    for device, kind in (("cpu", torch.float64), ("cuda", dtype)):
        for form in ("forward", "spell_out"):
            norm = GhostBatchNorm2d(8, 16).to(
                device, torch.float64 if kind == torch.float64 else torch.float32
            )
            image = x.to(device, kind).contiguous(memory_format=layout).requires_grad_()
            out = getattr(norm, form)(image)
            (gradient,) = torch.autograd.grad((out * x.to(device, kind)).sum(), image)
            outputs.append([t.double().cpu() for t in (out, gradient, norm.running_mean, norm.running_var)])
    for other in outputs[1:]:
        for ours, reference in zip(other, outputs[0], strict=True):
            assert (ours - reference).norm() <= tolerance * reference.norm().clip(1)


def test_compiled_equals_eager():
    torch.manual_seed(0)
    net = common.WideResNet(10, 1, "bn", ghost=8).cuda()
    x = torch.randn(16, 3, 32, 32, device="cuda")
    expected = net(x)
    torch.testing.assert_close(torch.compile(net)(x), expected, rtol=1e-3, atol=1e-3)
