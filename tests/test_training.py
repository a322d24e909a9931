"""The training loop against a float64 loop written out by hand, the schedule, and the order of the images."""

import copy

import numpy as np
import pytest
import torch

import common
import runner
import wrn_cifar
from common import METHODS, Run, epoch_end, learning_rate
from data import Images

CPU = torch.device("cpu")


def tiny_data(images=24, size=8, test=10, device=CPU):
    """Random images: what is learned does not matter here."""
    rng = np.random.default_rng(3)

    def part(n):
        return rng.integers(0, 256, (n, size, size, 3), dtype=np.uint8), rng.integers(0, 10, n)

    return Images("tiny", part(images), part(test), device, 10)


def config_of(flags):
    """The configuration of wrn_cifar.py's first run."""
    point = wrn_cifar.make_point(wrn_cifar.parse_args(f"--device cpu --amp off {flags}".split()))
    return point.config((point.rates[0], point.seeds[0]))


def tiny_run(flags="", data=None, micro=0):
    """A float64 run of WRN-10-1 on tiny data."""
    config = config_of(f"--depth 10 --width 1 --bs 8 --lr 2^-4 --epochs 4 {flags}")
    torch.manual_seed(common.stream_seed(config["seed"], "weights"))
    net = wrn_cifar.make_net(config, 10).double()
    for parameter in net.parameters():  # away from zero, so that every term of the update shows
        if parameter.ndim == 0:
            parameter.data += 0.5
    return Run(config, net, data or tiny_data(), CPU, micro=micro)


def running_statistics(net):
    """Batch norm's running means and variances."""
    return [buffer for name, buffer in net.named_buffers() if "running" in name]


def advance(run, updates):
    """So many updates of a run, as `train` makes them."""
    bursts = common.train(run, 10)
    assert sum(next(bursts) for _ in range(updates)) == updates * run.bs


def expected_weights(run, updates, ghost, wd, l2_all, scalar_lr):
    """The parameters after some updates by plain SGD with heavy ball, one ghost batch after the other."""
    net = copy.deepcopy(run.net)
    net.train()
    velocity = [torch.zeros_like(p) for p in net.parameters()]
    dropout_noise = torch.Generator().manual_seed(common.stream_seed(run.config["seed"], "dropout"))
    seen, budget = 0, 4 * 24
    for update in range(updates):
        rows = torch.cat([run.data.draw(run.config["seed"], epoch) for epoch in range(4)])
        images, labels = run.data.train_batch(rows[8 * update : 8 * (update + 1)])
        noise = torch.rand(8, 64, generator=dropout_noise) if net.drop_probability else None
        total = 0
        for i in range(0, 8, ghost):
            logits = net(images[i : i + ghost].double(), None if noise is None else noise[i : i + ghost])
            total = total - logits.log_softmax(1)[range(len(logits)), labels[i : i + ghost]].sum()
        objective = total / 8
        for p in net.parameters():
            if p.ndim > 1 or l2_all:
                objective = objective + wd / 2 * (p**2).sum()
        gradients = torch.autograd.grad(objective, list(net.parameters()))
        lr = 2**-4 if seen < budget / 2 else 2**-4 * 0.5 ** (1 + (seen - budget / 2) // (budget / 20))
        with torch.no_grad():
            for p, v, g in zip(net.parameters(), velocity, gradients, strict=True):
                v.mul_(0.9).add_((1 - run.config["dampening"]) * g)
                p.sub_(lr * (scalar_lr if p.ndim == 0 else 1) * v)
        seen += 8
    return list(net.parameters()), running_statistics(net)


@pytest.mark.parametrize("init", [init for init in METHODS if init != "zeroinit+bias"])
@pytest.mark.parametrize("micro, dampening", [(8, 0), (4, 0.9)])
def test_steps_equal_a_float64_loop(init, micro, dampening):
    run = tiny_run(f"--init {init} --ghost 4 --wd 0.01 --dampening {dampening}", micro=micro)
    parameters, statistics = expected_weights(run, 9, 4, 0.01, False, 1.0)
    advance(run, 9)
    for ours, reference in zip(run.net.parameters(), parameters, strict=True):
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-10)
    for ours, reference in zip(running_statistics(run.net), statistics, strict=True):
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-10)


def test_l2_on_everything_and_a_rate_of_their_own_for_the_scalars():
    run = tiny_run("--init fixup --wd 0.01 --l2-all --scalar-lr 0.125")
    parameters, _ = expected_weights(run, 3, 8, 0.01, True, 0.125)
    advance(run, 3)
    for ours, reference in zip(run.net.parameters(), parameters, strict=True):
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-10)


