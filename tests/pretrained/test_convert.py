"""zoo.pretrained.convert: the authors' layout in, out, and nothing unaccounted for."""

import hashlib
import itertools
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import zoo
from zoo import registry
from zoo.config import ModelConfig
from zoo.errors import ConfigError, UnknownModelError, WeightsError
from zoo.layers import ConvNorm
from zoo.pretrained import convert
from zoo.pretrained.convert import convert_file, convert_state_dict, to_authors
from zoo.registry import family_name

# Golden cases in a layout of the authors'.
CASES = [
    "efficientformer_l1",
    "efficientformerv2_s0",
    "efficientmod_s",
    "efficientmod_xs",
    "efficientvit_m0",
    "efficientvit_m5",
    "lowformer_b0",
    "lowformer_b15",
]
CONVERTED = [
    name
    for name in zoo.list_models(task="image-classification")
    if (convert._RULES / f"{family_name(name)}.toml").is_file()
]


def authors_state(golden: ModuleType, shared: Path, name: str) -> dict[str, Tensor]:
    """A golden case's weights, under the authors' names."""
    return golden.make_state(golden.load_case(shared / "golden" / f"{name}.json")["state"])


@pytest.fixture(scope="module")
def zoo_state() -> dict[str, Tensor]:
    """Random weights of M0 under zoo's names."""
    return zoo.create_model("efficientvit_m0").state_dict()


@pytest.mark.shared
@pytest.mark.parametrize("name", ["efficientvit_m0", "efficientvit_m5"])
def test_authors_weights_give_the_authors_outputs(name: str, golden: ModuleType, shared: Path) -> None:
    case = golden.load_case(shared / "golden" / f"{name}.json")
    expected = golden.load_outputs(shared / "golden" / f"{name}.json")
    model = zoo.create_model(name).eval()
    model.load_state_dict(convert_state_dict(authors_state(golden, shared, name), name), strict=True)
    assert sum(p.numel() for p in model.parameters()) == case["params"]
    with torch.inference_mode():
        features = model.forward_features(golden.make_input(case["input"]))
        logits = model.forward_head(features)
    for actual, wanted in ((features, expected["features"]), (logits, expected["logits"])):
        assert (actual - wanted).abs().max() <= 2e-5 * max(1.0, wanted.std())


@pytest.mark.shared
@pytest.mark.parametrize("name", CASES)
def test_round_trip_is_exact(name: str, golden: ModuleType, shared: Path) -> None:
    theirs = authors_state(golden, shared, name)
    ours = convert_state_dict(theirs, name)
    back = to_authors(ours, name)
    assert back.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert back[key].shape == tensor.shape
        # The index of the bias table, which golden cases leave at zero, is computed anew.
        assert key.endswith("attention_bias_idxs") or torch.equal(back[key], tensor)
    again = convert_state_dict(back, name)
    assert list(again) == list(ours)
    assert all(torch.equal(again[key], ours[key]) for key in ours)


@pytest.mark.parametrize("name", CONVERTED)
def test_every_variant_goes_to_the_authors_names_and_back(name: str) -> None:
    state = zoo.create_model(name).state_dict()
    again = convert_state_dict(to_authors(state, name), name)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in state.items())


def test_bias_index_is_put_back_as_the_authors_count(zoo_state: dict[str, Tensor]) -> None:
    index = to_authors(zoo_state, "efficientvit_m0")["blocks3.3.mixer.m.attn.attention_bias_idxs"]
    assert not index.is_meta
    points = [(y, x) for y in range(4) for x in range(4)]
    offsets: dict[tuple[int, int], int] = {}  # numbered in the order in which they are met, as LeViT does
    wanted = [[offsets.setdefault((abs(a - c), abs(b - d)), len(offsets)) for c, d in points] for a, b in points]
    assert index.tolist() == wanted


