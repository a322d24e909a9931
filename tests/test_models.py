"""The nets and layers against numbers from the papers and against independent references."""

import math

import pytest
import torch
import torch.nn.functional as F

from common import METHODS, GhostBatchNorm2d, Method, ScalarBias, WideResNet, dropout

PARAMETERS = {  # (depth, width): bn, none, zeroinit
    (16, 4): (2_748_890, 2_745_264, 2_747_536),
    (16, 2): (691_674, 689_840, 690_992),
    (100, 2): (6_123_226, 6_108_848, 6_116_314),
    (1000, 2): (64_318_426, 64_169_648, 64_244_764),
}


@pytest.mark.parametrize(("depth", "width"), PARAMETERS)
def test_parameter_counts(depth, width):
    for init, expected in zip(("bn", "none", "zeroinit"), PARAMETERS[depth, width], strict=True):
        with torch.device("meta"):
            net = WideResNet(depth, width, init)
        assert sum(p.numel() for p in net.parameters()) == expected


@pytest.mark.parametrize("depth", [4, 15, 17, 18, 0, -2])
def test_depth_must_be_6n_plus_4(depth):
    with pytest.raises(ValueError, match=r"6n\+4"):
        WideResNet(depth, 1)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("images", "ghost", "chunks"), [(8, 4, 2), (12, 4, 3), (3, 4, 1), (8, 0, 1), (4, 4, 1)]
)
def test_ghost_batch_norm(images, ghost, chunks, memory_format):
    torch.manual_seed(0)
    layer = GhostBatchNorm2d(3, ghost).double()
    layer.weight.data.uniform_(0.5, 2)
    layer.bias.data.normal_()
    weight, bias = (p.detach().clone().requires_grad_() for p in (layer.weight, layer.bias))
    mean, var = torch.zeros(3).double(), torch.ones(3).double()
    for _ in range(2):  # twice, so that the running statistics start from other values
        x = (3 * torch.randn(images, 3, 5, 5).double() + 1).to(memory_format=memory_format).requires_grad_()
        reference_x = x.detach().clone().requires_grad_()
        size = ghost if chunks > 1 else images
        parts = [
            F.batch_norm(reference_x[i : i + size], mean, var, weight, bias, training=True, momentum=0.1)
            for i in range(0, images, size)
        ]
        assert len(parts) == chunks
        ours, reference, out = layer(x), torch.cat(parts), torch.randn(images, 3, 5, 5).double()
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-12)
        grads = torch.autograd.grad((ours * out).sum(), (x, layer.weight, layer.bias))
        expected = torch.autograd.grad((reference * out).sum(), (reference_x, weight, bias))
        for grad, value in zip(grads, expected, strict=True):
            torch.testing.assert_close(grad, value, rtol=0, atol=1e-11)
        torch.testing.assert_close(layer.running_mean, mean, rtol=0, atol=1e-12)
        torch.testing.assert_close(layer.running_var, var, rtol=0, atol=1e-12)
    layer.eval()
    expected = (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt() * weight[:, None, None]
    torch.testing.assert_close(layer(x), expected + bias[:, None, None], rtol=0, atol=1e-12)


def test_a_norm_that_norm_does_not_know_is_an_error(monkeypatch):
    monkeypatch.setitem(METHODS, "ln", Method(norm="layer"))
    with pytest.raises(ValueError, match="no line for 'layer'"):
        WideResNet(10, 1, "ln")


@pytest.mark.parametrize("init", ["scalar", "zeroinit", "zeroinit-nodropout"])
def test_zeroinit_blocks_start_as_the_identity(init):
    torch.manual_seed(0)
    net = WideResNet(22, 1, init)
    plain = [block for block in net.blocks if block.projection is None]
    assert len(plain) == 7  # nine blocks; at width 1 the first group keeps its channels
    for block in plain:
        channels = block.conv1.in_channels
        x = torch.randn(2, channels, 8, 8)
        assert torch.equal(block(x), x)
        (block(x) * torch.randn_like(x)).sum().backward()
        assert block.scale.grad.abs() > 0
        assert all(p.grad.count_nonzero() == 0 for p in block.parameters() if p is not block.scale)


def test_projections_share_the_first_activation():
    net = WideResNet(16, 4, "bn")
    assert [block.projection is not None for block in net.blocks] == [True, False] * 3
    assert [block.conv1.stride for block in net.blocks] == [(1, 1), (1, 1), (2, 2), (1, 1), (2, 2), (1, 1)]
    block = net.blocks[2].eval()
    x = torch.randn(2, 64, 8, 8)
    h = block.norm1(x).relu()
    expected = block.projection(h) + block.conv2(block.norm2(block.conv1(h)).relu())
    torch.testing.assert_close(block(x), expected)


def test_a_thousand_layers_start_well_with_the_scalar_and_not_without():
    torch.manual_seed(0)
    images, labels = torch.randn(2, 3, 32, 32), torch.tensor([3, 7])
    losses = {}
    for init in ("zeroinit", "none"):
        net = WideResNet(1000, 1, init, dropout=0.0)
        loss = F.cross_entropy(net(images), labels)
        if init == "zeroinit":
            loss.backward()
            assert all(p.grad.isfinite().all() for p in net.parameters())
            assert sum(p.grad.count_nonzero() for p in net.parameters() if p.ndim == 0) == 498
        losses[init] = loss.item()
    assert losses["zeroinit"] < 4  # that of chance is ln 10 = 2.3
    assert not losses["none"] < 1e6  # without normalization the activations grow in every block


def test_fixup_starts_by_its_four_rules():
    torch.manual_seed(0)
    net = WideResNet(40, 4, "fixup")
    assert len(net.blocks) == 18
    assert net.classifier.weight.count_nonzero() == 0 and net.classifier.bias.count_nonzero() == 0
    for block in net.blocks:
        assert block.conv2.weight.count_nonzero() == 0
        outputs = block.conv1.out_channels
        std = math.sqrt(2 / (9 * outputs)) / math.sqrt(18)  # He fan-out times L^(-1/(2m-2)) with m = 2
        assert block.conv1.weight.std().item() == pytest.approx(std, rel=0.05)
        assert block.scale.item() == 1
        positions = (block.norm1, block.bias1, block.norm2, block.bias2)
        assert all(isinstance(layer, ScalarBias) and layer.bias.item() == 0 for layer in positions)
        if block.projection is not None:
            assert block.projection.weight.std().item() == pytest.approx(math.sqrt(2 / outputs), rel=0.05)
        assert block.conv1.bias is None and block.conv2.bias is None
    assert net.stem.weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 16)), rel=0.1)
    assert sum(p.ndim == 0 for p in net.parameters()) == 5 * 18 + 2
    # Where they act: h = relu(x + b1); s * conv2(relu(conv1(h + b2) + b3) + b4); projection on h + b2.
    for parameter in net.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    for block in net.blocks[5:7]:
        b1, b2, b3, b4 = (layer.bias for layer in (block.norm1, block.bias1, block.norm2, block.bias2))
        x = torch.randn(2, block.conv1.in_channels, 8, 8)
        h = torch.relu(x + b1) + b2
        branch = block.scale * block.conv2(torch.relu(block.conv1(h) + b3) + b4)
        torch.testing.assert_close(
            block(x), branch + (x if block.projection is None else block.projection(h))
        )
    features = (
        torch.relu(net.blocks[-1](x := torch.randn(2, 256, 8, 8)) + net.norm.bias).mean((2, 3))
        + net.bias.bias
    )
    tail = F.linear(features, net.classifier.weight, net.classifier.bias)
    net.stem, net.blocks = torch.nn.Identity(), net.blocks[-1:]
    torch.testing.assert_close(net(x), tail)


