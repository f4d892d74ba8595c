"""EfficientVMamba against the authors' outputs and figures, and what is special to the family."""

import copy
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import zoo
from zoo.analysis.counts import count
from zoo.families.efficientvmamba import EfficientVMambaConfig
from zoo.models.efficientvmamba import AtrousScan, InvertedResidual, PatchMerging, ScanBlock
from zoo.ops.selective_scan import selective_scan_reference
from zoo.pretrained.convert import convert_file, convert_state_dict, to_authors

MODELS = zoo.list_models("efficientvmamba_*")

# The authors' training logs (parameters, in full) and README (billions of multiply-accumulates at 224 px).
PUBLISHED = {
    "efficientvmamba_b": (33.717, 4.0),
    "efficientvmamba_s": (11.274, 1.3),
    "efficientvmamba_t": (6.494, 0.8),
}


def images(height: int, width: int | None = None, batch: int = 1) -> Tensor:
    return torch.randn(batch, 3, height, width or height, generator=torch.Generator().manual_seed(0))


def tiny(**changes: object) -> nn.Module:
    """A small network of the family, for what does not depend on size."""
    config = EfficientVMambaConfig(widths=(16, 24, 32, 40), depths=(1, 2, 1, 1), img_size=64, num_classes=5)
    return zoo.build(config.override(**changes)).eval()


def test_there_are_three() -> None:
    assert list(PUBLISHED) == MODELS


@pytest.mark.parametrize("name", MODELS)
def test_published_costs(name: str) -> None:
    params, macs = PUBLISHED[name]
    counts = count(name)
    assert round(counts.params / 1e6, 3) == params
    assert round(counts.macs / 1e9, 1) == macs


@pytest.fixture(scope="module")
def case(golden: ModuleType, shared: Path) -> dict:
    """The golden case with its weights, input and outputs."""
    path = shared / "golden" / "efficientvmamba_tiny.json"
    case = golden.load_case(path)
    weights, image = golden.make_state(case["state"]), golden.make_input(case["input"])
    return {**case, "weights": weights, "image": image, "outputs": golden.load_outputs(path)}


@pytest.mark.parametrize("scan", ["cpu", "torch", "ref"])
def test_same_outputs_as_the_authors(scan: str, case: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_SELECTIVE_SCAN", scan)
    model = zoo.create_model("efficientvmamba_t").eval()
    model.load_state_dict(convert_state_dict(case["weights"], "efficientvmamba_t"))
    expected, features = case["outputs"]["logits"], case["outputs"]["features"]
    assert expected.std() > 0.1  # an output that weights and input matter to
    tolerance = 2e-5 * max(1.0, expected.std().item())
    with torch.no_grad():
        assert_close(model(case["image"]), expected, rtol=0.0, atol=tolerance)
        assert_close(model.fuse()(case["image"]), expected, rtol=0.0, atol=tolerance)
        last = model.forward_intermediates(case["image"], indices=1, intermediates_only=True)[0]
        assert_close(last, features, rtol=0.0, atol=2e-5 * max(1.0, features.std().item()))


def test_costs_of_the_authors_model(case: dict) -> None:
    counts = count("efficientvmamba_t")
    assert counts.params == case["params"]
    # They count norms too: 5 for each number that a layer norm reads, 2 for a batch norm's (1 in inference).
    assert 0.97 * case["macs"] < counts.macs < case["macs"]


@pytest.mark.parametrize("name", MODELS)
def test_converter_round_trip(name: str) -> None:
    state = zoo.create_model(name).state_dict()
    theirs = to_authors(state, name)
    depth = zoo.get_config(name).depths[2]
    assert f"layers.2.{depth + 2}.reduction.weight" in theirs
    assert f"layers.2.{depth}.conv_pw2.1.running_var" in theirs
    assert not theirs.keys() & state.keys()
    again = convert_state_dict(theirs, name)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in state.items())


