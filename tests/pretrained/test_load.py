"""zoo.pretrained.load: files that are what they should be, and those that are not."""

import hashlib
import json
import logging
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import zoo
from zoo.atomic import save_safetensors
from zoo.errors import WeightsError
from zoo.pretrained import manifest
from zoo.pretrained.convert import to_authors
from zoo.pretrained.fetch import converted_path, fetch
from zoo.pretrained.files import forget_verified
from zoo.pretrained.load import fit_state_dict, load_state_dict
from zoo.pretrained.manifest import get_weights
from zoo.registry import get_family

REPO = "timm/efficientvit_m0.r224_in1k"


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """Random weights of M0."""
    return zoo.create_model("efficientvit_m0").state_dict()


@pytest.fixture
def file(state: dict[str, Tensor], tmp_path: Path) -> Path:
    """The same as a file."""
    save_safetensors(state, tmp_path / "m0.safetensors")
    return tmp_path / "m0.safetensors"


def test_reads_what_was_written(file: Path, state: dict[str, Tensor]) -> None:
    loaded = load_state_dict(file)
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[key], tensor) and loaded[key].dtype == tensor.dtype for key, tensor in state.items())


def test_what_is_read_does_not_change_with_the_file(file: Path, state: dict[str, Tensor]) -> None:
    loaded = load_state_dict(file)
    with file.open("r+b") as opened:
        opened.write(bytes(file.stat().st_size))
    assert all(torch.equal(loaded[key], tensor) for key, tensor in state.items())


def test_mapping_reads_the_same(file: Path, state: dict[str, Tensor]) -> None:
    loaded = load_state_dict(file, mapped=True)
    assert all(torch.equal(loaded[key], tensor) for key, tensor in state.items())
    loaded["head.linear.weight"].zero_()  # the file stays as it is
    assert torch.equal(load_state_dict(file)["head.linear.weight"], state["head.linear.weight"])


@pytest.mark.parametrize("shift", [0, 1, 4, 8, 16, 40])
def test_wherever_tensors_lie_in_a_file(shift: int, file: Path, state: dict[str, Tensor]) -> None:
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    file.write_bytes((length + shift).to_bytes(8, "little") + data[8 : 8 + length] + b" " * shift + data[8 + length :])
    loaded = load_state_dict(file, mapped=True)
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[key], tensor) and loaded[key].is_contiguous() for key, tensor in state.items())
    assert all(tensor.data_ptr() % tensor.itemsize == 0 for tensor in loaded.values())