def test_schedule_of_200_epochs():
    expected = [1.0] * 100 + [0.5 ** (1 + i // 10) for i in range(100)]
    assert expected[99:102] == [1.0, 0.5, 0.5] and expected[109:111] == [0.5, 0.25]
    assert expected[190] == 2**-10
    assert [learning_rate(1.0, epoch, 200) for epoch in range(200)] == expected
    # Whatever the batch size, each epoch's first update already has the epoch's rate.
    for bs in (3, 64, 8192):
        first = [epoch_end(epoch - 1, 50_000, bs) * bs for epoch in range(200)]
        assert [learning_rate(1.0, seen, 200 * 50_000) for seen in first] == expected


def test_schedule_of_other_budgets():
    # Seven epochs: half-way is 3.5, and each further halving comes 0.35 epochs later.
    assert [learning_rate(1.0, epoch, 7) for epoch in range(7)] == [1, 1, 1, 1, 2**-2, 2**-5, 2**-8]
    assert [learning_rate(0.25, tenth, 70) for tenth in (34, 35, 38, 39, 66, 67, 69)] == [
        0.25, 2**-3, 2**-3, 2**-4, 2**-11, 2**-12, 2**-12,
    ]  # fmt: skip
    # ImageNet: nine halvings, at epochs 45, 50, ..., 85 of 90.
    assert [learning_rate(1.0, epoch, 90, halvings=9) for epoch in (44, 45, 49, 50, 84, 85, 89)] == [
        1, 2**-1, 2**-1, 2**-2, 2**-8, 2**-9, 2**-9,
    ]  # fmt: skip


@pytest.mark.parametrize("bs", [3, 7, 8, 20])
def test_every_batch_is_full_and_every_epoch_sees_each_image_once(bs):
    run = tiny_run(f"--bs {bs}", tiny_data(images=20))
    batches = [rows for epoch in range(4) for rows in common.epoch_batches(run.data, 0, epoch, bs)]
    assert {len(rows) for rows in batches} == {bs}
    order = (torch.cat(batches)[:, 0] // run.data.side**2).tolist()
    epochs = [order[20 * e : 20 * (e + 1)] for e in range(4)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert len(order) - 80 < bs  # the last batch is filled up, no more


@pytest.mark.parametrize("bs", [3, 8192])
def test_batch_sizes_that_do_not_divide_the_images(bs):
    ends = [epoch_end(epoch, 50_000, bs) for epoch in range(200)]
    assert all(end * bs >= 50_000 * (epoch + 1) > (end - 1) * bs for epoch, end in enumerate(ends))
    assert ends[-1] == {3: 3_333_334, 8192: 1221}[bs]


def test_crops_flips_and_standardization():
    data = tiny_data(images=5, size=32)
    image = data.pixels.view(5, 40, 40, 3)[2]  # zero padding of four pixels on each side
    assert image[:4].sum() == 0 and image[:, 36:].sum() == 0 and image[4:36, 4:36].sum() > 0
    rows = data.draw(0, 0)
    assert set((rows[:, 0] % 40).tolist()) | set((rows[:, 0] % 1600 // 40).tolist()) <= set(range(9))
    assert rows[:, 2].tolist() == [data.labels[i] for i in rows[:, 0] // 1600]
    assert set(rows[:, 1].tolist()) <= {0, 1}
    pixels = data.pixels.view(5, 40, 40, 3)[:, 4:36, 4:36].reshape(-1, 3).double() / 255
    mean, std = pixels.mean(0), pixels.std(0, unbiased=False)
    rows = torch.tensor([[2 * 1600 + 4 * 40 + 4, 0, 7], [2 * 1600 + 1 * 40 + 6, 1, 3]])
    images, labels = data.train_batch(rows)
    plain = (image[4:36, 4:36] / 255 - mean) / std
    moved = ((image[1:33, 6:38] / 255 - mean) / std).flip(1)
    expected = torch.stack([plain, moved]).permute(0, 3, 1, 2)
    torch.testing.assert_close(images.double(), expected, rtol=1e-5, atol=1e-5)
    assert labels.tolist() == [7, 3]


def test_reflect_padding():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    pair = images, np.zeros(2, dtype=np.int64)
    padded = Images("tiny", pair, pair, CPU, 1, "reflect").pixels.view(2, 40, 40, 3).numpy()
    assert (padded[:, 3] == padded[:, 5]).all() and (padded[:, 4:36, 4:36] == images).all()


def test_losses_and_accuracies_by_hand():
    """The training loss is the cross-entropy in train mode; its objective adds the L2 term."""
    run = tiny_run("--init none --epochs 1 --wd 0.01 --lr 2^-30")  # a rate at which the weights stay
    losses, right = [], []
    for rows in common.epoch_batches(run.data, 0, 0, 8):
        images, labels = run.data.train_batch(rows)
        logits = run.net(images.double())
        losses += (-logits.log_softmax(1)[range(8), labels]).tolist()
        right += (logits.argmax(1) == labels).tolist()
    assert list(common.train(run, 1)) == [8, 8, 8]
    record = runner.outcome(run, 1)
    l2 = 0.01 / 2 * sum((p**2).sum().item() for p in run.net.parameters())
    assert record["status"] == "done"
    assert record["final"]["train_loss"] == pytest.approx(np.mean(losses), rel=1e-6)
    assert record["final"]["train_objective"] == pytest.approx(np.mean(losses) + l2, rel=1e-6)
    assert 0 < sum(right) < 24 and record["history"][0]["train_accuracy"] == pytest.approx(np.mean(right))
    ((images, labels),) = run.data.test_batches()
    expected = (run.net(images.double()).argmax(1) == labels).double().mean().item()
    assert record["final"]["test_accuracy"] == pytest.approx(expected) and len(labels) == 10


def test_each_seed_has_initial_weights_of_its_own():
    args, stems = wrn_cifar.parse_args(["--device", "cpu"]), []
    for flags in ("--seed 0", "--seed 1", "--seed 1 --lr 1"):
        config = config_of(f"--width 1 --bs 8 --init none {flags}")
        state = torch.get_rng_state()
        stems.append(runner.make_run(wrn_cifar, config, tiny_data(), args).net.stem.weight)
        assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(stems[0], stems[1]) and torch.equal(stems[1], stems[2])


def test_a_batch_larger_than_the_data_set_is_an_error():
    with pytest.raises(common.UserError, match="--bs 25 is more than the 24 training images"):
        tiny_run("--bs 25")