def test_authors_names(case: dict) -> None:
    state = convert_state_dict(case["weights"], "efficientvmamba_t")
    back = to_authors(state, "efficientvmamba_t")
    assert {key: list(x.shape) for key, x in back.items()} == {key: spec[0] for key, spec in case["state"].items()}
    assert all(torch.equal(back[key], tensor) for key, tensor in case["weights"].items())


def test_published_checkpoint(case: dict, tmp_path: Path) -> None:
    """As on the Hub: a pickle, under "state_dict", wrapped twice."""
    weights = {f"module.module.{key}": tensor for key, tensor in case["weights"].items()}
    torch.save({"state_dict": weights, "epoch": 300}, tmp_path / "t.pth")
    file = convert_file(tmp_path / "t.pth", tmp_path / "t.safetensors", "efficientvmamba_t")
    model = zoo.create_model("efficientvmamba_t", checkpoint=file).eval()
    with torch.no_grad():
        assert_close(model(case["image"]), case["outputs"]["logits"], rtol=0.0, atol=2e-5)


# The atrous scan.


def scan_pixel_by_pixel(scan: AtrousScan, x: Tensor) -> Tensor:
    """The same from its definition: four sequences of pixels, each scanned by the reference."""
    B, D, H, W = x.shape
    rank, states, _ = scan.sizes
    y = torch.zeros(B, H + H % 2, W + W % 2, D, dtype=x.dtype)
    padded = torch.zeros(B, D, H + H % 2, W + W % 2, dtype=x.dtype)
    padded[:, :, :H, :W] = x
    rows, columns = range(0, padded.shape[2], 2), range(0, padded.shape[3], 2)
    orders = [
        [(i, j) for i in rows for j in columns],
        [(i + 1, j) for j in columns for i in rows],
        [(i, j + 1) for i in rows for j in columns],
        [(i + 1, j + 1) for j in columns for i in rows],
    ]
    for k, order in enumerate(orders):
        u = torch.stack([padded[:, :, i, j] for i, j in order], -1)
        dt, b, c = (scan.x_proj[k] @ u).split([rank, states, states], 1)
        own = slice(k * D, (k + 1) * D)
        out, _ = selective_scan_reference(
            u,
            scan.dt_proj[k] @ dt,
            -scan.A_log[own].exp(),
            b[:, None],
            c[:, None],
            scan.D[own],
            delta_bias=scan.dt_bias[k],
            delta_softplus=True,
        )
        for t, (i, j) in enumerate(order):
            y[:, i, j] = out[:, :, t]
    return y[:, :H, :W]


