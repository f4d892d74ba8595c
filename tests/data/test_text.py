"""Text: documents from every kind of file, tokens in memory and on disk, rows that keep the documents' boundaries."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from zoo.data import tokens as tokens_module
from zoo.data.loader import EpochSampler, Loader, TextSamples
from zoo.data.text import Documents, open_documents, tiny_shakespeare
from zoo.data.tokens import IGNORED, Rows, Tokens, load_tokenizer, read_tokens, tokenize, write_tokens
from zoo.errors import DataError

TEXTS = ["Four score and seven", "", "years ago — our fathers", "brought forth"]


def documents(texts: list[str] = TEXTS) -> Documents:
    return Documents("these", lambda: iter(texts))


@pytest.fixture
def tokenizer_file(tmp_path: Path) -> Path:
    """A small byte-pair tokenizer, trained here."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def test_a_text_file_is_a_document(tmp_path: Path) -> None:
    (tmp_path / "some.txt").write_text("Grüße\n", encoding="utf-8")
    assert list(open_documents(str(tmp_path / "some.txt"))) == ["Grüße\n"]
    with pytest.raises(DataError, match=r"has the split 'train' only, not 'test'; hold a part out with data.holdout.$"):
        open_documents(str(tmp_path / "some.txt"), split="test")


def test_a_folder_holds_a_file_or_several_for_each_split(tmp_path: Path) -> None:
    for name in ("train-1.txt", "train-0.txt", "valid.txt"):
        (tmp_path / name).write_text(name)
    assert list(open_documents("owner/name", root=str(tmp_path))) == ["train-0.txt", "train-1.txt"]
    assert list(open_documents(str(tmp_path), split="valid")) == ["valid.txt"]
    with pytest.raises(DataError, match=r"has no split 'vlaid'. Did you mean: valid\? It has: train, valid.$"):
        open_documents(str(tmp_path), split="vlaid")


def test_a_line_of_jsonl_is_a_document(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"content": text}) + "\n\n" for text in TEXTS))
    found = open_documents(str(tmp_path), column="content")
    assert list(found) == list(found) == TEXTS
    with pytest.raises(
        DataError, match=r"train.jsonl, line 1 has no text in 'text'; set data.text_column. It has: cont"
    ):
        list(open_documents(str(tmp_path)))
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(DataError, match=r"train.jsonl is damaged: "):
        list(open_documents(str(tmp_path)))
    (tmp_path / "train.jsonl").write_text("3\n")
    with pytest.raises(DataError, match=r"line 1 has no text in 'text'; set data.text_column. Expected an object.$"):
        list(open_documents(str(tmp_path)))


def test_a_row_of_parquet_without_text_is_named(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["one", None]}), tmp_path / "train-0.parquet")
    with pytest.raises(DataError, match=r"train-0.parquet, row 2 has no text in 'text'"):
        list(open_documents(str(tmp_path)))


def test_a_row_of_parquet_is_a_document(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "train-0.parquet")
    assert list(open_documents(str(tmp_path))) == TEXTS
    with pytest.raises(DataError, match=r"has no text in 'body'; set data.text_column. It has: text.$"):
        list(open_documents(str(tmp_path), column="body"))


def test_texts_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^Unknown text 'tinyshakespear'. Did you mean: tinyshakespeare\? Expected "):
        open_documents("tinyshakespear")
    with pytest.raises(DataError, match=r"^data.root is '/no/such', which is not there; expected a file or a folder.$"):
        open_documents("a/b", root="/no/such")
    with pytest.raises(DataError, match=r"^Cannot load data set 'owner/name', split 'train': "):
        open_documents("owner/name")
    with pytest.raises(DataError, match=r" holds no text; expected files that end in .txt, .jsonl, .parquet.$"):
        open_documents(str(tmp_path))
    (tmp_path / "a.doc").touch()
    with pytest.raises(DataError, match=r"a.doc is a file; expected one that ends in .txt, .jsonl, .parquet.$"):
        open_documents(str(tmp_path / "a.doc"))
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(DataError, match=r"a.txt is damaged: 'utf-8' codec"):
        list(open_documents(str(tmp_path / "a.txt")))