def test_zoo_names_are_returned_as_they_are(zoo_state: dict[str, Tensor]) -> None:
    converted = convert_state_dict(zoo_state, "efficientvit_m0")
    assert all(converted[key] is tensor for key, tensor in zoo_state.items())
    assert converted.keys() == zoo_state.keys()


def test_matrices_become_convolutions_where_the_shape_says_so(zoo_state: dict[str, Tensor]) -> None:
    theirs = to_authors(zoo_state, "efficientvit_m0")
    flat = {
        key: tensor[:, :, 0, 0] if tensor.ndim == 4 and tensor.shape[2:] == (1, 1) else tensor
        for key, tensor in theirs.items()
    }
    assert flat["blocks1.0.ffn0.m.pw1.c.weight"].ndim == 2
    converted = convert_state_dict(flat, "efficientvit_m0")
    assert converted["head.linear.weight"].ndim == 2
    assert all(torch.equal(converted[key], tensor) for key, tensor in zoo_state.items())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"model": state, "epoch": 299},
        lambda state: {"state_dict": state},
        lambda state: {"model": {}, "model_ema": state, "optimizer": {"state": {}}},
        lambda state: {"state_dict": {}, "state_dict_ema": state},
        lambda state: {f"module.{key}": tensor for key, tensor in state.items()},
        lambda state: {"state_dict": {f"module.module._orig_mod.{key}": tensor for key, tensor in state.items()}},
        lambda state: {"ema": {"module": state}, "model": {"a": torch.zeros(1)}},
        lambda state: {"n_averaged": torch.tensor(3), **{f"module.{key}": value for key, value in state.items()}},
        lambda state: {"model": {f"module.{key}": tensor for key, tensor in state.items()}},
    ],
)
@pytest.mark.parametrize("layout", ["zoo", "authors"])
def test_checkpoints_are_unwrapped(wrap: Any, layout: str, zoo_state: dict[str, Tensor]) -> None:
    state = zoo_state if layout == "zoo" else to_authors(zoo_state, "efficientvit_m0")
    converted = convert_state_dict(wrap(state), "efficientvit_m0")
    assert converted.keys() == zoo_state.keys()


@pytest.mark.parametrize("layout", ["zoo", "authors"])
def test_unknown_and_missing_keys_raise(layout: str, zoo_state: dict[str, Tensor]) -> None:
    state = dict(zoo_state) if layout == "zoo" else to_authors(zoo_state, "efficientvit_m0")
    extra = {**state, "head_dist.weight": torch.zeros(1)}
    with pytest.raises(WeightsError, match=r"1 key \(head_dist\.weight\) unknown, 0 missing"):
        convert_state_dict(extra, "efficientvit_m0")
    bias = state.pop("head.linear.bias" if layout == "zoo" else "head.l.bias")
    assert bias is not None
    with pytest.raises(WeightsError, match=r"0 unknown, 1 key \(head\.linear\.bias\) missing"):
        convert_state_dict(state, "efficientvit_m0")


def test_blocks_that_the_model_does_not_have_raise(zoo_state: dict[str, Tensor]) -> None:
    theirs = to_authors(zoo_state, "efficientvit_m0")
    theirs["blocks3.9.dw0.m.c.weight"] = torch.zeros(192, 1, 3, 3)
    with pytest.raises(WeightsError, match=r"blocks3\.9\.dw0\.m\.c\.weight"):
        convert_state_dict(theirs, "efficientvit_m0")


def test_names_of_both_layouts_at_once_raise(zoo_state: dict[str, Tensor]) -> None:
    mixed = {**to_authors(zoo_state, "efficientvit_m0"), "head.linear.weight": torch.zeros(1000, 192)}
    with pytest.raises(WeightsError, match=r"head\.linear\.weight"):
        convert_state_dict(mixed, "efficientvit_m0")


