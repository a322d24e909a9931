"""ResNet-50 against torchvision's, a functional reference written out here, and the papers' numbers."""

import math

import pytest
import torch
import torch.nn.functional as F
import torchvision

import common
import wrn_cifar
from common import METHODS, BottleneckV1, BottleneckV2, GhostBatchNorm2d, ResNet50, ScalarBias, WideResNet
from records import UserError

FIRST = {0: 1, 3: 2, 7: 2, 13: 2}  # the first block of each group of 3, 4, 6 and 3 blocks, and its stride
WIDTH = [64] * 3 + [128] * 4 + [256] * 6 + [512] * 3


def random_net(*args, **options):
    """A float64 ResNet-50 of ten classes, all of whose parameters and running statistics are random."""
    with torch.device("meta"):
        net = ResNet50(*args, num_classes=10, **options)
    net = net.double().to_empty(device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            if tensor.ndim > 1:
                tensor.normal_(std=tensor[0].numel() ** -0.5)
            elif name.endswith(("weight", "running_var")):
                tensor.uniform_(0.5, 1.5)
            elif tensor.is_floating_point():
                tensor.normal_(std=0.3)
    return net


def projection(block):
    """The convolution on a block's skip path; in V1 a norm may follow."""
    return block.projection[0] if isinstance(block, BottleneckV1) else block.projection


def assert_close(ours, reference):
    """Equal up to 1e-9 of the largest entry."""
    assert ours.shape == reference.shape and reference.abs().max() > 0
    assert (ours - reference).abs().max() <= 1e-9 * reference.abs().max()


# ------------------------------------------------------------------------------------------------ counts


@pytest.mark.parametrize(
    ("version", "init", "parameters", "scalars"),
    [
        ("v1", "bn", 25_557_032, 0),
        ("v1", "zeroinit", 25_530_488, 16),
        ("v1", "zeroinit+bias", 25_530_488 + 16, 32),
        ("v1", "fixup", 25_504_026, 114),
        ("v2", "bn", 25_549_352, 0),
        (
            "v2",
            "zeroinit",
            25_530_488,
            16,
        ),  # neither norms nor their places: the same convolutions and biases as v1
    ],
)
def test_parameter_counts(version, init, parameters, scalars):
    with torch.device("meta"):
        net = ResNet50(version, init)
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert sum(p.ndim == 0 for p in net.parameters()) == scalars


# -------------------------------------------------------------------------------------------- references


def to_torchvision(name):
    """torchvision's name of one of our parameters or statistics."""
    part, _, rest = name.partition(".")
    if part != "blocks":
        return name.replace("stem.0", "conv1").replace("stem.1", "bn1").replace("classifier", "fc")
    index, _, rest = rest.partition(".")
    group, first = max((g, first) for g, first in enumerate(FIRST, 1) if first <= int(index))
    return (
        f"layer{group}.{int(index) - first}.{rest.replace('norm', 'bn').replace('projection', 'downsample')}"
    )


@pytest.mark.parametrize(("stride_on", "training"), [(None, True), (None, False), ("3x3", True)])
def test_v1_equals_torchvision(stride_on, training):
    ours = random_net("v1", "bn", stride_on=stride_on).train(training)
    with torch.device("meta"):
        theirs = torchvision.models.resnet50(num_classes=10)
    theirs = theirs.double().to_empty(device="cpu").train(training)
    theirs.load_state_dict({to_torchvision(name): tensor for name, tensor in ours.state_dict().items()})
    if stride_on is None:  # the paper's own has the stride on the first convolution
        for group in (theirs.layer2, theirs.layer3, theirs.layer4):
            group[0].conv1.stride, group[0].conv2.stride = group[0].conv2.stride, group[0].conv1.stride
    images, direction = torch.randn(4, 3, 32, 32).double(), torch.randn(4, 10).double()
    logits, expected = ours(images), theirs(images)
    assert_close(logits, expected)
    (logits * direction).sum().backward()
    (expected * direction).sum().backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert_close(parameter.grad, gradients[to_torchvision(name)])
    statistics = {name: b for name, b in theirs.named_buffers() if "running" in name}
    for name, buffer in ours.named_buffers():
        if "running" in name:
            assert_close(buffer, statistics[to_torchvision(name)])


def reference_v2(p, images, init, training, noise, stride_on):
    """The logits of ResNet-50-V2 with parameters and statistics p (He et al., 2016b; Zhang et al., 2019)."""

    def activation(x, name):
        if init == "fixup":
            x = x + p[f"{name}.bias"]
        if init == "bn":
            mean, var = p[f"{name}.running_mean"], p[f"{name}.running_var"]
            if training:
                mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
            x = (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
            x = x * p[f"{name}.weight"][:, None, None] + p[f"{name}.bias"][:, None, None]
        return x.clamp(min=0)

    def convolution(x, name, stride=1, padding=0):
        bias = p[f"{name}.bias"] if init == "zeroinit" else None
        return F.conv2d(x, p[f"{name}.weight"], bias, stride, padding)

    def shift(x, name):
        return x + p[f"{name}.bias"] if init == "fixup" else x

    x = F.max_pool2d(activation(convolution(images, "stem.0", 2, 3), "stem.1"), 3, 2, 1)
    for i in range(16):
        stride1, stride2 = (FIRST.get(i, 1), 1) if stride_on == "1x1" else (1, FIRST.get(i, 1))
        h = x if i == 0 else activation(x, f"blocks.{i}.norm1")
        h = shift(h, f"blocks.{i}.bias1")
        skip = convolution(h, f"blocks.{i}.projection", FIRST[i]) if i in FIRST else x
        h = convolution(h, f"blocks.{i}.conv1", stride1)
        h = shift(activation(h, f"blocks.{i}.norm2"), f"blocks.{i}.bias2")
        h = convolution(h, f"blocks.{i}.conv2", stride2, 1)
        h = shift(activation(h, f"blocks.{i}.norm3"), f"blocks.{i}.bias3")
        h = convolution(h, f"blocks.{i}.conv3")
        x = skip + (h if init == "bn" else h * p[f"blocks.{i}.scale"])
    features = activation(x, "norm").mean((2, 3))
    if init == "zeroinit" and training:
        features = torch.where(noise < 0.2, 0.0, features / 0.8)
    return shift(features, "bias") @ p["classifier.weight"].T + p["classifier.bias"]


@pytest.mark.parametrize(
    ("init", "training", "stride_on"),
    [("bn", True, None), ("bn", False, "1x1"), ("zeroinit", True, None), ("fixup", True, "1x1")],
)
def test_v2_equals_a_functional_reference(init, training, stride_on):
    net = random_net("v2", init, stride_on=stride_on).train(training)
    p = dict(net.named_parameters()) | {name: b.clone() for name, b in net.named_buffers()}
    images, direction = torch.randn(4, 3, 32, 32).double(), torch.randn(4, 10).double()
    noise = torch.rand(4, 2048).double()
    logits, expected = net(images, noise), reference_v2(p, images, init, training, noise, stride_on)
    assert_close(logits, expected)
    gradients = torch.autograd.grad((logits * direction).sum(), list(net.parameters()))
    expected = torch.autograd.grad((expected * direction).sum(), list(net.parameters()))
    for ours, reference in zip(gradients, expected, strict=True):
        assert_close(ours, reference)


@pytest.mark.parametrize("init", ["zeroinit", "zeroinit+bias", "fixup"])
@pytest.mark.parametrize("inputs", [64, 32])
def test_v1_blocks_without_norm(init, inputs):
    """Fixup as its authors have it, conv(x + a) and a bias before each ReLU; ZeroInit as in section 5."""
    torch.manual_seed(0)
    block = BottleneckV1(METHODS[init], inputs, 16, 2 if inputs == 32 else 1, 0, "1x1").double()
    for p in block.parameters():
        p.data += 0.3 * torch.randn_like(p)
    zero = torch.zeros(()).double()
    a1, a2, a3, b1, b2, b3 = (
        getattr(layer, "bias", zero)
        for layer in (block.bias1, block.bias2, block.bias3, block.norm1, block.norm2, block.last_bias)
    )
    used = {"zeroinit": 0, "zeroinit+bias": 1, "fixup": 6}[init]
    assert len({id(scalar) for scalar in (a1, a2, a3, b1, b2, b3)} - {id(zero)}) == used

    def convolution(x, conv, stride=1):
        return F.conv2d(x, conv.weight, conv.bias, stride, conv.weight.shape[-1] // 2)

    x = torch.randn(2, inputs, 8, 8).double()
    skip = convolution(x + a1, projection(block), 2) if inputs == 32 else x
    h = (convolution(x + a1, block.conv1, 2 if inputs == 32 else 1) + b1).relu()
    h = (convolution(h + a2, block.conv2) + b2).relu()
    expected = (skip + convolution(h + a3, block.conv3) * block.scale + b3).relu()
    assert (block.conv1.bias is None) == (init == "fixup") and (block.projection is None) == (inputs == 64)
    assert_close(block(x), expected)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_ghost_batches(version):
    net = random_net(version, "bn", ghost=2)
    ghosts = [module.ghost for module in net.modules() if isinstance(module, GhostBatchNorm2d)]
    assert ghosts == [2] * {"v1": 53, "v2": 49}[version]
    images = torch.randn(4, 3, 32, 32).double()
    with torch.no_grad():
        assert_close(net(images), torch.cat([net(images[:2]), net(images[2:])]))


# ---------------------------------------------------------------------------------------- initialization


@pytest.mark.parametrize(("version", "init"), [("v1", "zeroinit"), ("v1", "zeroinit+bias"), ("v2", "scalar")])
def test_zeroinit_blocks_start_as_the_identity(version, init, monkeypatch):
    monkeypatch.setattr(
        common, "draw_weights", lambda weight, _: torch.nn.init.normal_(weight, std=0.1)
    )  # fast
    torch.manual_seed(0)
    net = ResNet50(version, init)
    assert [i for i, block in enumerate(net.blocks) if block.projection is not None] == list(FIRST)
    for i, block in enumerate(net.blocks):
        x = torch.randn(2, block.conv1.in_channels, 4, 4)
        projected = 0 if i not in FIRST else block.projection(x if version == "v1" else x.relu())
        expected = projected if i in FIRST else x
        output = block(x)
        assert torch.equal(output, expected.relu() if version == "v1" else expected)
        (output * torch.randn_like(output)).sum().backward()
        assert block.scale.ndim == 0 and block.scale.grad.abs() > 0
        assert all(p.grad.count_nonzero() == 0 for conv in block.branch_convs() for p in conv.parameters())
        if init == "zeroinit+bias":
            assert block.last_bias.bias.ndim == 0 and block.last_bias.bias.grad.abs() > 0


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_fixup_starts_by_its_four_rules(version):
    torch.manual_seed(0)
    net = ResNet50(version, "fixup")
    assert len(net.blocks) == 16
    for i, (block, width) in enumerate(zip(net.blocks, WIDTH, strict=True)):
        assert block.conv3.weight.count_nonzero() == 0 and block.scale.item() == 1
        # He's deviation times 16^(-1/(2m-2)), m = 3.
        for conv, fan_out in (block.conv1, width), (block.conv2, 9 * width):
            assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out) / 2, rel=0.05)
        if i in FIRST:
            deviation = projection(block).weight.std().item()
            assert deviation == pytest.approx(math.sqrt(2 / (4 * width)), rel=0.05)
    assert net.stem[0].weight.std().item() == pytest.approx(math.sqrt(2 / (49 * 64)), rel=0.05)
    biases = [module.bias for module in net.modules() if isinstance(module, ScalarBias)]
    assert len(biases) == 98 and all(bias.ndim == 0 and bias.item() == 0 for bias in biases)
    assert all(module.bias is None for module in net.modules() if isinstance(module, torch.nn.Conv2d))
    assert net(torch.randn(2, 3, 32, 32)).abs().max() == 0


def test_the_scalars_start_at_alpha(monkeypatch):
    monkeypatch.setattr(common, "initialize", lambda *_: None)  # of other parameters; it takes seconds
    assert {block.scale.item() for block in ResNet50("v2", "scalar", alpha=0.5).blocks} == {0.5}


def test_norms_start_as_plain_ones():
    torch.manual_seed(0)
    net = ResNet50("v1", "bn", base_init="he-out")
    for module in net.modules():
        if isinstance(module, GhostBatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all()  # also the last one of each branch
    assert net.blocks[5].conv3.weight.std().item() == pytest.approx(math.sqrt(2 / 512), rel=0.02)
    assert net.classifier.weight.std().item() == pytest.approx(0.8796 * 2048**-0.5, rel=0.02)


# ------------------------------------------------------------------------------------ methods and errors


def test_the_scalar_bias_is_for_v1_only():
    with torch.device("meta"):
        for make in (lambda: ResNet50("v2", "zeroinit+bias"), lambda: WideResNet(16, 1, "zeroinit+bias")):
            with pytest.raises(ValueError, match="ResNet-50-V1"):
                make()
    with pytest.raises(UserError, match="argument --init: invalid choice"):
        wrn_cifar.parse_args(["--init", "zeroinit+bias"])


@pytest.mark.parametrize(("version", "stride_on"), [("v3", None), (2, None), ("v1", "5x5"), ("v2", "")])
def test_other_versions_and_strides_are_errors(version, stride_on):
    with pytest.raises(ValueError, match=str(stride_on or version)), torch.device("meta"):
        ResNet50(version, stride_on=stride_on)


@pytest.mark.parametrize("init", METHODS)
def test_biases_and_dropout_are_where_the_tables_have_them(init):
    with torch.device("meta"):
        net = ResNet50("v1", init)
    biased = init.startswith(("biases", "zeroinit"))
    assert all((m.bias is not None) == biased for m in net.modules() if isinstance(m, torch.nn.Conv2d))
    assert (net.classifier.bias is not None) == (biased or init in ("bn", "fixup"))
    assert net.drop_probability == (
        0.2 if init in ("dropout", "biases+dropout", "zeroinit", "zeroinit+bias") else 0
    )
    with torch.device("meta"):
        assert ResNet50("v1", init, dropout=0.5).drop_probability == 0.5


def test_dropout_only_in_training():
    net = random_net("v1", "zeroinit")
    images, bias = torch.randn(2, 3, 32, 32).double(), net.classifier.bias
    with torch.no_grad():
        assert not torch.equal(net(images), net(images))
        kept, dropped = (net(images, torch.full((2, 2048), noise).double()) for noise in (0.2, 0.19))
        net.eval()
        assert torch.equal(net(images), net(images))
        assert_close(kept - bias, (net(images) - bias) / 0.8)
        assert_close(dropped, bias.expand(2, 10))


@pytest.mark.parametrize("init", METHODS)
def test_a_block_keeps_bfloat16(init):
    for block in (BottleneckV1, BottleneckV2):
        for inputs in (32, 64):
            layer = block(METHODS[init], inputs, 16, 1, 2, "3x3")
            with torch.autocast("cpu", torch.bfloat16):
                assert layer(torch.randn(4, inputs, 4, 4).bfloat16()).dtype == torch.bfloat16