@pytest.mark.parametrize("kind", ["bytes", "file", "auto"])
def test_tokenizers_give_the_text_back(kind: str, tokenizer_file: Path, tmp_path: Path) -> None:
    name = {"bytes": "bytes", "file": str(tokenizer_file), "auto": str(tmp_path / "auto")}[kind]
    if kind == "auto":
        from transformers import PreTrainedTokenizerFast

        fast = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_file), eos_token="<|endoftext|>")
        fast.save_pretrained(name)
    tokenizer = load_tokenizer(name)
    encoded = tokenizer.encode(TEXTS)
    assert [tokenizer.decode(each) for each in encoded] == TEXTS
    assert max(max(each, default=0) for each in encoded) < tokenizer.vocab_size
    assert not any(tokenizer.eos in each for each in encoded)
    assert tokenizer.vocab_size == (257 if kind == "bytes" else 295)


def test_tokenizers_that_do_not_work(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer.json is not a tokenizer: [^\n]+\.$"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))
    with pytest.raises(
        DataError, match=r"^No tokenizer 'tokenizer.json'; expected 'bytes', a tokenizer.json, a folder"
    ):
        load_tokenizer("tokenizer.json")
    with pytest.raises(DataError, match=r"^Cannot load tokenizer 'owner/name': [^\n]+\.$"):
        load_tokenizer("owner/name")


def test_empty_text_is_refused(tmp_path: Path) -> None:
    for texts in ([], ["", ""]):
        with pytest.raises(DataError, match=r"^these holds no text.$"):
            tokenize(documents(texts), "bytes")
        with pytest.raises(DataError, match=r"^these holds no text.$"):
            write_tokens(documents(texts), "bytes", tmp_path / str(len(texts)), "train")


def test_rows_keep_the_documents_apart() -> None:
    tokens = tokenize(documents(["abc", "", "defgh"]), "bytes")  # abc. . defgh.
    inputs, targets, positions = Rows(tokens, 5).read([1, 0])
    assert inputs.tolist() == [list(b"defgh"), [*b"abc", 256, 256]]
    assert targets.tolist() == [[*b"efgh", 256], [*b"bc", 256, IGNORED, IGNORED]]
    assert positions.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 0]]
    # A document that began in an earlier row goes on, with positions from the row's beginning.
    inputs, targets, positions = Rows(tokens, 3).read([2])
    assert (inputs[0, 0], positions.tolist()) == (ord("e"), [[0, 1, 2]])


def test_a_tail_is_kept_for_evaluation_only() -> None:
    tokens = tokenize(documents(["abcdefg"]), "bytes")
    assert len(Rows(tokens, 3)) == 2
    rows = Rows(tokens, 3, keep_tail=True)
    assert len(rows) == 3
    inputs, targets, _ = rows.read([2])
    assert inputs.tolist() == [[ord("g"), 256, 256]]
    assert targets.tolist() == [[256, IGNORED, IGNORED]]
    with pytest.raises(DataError, match=r"^8 tokens are too few for one row of 8; lower data.seq_len.$"):
        Rows(tokens, 8)


