"""From what a recipe calls its data to a source."""

import re
from pathlib import Path

import numpy as np

from zoo.data.sources.base import EMBEDDED, ImageSource, class_counts, members_of
from zoo.data.sources.files import MANIFEST_SUFFIXES, FolderSource, ManifestSource, subfolders
from zoo.data.sources.shards import ShardSource
from zoo.data.sources.stream import StreamSource
from zoo.data.sources.tables import HubSource, ParquetSource, load_hub
from zoo.errors import DataError, nearest

# the folder names that a split goes by, the likeliest first
_SPLITS = {
    "train": ("train", "training"),
    "test": ("test", "val", "valid", "validation"),
    "val": ("val", "valid", "validation"),
    "validation": ("validation", "val", "valid"),
}
_SPLITS |= {"training": _SPLITS["train"], "valid": _SPLITS["val"]}


def open_source(name: str, *, split: str = "train", root: str = "") -> ImageSource:
    """Open a data set of labelled pictures.

    Args:
        name: ``"digits"`` (embedded), a folder (of class folders, parquet files or tar shards), a file (CSV, TSV or
            JSONL manifest, parquet, tar), tar shards as ``"PATH/train-{000000..000009}.tar"``, or a Hub data set as
            ``"owner/name"``.
        split: ``"train"``, ``"test"``, ...; a folder without a subfolder or file for any split has ``"train"`` alone.
        root: A local copy that stands for ``name``.

    Raises:
        DataError: If it cannot be found or read, in one line that says what was expected.
    """
    embedded = sorted(path.stem for path in EMBEDDED.glob("*.parquet"))
    place = Path(root or name).expanduser()
    if not root and name in embedded:
        place = EMBEDDED / f"{name}.parquet"
    if place.is_file() or "{" in place.name:
        return _open_file(place, split)
    if place.is_dir():
        return _open_folder(place, split)
    if root:
        raise _no_folder(root)
    if is_hub_name(name):
        return HubSource(name, split)
    raise DataError(
        f"Unknown data set {name!r}.{nearest(name, embedded)} Expected one of {', '.join(embedded)}, a folder, "
        "a parquet file, or a Hub data set as owner/name."
    )


def open_stream(
    name: str, *, split: str = "train", root: str = "", size: int = 0, seed: int | None = None
) -> StreamSource:
    """Open a Hub data set, or parquet files in a folder, as a stream: nothing is downloaded before it is needed.

    Args:
        name, split, root: As for :func:`open_source`.
        size: Pictures in an epoch, where the Hub does not say.
        seed: Shuffles through a buffer; None keeps the order.

    Raises:
        DataError: If it cannot be found or read.
    """
    place = Path(root or name).expanduser()
    if place.is_dir():
        files = [str(file) for file in parquet_files(place, split)]
        if not files:
            raise DataError(f"{place} holds no parquet files; data.streaming reads those, or a Hub data set.")
        return StreamSource(
            load_hub("parquet", split, data_files={split: files}, streaming=True), str(place), size=size, seed=seed
        )
    if root:
        raise _no_folder(root)
    return StreamSource(load_hub(name, split, streaming=True), f"{name}[{split}]", size=size, seed=seed)


def _no_folder(root: str) -> DataError:
    found = "a file" if Path(root).expanduser().is_file() else "not there"
    return DataError(f"data.root is {root!r}, which is {found}; expected a folder.")


