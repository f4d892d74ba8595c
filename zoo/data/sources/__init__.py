"""Where pictures come from: class folders, manifests, tar shards, parquet files, Hub data sets, and the embedded ones.

A source knows how many samples it has, their labels and class names, and hands out *encoded* pictures; decoding is the
next stage (:mod:`zoo.data.image`). Text has its sources in :mod:`zoo.data.text`.
"""

from zoo.data.sources.base import (
    EMBEDDED,
    IMAGE_SUFFIXES,
    ImageSource,
    Relabelled,
    class_counts,
    members_of,
    missing_classes,
)
from zoo.data.sources.files import FolderSource, ManifestSource
from zoo.data.sources.opening import open_source, open_stream, stratified_holdout
from zoo.data.sources.shards import ShardSource
from zoo.data.sources.stream import StreamSource
from zoo.data.sources.tables import HubSource, ParquetSource

__all__ = [
    "EMBEDDED",
    "IMAGE_SUFFIXES",
    "FolderSource",
    "HubSource",
    "ImageSource",
    "ManifestSource",
    "ParquetSource",
    "Relabelled",
    "ShardSource",
    "StreamSource",
    "class_counts",
    "members_of",
    "missing_classes",
    "open_source",
    "open_stream",
    "stratified_holdout",
]
