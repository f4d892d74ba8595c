"""From a set of weights to its file on this machine. Imports no torch."""

import logging
from pathlib import Path

import zoo
from zoo.errors import WeightsError
from zoo.pretrained.download import check_sha256, hub_file, url_file, url_place
from zoo.pretrained.files import cache_folder, read_header
from zoo.pretrained.manifest import Weights

_logger = logging.getLogger(__name__)


def fetch(weights: Weights) -> Path:
    """The local safetensors file of a set of weights, downloaded unless it is packaged or in the cache.

    Raises:
        WeightsError: If it cannot be had, is not the file that the manifest describes, or is yet to be converted.
    """
    if weights.pickled:
        return _converted(weights)
    if weights.hub or weights.url:
        return _downloaded(weights)
    if not weights.path.is_file():
        raise WeightsError(
            f"{weights.path}: missing, though {weights.name} should come with the package; reinstall it."
        )
    if weights.sha256:
        check_sha256(weights.path, weights.sha256, weights.name)
    return weights.path


def _downloaded(weights: Weights) -> Path:
    if weights.hub:
        return hub_file(weights.hub, weights.file, weights.revision, sha256=weights.sha256)
    return url_file(weights.url, weights.sha256, name=weights.file)


def converted_path(weights: Weights) -> Path:
    """Where the conversion of an authors' file is kept."""
    return cache_folder("converted") / f"{weights.name}.safetensors"


def origin(weights: Weights) -> str:
    """Which file an authors' file is; its conversion keeps it in its header."""
    return f"{weights.hub}@{weights.revision}/{weights.file}" if weights.hub else weights.url or weights.page


def _converted(weights: Weights) -> Path:
    """A conversion of this file by this version: rules and places may change from one to the next."""
    path = converted_path(weights)
    if path.is_file():
        header = read_header(path).get("__metadata__", {})
        expected = {"zoo_version": zoo.__version__, "source": origin(weights)}
        if weights.sha256:
            expected["source_sha256"] = weights.sha256
        other = next((key for key, value in expected.items() if header.get(key) != value), None)
        if other is None:
            return path
        _logger.warning(
            "%s has %s %r, not %r: expected another conversion", path, other, header.get(other), expected[other]
        )
    if weights.page:
        how = f"Fetch it from {weights.page}, then: zoo weights convert {weights.name} --source FILE"
    else:
        how = f"zoo weights convert {weights.name}"
    raise WeightsError(f"{weights.name} is published as a pickle, which is converted once before it is loaded. {how}")


def authors_file(weights: Weights) -> Path:
    """The pickle that a set of weights is published as, downloaded unless it is in the cache; it is only to convert.

    Raises:
        WeightsError: If it has no address of its own, or cannot be had.
    """
    if weights.hub or weights.url:
        return _downloaded(weights)
    raise WeightsError(f"{weights.name}: fetch its file from {weights.page}, then name it: --source FILE.")


def cached_file(weights: Weights) -> Path | None:
    """The file that :func:`fetch` would find without a network, unchecked; None when there is none."""
    if weights.pickled:
        path = converted_path(weights)
    elif weights.hub:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(weights.hub, weights.file, revision=weights.revision)
        return Path(found) if isinstance(found, str) else None
    elif weights.url:
        path = url_place(weights.url, weights.sha256, weights.file)
    else:
        path = weights.path
    return path if path.is_file() else None


def remove_cached(weights: Weights) -> None:
    """Remove from the cache what :func:`fetch` put there for these weights; of a Hub repository, every revision.

    Raises:
        WeightsError: If nothing of it is there.
    """
    path = cached_file(weights)
    if weights.packaged or path is None:
        raise WeightsError(f"{weights.name} is not in the cache.")
    if weights.hub and not weights.pickled:
        from huggingface_hub import scan_cache_dir

        found = scan_cache_dir()
        revisions = [each.commit_hash for repo in found.repos if repo.repo_id == weights.hub for each in repo.revisions]
        found.delete_revisions(*revisions).execute()
    else:
        path.unlink()