def is_hub_name(name: str) -> bool:
    """Whether this can only be ``owner/name``."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def _open_file(place: Path, split: str) -> ImageSource:
    if place.suffix in MANIFEST_SUFFIXES:
        return ManifestSource(place, split)
    if place.suffix not in (".parquet", ".tar"):
        raise DataError(
            f"{place} is a file; expected a folder of class folders, or a file that ends in .csv, .tsv, .jsonl, "
            ".parquet or .tar."
        )
    if split != "train":
        raise DataError(f"{str(place)!r} has the split 'train' only, not {split!r}; hold a part out with data.holdout.")
    return ParquetSource([place]) if place.suffix == ".parquet" else ShardSource(expand_braces(place))


def expand_braces(place: Path) -> list[Path]:
    """``x-{08..11}.tar`` -> ``x-08.tar`` to ``x-11.tar``, as WebDataset's users write it.

    Raises:
        DataError: If one of them is not there.
    """
    match = re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", str(place))
    if match is None:
        return [place]
    before, first, last, after = match.groups()
    files = [Path(f"{before}{i:0{len(first)}d}{after}") for i in range(int(first), int(last) + 1)]
    for file in files:
        if not file.is_file():
            raise DataError(f"{file} of {place} is not there.")
    return files


def parquet_files(root: Path, split: str) -> list[Path]:
    """The parquet files of a split in a folder, or in its subfolder ``data``; empty if there are none for any split.

    Raises:
        DataError: If there are files, but none for this split.
    """
    return files_of_split(root, split, "parquet") or files_of_split(root / "data", split, "parquet")


def files_of_split(folder: Path, split: str, suffix: str) -> list[Path]:
    """The files ``<split>.<suffix>`` and ``<split>-*.<suffix>`` in a folder; empty if there are none for any split.

    Raises:
        DataError: If there are files, but none for this split.
    """
    files = sorted(folder.glob(f"*.{suffix}"))
    if not files:
        return []
    chosen = [file for file in files if file.name.startswith(f"{split}-") or file.stem == split]
    if not chosen:
        splits = sorted({file.name.partition("-")[0].removesuffix(f".{suffix}") for file in files})
        raise DataError(f"{folder} has no split {split!r}.{nearest(split, splits)} It has: {', '.join(splits)}.")
    return chosen


def _open_folder(root: Path, split: str) -> ImageSource:
    if files := parquet_files(root, split):
        return ParquetSource(files)
    if files := files_of_split(root, split, "tar"):
        return ShardSource(files)
    # A folder of class folders may be a split; a folder of pictures is a class, whatever its name.
    splits = [folder.name for folder in subfolders(root) if folder.name in {split, *_SPLITS} and subfolders(folder)]
    for name in _SPLITS.get(split, (split,)):
        if name in splits:
            return FolderSource(root / name)
    if splits:
        raise DataError(f"{root} has no split {split!r}.{nearest(split, splits)} It has: {', '.join(splits)}.")
    if split != "train":
        raise DataError(f"{root} has the split 'train' only, not {split!r}; hold a part out with data.holdout.")
    return FolderSource(root)


def stratified_holdout(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split sample indices into (train, held out), the same share of every class held out.

    Where pictures have several labels, the rarest class is shared out first, then the next of what is left, as
    iterative stratification does (Sechidis et al., 2011); pictures without a label are shared out last. Shares are then
    as equal as classes that come together allow.

    Args:
        labels: ``[N]`` int64, or ``[N, num_classes]`` bool.
        fraction: Share to hold out, in (0, 1). Every class with two samples or more keeps and gives at least one; a
            single sample is kept for training.
        seed: Decides which.

    Raises:
        DataError: If there is nothing to hold out.
    """
    generator = np.random.default_rng([seed, 0x5EED])
    held = np.zeros(len(labels), dtype=bool)
    undecided = ~held
    several = labels.ndim == 2
    counts = class_counts(labels, 0)
    order = np.argsort(counts, kind="stable") if several else np.arange(len(counts))
    groups = [members_of(labels, label) for label in order if counts[label]]
    if several:
        groups.append(np.flatnonzero(~labels.any(1)))
    for members in groups:
        wanted = min(max(round(fraction * len(members)), 1), len(members) - 1) - held[members].sum()
        members = generator.permutation(members[undecided[members]])
        held[members[: max(wanted, 0)]] = True
        undecided[members] = False
    if not held.any():
        raise DataError(f"None of the {len(groups)} classes has two samples, so that none can be held out.")
    return np.flatnonzero(~held), np.flatnonzero(held)