@pytest.mark.parametrize("checkpoint", [{}, {"model": {}}, {"epoch": 3}, {"model": {"a": 1}}, [], {"a": [1]}])
def test_no_state_dict(checkpoint: Any) -> None:
    with pytest.raises(WeightsError, match="No state dict"):
        convert_state_dict(checkpoint, "efficientvit_m0")


def test_unknown_model(zoo_state: dict[str, Tensor]) -> None:
    with pytest.raises(UnknownModelError, match="Did you mean"):
        convert_state_dict(zoo_state, "efficientvit_m9")


@pytest.mark.parametrize("zipped", [True, False])
def test_convert_file_from_a_training_checkpoint(zipped: bool, zoo_state: dict[str, Tensor], tmp_path: Path) -> None:
    source, target = tmp_path / "efficientvit_m0.pth", tmp_path / "efficientvit_m0.safetensors"
    checkpoint = {"model": to_authors(zoo_state, "efficientvit_m0"), "args": Namespace(lr=1e-3)}
    torch.save(checkpoint, source, _use_new_zipfile_serialization=zipped)
    assert convert_file(source, target, "efficientvit_m0") == target
    written = load_file(target)
    assert written.keys() == zoo_state.keys()
    assert all(torch.equal(written[key], zoo_state[key]) for key in written)
    with safe_open(target, "pt") as file:
        metadata = file.metadata()
    assert (metadata["format"], metadata["model"]) == ("pt", "efficientvit_m0")
    assert metadata["source_sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()


def test_convert_file_takes_tensors_that_share_memory(zoo_state: dict[str, Tensor], tmp_path: Path) -> None:
    whole = torch.zeros(2, 192)
    state = {**zoo_state, "head.bn.weight": whole[0], "head.bn.bias": whole[1]}
    torch.save(state, tmp_path / "a.pth")
    assert load_file(convert_file(tmp_path / "a.pth", tmp_path / "a.safetensors", "efficientvit_m0"))


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_malicious_pickle_does_not_run(zipped: bool, tmp_path: Path) -> None:
    source, ran = tmp_path / "m0.pth", tmp_path / "ran"
    torch.save({"model": Payload(ran)}, source, _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError, match=r"m0\.pth: not read"):
        convert_file(source, tmp_path / "m0.safetensors", "efficientvit_m0")
    assert not ran.exists()
    assert not (tmp_path / "m0.safetensors").exists()
    torch.load(source, weights_only=False)  # noqa: TID251 -- the payload works, where it is let
    assert ran.exists()


def test_damaged_pickle(zoo_state: dict[str, Tensor], tmp_path: Path) -> None:
    source = tmp_path / "m0.pth"
    torch.save(zoo_state, source)
    source.write_bytes(source.read_bytes()[:5000])
    with pytest.raises(WeightsError, match=r"m0\.pth: not read") as raised:
        convert_file(source, tmp_path / "m0.safetensors", "efficientvit_m0")
    assert "\n" not in str(raised.value)


def folded_by_timm(name: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's model with its batch norms folded by timm: each pair under its own name."""
    model = timm.create_model(name)
    model.load_state_dict(weights)
    return timm.utils.reparameterize_model(model.eval()).state_dict()


def folded_by_the_authors(name: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """As timm folds it, under the authors' names."""
    converter = convert._converter(registry.get_family("efficientvit"), zoo.get_config(name))
    renamed, _, unknown = converter.to_authors.apply(folded_by_timm(name, weights), {})
    assert not unknown
    assert "blocks1.0.mixer.m.attn.qkvs.0.bias" in renamed
    return renamed


@pytest.mark.parametrize(
    "name, fold",
    [
        ("efficientvit_m0", folded_by_timm),
        ("efficientvit_m0", folded_by_the_authors),
    ],
)
def test_folded_batch_norms_become_identities(name: str, fold: Any, randomise: Any) -> None:
    model = randomise(zoo.create_model(name))
    folded = fold(name, model.state_dict())
    assert len(folded) < 0.6 * len(model.state_dict())
    state = convert_state_dict({"model_ema": {f"module.{key}": value for key, value in folded.items()}}, name)
    assert state.keys() == model.state_dict().keys()
    again = zoo.create_model(name).eval()
    again.load_state_dict(state, strict=True)
    images = torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model(images)
        assert (again(images) - expected).abs().max() <= 2e-5 * max(1.0, expected.std())


def folded_by_hand(model: nn.Module) -> dict[str, Tensor]:
    """A state dict with every batch norm that directly follows a convolution folded, by torch's own function."""
    state = model.state_dict()
    modules = dict(model.named_modules())
    leaves = [path for path, module in modules.items() if not list(module.children())]
    for before, path in itertools.pairwise(leaves):
        conv, norm = modules[before], modules[path]
        if not isinstance(conv, nn.Conv2d) or not isinstance(norm, nn.BatchNorm2d):
            continue
        weight, bias = nn.utils.fusion.fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        place = before.rpartition(".")[0] if isinstance(modules[path.rpartition(".")[0]], ConvNorm) else before
        for key in [key for key in state if key.startswith((f"{before}.", f"{path}."))]:
            del state[key]
        state |= {f"{place}.weight": weight, f"{place}.bias": bias}
    return state


@pytest.mark.parametrize(
    "name",
    ["efficientformer_l1", "efficientformerv2_s0", "lowformer_b0", "efficientvmamba_t", "efficientvit_m0", "tinynet_e"],
)
def test_batch_norms_folded_by_hand(name: str, randomise: Any) -> None:
    model = randomise(zoo.create_model(name))
    folded = folded_by_hand(model)
    assert len(folded) < len(model.state_dict()) - 80
    state = convert_state_dict(folded, name)
    assert state.keys() == model.state_dict().keys()
    again = zoo.create_model(name).eval()
    again.load_state_dict(state, strict=True)
    images = torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model(images)
        assert (again(images) - expected).abs().max() <= 2e-5 * max(1.0, expected.std())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "efficientvit_m0",
            r"These are the weights of efficientvit_m0 after fuse\(\), which no other form of it can load",
        ),
        ("lowformer_b0", r"Not a state dict of .*It has no batch norms, as after fuse\(\)"),
        ("tinynet_e", r"These are the weights of tinynet_e after fuse\(\), which no other form"),
    ],
)
def test_what_fuse_leaves_is_refused(name: str, message: str) -> None:
    state = zoo.create_model(name).eval().fuse().state_dict()
    with pytest.raises(WeightsError, match=message):
        convert_state_dict(state, name)