@pytest.mark.parametrize(
    ("base_init", "expected"), [("lecun", 0.8796 * 9**-0.5), ("he-in", 2**0.5 * 9**-0.5)]
)
def test_base_initialization(base_init, expected):
    """A normal truncated at two standard deviations keeps 0.8796 of its own."""
    torch.manual_seed(0)
    net = WideResNet(16, 4, "none", base_init=base_init)
    for conv in (net.blocks[1].conv2, net.blocks[5].conv1):
        assert conv.weight.std().item() == pytest.approx(expected / conv.in_channels**0.5, rel=0.02)
    assert (net.blocks[1].conv2.weight.abs().max() <= 2 / 24) == (base_init == "lecun")
    assert net.classifier.weight.std().item() == pytest.approx(0.8796 / 16, rel=0.05)
    he_out = WideResNet(16, 4, "none", base_init="he-out").blocks[2].conv1
    assert he_out.weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 128)), rel=0.02)


@pytest.mark.parametrize("init", [init for init in METHODS if init != "zeroinit+bias"])
def test_biases_and_dropout_are_where_the_tables_have_them(init):
    net = WideResNet(16, 1, init)
    biased = init in ("biases", "biases+dropout", "zeroinit", "zeroinit-nodropout")
    assert all((m.bias is not None) == biased for m in net.modules() if isinstance(m, torch.nn.Conv2d))
    assert (net.classifier.bias is not None) == (biased or init in ("bn", "fixup"))
    assert net.drop_probability == (0.6 if init in ("dropout", "biases+dropout", "zeroinit") else 0)
    assert all(
        (block.scale is not None) == (init in ("scalar", "fixup") or "zeroinit" in init)
        for block in net.blocks
    )


