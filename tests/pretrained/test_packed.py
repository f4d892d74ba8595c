"""Packed files of ternary models: written, loaded, checked, and refused."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import zoo
from zoo.cli import app
from zoo.data.text import tiny_shakespeare
from zoo.errors import ConfigError, WeightsError
from zoo.layers import PackedBitLinear, pack_bit_linears
from zoo.pretrained.files import read_header
from zoo.pretrained.packed import save_packed
from zoo.pretrained.source import find_weights
from zoo.pretrained.verify import verify

NAME, CONFIG = "matmulfree_2m", {"hidden_size": 32, "num_hidden_layers": 2}
IDS = torch.arange(2 * 7).view(2, 7)


@pytest.fixture(scope="module")
def model() -> Any:
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    return zoo.create_model(NAME, **CONFIG).eval()


@pytest.fixture
def file(model: Any, tmp_path: Path) -> Path:
    path = tmp_path / "packed.safetensors"
    packed = zoo.create_model(NAME, **CONFIG).eval()
    packed.load_state_dict(model.state_dict())
    save_packed(pack_bit_linears(packed), path, NAME, metadata={"licence": "mit"})
    return path


@torch.no_grad()
def test_a_file_gives_the_packed_model(model: Any, file: Path) -> None:
    loaded = zoo.create_model(str(file)).eval()
    assert all(not isinstance(layer, torch.nn.Linear) for layer in loaded.modules())
    assert sum(isinstance(layer, PackedBitLinear) for layer in loaded.modules()) == 2 * 6 + 1
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=0.0, atol=1e-4)
    again = zoo.create_model(NAME, checkpoint=file, **CONFIG).eval()
    assert torch.equal(again(IDS).logits, loaded(IDS).logits)
    half = zoo.create_model(str(file), dtype=torch.bfloat16)
    assert half.lm_head.scale.dtype == torch.float32
    assert torch.equal(half.lm_head.scale, loaded.lm_head.scale)


@torch.no_grad()
def test_transformers_does_not_write_it(model: Any, tmp_path: Path) -> None:
    """Its config.json would not say that it is packed, and ``from_pretrained`` would make up the weights."""
    packed = pack_bit_linears(copy.deepcopy(model))
    with pytest.raises(WeightsError, match="The model is packed"):
        packed.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="resize it first, then pack it"):
        packed.resize_token_embeddings(300)


def test_it_generates(model: Any, file: Path) -> None:
    loaded = zoo.create_model(str(file)).eval()
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(loaded.generate(IDS, **options), model.generate(IDS, **options))


def test_its_header_and_size(model: Any, file: Path) -> None:
    metadata = read_header(file)["__metadata__"]
    assert metadata["model"] == NAME
    assert json.loads(metadata["config"]) == CONFIG
    assert metadata["packing"] == "bitnet-2bit"
    assert find_weights(file).licence == "mit"
    layers = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    packed = {name: x for name, x in load_file(file).items() if name.endswith(".packed")}
    assert sum(x.nbytes for x in packed.values()) == sum(-(-len(x.weight) // 4) * x.in_features for x in layers)
    assert verify(find_weights(file)) == [f"{len(load_file(file))} keys and shapes", "finite values", "ternary codes"]


def damaged(file: Path, **changes: Any) -> Path:
    """The same file with other tensors or strings in it."""
    tensors, metadata = load_file(file), dict(read_header(file)["__metadata__"])
    for name, value in changes.items():
        if isinstance(value, str):
            metadata[name] = value
        else:
            tensors["lm_head." + name] = value
    save_file(tensors, file, metadata)
    return file


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": torch.tensor(float("nan"))}, r"lm_head.scale holds values that are NaN or infinite"),
        ({"packed": torch.full((65, 32), 0b11, dtype=torch.uint8)}, r"lm_head.packed holds a code that is none of"),
        ({"packed": torch.zeros(65, 31, dtype=torch.uint8)}, r"1 key \(lm_head.packed\) of another shape"),
        ({"packing": "base3"}, r"packed as 'base3'; expected 'bitnet-2bit'"),
        ({"config": json.dumps({"hidden_size": 64})}, r"hidden_size is 32, there 64"),
    ],
    ids=lambda x: "",
)
def test_refused(changes: dict[str, Any], message: str, file: Path) -> None:
    with pytest.raises(WeightsError, match=message) as caught:
        zoo.create_model(NAME, checkpoint=damaged(file, **changes), **CONFIG)
    assert "\n" not in str(caught.value)


def test_refused_by_another_model(file: Path, model: Any, tmp_path: Path) -> None:
    message = r"packed weights of matmulfree_2m, which this model is not: hidden_size is 192, there 32"
    with pytest.raises(WeightsError, match=message):
        zoo.create_model(NAME, checkpoint=file)
    with pytest.raises(WeightsError, match="which this model is not: it is of another family"):
        zoo.create_model("efficientvit_m0", checkpoint=file)
    with pytest.raises(WeightsError, match=r"is not packed; call zoo\.layers\.pack_bit_linears"):
        save_packed(model, tmp_path / "other.safetensors", NAME)
    with pytest.raises(WeightsError, match="Cannot write"):
        save_packed(zoo.create_model(str(file)), tmp_path / "none" / "x.safetensors", NAME)


@torch.no_grad()
def test_int8_embeddings(model: Any, tmp_path: Path) -> None:
    packed = zoo.create_model(NAME, **CONFIG).eval()
    packed.load_state_dict(model.state_dict())
    embedded = packed.model.embed_tokens(IDS)
    pack_bit_linears(packed, int8_embeddings=True)
    table = packed.model.embed_tokens
    assert table.codes.dtype == torch.int8
    assert not any(isinstance(layer, torch.nn.Embedding) for layer in packed.modules())
    off = (table(IDS) - embedded).abs()
    assert off.max() > 0
    assert (off <= 0.501 / 127 * embedded.abs().amax(-1, keepdim=True)).all()

    path = tmp_path / "int8.safetensors"
    save_packed(packed, path, NAME)
    assert torch.equal(zoo.create_model(str(path)).eval()(IDS).logits, packed(IDS).logits)
    half = zoo.create_model(str(path), dtype=torch.bfloat16)
    assert half.model.embed_tokens(IDS).dtype == torch.bfloat16
    with pytest.raises(WeightsError, match=r"embeddings as 'int4'; expected 'int8'"):
        zoo.create_model(str(damaged(path, embeddings="int4")))


@torch.no_grad()
def test_int8_embeddings_cost_little() -> None:
    """On 8 KB of text that the shipped weights have not seen; the packed model itself loses nothing."""
    pytest.importorskip("transformers")
    text = torch.tensor(list(tiny_shakespeare()[-32 * 256 :].encode())).view(32, 256)

    def loss(**options: bool) -> float:
        model: Any = zoo.create_model(NAME, pretrained=True).eval()
        model = pack_bit_linears(model, **options) if options else model
        return float(model(text, labels=text).loss)

    exact = loss()
    assert loss(int8_embeddings=False) == pytest.approx(exact, abs=1e-6)
    assert loss(int8_embeddings=True) == pytest.approx(exact, abs=2e-3)


def test_command(model: Any, tmp_path: Path) -> None:
    from zoo.atomic import save_safetensors

    source, out = tmp_path / "full.safetensors", tmp_path / "packed.safetensors"
    save_safetensors(model.state_dict(), source, {"model": NAME, "config": json.dumps(CONFIG)})
    done = CliRunner().invoke(app, ["weights", "pack", str(source), "--out", str(out)], catch_exceptions=False)
    assert done.exit_code == 0
    assert "times less than" in done.stdout
    with torch.no_grad():
        logits = zoo.create_model(str(out)).eval()(IDS).logits
        torch.testing.assert_close(logits, model(IDS).logits, rtol=0.0, atol=1e-4)
