"""Text as numbers: tokenizers, tokens in memory or memory-mapped, and their rows for a language model.

Documents stand one after another, each ended by the tokenizer's end-of-text token, and are cut into rows of equal
length, so that every token of a batch is real. Where one document ends and the next begins is kept: positions restart
there, and the last token of one is not asked to predict the first of the next.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from zoo.atomic import write_atomically
from zoo.data.text import Documents
from zoo.errors import DataError, nearest, reason, require

IGNORED = -100  # a target that no loss counts, as in torch's cross-entropy
_DOCUMENTS = 1000  # that go through a tokenizer together


class Tokenizer(Protocol):
    """Turns text into numbers below ``vocab_size`` and back."""

    vocab_size: int
    eos: int  # ends every document
    prefix: list[int]  # begins every prompt; empty for most

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Each text's tokens, without special ones."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of some tokens."""
        ...

    def to_transformers(self) -> Any:
        """The same as a tokenizer of :mod:`transformers`, which pads on the left, with ends of text."""
        ...


class Bytes:
    """UTF-8 bytes as tokens; 256 ends a document."""

    vocab_size = 257
    eos = 256
    prefix: list[int] = []

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(token for token in tokens if token < 256).decode(errors="replace")

    def to_transformers(self) -> Any:
        tokenizers = require("tokenizers", extra="lm", why="A tokenizer for transformers")
        # Its byte-level alphabet has a printable letter for every byte: those bytes that are printable in Latin-1 stand
        # for themselves, the others for the letters from 256 on.
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        hidden = [byte for byte in range(256) if byte not in set(printable)]
        letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({letters[byte]: byte for byte in range(256)}, []))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        tokenizer.add_special_tokens([_END])
        return _fast(tokenizer_object=tokenizer, eos_token=_END)


class TokenizerFile:
    """A ``tokenizer.json`` of the :mod:`tokenizers` library."""

    def __init__(self, path: Path) -> None:
        tokenizers = require("tokenizers", extra="lm", why="Reading a tokenizer")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exceptions
            raise DataError(f"{path} is not a tokenizer: {reason(error)}.") from error
        self.vocab_size = self._tokenizer.get_vocab_size()
        ends = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "[SEP]")
        found = (self._tokenizer.token_to_id(end) for end in ends)
        eos = next((token for token in found if token is not None), None)
        if eos is None:
            raise DataError(f"{path} has no end-of-text token; expected one of {', '.join(ends)}.")
        self.eos: int = eos
        self.prefix: list[int] = []

    def to_transformers(self) -> Any:
        return _fast(tokenizer_object=self._tokenizer, eos_token=self._tokenizer.id_to_token(self.eos))

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [each.ids for each in self._tokenizer.encode_batch(texts, add_special_tokens=False)]

    def decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(list(tokens))


class AutoTokenizer:
    """A tokenizer of :mod:`transformers`, from a folder or the Hub."""

    def __init__(self, name: str) -> None:
        transformers = require("transformers", extra="lm", why="Reading a tokenizer")
        try:
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        except Exception as error:  # network, name and format mistakes are of many types
            raise DataError(f"Cannot load tokenizer {name!r}: {reason(error)}.") from error
        if self._tokenizer.eos_token_id is None:
            raise DataError(f"Tokenizer {name!r} has no end-of-text token.")
        self.vocab_size = len(self._tokenizer)
        self.eos: int = self._tokenizer.eos_token_id
        begin = self._tokenizer.bos_token_id
        self.prefix: list[int] = [begin] if self._tokenizer("")["input_ids"] == [begin] else []

    def encode(self, texts: list[str]) -> list[list[int]]:
        return self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    def decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(list(tokens))

    def to_transformers(self) -> Any:
        return self._tokenizer


_END = "<|endoftext|>"


def _fast(**parts: Any) -> Any:
    transformers = require("transformers", extra="lm", why="A tokenizer for transformers")
    return transformers.PreTrainedTokenizerFast(pad_token=parts["eos_token"], padding_side="left", **parts)


def load_tokenizer(name: str) -> Tokenizer:
    """A tokenizer: ``"bytes"``, a ``tokenizer.json``, or a folder or Hub name that :mod:`transformers` knows.

    Raises:
        DataError: If it cannot be loaded or has no end-of-text token.
    """
    if name == "bytes":
        return Bytes()
    path = Path(name).expanduser()
    if path.is_file():
        return TokenizerFile(path)
    if not path.is_dir() and "/" not in name and "." in name:
        raise DataError(f"No tokenizer {name!r}; expected 'bytes', a tokenizer.json, a folder, or a name on the Hub.")
    return AutoTokenizer(name)


