"""Class folders, manifests, shards, parquet files, Hub data sets and the embedded digits; and holding a part out."""

import io
import json
import multiprocessing
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from zoo.data.image import decode_image
from zoo.data.sources import (
    FolderSource,
    ImageSource,
    Relabelled,
    missing_classes,
    open_source,
    open_stream,
    stratified_holdout,
)
from zoo.errors import DataError, MissingExtraError

PNG = bytes.fromhex(  # a grey picture of one pixel
    "89504e470d0a1a0a0000000d4948445200000001000000010800000000"
    "3a7e9b550000000a49444154789c636000000002000148afa4710000000049454e44ae426082"
)


def make_folder(root: Path, **pictures: int) -> Path:
    """Class folders with so many pictures each; ``train__cat`` stands for ``train/cat``."""
    for name, count in pictures.items():
        folder = root.joinpath(*name.split("__"))
        folder.mkdir(parents=True)
        for i in range(count):
            (folder / f"{i}.png").write_bytes(PNG)
    return root


def make_parquet(path: Path, labels: list[Any], *, names: list[str] | None = None, image: Any = None) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = pa.array([{"bytes": PNG, "path": None}] * len(labels), pa.struct({"bytes": pa.binary(), "path": "string"}))
    table = pa.table({"image": images if image is None else image, "label": labels})
    if names is not None:
        features = {"label": {"_type": "ClassLabel", "names": names}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    return path


def test_class_folders_are_classes_sorted_by_name(tmp_path: Path) -> None:
    source = open_source(str(make_folder(tmp_path, dog=2, cat=1, emu=3)))
    assert source.classes == ("cat", "dog", "emu")
    assert source.labels.tolist() == [0, 1, 1, 2, 2, 2]
    assert source.encoded(1) == PNG
    assert source.describe(1) == str(tmp_path / "dog" / "0.png")


def test_pictures_lie_at_any_depth_and_hidden_or_other_files_do_not_count(tmp_path: Path) -> None:
    root = make_folder(tmp_path, cat=1, cat__old=1, dog=1)
    for name in ("cat/._0.png", "cat/notes.txt", ".cache/x/0.png", "dog/.hidden/0.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(PNG)
    (root / "dog" / "UPPER.JPG").write_bytes(PNG)
    source = open_source(str(root))
    assert source.classes == ("cat", "dog")
    assert source.labels.tolist() == [0, 0, 1, 1]


def test_a_folder_may_hold_its_splits(tmp_path: Path) -> None:
    root = str(make_folder(tmp_path, train__cat=3, train__dog=2, val__cat=1, val__dog=1))
    assert len(open_source(root)) == 5
    for split in ("val", "validation", "test"):
        assert len(open_source(root, split=split)) == 2
    with pytest.raises(DataError, match=r"has no split 'trian'. Did you mean: train\? It has: train, val.$"):
        open_source(root, split="trian")


def test_a_class_may_be_called_like_a_split(tmp_path: Path) -> None:
    source = open_source(str(make_folder(tmp_path, car=1, train=2)))
    assert source.classes == ("car", "train")


def test_folders_without_what_they_need(tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(PNG)
    with pytest.raises(DataError, match=r"has no class folders; expected .*/<class name>/<pictures>.$"):
        open_source(str(tmp_path))
    make_folder(tmp_path, cat=1, dog=0)
    with pytest.raises(DataError, match=r"Class folder .*dog holds no pictures; remove it, or add some \(.bmp, "):
        open_source(str(tmp_path))
    (tmp_path / "dog").rmdir()
    with pytest.raises(DataError, match=r"has the split 'train' only, not 'test'; hold a part out with data.holdout.$"):
        open_source(str(tmp_path), split="test")


@pytest.mark.parametrize("subfolder", ["", "data"])
def test_parquet_in_the_hubs_layout(tmp_path: Path, subfolder: str) -> None:
    names = ["cat", "dog"]
    for i, labels in enumerate(([0, 1, 1], [1, 0])):
        make_parquet(tmp_path / subfolder / f"train-0000{i}-of-00002.parquet", labels, names=names)
    make_parquet(tmp_path / subfolder / "test-00000-of-00001.parquet", [1], names=names)
    source = open_source("owner/name", root=str(tmp_path))
    assert source.classes == ("cat", "dog")
    assert source.labels.tolist() == [0, 1, 1, 1, 0]
    assert [source.encoded(i) for i in range(5)] == [PNG] * 5
    assert open_source("owner/name", root=str(tmp_path), split="test").labels.tolist() == [1]
    with pytest.raises(DataError, match=r"has no split 'tset'. Did you mean: test\? It has: test, train.$"):
        open_source("owner/name", root=str(tmp_path), split="tset")


def test_parquet_without_class_names_numbers_its_classes(tmp_path: Path) -> None:
    source = open_source(str(make_parquet(tmp_path / "some.parquet", [2, 0, 1, 2])))
    assert source.classes == ("0", "1", "2")


def test_damaged_parquet_is_named(tmp_path: Path) -> None:
    make_parquet(tmp_path / "train-0.parquet", [0])
    damaged = make_parquet(tmp_path / "train-1.parquet", [0] * 50)
    damaged.write_bytes(damaged.read_bytes()[:-40])
    with pytest.raises(DataError, match=r"^Cannot read .*train-1.parquet as parquet: [^\n]+\.$"):
        open_source(str(tmp_path))


@pytest.mark.parametrize(
    "labels, names, message",
    [
        ([0, 2], ["cat", "dog"], r": sample 1 has the label 2; expected 0 to 1, as there are 2 classes.$"),
        ([0, -1], ["cat", "dog"], r": sample 1 has the label -1; expected 0 to 1, as there are 2 classes.$"),
        (["cat", "dog"], None, r"column 'label' is string; expected integers.$"),
        ([0, None], None, r"column 'label' is int64; expected integers.$"),
        ([], ["cat"], r"is empty.$"),
    ],
)
def test_labels_that_do_not_fit(tmp_path: Path, labels: list, names: list[str] | None, message: str) -> None:
    import pyarrow as pa

    kind = pa.string() if "cat" in labels else pa.int64()
    path = make_parquet(tmp_path / "some.parquet", pa.array(labels, kind), names=names)
    with pytest.raises(DataError, match=message):
        open_source(str(path))


def test_columns_that_do_not_fit(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "some.parquet"
    pq.write_table(pa.table({"text": ["a"], "label": [0]}), path)
    with pytest.raises(DataError, match=r"has the columns text, label; expected 'image' or 'img', and 'label'.$"):
        open_source(str(path))
    make_parquet(path, [0], image=pa.array([PNG]))
    with pytest.raises(DataError, match=r"column 'image' is binary; expected the Hub's struct<bytes, path>.$"):
        open_source(str(path))


def test_a_parquet_file_has_one_split(tmp_path: Path) -> None:
    path = make_parquet(tmp_path / "some.parquet", [0, 1])
    with pytest.raises(DataError, match=r"has the split 'train' only, not 'test'; hold a part out with data.holdout.$"):
        open_source(str(path), split="test")
    (tmp_path / "some.zip").write_text("label")
    with pytest.raises(
        DataError, match=r"some.zip is a file; expected a folder of class folders, or a file that ends in"
    ):
        open_source(str(tmp_path / "some.zip"))


def test_embedded_digits() -> None:
    source = open_source("digits")
    assert len(source) == 1797
    assert source.classes == tuple("0123456789")
    assert np.bincount(source.labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert decode_image(source.encoded(0), source.describe(0)).size == (8, 8)


@pytest.mark.shared
def test_cifar10_as_the_hub_lays_it_out(shared: Path) -> None:
    source = open_source("uoft-cs/cifar10", split="test", root=str(shared / "data" / "cifar10"))
    assert source.classes[:3] == ("airplane", "automobile", "bird")
    assert np.bincount(source.labels).tolist() == [1000] * 10
    assert decode_image(source.encoded(9999), source.describe(9999)).size == (32, 32)


def test_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^Unknown data set 'digit'. Did you mean: digits\? Expected one of digits, "):
        open_source("digit")
    with pytest.raises(DataError, match=r"^Unknown data set '/no/such/folder'. Expected one of digits, a folder, "):
        open_source("/no/such/folder")
    with pytest.raises(DataError, match=r"^data.root is '/no/such', which is not there; expected a folder.$"):
        open_source("uoft-cs/cifar10", root="/no/such")


def test_hub_data_set_without_a_network_is_one_clear_line() -> None:
    with pytest.raises(DataError) as caught:
        open_source("uoft-cs/cifar10", split="test")
    message = str(caught.value)
    assert message.startswith("Cannot load data set 'uoft-cs/cifar10', split 'test': ")
    assert message.endswith(". Check the name and the network, or pass a local copy as data.root=FOLDER.")
    assert "\n" not in message


def test_parquet_without_pyarrow_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(MissingExtraError, match=r'^Reading parquet files needs pyarrow: pip install "efficient-zoo'):
        open_source("digits")


def test_a_file_that_has_gone_is_named(tmp_path: Path) -> None:
    source: ImageSource = open_source(str(make_folder(tmp_path, cat=2)))
    (tmp_path / "cat" / "1.png").unlink()
    with pytest.raises(DataError, match=r"^Cannot read .*cat/1.png: No such file or directory.$"):
        source.encoded(1)


@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.5, 0.99])
def test_holdout_takes_the_same_share_of_every_class(fraction: float) -> None:
    counts = np.array([100, 50, 10, 2])
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(4), counts))
    train, held = stratified_holdout(labels, fraction, seed=3)
    assert sorted([*train, *held]) == list(range(len(labels)))
    expected = np.clip(np.round(fraction * counts), 1, counts - 1)
    assert np.bincount(labels[held]).tolist() == expected.tolist()


def test_holdout_depends_on_its_seed_alone() -> None:
    labels = np.repeat(np.arange(5), 20)
    first, again, other = (stratified_holdout(labels, 0.2, seed)[1].tolist() for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_a_class_with_one_sample_is_kept_for_training() -> None:
    labels = np.array([0, 0, 0, 1, 2, 2])
    train, held = stratified_holdout(labels, 0.5, seed=0)
    assert 3 in train
    assert set(labels[held]) == {0, 2}


def test_classes_of_one_sample_each_leave_nothing_to_hold_out() -> None:
    with pytest.raises(DataError, match=r"^None of the 3 classes has two samples, so that none can be held out.$"):
        stratified_holdout(np.arange(3), 0.5, seed=0)


def test_relabelled_by_class_name(tmp_path: Path) -> None:
    source = FolderSource(make_folder(tmp_path, cat=1, emu=2))
    other = Relabelled(source, ("ant", "cat", "dog", "emu"), "val")
    assert other.labels.tolist() == [1, 3, 3]
    assert missing_classes(other.labels, other.classes) == ["ant", "dog"]
    assert (other.encoded(0), other.describe(0)) == (PNG, source.describe(0))
    with pytest.raises(
        DataError, match=r"^val has the class 'cat', which the training data has not. Did you mean: cut"
    ):
        Relabelled(source, ("cut", "emu"), "val")


MANIFESTS = {
    "csv": "path,label,split\na/1.png,dog,train\na/2.png,cat,train\na/1.png,dog,val\n",
    "tsv": "file_name\tclass\tsplit\na/1.png\tdog\ttrain\na/2.png\tcat\t\na/1.png\tdog\tval\n",
    "jsonl": '{"image": "a/1.png", "target": "dog"}\n\n{"image": "a/2.png", "target": "cat"}\n'
    '{"image": "a/1.png", "target": "dog", "split": "val"}\n',
}


@pytest.mark.parametrize("kind", MANIFESTS)
def test_manifests_list_pictures(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").write_bytes(PNG)
    file = tmp_path / f"pictures.{kind}"
    file.write_text(MANIFESTS[kind])
    source = open_source(str(file))
    assert source.classes == ("cat", "dog")
    assert source.labels.tolist() == [1, 0]
    assert source.encoded(0) == PNG
    assert source.describe(1) == str(tmp_path / "a" / "2.png")
    with pytest.raises(DataError, match=r"^Cannot read .*a/2.png: No such file or directory.$"):
        source.encoded(1)
    assert open_source(str(file), split="val").labels.tolist() == [1]
    with pytest.raises(DataError, match=r"has no split 'vla'. Did you mean: val\? It has: train, val.$"):
        open_source(str(file), split="vla")


def test_indices_in_a_manifest_are_named_by_a_file_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "pictures.csv"
    file.write_text("path,label\n1.png,1\n2.png,0\n")
    assert open_source(str(file)).classes == ("0", "1")
    (tmp_path / "classes.txt").write_text("zebra\nant\nbee\n")
    source = open_source(str(file))
    assert (source.classes, source.labels.tolist()) == (("zebra", "ant", "bee"), [1, 0])
    file.write_text("path,label\n1.png,bee\n")
    assert open_source(str(file)).labels.tolist() == [2]


@pytest.mark.parametrize(
    "text, message",
    [
        ("", r"lists no pictures.$"),
        ("path,label\n", r"lists no pictures.$"),
        ("picture,label\n1.png,cat\n", r"has the columns picture, label; expected 'path', and 'label' or 'labels'.$"),
        ("path,label\n1.png,cat\n2.png,\n", r": row 2 has no label.$"),
        ('path,label\n"1.png,cat\n', r"is not valid CSV: "),
        ("path,label\n1.png,7\n", r": sample 0 has the label 7; expected 0 to 2, as there are 3 classes.$"),
        ("path,label\n1.png,-1\n", r": sample 0 has the label -1; expected 0 to 2, as there are 3 classes.$"),
        ("path,label\n1.png,cut\n", r"sample 0 has the class 'cut'. Did you mean: cat\?$"),
    ],
)
def test_manifests_that_do_not_fit(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "pictures.csv").write_text(text)
    (tmp_path / "classes.txt").write_text("ant\nbee\ncat\n")
    with pytest.raises(DataError, match=message) as caught:
        open_source(str(tmp_path / "pictures.csv"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("label", ["--5", "²", "12345678901234567890"])
def test_labels_that_only_look_like_numbers_are_names(tmp_path: Path, label: str) -> None:
    file = tmp_path / "pictures.csv"
    file.write_text(f"path,label\n1.png,{label}\n2.png,1\n", encoding="utf-8")
    assert set(open_source(str(file)).classes) == {label, "1"}


def test_numbers_that_can_be_no_indices_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "pictures.csv"
    file.write_text("path,label\n1.png,12345678901\n")
    with pytest.raises(DataError, match=r"has the label 12345678901; expected indices from 0 on, fewer than 1,000,000"):
        open_source(str(file))


def test_class_names_are_utf_8_with_or_without_a_mark(tmp_path: Path) -> None:
    file = tmp_path / "pictures.csv"
    file.write_text("path,label\n1.png,1\n")
    (tmp_path / "classes.txt").write_text("ânt\nbee\n", encoding="utf-8-sig")
    assert open_source(str(file)).classes == ("ânt", "bee")
    (tmp_path / "classes.txt").write_text("ânt\nbee\n", encoding="latin-1")
    with pytest.raises(DataError, match=r"classes.txt is not UTF-8: [^\n]+\.$"):
        open_source(str(file))


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_damaged_jsonl_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "pictures.jsonl").write_text(text)
    with pytest.raises(DataError, match=r"pictures.jsonl is not valid JSONL: "):
        open_source(str(tmp_path / "pictures.jsonl"))


def make_shard(path: Path, *samples: dict[str, bytes], first: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, files in enumerate(samples, first):
            for suffix, data in files.items():
                member = tarfile.TarInfo(f"{key:04d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


def encoded_in_child(source: ImageSource, index: int, answers: Any) -> None:
    answers.put(source.encoded(index))


def test_tar_shards_are_read_at_any_place(tmp_path: Path) -> None:
    make_shard(tmp_path / "train-00.tar", {"png": PNG, "cls": b"1"}, {"png": PNG + b"x", "cls": b"0"})
    make_shard(tmp_path / "train-01.tar", {"json": b'{"label": 1}', "jpg": PNG + b"yy"}, first=2)
    make_shard(tmp_path / "val-00.tar", {"png": PNG, "cls": b"1"})
    source = open_source(str(tmp_path))
    assert (source.classes, source.labels.tolist()) == (("0", "1"), [1, 0, 1])
    assert [source.encoded(i) for i in (2, 0, 1)] == [PNG + b"yy", PNG, PNG + b"x"]
    assert source.describe(2) == f"{tmp_path / 'train-01.tar'}, sample 0002"
    assert len(open_source(str(tmp_path), split="val")) == 1
    assert len(open_source(str(tmp_path / "train-{00..01}.tar"))) == 3
    assert len(open_source(str(tmp_path / "train-01.tar"))) == 1
    with pytest.raises(DataError, match=r"train-02.tar of .*train-{00..02}.tar is not there.$"):
        open_source(str(tmp_path / "train-{00..02}.tar"))
    context = multiprocessing.get_context("spawn")  # descriptors do not travel
    answers = context.Queue()
    child = context.Process(target=encoded_in_child, args=(source, 1, answers))
    child.start()
    assert answers.get(timeout=60) == PNG + b"x"
    child.join()


def test_shards_with_class_names(tmp_path: Path) -> None:
    make_shard(tmp_path / "a.tar", {"png": PNG, "cls": b"dog"}, {"png": PNG, "cls": b"cat\n"})
    assert open_source(str(tmp_path / "a.tar")).classes == ("cat", "dog")
    (tmp_path / "classes.txt").write_text("dog\nemu\ncat\n")
    assert open_source(str(tmp_path / "a.tar")).labels.tolist() == [0, 2]


@pytest.mark.parametrize(
    "sample, message",
    [
        ({"cls": b"1"}, r"a.tar: sample '0000' has no picture, only cls.$"),
        ({"png": PNG}, r"a.tar: sample '0000' has no label; expected a .cls file.$"),
        ({"png": PNG, "json": b"{"}, r"a.tar: sample '0000' has no label; expected a .cls file.$"),
        ({"png": PNG, "cls": b"-3"}, r"sample 0 has the label -3; expected 0 to "),
    ],
)
def test_samples_that_lack_something(tmp_path: Path, sample: dict[str, bytes], message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_source(str(make_shard(tmp_path / "a.tar", sample)))


@pytest.mark.parametrize("keep", [100, 700, 1100])
def test_a_damaged_shard_is_named(tmp_path: Path, keep: int) -> None:
    shard = make_shard(tmp_path / "a.tar", {"cls": b"1", "png": PNG * 20})
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(
        DataError, match=r"^(Cannot read .*a.tar as a tar shard: .*|.*a.tar: sample '0000' has no picture.*)\.$"
    ):
        open_source(str(shard))


@pytest.fixture
def streamed(tmp_path: Path) -> Path:
    """20 pictures in two parquet files as :mod:`datasets` writes them: picture i has label i % 3, i trailing bytes."""
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    for part in range(2):
        numbers = range(10 * part, 10 * part + 10)
        images = [{"bytes": PNG + bytes(i), "path": None} for i in numbers]
        rows = {"image": images, "label": [i % 3 for i in numbers]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"train-{part}.parquet")
    return tmp_path


def test_a_stream_is_read_forwards(streamed: Path) -> None:
    stream = open_stream(str(streamed), size=20)
    assert (len(stream), stream.classes) == (20, ("a", "b", "c"))
    assert [stream.sample(0, i) for i in (0, 3, 19, 4)] == [(PNG + bytes(i), i % 3) for i in (0, 3, 19, 4)]
    with pytest.raises(DataError, match=r", row 20 of the stream is not there: the stream has fewer than 25.$"):
        open_stream(str(streamed), size=25).sample(0, 20)
    with pytest.raises(DataError, match=r" does not say how many records it has; set data.samples.$"):
        open_stream(str(streamed))


@pytest.mark.parametrize("buffer", [1, 6, 1000])
def test_a_stream_is_shuffled_by_seed_and_epoch(streamed: Path, buffer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zoo.data.sources.stream._BUFFER", buffer)

    def order(seed: int, epoch: int) -> list[int]:
        stream = open_stream(str(streamed), size=20, seed=seed)
        return [len(stream.sample(epoch, i)[0]) - len(PNG) for i in range(20)]

    first = order(0, 0)
    assert sorted(first) == list(range(20))
    assert order(0, 0) == first
    if buffer == 1:  # nothing to choose from
        assert first == list(range(20))
        return
    assert order(0, 1) != first
    assert order(1, 0) != first


def test_a_stream_needs_a_hub_or_parquet(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no parquet files; data.streaming reads those, or a Hub data set.$"):
        open_stream(str(tmp_path))
    with pytest.raises(DataError, match=r"^data.root is '/no/such', which is not there; expected a folder.$"):
        open_stream("owner/name", root="/no/such")
    (tmp_path / "train.parquet").touch()
    with pytest.raises(DataError, match=r"^data.root is '.*/train.parquet', which is a file; expected a folder.$"):
        open_stream("owner/name", root=str(tmp_path / "train.parquet"))
    with pytest.raises(DataError, match=r"^Cannot load data set 'owner/name', split 'train': "):
        open_stream("owner/name")