def reference(tokens: Tokens, length: int) -> tuple[list, list, list]:
    """The plain way: token by token."""
    inputs, targets, positions = [], [], []
    for piece, starts in zip(tokens.pieces, tokens.starts, strict=True):
        begin = {int(start) for start in starts}
        for row in range((len(piece) - 1) // length):
            inputs.append([int(piece[i]) for i in range(row * length, row * length + length)])
            targets.append(
                [IGNORED if i + 1 in begin else int(piece[i + 1]) for i in range(row * length, row * length + length)]
            )
            at, where = 0, []
            for i in range(row * length, row * length + length):
                at = 0 if i in begin or not where else at + 1
                where.append(at)
            positions.append(where)
    return inputs, targets, positions


@pytest.mark.parametrize("length", [1, 4, 7, 64])
def test_rows_equal_the_plain_way(length: int) -> None:
    generator = np.random.default_rng(length)
    sizes = [[3, 1, 40, 2, 90], [1, 1, 1, 200]]
    pieces = [generator.integers(0, 99, sum(each), dtype=np.uint16) for each in sizes]
    starts = [np.cumsum([0, *each[:-1]]) for each in sizes]
    tokens = Tokens(pieces, starts, 100, 99, "")
    rows = Rows(tokens, length)
    assert tuple(part.tolist() for part in rows.read(range(len(rows)))) == reference(tokens, length)


@pytest.mark.parametrize("piece_tokens", [1, 30, 10**6])
def test_tokens_on_disk_are_those_in_memory(tmp_path: Path, piece_tokens: int) -> None:
    write_tokens(documents(), "bytes", tmp_path, "train", piece_tokens=piece_tokens)
    loaded, made = read_tokens(tmp_path, "train"), tokenize(documents(), "bytes")
    assert np.concatenate(loaded.pieces).tolist() == made.pieces[0].tolist()
    assert sum(map(len, loaded.starts)) == len(TEXTS)
    assert (loaded.vocab_size, loaded.eos, loaded.tokenizer) == (257, 256, "bytes")
    assert loaded.pieces[0].dtype == np.uint16
    assert isinstance(loaded.pieces[0], np.memmap)


def test_packing_goes_on_where_it_was_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    def once_more(done: int, total: int) -> None:
        raise Killed

    with pytest.raises(Killed):
        write_tokens(documents(), "bytes", tmp_path, "train", piece_tokens=1, on_piece=once_more)
    with pytest.raises(DataError, match=r"split 'train', is incomplete; the same `zoo data pack` finishes it.$"):
        read_tokens(tmp_path, "train")
    first = (tmp_path / "train-00000.tokens.npy").stat().st_mtime_ns
    seen: list[tuple[int, int]] = []
    write_tokens(documents(), "bytes", tmp_path, "train", piece_tokens=1, on_piece=lambda *news: seen.append(news))
    assert (tmp_path / "train-00000.tokens.npy").stat().st_mtime_ns == first
    assert [done for done, _ in seen] == [2, 3, 4, 4]
    tokens = read_tokens(tmp_path, "train")
    assert np.concatenate(tokens.pieces).tolist() == tokenize(documents(), "bytes").pieces[0].tolist()
    monkeypatch.setattr(tokens_module, "encode_documents", None)  # a finished split is left alone
    write_tokens(documents(), "bytes", tmp_path, "train", piece_tokens=1)


def test_tokens_on_disk_that_do_not_fit(tmp_path: Path, tokenizer_file: Path) -> None:
    write_tokens(documents(), "bytes", tmp_path, "train")
    with pytest.raises(DataError, match=r"holds tokens of 'bytes', not of '.*tokenizer.json'; choose another.$"):
        write_tokens(documents(), str(tokenizer_file), tmp_path, "test")
    with pytest.raises(DataError, match=r"has no split 'trian'. Did you mean: train\? It has: train.$"):
        read_tokens(tmp_path, "trian")
    piece = tmp_path / "train-00000.tokens.npy"
    piece.write_bytes(piece.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"split 'train', piece 0 is damaged: [^\n]+\.$"):
        read_tokens(tmp_path, "train")
    (tmp_path / "tokens.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokens.json is not a record of zoo's: "):
        read_tokens(tmp_path, "train")


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
def test_a_part_is_held_out_from_the_end(fraction: float) -> None:
    pieces = [np.arange(30, dtype=np.uint16), np.arange(30, 50, dtype=np.uint16)]
    whole = Tokens(pieces, [np.array([0, 7, 20]), np.array([0, 15])], 60, 59, "")
    left, right = whole.split(fraction)
    assert np.concatenate(left.pieces + right.pieces).tolist() == list(range(50))
    assert len(right) == round(fraction * 50)
    for part in (left, right):
        for piece, starts in zip(part.pieces, part.starts, strict=True):
            expected = {0, 7, 20, 30, 45} & set(piece.tolist()) | {int(piece[0])}
            assert set(piece[starts].tolist()) == expected
    with pytest.raises(DataError, match=r"^50 tokens are too few to hold 0.001 of them out.$"):
        whole.split(0.001)


def test_text_goes_through_the_same_loader() -> None:
    tokens = tokenize(open_documents("tinyshakespeare"), "bytes")
    assert len(tokens) == len(tiny_shakespeare().encode()) + 1
    rows = Rows(tokens, 64)
    sampler = EpochSampler(len(rows), 32, shuffle=True, seed=3)
    loader, helped = Loader(TextSamples(rows), sampler), Loader(TextSamples(rows), sampler, workers=1)
    for each in (loader, helped):
        each.set_epoch(1, consumed=32 * (len(sampler) - 3) if not sampler.consumed else sampler.consumed)
    batches = list(loader)
    assert len(batches) == 3
    for left, right in zip(batches, helped, strict=True):
        assert torch.equal(left.inputs, right.inputs)
    batch = batches[0]
    assert batch.inputs.shape == batch.targets.shape == (32, 64)
    assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
    # every token of a batch is real
    assert (batch.targets != IGNORED).float().mean() > 0.95