def encode_documents(documents: Iterable[str], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """Each document's tokens and the end-of-text token, ``[T]`` uint16, or uint32 for large vocabularies."""
    dtype = token_dtype(tokenizer.vocab_size)
    remaining = iter(documents)
    while texts := list(islice(remaining, _DOCUMENTS)):
        for tokens in tokenizer.encode(texts):
            yield np.asarray([*tokens, tokenizer.eos], dtype=dtype)


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest type that holds every token."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


@dataclass(frozen=True)
class Tokens:
    """A text as tokens, in one piece or several.

    Attributes:
        pieces: ``[T]`` integers each, in memory or memory-mapped.
        starts: ``[D]`` int64 for each piece: where its documents begin; the first is 0.
        vocab_size: All tokens are smaller.
        eos: The token that ends a document.
        tokenizer: What :func:`load_tokenizer` loads; empty if the tokens came without it.
    """

    pieces: list[np.ndarray]
    starts: list[np.ndarray]
    vocab_size: int
    eos: int
    tokenizer: str

    def __len__(self) -> int:
        return sum(map(len, self.pieces))

    def split(self, fraction: float) -> "tuple[Tokens, Tokens]":
        """(the beginning, the last ``fraction`` of the tokens); no copy is made.

        Raises:
            DataError: If one of them would be empty.
        """
        left = len(self) - round(fraction * len(self))
        if not 0 < left < len(self):
            raise DataError(f"{len(self)} tokens are too few to hold {fraction:g} of them out.")
        before: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
        after: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
        for piece, starts in zip(self.pieces, self.starts, strict=True):
            cut = min(max(left, 0), len(piece))
            if cut:
                before[0].append(piece[:cut])
                before[1].append(starts[starts < cut])
            if cut < len(piece):
                later = starts[starts > cut] - cut
                after[0].append(piece[cut:])
                after[1].append(np.concatenate([np.zeros(1, np.int64), later]))
            left -= len(piece)
        return tuple(Tokens(*part, self.vocab_size, self.eos, self.tokenizer) for part in (before, after))  # type: ignore[return-value]


def tokenize(documents: Documents, tokenizer_name: str) -> Tokens:
    """Texts as tokens in memory.

    Raises:
        DataError: If there is no text at all.
    """
    tokenizer = load_tokenizer(tokenizer_name)
    parts = list(encode_documents(documents, tokenizer))
    if not any(len(part) > 1 for part in parts):
        raise DataError(f"{documents.name} holds no text.")
    starts = np.cumsum([0] + [len(part) for part in parts[:-1]], dtype=np.int64)
    return Tokens([np.concatenate(parts)], [starts], tokenizer.vocab_size, tokenizer.eos, tokenizer_name)


def write_tokens(
    documents: Documents,
    tokenizer_name: str,
    out: Path,
    split: str,
    *,
    piece_tokens: int = 100_000_000,
    on_piece: Any = None,
) -> None:
    """Tokenise into the folder ``out``, in pieces that are each written whole; interrupted, the same call goes on.

    Args:
        documents: What to tokenise; the same on every call.
        tokenizer_name: For :func:`load_tokenizer`.
        out: ``tokens.json``, ``<split>-00000.tokens.npy`` and ``<split>-00000.starts.npy``, ... are written there.
        split: Name of the split.
        piece_tokens: A piece ends with the document that fills it.
        on_piece: Called with (documents done, tokens done) after each piece.

    Raises:
        DataError: If there is no text, or the folder holds tokens of another tokenizer.
    """
    tokenizer = load_tokenizer(tokenizer_name)
    out.mkdir(parents=True, exist_ok=True)
    described = {"tokenizer": tokenizer_name, "vocab_size": tokenizer.vocab_size, "eos": tokenizer.eos}
    record: dict[str, Any] = {**described, "splits": {}}
    if is_token_folder(out):
        record = _read_record(out)
    if any(record.get(key) != value for key, value in described.items()):
        raise DataError(
            f"{out} holds tokens of {record.get('tokenizer')!r}, not of {tokenizer_name!r}; choose another."
        )
    if split in record["splits"]:
        return
    _write_record(out, record)  # marks whose pieces these are
    done = piece = total = 0
    while (out / f"{split}-{piece:05d}.starts.npy").is_file():
        done += len(np.load(out / f"{split}-{piece:05d}.starts.npy", mmap_mode="r"))
        total += len(np.load(out / f"{split}-{piece:05d}.tokens.npy", mmap_mode="r"))
        piece += 1
    parts: list[np.ndarray] = []
    size = 0
    encoded = encode_documents(islice(documents, done, None), tokenizer)
    for tokens in encoded:
        parts.append(tokens)
        size += len(tokens)
        if size >= piece_tokens:
            _write_piece(out, split, piece, parts)
            done, total, piece, parts, size = done + len(parts), total + size, piece + 1, [], 0
            if on_piece is not None:
                on_piece(done, total)
    if parts:
        _write_piece(out, split, piece, parts)
        done, total, piece = done + len(parts), total + size, piece + 1
    if total <= done:  # nothing but ends of text
        raise DataError(f"{documents.name} holds no text.")
    record["splits"][split] = {"documents": done, "tokens": total, "pieces": piece}
    _write_record(out, record)
    if on_piece is not None:
        on_piece(done, total)


_RECORD = "tokens.json"


def is_token_folder(place: Path) -> bool:
    """Whether :func:`write_tokens` wrote here."""
    return (place / _RECORD).is_file()


def read_tokens(root: Path, split: str) -> Tokens:
    """Memory-mapped tokens of a split that :func:`write_tokens` wrote.

    Raises:
        DataError: If the split is missing, incomplete or damaged.
    """
    record = _read_record(root)
    if split not in record["splits"]:
        if (root / f"{split}-00000.starts.npy").is_file():
            raise DataError(f"{root}, split {split!r}, is incomplete; the same `zoo data pack` finishes it.")
        known = sorted(record["splits"])
        raise DataError(f"{root} has no split {split!r}.{nearest(split, known)} It has: {', '.join(known)}.")
    pieces, starts = [], []
    for i in range(record["splits"][split]["pieces"]):
        try:
            pieces.append(np.load(root / f"{split}-{i:05d}.tokens.npy", mmap_mode="r", allow_pickle=False))
            starts.append(np.load(root / f"{split}-{i:05d}.starts.npy", allow_pickle=False))
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{root}, split {split!r}, piece {i} is damaged: {reason(error)}.") from error
    tokens = Tokens(pieces, starts, record["vocab_size"], record["eos"], record["tokenizer"])
    if len(tokens) != record["splits"][split]["tokens"]:
        raise DataError(f"{root}, split {split!r}, has {len(tokens)} tokens, not {record['splits'][split]['tokens']}.")
    return tokens


def _read_record(root: Path) -> dict[str, Any]:
    try:
        record = json.loads((root / _RECORD).read_text())
        return {key: record[key] for key in ("tokenizer", "vocab_size", "eos", "splits")}
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{root / _RECORD} is not a record of zoo's: {reason(error)}.") from error


def _write_record(root: Path, record: dict[str, Any]) -> None:
    with write_atomically(root / _RECORD) as file:
        file.write(json.dumps(record, indent=2).encode() + b"\n")


def _write_piece(out: Path, split: str, piece: int, parts: list[np.ndarray]) -> None:
    # The starts come second: they mark the piece as complete.
    starts = np.cumsum([0] + [len(part) for part in parts[:-1]], dtype=np.int64)
    for kind, values in (("tokens", np.concatenate(parts)), ("starts", starts)):
        with write_atomically(out / f"{split}-{piece:05d}.{kind}.npy") as file:
            np.save(file, values)


class Rows:
    """Tokens cut into rows: row i is ``length + 1`` tokens, of which the last is the first of row i + 1.

    Args:
        tokens: What to cut. Rows do not cross from one piece into the next.
        length: Tokens that a model sees.
        keep_tail: Keep a piece's last, shorter row, filled up with ends of text that no loss counts.

    Raises:
        DataError: If there are too few tokens for one row.
    """

    def __init__(self, tokens: Tokens, length: int, *, keep_tail: bool = False) -> None:
        self.tokens = tokens
        self.length = length
        counts = [len(piece) - 1 for piece in tokens.pieces]  # tokens that have a successor
        self._ends = np.cumsum([-(-count // length) if keep_tail else count // length for count in counts])
        if not len(self):
            raise DataError(f"{len(tokens)} tokens are too few for one row of {length}; lower data.seq_len.")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, rows: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Inputs, targets and positions of some rows, each ``[B, T]`` int32.

        A target is the next token, or :data:`IGNORED` where the next token is of another document. A position counts
        from the beginning of the document, or of the row if that is nearer.
        """
        length = self.length
        inputs = np.full((len(rows), length), self.tokens.eos, dtype=np.int32)
        targets = np.full((len(rows), length), IGNORED, dtype=np.int32)
        positions = np.empty((len(rows), length), dtype=np.int32)
        ramp = np.arange(length, dtype=np.int32)
        for i, row in enumerate(rows):
            piece = int(np.searchsorted(self._ends, row, side="right"))
            begin = (row - (int(self._ends[piece - 1]) if piece else 0)) * length
            values = self.tokens.pieces[piece][begin : begin + length + 1]
            size = len(values) - 1
            inputs[i, :size] = values[:-1]
            targets[i, :size] = values[1:]
            positions[i] = ramp
            starts = self.tokens.starts[piece]
            first, last = np.searchsorted(starts, (begin + 1, begin + size + 1))
            for start in starts[first:last] - begin:
                targets[i, start - 1] = IGNORED
                positions[i, start:] = ramp[: length - start]
        return inputs, targets, positions