def test_some_missing_batch_norms_are_not_taken_for_folded_ones(zoo_state: dict[str, Tensor]) -> None:
    state = {key: tensor for key, tensor in zoo_state.items() if not key.startswith("head.bn.")}
    with pytest.raises(WeightsError, match=r"0 unknown, 5 keys \(head\.bn\.weight"):
        convert_state_dict(state, "efficientvit_m0")


@pytest.mark.parametrize("name", ["efficientnet_b0", "efficientmod_xxs", "efficientvit_m0"])
def test_weights_of_a_fused_model_are_recognised(name: str) -> None:
    fused = zoo.create_model(name).fuse().state_dict()
    with pytest.raises(WeightsError, match=rf"the weights of {name} after fuse\(\), .* expected those before, or load"):
        convert_state_dict(fused, name)


def test_shapes_are_checked_and_the_config_can_be_another(zoo_state: dict[str, Tensor]) -> None:
    theirs = to_authors(zoo_state, "efficientvit_m0")
    ten = {**theirs, "head.l.weight": torch.zeros(10, 192), "head.l.bias": torch.zeros(10)}
    with pytest.raises(WeightsError, match=r"head\.l\.weight is \[10, 192\], expected \[1000, 192\].*num_classes=10"):
        convert_state_dict(ten, "efficientvit_m0")
    assert convert_state_dict(ten, "efficientvit_m0", num_classes=10)["head.linear.weight"].shape == (10, 192)
    with pytest.raises(ConfigError, match="Did you mean: num_classes"):
        convert_state_dict(ten, "efficientvit_m0", num_clases=10)


