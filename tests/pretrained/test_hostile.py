"""Files that were made to do harm, and files that chance has ruined: refused with a reason, whatever is in them."""

import json
import pickle  # noqa: TID251 -- to write what must not be read
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from zoo.atomic import save_safetensors
from zoo.errors import WeightsError
from zoo.pretrained.convert import convert_file, convert_state_dict
from zoo.pretrained.load import fit_state_dict, load_state_dict
from zoo.registry import get_family

M0 = "efficientvit_m0"
ROOT = Path(__file__).parents[2]


def entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def write(path: Path, header: Any, data: bytes = bytes(16), length: int | None = None) -> Path:
    """A safetensors file with this header, over 16 bytes of data by default."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def test_an_honest_file_is_read(tmp_path: Path) -> None:
    file = write(tmp_path / "a.safetensors", {"a": entry([2], 0, 8), "b": entry([2], 8, 16)})
    assert load_state_dict(file).keys() == {"a", "b"}


@pytest.mark.parametrize(
    "header, length",
    [
        ({"a": entry([4], 0, 16), "b": entry([2], 8, 16)}, None),  # overlap
        ({"a": entry([4], 0, 16), "b": entry([4], 0, 16)}, None),
        ({"a": entry([2], 8, 16)}, None),  # a hole
        ({"a": entry([2], 0, 8)}, None),  # a rest
        ({"a": entry([4], 0, 16), "b": entry([4], 16, 32)}, None),  # beyond the end
        ({"a": entry([4], 16, 0)}, None),
        ({"a": entry([8], 0, 16)}, None),  # another size than its shape
        ({"a": entry([2_500_000_000], 0, 10_000_000_000)}, None),  # 10 GB in a file of 100 bytes
        ({"a": entry([2**40, 2**40], 0, 16)}, None),
        ({"a": entry([2**63], 0, 16)}, None),
        ({"a": entry([0, 2**62, 2**62], 0, 0)}, None),
        ({"a": entry([-4], 0, 16)}, None),
        ({"a": entry([4], -16, 0)}, None),
        ({"a": entry([4.5], 0, 16)}, None),
        ({"a": entry([4], 0, 16, "X32")}, None),
        ({"a": entry([32], 0, 16, "F4")}, None),
        ({"a": [4]}, None),
        ({"a": {}}, None),
        ({"__metadata__": 3, "a": entry([4], 0, 16)}, None),
        ({"__metadata__": {"format": 3}, "a": entry([4], 0, 16)}, None),
        ([1], None),
        (b"{", None),
        (b"{" + b'"a":[' * 100_000, None),
        (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", None),
        (b"\xff\xfe{}", None),
        ({"a": entry([4], 0, 16)}, 0),
        ({"a": entry([4], 0, 16)}, 1),
        ({"a": entry([4], 0, 16)}, 10**10),
        ({"a": entry([4], 0, 16)}, 2**63),
        ({"a": entry([4], 0, 16)}, 2**64 - 1),
    ],
)
def test_lying_headers(header: Any, length: int | None, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"a\.safetensors") as raised:
        load_state_dict(write(tmp_path / "a.safetensors", header, length=length))
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize("twice", ['"a"', '"__metadata__"'])
def test_duplicated_keys(twice: str, tmp_path: Path) -> None:
    value = '{"x": "y"}' if "meta" in twice else json.dumps(entry([4], 0, 16))
    tensors = f'{twice}: {value}, {twice}: {value}, "b": {json.dumps(entry([4], 0, 16))}'
    with pytest.raises(WeightsError, match="is in it twice"):
        load_state_dict(write(tmp_path / "a.safetensors", f"{{{tensors}}}".encode()))


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool])
def test_weights_of_another_kind_of_number(dtype: torch.dtype, tmp_path: Path) -> None:
    state = zoo.create_model(M0).state_dict()
    state["head.linear.bias"] = torch.zeros(1000, dtype=dtype)
    save_safetensors(state, tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match=r"head\.linear\.bias.*expected torch\.float32"):
        zoo.create_model(M0, checkpoint=tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match=r"head\.linear\.bias is torch\.\w+, expected torch\.float32"):
        convert_state_dict(state, M0)


def test_an_absurd_shape_does_not_fit(tmp_path: Path) -> None:
    state = load_state_dict(write(tmp_path / "a.safetensors", {"head.bn.bias": entry([0, 2**62], 0, 0)}, b""))
    with torch.device("meta"):
        model = get_family("efficientvit").model(zoo.get_config(M0))
    with pytest.raises(WeightsError, match="of another shape"):
        fit_state_dict(model, state, get_family("efficientvit"))


# Pickles.


class Call:
    """Calls something when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


