"""The shared layers, each against its definition or timm's."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from timm.layers import SqueezeExcite as TimmSqueezeExcite
from timm.layers import make_divisible as timm_make_divisible
from timm.layers import resize_rel_pos_bias_table_levit
from torch import nn
from torch.testing import assert_close

from zoo.config import make_divisible
from zoo.layers import (
    AttentionBias,
    ConvNorm,
    DropPath,
    GlobalPool,
    NormLinear,
    SqueezeExcite,
    drop_path_rates,
    fuse_batch_norm,
    resize_bias_table,
)
from zoo.layers.attention_bias import offset_index
from zoo.layers.init import skip_init


def test_drop_path_drops_whole_samples_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    drop = DropPath(0.25).train()
    y = drop(torch.ones(4000, 3, 2, 2))
    assert torch.equal(y, y[:, :1, :1, :1].expand_as(y))
    assert y.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    dropped = (y[:, 0, 0, 0] == 0).float().mean().item()
    assert dropped == pytest.approx(0.25, abs=5 * (0.25 * 0.75 / 4000) ** 0.5)  # five standard deviations
    x = torch.randn(2, 3)
    assert drop.eval()(x) is x
    assert DropPath(0.0).train()(x) is x


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
def test_drop_path_scripts_and_traces() -> None:
    x = torch.ones(64, 2, 1, 1)
    for drop in (torch.jit.script(DropPath(0.5).train()), torch.fx.symbolic_trace(DropPath(0.5).train())):
        assert set(drop(x).unique().tolist()) == {0.0, 2.0}


def test_drop_path_rates() -> None:
    assert drop_path_rates(0.3, (1, 3)) == [[0.0], pytest.approx([0.1, 0.2, 0.3])]
    assert drop_path_rates(0.3, (1,)) == [[0.0]]
    assert drop_path_rates(0.0, (2, 2)) == [[0.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("old, new", [(4, 7), (7, 4), (7, 2), (1, 3)])
def test_bias_table_is_resized_as_timm_does(old: int, new: int) -> None:
    table = torch.randn(3, old * old)
    resized = resize_bias_table(table, (old, old), (new, new))
    assert_close(resized, resize_rel_pos_bias_table_levit(table.T, (new * new, 3)).T)
    assert resize_bias_table(table.bfloat16(), (old, old), (new, new)).dtype == torch.bfloat16
    exact = resize_bias_table(table.double(), (old, old), (new, new))
    assert exact.dtype == torch.float64
    assert_close(resized, exact.float(), rtol=1e-5, atol=1e-5)
    assert resize_bias_table(table, (old, old), (old, old)) is table


@pytest.mark.parametrize("height, width, stride", [(3, 3, 1), (2, 4, 1), (3, 5, 2), (4, 2, 2)])
def test_offset_index(height: int, width: int, stride: int) -> None:
    index = offset_index(height, width, stride)
    queries = [(y, x) for y in range(0, height, stride) for x in range(0, width, stride)]
    keys = [(y, x) for y in range(height) for x in range(width)]
    assert index.tolist() == [[abs(a - c) * width + abs(b - d) for c, d in keys] for a, b in queries]
    assert index[0].tolist() == list(range(height * width))


class Biased(AttentionBias):
    """An attention bias and nothing else."""

    def __init__(self, height: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.init_attention_bias(2, (height, width), stride=stride)
        nn.init.normal_(self.attention_biases)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("frozen", [False, True])
def test_attention_bias_at_another_size(stride: int, frozen: bool) -> None:
    """In the forward pass, through ``load_state_dict`` and by resizing, before and after it is frozen: all the same."""
    module, loaded = Biased(5, 5, stride), Biased(4, 6, stride)
    loaded.load_state_dict({**module.state_dict(), "attention_bias_idxs": torch.zeros(1)})
    expected = loaded.attention_bias()
    assert expected.shape == (2, 24 // stride**2, 24)
    if frozen:
        module.freeze_attention_bias()
    assert torch.equal(module.attention_bias_at(4, 6), expected)
    assert torch.equal(module.attention_bias_at(5, 5), module.attention_bias())
    module.resize_attention_bias((4, 6))
    assert torch.equal(module.attention_bias(), expected)
    assert bool(list(module.parameters())) != frozen


def trained(module: nn.Module) -> nn.Module:
    """With statistics and affine weights that are not the identity; float64, eval mode."""
    torch.manual_seed(0)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 2.0)
            nn.init.normal_(norm.bias)
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.1, 4.0)
    return module.double().eval()


@pytest.mark.parametrize(
    "module",
    [ConvNorm(6, 4), ConvNorm(6, 6, 3, stride=2, groups=6), ConvNorm(4, 8, 5, groups=2, eps=1e-3, norm_weight=0.0)],
)
def test_conv_norm_fuses_exactly(module: ConvNorm) -> None:
    module = trained(module)
    conv = module.fuse()
    assert type(conv) is nn.Conv2d
    x = torch.randn(2, conv.in_channels, 9, 8, dtype=torch.float64)
    assert_close(conv(x), module(x), rtol=0.0, atol=1e-13)


def test_norm_linear_fuses_exactly() -> None:
    module = trained(NormLinear(6, 4, drop_rate=0.5))
    linear = module.fuse()
    assert type(linear) is nn.Linear
    x = torch.randn(3, 6, dtype=torch.float64)
    assert_close(linear(x), module(x), rtol=0.0, atol=1e-13)


def test_fusing_keeps_what_does_not_fuse() -> None:
    network = trained(nn.Sequential(ConvNorm(3, 4), nn.ReLU(), nn.Sequential(ConvNorm(4, 4, 3), nn.MaxPool2d(2))))
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    expected = network(x)
    assert fuse_batch_norm(network) is network
    assert [type(m) for m in network.modules() if not list(m.children())] == [
        nn.Conv2d,
        nn.ReLU,
        nn.Conv2d,
        nn.MaxPool2d,
    ]
    assert_close(network(x), expected, rtol=0.0, atol=1e-13)


def test_a_norm_without_statistics_cannot_be_folded() -> None:
    module = ConvNorm(3, 4)
    module.bn = nn.BatchNorm2d(4, track_running_stats=False)
    with pytest.raises(RuntimeError, match="running statistics"):
        module.fuse()


def test_norm_weight_starts_where_it_is_told() -> None:
    assert torch.equal(ConvNorm(3, 4, norm_weight=0.0).bn.weight, torch.zeros(4))
    assert torch.equal(ConvNorm(3, 4).bn.weight, torch.ones(4))


def test_global_pool() -> None:
    x = torch.arange(24.0).view(1, 2, 3, 4)
    assert GlobalPool("avg")(x).tolist() == [[5.5, 17.5]]
    assert GlobalPool("max")(x).tolist() == [[11.0, 23.0]]
    assert GlobalPool("")(x) is x


def test_squeeze_excite_is_timms() -> None:
    ours = SqueezeExcite(24, ratio=0.25)
    theirs = TimmSqueezeExcite(24, 0.25)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 24, 5, 5)
    assert_close(ours(x), theirs(x))
    with torch.no_grad():
        assert_close(ours.fuse()(x), theirs(x))


def test_skip_init_leaves_values_alone_in_its_own_thread() -> None:
    values = torch.full((3,), 7.0)
    functions = dict(vars(nn.init))

    def initialise(_: int) -> float:
        return nn.init.ones_(torch.zeros(3)).sum().item()

    with ThreadPoolExecutor(1) as other:
        with skip_init():
            with skip_init():
                assert nn.init.ones_(values) is values
            nn.init.zeros_(values)
            assert values.tolist() == [7.0] * 3
            assert list(other.map(initialise, range(1))) == [3.0]
            assert nn.Linear(2, 2, device="meta").weight.is_meta
        nn.init.zeros_(values)
    assert values.tolist() == [0.0] * 3
    assert dict(vars(nn.init)) == functions


@pytest.mark.parametrize("limit", [0.0, 0.9])
def test_make_divisible_is_timms(limit: float) -> None:
    for value in range(1, 200):
        assert make_divisible(value / 2, 8, round_limit=limit) == timm_make_divisible(value / 2, 8, round_limit=limit)
