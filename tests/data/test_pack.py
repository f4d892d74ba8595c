"""Inspecting and packing data sets."""

import errno
import io
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zoo.data.inspect import contact_sheet, inspect_pictures
from zoo.data.pack import pack_pictures
from zoo.data.sources import FolderSource, open_source
from zoo.errors import DataError


@pytest.fixture
def mixed(class_folder: Path, tmp_path: Path) -> Path:
    """The class folder without most of blue, with a JPEG, a double and two damaged files."""
    root = tmp_path / "mixed"
    shutil.copytree(class_folder, root)
    for i in range(5, 20):
        (root / "blue" / f"{i:02d}.png").unlink()
    Image.new("L", (300, 10)).save(root / "red" / "00.png", "JPEG")
    shutil.copy(root / "green" / "01.png", root / "green" / "02.png")
    (root / "green" / "03.png").write_bytes(b"")
    damaged = root / "green" / "04.png"
    damaged.write_bytes(damaged.read_bytes()[:200])
    return root


def test_everything_is_counted(mixed: Path) -> None:
    calls: list[None] = []
    found = inspect_pictures(FolderSource(mixed), on_picture=lambda: calls.append(None))
    assert len(calls) == found.samples == 45
    assert found.per_class == {"blue": 5, "green": 20, "red": 20}
    assert found.imbalance == 4
    assert found.formats == {"PNG RGB": 42, "JPEG L": 1}
    assert (found.widths, found.heights) == ((40, 40, 300), (10, 32, 32))
    assert found.duplicates == 1
    assert sorted(found.corrupt) == [str(mixed / "green" / name) for name in ("03.png", "04.png")]
    assert found.total_bytes == sum(path.stat().st_size for path in mixed.rglob("*.png"))


def test_a_sheet_shows_the_classes(mixed: Path, tmp_path: Path) -> None:
    contact_sheet(FolderSource(mixed), tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"), dtype=int)
    assert sheet.shape == (3 * 126, 1120, 3)
    blue, green = sheet[16:44, 2:38], sheet[142:170, 2:38]
    assert blue[..., 2].mean() > blue[..., 1].mean() + 50
    assert green[..., 1].mean() > green[..., 2].mean() + 50
    with pytest.raises(DataError, match=r"^Cannot write .*sheet.png: No such file or directory.$"):
        contact_sheet(FolderSource(mixed), tmp_path / "none" / "sheet.png")


@pytest.mark.parametrize("per_shard", [1, 7, 1000])
def test_shards_hold_the_same_pictures(class_folder: Path, tmp_path: Path, per_shard: int) -> None:
    source, news = FolderSource(class_folder), []
    assert pack_pictures(source, tmp_path, "train", per_shard=per_shard, on_shard=news.append) == {}
    packed = open_source(str(tmp_path))
    assert (packed.classes, packed.labels.tolist()) == (source.classes, source.labels.tolist())
    assert [packed.encoded(i) for i in range(60)] == [source.encoded(i) for i in range(60)]
    assert len(list(tmp_path.glob("train-*.tar"))) == len(news) == -(-60 // per_shard)
    assert news[-1] == 60


def test_packing_leaves_out_what_is_no_picture(mixed: Path, tmp_path: Path) -> None:
    (mixed / "red" / "05.png").write_bytes(b"text")
    skipped = pack_pictures(FolderSource(mixed), tmp_path / "out", "train")
    assert sorted(skipped) == [str(mixed / name) for name in ("green/03.png", "green/04.png", "red/05.png")]
    assert len(open_source(str(tmp_path / "out"))) == 42


@pytest.mark.parametrize("kind, cut", [("JPEG", 9), ("PNG", 30), ("WEBP", 9), ("BMP", 9)])
def test_packing_leaves_out_what_is_cut_short(tmp_path: Path, kind: str, cut: int) -> None:
    (tmp_path / "in" / "cat").mkdir(parents=True)
    image = Image.effect_noise((40, 32), 50).convert("RGB")
    for i, appended in enumerate((b"", b"x" * 100)):
        image.save(tmp_path / "in" / "cat" / f"{i}.png", kind)
        with (tmp_path / "in" / "cat" / f"{i}.png").open("ab") as file:
            file.write(appended)
    whole = (tmp_path / "in" / "cat" / "0.png").read_bytes()
    (tmp_path / "in" / "cat" / "2.png").write_bytes(whole[:-cut])
    skipped = pack_pictures(FolderSource(tmp_path / "in"), tmp_path / "out", "train")
    assert list(skipped) == [str(tmp_path / "in" / "cat" / "2.png")]


def test_pictures_of_phones_are_packed(tmp_path: Path) -> None:
    (tmp_path / "in" / "cat").mkdir(parents=True)
    image = Image.new("RGB", (8, 8))
    image.save(tmp_path / "in" / "cat" / "0.jpg", "MPO", save_all=True, append_images=[image])
    assert pack_pictures(FolderSource(tmp_path / "in"), tmp_path / "out", "train") == {}


def test_shards_are_gone_on_with_as_they_were_begun(class_folder: Path, tmp_path: Path) -> None:
    source = FolderSource(class_folder)
    pack_pictures(source, tmp_path, "train", per_shard=30)
    with pytest.raises(DataError, match=r"shards of 'train' of 60 pictures, 30 in each; expected 60, 20 in each, or "):
        pack_pictures(source, tmp_path, "train", per_shard=20)
    pack_pictures(source, tmp_path, "test", per_shard=20)
    (tmp_path / "train.json").unlink()
    with pytest.raises(
        DataError, match=r"shards of 'train' and no train.json that says of what; expected 60, 30 in each, or another"
    ):
        pack_pictures(source, tmp_path, "train", per_shard=30)


def test_packing_pictures_goes_on_where_it_was_interrupted(
    class_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync, left = os.fsync, 4

    def fill_up(descriptor: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fill_up)
    monkeypatch.setattr("zoo.atomic._sync_folder", lambda folder: None)
    source = FolderSource(class_folder)
    with pytest.raises(DataError, match=r"^Cannot write .*: No space left on device. What is there stays valid.$"):
        pack_pictures(source, tmp_path, "train", per_shard=10)
    monkeypatch.undo()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.tar")}
    assert len(before) == 2
    pack_pictures(source, tmp_path, "train", per_shard=10)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(open_source(str(tmp_path))) == 60


def test_one_folder_holds_one_set_of_classes(class_folder: Path, mixed: Path, tmp_path: Path) -> None:
    pack_pictures(FolderSource(class_folder), tmp_path / "out", "train")
    shutil.rmtree(mixed / "red")
    with pytest.raises(DataError, match=r"out holds shards of other classes; choose another folder.$"):
        pack_pictures(FolderSource(mixed), tmp_path / "out", "test")


def test_packed_bytes_decode_as_before(class_folder: Path, tmp_path: Path) -> None:
    pack_pictures(FolderSource(class_folder), tmp_path, "train")
    image = Image.open(io.BytesIO(open_source(str(tmp_path)).encoded(7)))
    assert image.size == (40, 32)