def test_dropout():
    torch.manual_seed(0)
    noise = torch.tensor([[0.1, 0.59], [0.61, 0.999]])
    torch.testing.assert_close(
        dropout(torch.full((2, 2), 3.0), 0.6, noise), torch.tensor([[0, 0], [7.5, 7.5]])
    )
    x = dropout(torch.ones(1000, 100), 0.6)
    assert (x == 0).float().mean().item() == pytest.approx(
        0.6, abs=0.01
    ) and x.mean().item() == pytest.approx(1, abs=0.02)
    net = WideResNet(16, 1, "zeroinit")
    images = torch.randn(2, 3, 8, 8)
    assert not torch.equal(net(images), net(images))
    net.eval()
    assert torch.equal(net(images), net(images))


def test_a_scalar_does_not_widen_bfloat16():
    block = WideResNet(16, 1, "zeroinit").blocks[1]
    with torch.autocast("cpu", torch.bfloat16):
        assert block(torch.randn(2, 16, 8, 8).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_the_scalar_starts_at_alpha(alpha):
    net = WideResNet(16, 1, "scalar", alpha=alpha)
    assert [block.scale.item() for block in net.blocks] == [alpha] * 6
    x = torch.randn(2, 16, 8, 8)
    block = net.blocks[1]
    torch.testing.assert_close(block(x), x + alpha * block.conv2(block.conv1(x.relu()).relu()))


def test_alpha_is_zero_by_default():
    assert [block.scale.item() for block in WideResNet(16, 1, "zeroinit").blocks] == [0.0] * 6


@pytest.mark.parametrize("images, ghost", [(12, 4), (12, 0), (3, 4)])
def test_the_spelled_out_form_of_ghost_batch_norm(images, ghost):
    """What a compiler and ranks are given equals F.batch_norm: values, gradients, running statistics."""
    torch.manual_seed(0)
    x, weights = torch.randn(2, images, 3, 5, 5, dtype=torch.float64)
    found = []
    for form in ("forward", "spell_out"):
        norm = GhostBatchNorm2d(3, ghost).double()
        torch.nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(1))
        x.requires_grad_()
        out = getattr(norm, form)(x)
        gradients = torch.autograd.grad((out * weights).sum(), [x, norm.weight, norm.bias])
        found.append([out, *gradients, norm.running_mean, norm.running_var])
    for ours, reference in zip(*found, strict=True):
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-12)


def test_running_statistics_are_as_exact_under_autocast():
    """Those of 30 updates in bf16, of the spelled-out form: F.batch_norm keeps them in float32."""
    found = []
    for form in ("forward", "spell_out"):
        norm, draw = GhostBatchNorm2d(3, 8), torch.Generator().manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            for _ in range(30):
                getattr(norm, form)((400 * torch.randn(64, 3, 4, 4, generator=draw) + 100).bfloat16())
        found.append((norm.running_mean, norm.running_var))
    for ours, reference in zip(*found, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=0)


@pytest.mark.parametrize("momentum", [0.1, 0.5])
@pytest.mark.parametrize("chunks", [1, 2, 7])
def test_closed_running_statistics_are_those_of_sequential_passes(chunks, momentum):
    torch.manual_seed(0)
    x = 3 * torch.randn(chunks, 4, 3, 5, 5, dtype=torch.float64) + 1
    layer = GhostBatchNorm2d(3, 4).double()
    layer.momentum = momentum
    for statistic in (layer.running_mean, layer.running_var):
        torch.nn.init.uniform_(statistic, 0.5, 2)
    mean, var = layer.running_mean.clone(), layer.running_var.clone()
    for part in x:
        F.batch_norm(part, mean, var, training=True, momentum=momentum)
    layer.update_running(layer.running_mean, x.mean((1, 3, 4)))
    layer.update_running(layer.running_var, x.var((1, 3, 4)))
    torch.testing.assert_close(layer.running_mean, mean, rtol=0, atol=1e-12)
    torch.testing.assert_close(layer.running_var, var, rtol=0, atol=1e-12)