def refused(path: Path, tmp_path: Path) -> str:
    with pytest.raises(WeightsError) as raised:
        convert_file(path, tmp_path / "out.safetensors", M0)
    assert not (tmp_path / "out.safetensors").exists()
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("depth", ["value", "key", "nested", "storage"])
def test_code_hidden_anywhere_does_not_run(zipped: bool, depth: str, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    call = Call(Path.touch, ran)
    hidden = {"value": {"a": call}, "key": {call: 1}, "nested": {"model": {"a": [{"b": (call,)}]}}, "storage": call}
    torch.save(hidden[depth], tmp_path / "m0.pth", _use_new_zipfile_serialization=zipped)
    assert "not read, it is damaged or holds more than tensors" in refused(tmp_path / "m0.pth", tmp_path)
    assert not ran.exists()


@pytest.mark.parametrize("protocol", range(6))
def test_plain_pickles_do_not_run(protocol: int, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (tmp_path / "m0.pth").write_bytes(pickle.dumps({"model": Call(Path.touch, ran)}, protocol))
    refused(tmp_path / "m0.pth", tmp_path)
    assert not ran.exists()


def test_one_number_seen_a_trillion_times(tmp_path: Path) -> None:
    torch.save({"model": {"a": torch.zeros(1).expand(10**6, 10**6)}}, tmp_path / "m0.pth")
    assert (tmp_path / "m0.pth").stat().st_size < 10_000
    assert "has fewer numbers than that" in refused(tmp_path / "m0.pth", tmp_path)


@pytest.mark.parametrize("tensor", [torch.eye(3).to_sparse(), torch.empty(3, device="meta")])
def test_tensors_without_numbers_of_their_own(tensor: torch.Tensor, tmp_path: Path) -> None:
    torch.save({"model": {"a": tensor}}, tmp_path / "m0.pth")
    refused(tmp_path / "m0.pth", tmp_path)


def test_compressed_archives_may_be_bombs(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1_000_000)}, tmp_path / "stored.pth")
    with (
        zipfile.ZipFile(tmp_path / "stored.pth") as stored,
        zipfile.ZipFile(tmp_path / "m0.pth", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for info in stored.infolist():
            packed.writestr(info.filename, stored.read(info))
    assert "it is compressed, as torch.save never does" in refused(tmp_path / "m0.pth", tmp_path)


def test_a_state_dict_that_contains_itself(tmp_path: Path) -> None:
    state: dict[str, Any] = {"a": torch.zeros(1)}
    state["model"] = state
    torch.save(state, tmp_path / "m0.pth")
    refused(tmp_path / "m0.pth", tmp_path)


def test_nan_weights_are_not_converted(tmp_path: Path) -> None:
    state = zoo.create_model(M0).state_dict()
    state["head.linear.bias"] = torch.full((1000,), float("nan"))
    torch.save(state, tmp_path / "m0.pth")
    assert "head.linear.bias holds values that are NaN" in refused(tmp_path / "m0.pth", tmp_path)


# Chance. In a process of its own, since what is feared is that it dies or never ends.

FUZZ = """
import io, random, sys, time
from collections import Counter
from pathlib import Path
import torch, zoo
from zoo.atomic import save_safetensors
from zoo.errors import WeightsError
from zoo.pretrained.convert import convert_file, to_authors
from zoo.pretrained.source import find_weights

torch.set_num_threads(1)
folder, seed, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
sizes = dict(depths=(1, 1, 1), widths=(16, 16, 16), num_heads=(1, 1, 1), img_size=32, num_classes=2)
state = zoo.create_model("efficientvit_m0", **sizes).state_dict()
theirs = {"model": to_authors(state, "efficientvit_m0", **sizes), "epoch": 3}
save_safetensors(state, folder / "a.safetensors", {"model": "efficientvit_m0"})
torch.save(theirs, folder / "a.pth")
torch.save(theirs, folder / "b.pth", _use_new_zipfile_serialization=False)
generator = random.Random(seed)
BYTES = bytes([0, 1, 0x7F, 0x80, 0xFF]) + b'{}[]",:0159-e.RcbhXK'

def mutate(data):
    data = bytearray(data)
    head = 9000 if generator.random() < 0.7 else len(data)  # most of what can go wrong is at the start, or at the end
    def spot():
        near = generator.randrange(min(head, len(data)))
        return near if generator.random() < 0.8 else -1 - generator.randrange(min(600, len(data)))
    for _ in range(generator.choice((1, 1, 2, 5, 20))):
        kind = generator.randrange(6)
        if kind == 0:
            data[spot()] ^= 1 << generator.randrange(8)
        elif kind == 1:
            data[spot()] = generator.choice(BYTES)
        elif kind == 2:
            at = spot() % len(data)
            del data[at : at + generator.randrange(1, 40)]
        elif kind == 3:
            at = spot() % len(data)
            data[at:at] = generator.choice((generator.randbytes(8), b"999999999999", b"null", bytes(16)))
        elif kind == 4:
            at, other = spot() % len(data), spot() % len(data)
            data[at : at + 16] = data[other : other + 16]
        elif generator.random() < 0.2:
            del data[generator.randrange(1, len(data)) :]
        if len(data) < 2:
            break
    return bytes(data)

outcomes, slowest = Counter(), 0.0
originals = [folder / name for name in ("a.safetensors", "a.pth", "b.pth")]
for path in originals:  # unharmed, they load
    convert_file(path, folder / "out.safetensors", "efficientvit_m0", **sizes)
contents = [path.read_bytes() for path in originals]
for i in range(count):
    path = folder / f"mutant{originals[i % 3].suffix}"
    path.write_bytes(mutate(contents[i % 3]))
    print(i, path.name, file=sys.stderr, flush=True)  # the last line tells which one killed it
    start = time.process_time()
    try:
        if i % 3 == 0:
            find_weights(str(path))
        convert_file(path, folder / "out.safetensors", "efficientvit_m0", **sizes)
        outcomes["loaded"] += 1
    except WeightsError as error:
        assert len(str(error)) < 1000 and "\\n" not in str(error), error
        outcomes["refused"] += 1
    slowest = max(slowest, time.process_time() - start)
print(outcomes["refused"], outcomes["loaded"], f"{slowest:.3f}")
"""


@pytest.mark.slow
def test_six_hundred_mutated_files(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", FUZZ, str(tmp_path), "0", "600"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    refused, loaded, _ = done.stdout.split()
    assert int(refused) + int(loaded) == 600
    assert int(refused) > 250  # flipping a bit of a weight is no offence
    assert int(loaded) > 20