@dataclass(frozen=True, kw_only=True)
class ToyConfig(ModelConfig):
    width: int = 4


class Toy(nn.Module):
    """Named as zoo would, where the authors have one tensor for q, k and v, and two for the gates."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "q": nn.Linear(width, 2 * width),
                    "k": nn.Linear(width, width),
                    "v": nn.Linear(width, width),
                    "gates": nn.Linear(width, 2 * width, bias=False),
                    "mix": nn.Conv1d(width, 3, 2, bias=False),
                }
            )
            for _ in range(2)
        )


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    rules = tmp_path / "toy.toml"
    rules.write_text(
        """
names = [
  ["h.{i+1}.qkv.*", ["layers.{i}.q.*", "layers.{i}.k.*", "layers.{i}.v.*"]],
  [["h.{i+1}.up.*", "h.{i+1}.gate.*"], "layers.{i}.gates.*"],
  ["h.{i+1}.*", "layers.{i}.*"],
]
[permute]
"*.mix.weight" = [2, 0, 1]
"""
    )
    family = registry.Family(
        "toy", config=ToyConfig, model=Toy, title="Toy", paper="-", code="-", licence="mit", converter=rules
    )
    family.variant(toy_s)
    monkeypatch.setitem(registry._registered, "toy", family)
    return "toy_s"


def toy_s() -> ToyConfig:
    return ToyConfig()


def test_rules_split_concatenate_and_permute_both_ways(toy: str) -> None:
    ours = Toy(ToyConfig()).state_dict()
    theirs = to_authors(ours, toy)
    layer = "layers.1."
    for entry in ("weight", "bias"):
        parts = [ours[f"{layer}{part}.{entry}"] for part in "qkv"]
        assert torch.equal(theirs[f"h.2.qkv.{entry}"], torch.cat(parts))
    assert torch.equal(torch.cat([theirs["h.2.up.weight"], theirs["h.2.gate.weight"]]), ours[f"{layer}gates.weight"])
    assert theirs["h.2.mix.weight"].shape == (4, 2, 3)
    assert torch.equal(theirs["h.2.mix.weight"].permute(2, 0, 1), ours[f"{layer}mix.weight"])
    assert len(theirs) == 2 * 5

    back = convert_state_dict(theirs, toy)
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in ours.items())

    del theirs["h.2.gate.weight"]
    with pytest.raises(
        WeightsError, match=r"1 key \(h\.2\.up\.weight\) unknown, 1 key \(layers\.1\.gates\.weight\) mis"
    ):
        convert_state_dict(theirs, toy)
    short = {**to_authors(ours, toy), "h.1.qkv.weight": torch.zeros(15, 4)}
    with pytest.raises(WeightsError, match=r"1 key \(h\.1\.qkv\.weight\) unknown, 3 keys"):
        convert_state_dict(short, toy)


@pytest.mark.parametrize("name", zoo.list_models(task="image-classification"))
def test_every_variant_with_rules_goes_out_and_comes_back(name: str) -> None:
    config = zoo.get_config(name)
    family = registry.family_of(config)
    if convert._converter(family, config) is None:
        with pytest.raises(WeightsError, match="no other layout"):
            to_authors({}, name)
        return
    # Numbered, not random: equal means every entry is in its own place.
    with torch.device("meta"):
        own = family.model(config).state_dict()
    state = {key: torch.full(tensor.shape, i, dtype=tensor.dtype) for i, (key, tensor) in enumerate(own.items())}
    back = convert_state_dict({"state_dict": to_authors(state, name)}, name)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in state.items())
