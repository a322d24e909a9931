"""The training loop against a float64 loop written out by hand, the schedule, and the order of the images."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import wrn_cifar
from common import METHODS, Run, learning_rate

CPU = torch.device("cpu")


def tiny_data(images=24, size=8):
    """Random images: what is learned does not matter here."""
    rng = np.random.default_rng(3)

    def part(n):
        return rng.integers(0, 256, (n, size, size, 3), dtype=np.uint8), rng.integers(0, 10, n)

    return wrn_cifar.Images("tiny", part(images), part(10), CPU)


def tiny_run(flags="", data=None, micro=0):
    """A float64 run of WRN-10-1 on tiny data."""
    args = wrn_cifar.parse_args(f"--depth 10 --width 1 --bs 8 --lr 2^-4 --epochs 4 {flags}".split())
    (config,) = wrn_cifar.configurations(args).values()
    torch.manual_seed(common.stream_seed(config["seed"], "weights"))
    net = wrn_cifar.make_net(config).double()
    for parameter in net.parameters():  # away from zero, so that every term of the update shows
        if parameter.ndim == 0:
            parameter.data += 0.5
    return Run(config, net, data or tiny_data(), CPU, micro=micro)


def expected_weights(run, updates, ghost, wd, l2_all, scalar_lr):
    """The parameters after some updates by plain SGD with heavy ball, one ghost batch after the other."""
    net = copy.deepcopy(run.net)
    net.train()
    velocity = [torch.zeros_like(p) for p in net.parameters()]
    dropout_noise = torch.Generator().manual_seed(common.stream_seed(run.config["seed"], "dropout"))
    seen, budget = 0, 4 * 24
    for update in range(updates):
        rows = torch.cat([run.data.draw(run.config["seed"], e) for e in range(4)])[8 * update : 8 * (update + 1)]
        images, labels = run.data.train_batch(rows)
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
                v.mul_(0.9).add_(g)
                p.sub_(lr * (scalar_lr if p.ndim == 0 else 1) * v)
        seen += 8
    return list(net.parameters()), [b for n, b in net.named_buffers() if "running" in n]


@pytest.mark.parametrize("init", METHODS)
@pytest.mark.parametrize("micro", [8, 4])
def test_steps_equal_a_float64_loop(init, micro):
    run = tiny_run(f"--init {init} --ghost 4 --wd 0.01", micro=micro)
    run.forward = lambda images, noise=None: run.net(images.double(), noise)
    parameters, statistics = expected_weights(run, 9, 4, 0.01, False, 1.0)
    steps = [rows for epoch in range(3) for rows in run.batches(epoch)]
    for i, rows in enumerate(steps):
        run.set_learning_rate(i)
        run.step(rows)
    assert len(steps) == 9
    for ours, reference in zip(run.net.parameters(), parameters, strict=True):
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-10)
    for ours, reference in zip((b for n, b in run.net.named_buffers() if "running" in n), statistics, strict=True):
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-10)