@pytest.mark.parametrize("size", [(8, 8), (6, 10), (7, 8), (8, 7), (5, 3), (1, 1), (1, 6)], ids=str)
def test_atrous_scan_is_its_definition(size: tuple[int, int], randomise: Callable) -> None:
    scan = randomise(AtrousScan(6, rank=2, state_size=3)).double()
    x = torch.randn(2, 6, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = scan_pixel_by_pixel(scan, x)
        assert_close(scan(x), expected)
        assert_close(scan(x.to(memory_format=torch.channels_last)), expected)


@pytest.mark.parametrize("size", [(6, 6), (5, 7), (1, 1)], ids=str)
def test_patch_merging(size: tuple[int, int], randomise: Callable) -> None:
    """Pixels of a patch follow one another column by column."""
    merging = randomise(PatchMerging(3, 4))
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    y = merging(x)
    assert y.shape == (2, 4, -(-size[0] // 2), -(-size[1] // 2))
    padded = nn.functional.pad(x, (0, size[1] % 2, 0, size[0] % 2))
    patch = torch.cat([padded[0, :, i, j] for i, j in ((-2, -2), (-1, -2), (-2, -1), (-1, -1))])
    assert_close(y[0, :, -1, -1], merging.reduction(merging.norm(patch)))


def test_initialisation() -> None:
    scan = AtrousScan(12, rank=2, state_size=4)
    assert_close(scan.A_log.exp(), torch.arange(1.0, 5.0).expand(48, 4))
    assert torch.equal(scan.D, torch.ones(48))
    dt = nn.functional.softplus(scan.dt_bias)
    assert dt.min() >= 0.001 * (1 - 1e-4)
    assert dt.max() <= 0.1 * (1 + 1e-4)
    assert scan.dt_proj.abs().max() <= 2**-0.5


def test_initialisation_after_to_empty(initialised_again: Callable) -> None:
    """A model built on the meta device and initialised there is like one that was never there."""
    torch.manual_seed(0)
    expected = zoo.create_model("efficientvmamba_t")
    model = initialised_again(expected)
    for (key, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert p.isfinite().all(), key
        if q.numel() >= 1000 and q.std() > 0:
            assert p.std().item() == pytest.approx(q.std().item(), rel=0.2), key


# The network.


@pytest.mark.parametrize("size", [(96, 96), (128, 128), (224, 224), (100, 60), (36, 132), (97, 33)], ids=str)
def test_any_size(size: tuple[int, int], randomise: Callable) -> None:
    """A model has nothing that depends on the size it was built for."""
    model = randomise(tiny())
    other = tiny(img_size=size)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        y = model(images(*size))
        assert y.isfinite().all()
        assert torch.equal(other(images(*size)), y)


def test_set_input_size(randomise: Callable) -> None:
    model = randomise(tiny())
    expected = model(images(96, 128))
    model.set_input_size((96, 128))
    assert model.config.input_hw == (96, 128)
    assert torch.equal(model(images(96, 128)), expected)


@pytest.mark.parametrize("stages", [0, 1, 4])
def test_number_of_scan_stages(stages: int) -> None:
    """The rows of the paper's Table 8: all inverted residuals, as it is, all state-space blocks."""
    model = tiny(num_scan_stages=stages)
    kinds = [type(stage.blocks[0]) for stage in model.stages]
    assert kinds == [ScanBlock] * stages + [InvertedResidual] * (4 - stages)
    assert model(images(64)).shape == (1, 5)


def test_no_weight_decay() -> None:
    names = zoo.create_model("efficientvmamba_t").no_weight_decay()
    assert len(names) == 8
    assert {name.rsplit(".", 1)[1] for name in names} == {"A_log", "D"}


def test_fused_stays_fused_in_eval(randomise: Callable) -> None:
    model = randomise(tiny())
    fused = copy.deepcopy(model).fuse()
    assert not [m for m in fused.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        assert_close(fused(images(64)), model(images(64)), rtol=1e-4, atol=1e-5)
        channels_last = images(64).to(memory_format=torch.channels_last)
        assert_close(fused(channels_last), fused(images(64)), rtol=1e-5, atol=1e-6)


def test_low_precision(randomise: Callable) -> None:
    """The recurrence stays in float32."""
    model = randomise(tiny())
    with torch.no_grad():
        expected = model(images(64))
        with torch.autocast("cpu", torch.bfloat16):
            assert_close(model(images(64)).float(), expected, rtol=0.1, atol=0.05 * expected.abs().max().item())
        assert model.bfloat16()(images(64).bfloat16()).dtype == torch.bfloat16


def test_compile_without_graph_breaks(randomise: Callable) -> None:
    model = randomise(tiny()).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    gradients = []
    for each in (model, compiled):
        model.zero_grad()
        each(images(64, batch=2)).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, ours in zip(*gradients, strict=True):
        assert_close(ours, plain, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widths": (48, 96)}, "widths has 2, depths has 4"),
        ({"depths": (2, 0, 4, 2)}, "positive"),
        ({"num_scan_stages": 5}, "num_scan_stages is 5; expected 0 to 4"),
        ({"num_scan_stages": -1}, "num_scan_stages is -1"),
        ({"widths": (4, 96, 192, 384)}, r"widths\[0\] is 4; .* at least 8"),
        ({"state_size": 0}, "positive"),
        ({"img_size": 16}, "at least 32 pixels"),
    ],
)
def test_configs_that_make_no_network(changes: dict, message: str) -> None:
    with pytest.raises(zoo.ConfigError, match=message):
        EfficientVMambaConfig(**changes)
