"""Two processes make the update of one, whatever the division into ranks, ghost batches and passes."""

import os

import pytest
import torch
from test_training import tiny_data, tiny_run

import common

RESNETS = {
    "bn, a ghost batch in each rank": ("v1", "bn", 4, 0),
    "bn, ghost batches in passes": ("v2", "bn", 2, 2),
    "bn, a ghost batch over both ranks": ("v1", "bn", 8, 0),
    "fixup": ("v1", "fixup", 0, 0),
    "fixup, passes": ("v2", "fixup", 0, 2),
    "zeroinit": ("v2", "zeroinit", 0, 0),
    "zeroinit+bias, passes": ("v1", "zeroinit+bias", 0, 2),
}
CASES = {
    "none": ("--init none", 8),
    "none, passes": ("--init none", 2),
    "zeroinit": ("--init zeroinit", 8),
    "zeroinit, passes": ("--init zeroinit", 2),
    "fixup, passes": ("--init fixup", 1),
    "bn, two ghost batches per rank": ("--init bn --ghost 2", 4),
    "bn, two ghost batches per rank, passes": ("--init bn --ghost 2", 2),
    "bn, a ghost batch per rank": ("--init bn --ghost 4", 4),
    "bn, a ghost batch over both ranks": ("--init bn --ghost 8", 0),
    "bn, the whole batch": ("--init bn --ghost 0", 0),
}


def train_some(case):
    """Seven updates and an evaluation in float64; the parameters, running statistics, losses and accuracies."""
    flags, micro = CASES[case]
    run = tiny_run(flags, tiny_data(test=11), micro=micro)
    for _ in zip(range(7), common.train(run, 1), strict=False):
        pass
    statistics = [b for name, b in run.net.named_buffers() if "running" in name]
    return run.masters, statistics, [{k: v for k, v in e.items() if k != "seconds"} for e in run.history]


def train_resnet(case):
    """An update of ResNet-50 in float64, away from the start, where Fixup and ZeroInit have gradients of zero."""
    version, init, ghost, micro = RESNETS[case]
    config = {"model": "resnet50", "init": init, "bs": 8, "lr": 2**-4, "epochs": 1, "seed": 0, "ghost": ghost}
    config |= {"wd": 1e-4, "momentum": 0.9, "l2_all": False, "scalar_lr": 1.0}
    torch.manual_seed(0)
    net = common.ResNet50(version, init, 10, ghost).double()
    for parameter in net.parameters():
        noise = torch.randn_like(parameter)  # positive for scalars, so that no ReLU is dead
        parameter.data += 0.1 * noise / parameter[0].numel() ** 0.5 if parameter.ndim else 0.1 * noise.abs()
    run = common.Run(config, net, tiny_data(8, 64, test=3), torch.device("cpu"), micro=micro)
    before = [p.detach().clone() for p in run.masters]
    next(common.train(run, 1))
    steps = [(p.detach() - b) / 2**-4 for p, b in zip(run.masters, before, strict=True)]
    return steps, run.totals


def rank(number, port, out):
    """What each of two processes does, as torchrun would start it."""
    os.environ |= {"RANK": str(number), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    common.pick_device("cpu")
    torch.save({case: train_some(case) for case in CASES}, f"{out}/{number}.pt")
    torch.save({case: train_resnet(case) for case in RESNETS}, f"{out}/resnet{number}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What both ranks found, one file each."""
    out = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(rank, (29500 + os.getpid() % 1000, str(out)), nprocs=2)
    return out


@pytest.fixture(scope="module")
def both(folder):
    return [torch.load(folder / f"{i}.pt") for i in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_make_the_update_of_one(case, both):
    expected = train_some(case)
    for parameters, statistics, history in (ranks[case] for ranks in both):
        for ours, reference in zip(parameters, expected[0], strict=True):
            torch.testing.assert_close(ours, reference, rtol=0, atol=1e-10)
        if "per rank" not in case:  # there each rank goes on from its own, and they are averaged
            for ours, reference in zip(statistics, expected[1], strict=True):
                torch.testing.assert_close(ours, reference, rtol=0, atol=1e-10)
        assert history[0]["train_accuracy"] == pytest.approx(expected[2][0]["train_accuracy"])
        assert history[1]["train_loss"] == pytest.approx(expected[2][1]["train_loss"], abs=1e-10)
        if "per rank" not in case:
            assert history[1]["test_accuracy"] == pytest.approx(expected[2][1]["test_accuracy"])  # of 11 images


@pytest.mark.parametrize("case", RESNETS)
def test_two_ranks_make_the_update_of_one_on_resnet(case, folder):
    (version, init, ghost, _), both = RESNETS[case], [torch.load(folder / f"resnet{i}.pt")[case] for i in range(2)]
    RESNETS["one rank"] = version, init, ghost, 0
    steps, totals = train_resnet("one rank")
    del RESNETS["one rank"]
    assert sum((step != 0).any().item() for step in steps) == len(steps)  # every parameter moves
    for theirs, their_totals in both:
        for ours, reference in zip(theirs, steps, strict=True):
            assert (ours - reference).abs().max() <= 1e-9 * reference.abs().max().clip(1)
        torch.testing.assert_close(their_totals, totals, rtol=1e-9, atol=0)


def test_both_ranks_hold_the_same(both):
    for case in CASES:
        for ours, theirs in zip(*(ranks[case][0] + ranks[case][1] for ranks in both), strict=True):
            assert torch.equal(ours, theirs)
        assert both[0][case][2] == both[1][case][2]


@pytest.mark.parametrize(
    "bs, ghost, world, micro, expected",
    [
        (1024, 256, 8, 0, (128, 128, 2)),
        (1024, 256, 2, 0, (512, 256, 1)),
        (1024, 256, 2, 512, (512, 512, 1)),
        (1024, None, 8, 32, (128, 32, 1)),
        (100, 64, 1, 0, (100, 64, 1)),
        (32, 64, 4, 0, (8, 8, 4)),
        (32, 0, 1, 0, (32, 32, 1)),
    ],
)
def test_division_of_a_batch(bs, ghost, world, micro, expected):
    assert common.split_batch(bs, ghost, world, micro, "cpu") == expected


@pytest.mark.parametrize(
    "bs, ghost, world, micro, said",
    [
        (30, None, 4, 0, "multiple of the 4 ranks"),
        (96, 64, 2, 0, "ghost batches of 64"),
        (192, 64, 2, 0, "ghost batches of 64"),
        (384, 128, 6, 96, "multiple of the 64 images"),
        (128, 64, 1, 32, "--micro 32"),
    ],
)
def test_divisions_that_would_change_the_update(bs, ghost, world, micro, said):
    with pytest.raises(common.UserError, match=said):
        common.split_batch(bs, ghost, world, micro, "cpu")