def test_a_mapped_file_is_checked_once_and_again_when_it_changes(
    file: Path, state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = []
    monkeypatch.setattr("zoo.pretrained.load.check_finite", lambda state, path: checked.append(path))
    for _ in range(2):
        load_state_dict(file, mapped=True)
    assert checked == [file]
    load_state_dict(file)  # what is not of the cache always is
    assert checked == [file] * 2
    save_safetensors(state, file)
    load_state_dict(file, mapped=True)
    assert checked == [file] * 3
    forget_verified()
    load_state_dict(file, mapped=True)
    assert checked == [file] * 4


@pytest.mark.parametrize("dtype, size", [("U16", 4), ("C64", 16), ("F8_E4M3", 2)])
def test_a_kind_of_number_that_zoo_does_not_use(dtype: str, size: int, tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": dtype, "shape": [2], "data_offsets": [0, size]}})
    file = tmp_path / "a.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(size))
    with pytest.raises(WeightsError, match=f"a is of dtype {dtype}; expected one of F64, F32"):
        load_state_dict(file, mapped=True)


def test_a_model_from_a_users_file_does_not_change_with_it(file: Path, state: dict[str, Tensor]) -> None:
    model = zoo.create_model("efficientvit_m0", checkpoint=file)
    with file.open("r+b") as opened:
        opened.write(bytes(file.stat().st_size))
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in state.items())


def damage(file: Path, how: str) -> Path:
    """Make a file, or what is in its place, unreadable in one of several ways."""
    data = file.read_bytes()
    if how == "missing" or how == "folder":
        file.unlink()
    if how == "folder":
        file.mkdir()
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "truncated":
        file.write_bytes(data[: len(data) // 2])
    elif how == "truncated header":
        file.write_bytes(data[:100])
    elif how == "corrupt header":
        file.write_bytes(data[:8] + b"{" + bytes(range(200)) + data[209:])
    elif how == "one byte":
        file.write_bytes(b"P")
    elif how == "text":
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    elif how == "huge header":
        file.write_bytes((2**60).to_bytes(8, "little") + data[8:])
    return file


@pytest.mark.parametrize(
    "how, message",
    [
        ("missing", "no such file; expected a safetensors file"),
        ("folder", "a folder; expected a safetensors file"),
        ("empty", "an empty file; expected safetensors"),
        ("truncated", "not a whole safetensors file"),
        ("truncated header", "not a whole safetensors file"),
        ("corrupt header", "not a whole safetensors file"),
        ("one byte", "not a whole safetensors file"),
        ("text", "not a whole safetensors file"),
        ("huge header", "not a whole safetensors file"),
    ],
)
def test_unreadable_file(how: str, message: str, file: Path) -> None:
    with pytest.raises(WeightsError, match=message) as raised:
        zoo.create_model("efficientvit_m0", checkpoint=damage(file, how))
    assert str(file) in str(raised.value)
    assert "\n" not in str(raised.value)


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("suffix", ["pth", "bin", "safetensors"])
def test_pickle_is_refused_and_not_run(zipped: bool, suffix: str, tmp_path: Path) -> None:
    file, ran = tmp_path / f"m0.{suffix}", tmp_path / "ran"
    torch.save({"model": Payload(ran)}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError, match=r"a pickle.*expected safetensors.*zoo weights convert") as raised:
        zoo.create_model("efficientvit_m0", checkpoint=file)
    assert not ran.exists()
    assert "\n" not in str(raised.value)


def test_header_as_long_as_a_pickle_mark_is_still_safetensors(tmp_path: Path) -> None:
    # A header of 640 bytes starts a file with 0x80 0x02, as a pickle of protocol 2 does.
    file = tmp_path / "a.safetensors"
    save_safetensors({"a": torch.ones(2)}, file, {"padding": ""})
    length = int.from_bytes(file.read_bytes()[:8], "little")
    save_safetensors({"a": torch.ones(2)}, file, {"padding": "x" * (640 - length)})
    assert file.read_bytes()[:2] == b"\x80\x02"
    assert torch.equal(load_state_dict(file)["a"], torch.ones(2))


def test_checkpoint_of_another_architecture(tmp_path: Path) -> None:
    other = {
        "conv1.weight": torch.zeros(64, 3, 7, 7),
        "fc.weight": torch.zeros(1000, 512),
        "fc.bias": torch.zeros(1000),
    }
    save_safetensors(other, tmp_path / "resnet.safetensors")
    with pytest.raises(
        WeightsError, match=r"does not fit efficientvit_m0: 3 keys \(conv1\.weight, .*\) unused"
    ) as raised:
        zoo.create_model("efficientvit_m0", checkpoint=tmp_path / "resnet.safetensors")
    assert "missing" in str(raised.value)
    assert len(str(raised.value)) < 300


def test_checkpoint_of_another_variant(file: Path) -> None:
    with pytest.raises(WeightsError, match=r"does not fit efficientvit_m5: .*\(patch_embed\.conv1\.conv\.weight, "):
        zoo.create_model("efficientvit_m5", checkpoint=file)
    with pytest.raises(WeightsError, match=r"does not fit efficientvit_m3: \d+ keys \(.*\) of another"):
        zoo.create_model("efficientvit_m3", checkpoint=file)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda state: state.update({"head.fc.weight": torch.zeros(1)}),
            r"1 key \(head\.fc\.weight\) unused, 0 missing",
        ),
        (lambda state: state.pop("head.linear.bias"), r"0 unused, 1 key \(head\.linear\.bias\) missing"),
        (
            lambda state: state.update({"head.bn.bias": torch.zeros(7)}),
            r"1 key \(head\.bn\.bias\) of another shape",
        ),
        (
            lambda state: state.update({"stages.0.blocks.0.mixer.m.attn.attention_biases": torch.zeros(4, 48)}),
            r"1 key \(stages\.0\.blocks\.0\.mixer\.m\.attn\.attention_biases\) of another shape",
        ),
        (
            lambda state: state.update({"stages.0.blocks.0.mixer.m.attn.attention_biases": torch.zeros(3, 49)}),
            "of another shape",
        ),
        (lambda state: state.update({"head.linear.weight": torch.zeros(10, 7)}), "of another shape"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_any_other_mismatch_names_the_keys(change: Any, message: str, device: str, state: dict[str, Tensor]) -> None:
    model = zoo.build(zoo.get_config("efficientvit_m0"), device=device)
    state = dict(state)
    change(state)
    with pytest.raises(WeightsError, match=message):
        fit_state_dict(model, state, get_family("efficientvit"))


def test_a_real_model_keeps_its_tensors(state: dict[str, Tensor]) -> None:
    model = zoo.create_model("efficientvit_m0", num_classes=7, in_chans=1)
    before = dict(model.named_parameters())
    fit_state_dict(model, state, get_family("efficientvit"))
    assert all(before[name] is parameter for name, parameter in model.named_parameters())
    assert torch.equal(model.state_dict()["head.bn.weight"], state["head.bn.weight"])


# Getting the file.


def packaged(folder: Path, monkeypatch: pytest.MonkeyPatch, sha256: str) -> manifest.Weights:
    """An entry whose file is ``m0.safetensors`` in ``folder``."""
    (folder / "efficientvit.toml").write_text(
        f'[efficientvit_m0.here]\nfile = "m0.safetensors"\nlicence = "mit"\nlayout = "zoo"\nsha256 = "{sha256}"\n'
    )
    monkeypatch.setattr(manifest, "folder", lambda name: folder)
    return zoo.get_weights("efficientvit_m0.here")


def test_packaged_file(file: Path, state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    weights = packaged(file.parent, monkeypatch, hashlib.sha256(file.read_bytes()).hexdigest())
    assert fetch(weights) == file
    model = zoo.create_model("efficientvit_m0", pretrained=True)
    assert torch.equal(model.state_dict()["head.linear.weight"], state["head.linear.weight"])


def test_packaged_file_with_another_hash(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packaged(file.parent, monkeypatch, "0" * 64)
    with pytest.raises(WeightsError, match=r"its sha256 is [0-9a-f]{64}, expected 0000"):
        zoo.create_model("efficientvit_m0", pretrained=True)


def test_packaged_file_that_is_not_there(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = packaged(file.parent, monkeypatch, "")
    file.unlink()
    with pytest.raises(WeightsError, match="should come with the package"):
        fetch(weights)


CREATE = """
import torch
torch.set_num_threads(1)
model = zoo.create_model("efficientvit_m0", pretrained=True)
print("loaded", model.state_dict()["head.linear.weight"].double().sum().item())
"""


def test_download_end_to_end(hub: Any, client: Any, file: Path, state: dict[str, Tensor]) -> None:
    hub.add(REPO, {"model.safetensors": file.read_bytes()})
    expected = f"loaded {state['head.linear.weight'].double().sum().item()}"
    assert client.run(CREATE) == expected
    assert hub.downloads() == [f"/{REPO}/resolve/main/model.safetensors"]
    assert client.run(CREATE, HF_HUB_OFFLINE="1") == expected


def test_download_of_a_truncated_file(hub: Any, client: Any, file: Path) -> None:
    hub.add(REPO, {"model.safetensors": damage(file, "truncated").read_bytes()})
    assert "not a whole safetensors file" in client.run(CREATE)


def closed_port() -> str:
    """An address on which nothing listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


@pytest.mark.parametrize("cause", ["offline", "closed port", "no such repository"])
def test_no_download_says_what_to_do(cause: str, hub: Any, client: Any) -> None:
    if cause == "closed port":
        hub.endpoint = closed_port()
    out = client.run(CREATE, HF_HUB_OFFLINE="1" if cause == "offline" else "0")
    assert out.startswith("refused")
    assert "\n" not in out
    advice = {
        "offline": ("HF_HUB_OFFLINE is set", "checkpoint=FILE"),
        "closed port": ("Without a network", "checkpoint=FILE"),
        "no such repository": ("there is no such repository, or it is private", "hf auth login", "HF_TOKEN"),
    }
    for part in (REPO, "model.safetensors", *advice[cause]):
        assert part in out


def test_classifier_of_other_classes_is_logged(
    file: Path, state: dict[str, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="zoo"):
        model = zoo.create_model("efficientvit_m0", checkpoint=file, num_classes=10)
    (record,) = caplog.records
    assert record.name.startswith("zoo.")
    assert "head.linear has 1000 classes, the model 10" in record.getMessage()
    assert model.state_dict()["head.linear.weight"].shape == (10, 192)
    assert torch.equal(model.state_dict()["head.bn.weight"], state["head.bn.weight"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_that_are_no_numbers_are_refused(value: float, dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = torch.zeros(3, 4, dtype=dtype)
    tensor[1, 2] = value
    save_safetensors({"fine": torch.ones(2), "empty": torch.ones(0), "bad": tensor}, tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match=r"a\.safetensors: bad holds values that are NaN or infinite"):
        load_state_dict(tmp_path / "a.safetensors")


CONVERT = """
from dataclasses import replace
import zoo.pretrained.manifest as manifest
from zoo.cli import main
found = manifest._read
manifest._read = lambda path: tuple(replace(entry, url=entry.url.replace("https://github.com", {endpoint!r}))
                                    for entry in found(path))
try:
    main(["weights", "convert", "efficientvit_m0.authors"])
except SystemExit as done:
    assert not done.code
model = zoo.create_model("efficientvit_m0.authors", pretrained=True)
print("loaded", model.state_dict()["head.linear.weight"].double().sum().item())
"""


def test_the_authors_file_is_fetched_and_converted(
    hub: Any, client: Any, state: dict[str, Tensor], tmp_path: Path
) -> None:
    torch.save({"model": to_authors(state, "efficientvit_m0")}, tmp_path / "m0.pth")
    release = "/xinyuliu-jeffrey/EfficientViT_Model_Zoo/releases/download/v1.0/efficientvit_m0.pth"
    hub.plain[release] = (tmp_path / "m0.pth").read_bytes()
    out = client.run(CONVERT.format(endpoint=hub.endpoint))
    assert out.endswith(f"loaded {state['head.linear.weight'].double().sum().item()}")
    assert hub.downloads() == [release]


@pytest.mark.parametrize(
    "header",
    [
        {"zoo_version": "0.0.1"},
        {"source": "https://host/older.pth"},
        {"source_sha256": "1" * 64},
    ],
    ids=lambda header: next(iter(header)),
)
def test_a_conversion_of_another_file_or_version_is_not_taken(
    header: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    weights = replace(get_weights("efficientvit_m0.authors"), url="https://host/m0.pth", sha256="0" * 64)
    right = {"zoo_version": zoo.__version__, "source": weights.url, "source_sha256": weights.sha256}
    converted_path(weights).parent.mkdir(parents=True)
    save_safetensors({"a": torch.ones(1)}, converted_path(weights), right)
    assert fetch(weights) == converted_path(weights)
    save_safetensors({"a": torch.ones(1)}, converted_path(weights), {**right, **header})
    with pytest.raises(WeightsError, match=r"converted once before it is loaded\. zoo weights convert efficientvit_m0"):
        fetch(weights)


def test_large_numbers_are_not_taken_for_infinite_ones(tmp_path: Path) -> None:
    large = {"a": torch.full((4,), 3e38), "b": torch.full((4,), 1e308, dtype=torch.float64)}
    large["c"] = torch.full((9,), 6e4, dtype=torch.float16)
    save_safetensors(large, tmp_path / "a.safetensors")
    assert load_state_dict(tmp_path / "a.safetensors").keys() == large.keys()
