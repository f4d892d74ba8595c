"""Files from the Hub and from URLs: resumed after a cut, tried again, checked before use, shared between processes.

The Hub's protocol and cache are huggingface_hub's, so ``HF_HOME``, ``HF_HUB_OFFLINE``, ``HF_ENDPOINT`` and ``HF_TOKEN``
mean what they mean to it. This module adds what it leaves out: errors of one line, another try where the server says
so, and a check of what lies in the cache against the hash it is filed under.
"""

import errno
import hashlib
import http.client
import logging
import os
import re
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import zoo
from zoo.errors import WeightsError, reason
from zoo.pretrained.files import cache_folder, git_oid_of, has_sha256, sha256_of

_logger = logging.getLogger(__name__)
_Result = TypeVar("_Result")

ATTEMPTS = 5
LONGEST_WAIT = 120.0  # seconds; a server that asks for more is not waited for
_TRANSIENT = (408, 429, 500, 502, 503, 504)  # HTTP statuses that may be others the next time
_CHUNK = 1 << 20  # bytes
_SAFE_NAME = re.compile(r"(?!\.)[\w.-]+")


def hub_file(repo: str, file: str, revision: str = "main", *, sha256: str = "") -> Path:
    """A file of a Hub repository, from huggingface_hub's cache or downloaded into it.

    Args:
        repo: ``"owner/name"``.
        file: Its path in the repository.
        revision: Branch, tag or commit; a commit that is in the cache needs no network.
        sha256: What it must be, where that is known.

    Raises:
        WeightsError: If it cannot be had, with the reason, or is not what it must be.
    """
    path = _from_hub(repo, file, revision)
    if not _is_whole(path):
        _logger.warning("%s is damaged in the cache: fetching it again", path)
        path = _from_hub(repo, file, revision, force_download=True)
        if not _is_whole(path):
            raise WeightsError(f"{path}: not what the Hub says it is, though just downloaded; the network damages it.")
    if sha256:
        check_sha256(path, sha256, f"{repo} ({revision})")
    return path


def check_sha256(path: Path, sha256: str, owner: str) -> None:
    """Raise when a file has another hash.

    Raises:
        WeightsError: With both.
    """
    if not has_sha256(path, sha256):
        raise WeightsError(
            f"{path}: not the file that belongs to {owner}: its sha256 is {sha256_of(path)}, expected {sha256}. "
            "It is not loaded; the file was changed at its source, or damaged here."
        )


def _from_hub(repo: str, file: str, revision: str, *, force_download: bool = False) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, HTTPError

    def get() -> str:
        _check_answer(repo, file, revision)
        return hf_hub_download(
            repo,
            file,
            revision=revision,
            library_name="zoo",
            library_version=zoo.__version__,
            force_download=force_download,
        )

    try:
        return Path(_retrying(get, f"{repo}/{file}"))
    # OSError: no network, a full disk, no such repository. HTTPError: a connection that broke half-way.
    # ValueError: a damaged file that cannot be fetched anew without a network.
    except (OSError, HTTPError, EntryNotFoundError, HFValidationError, ValueError) as error:
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(
            f"Cannot fetch {file} from the Hub repository {repo} ({revision}): {hub_reason(error, repo)}."
        ) from error


def _check_answer(repo: str, file: str, revision: str) -> None:
    """Refuse an answer whose names would lead out of the cache, before the client makes paths of them."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HTTPError

    if isinstance(try_to_load_from_cache(repo, file, revision=revision), str):
        return
    try:
        answer = get_hf_file_metadata(
            hf_hub_url(repo, file, revision=revision), library_name="zoo", library_version=zoo.__version__
        )
    except (OSError, HTTPError):
        return  # the download meets it again, and reports it
    for header, name in (("ETag", answer.etag), ("X-Repo-Commit", answer.commit_hash)):
        if name is not None and not _SAFE_NAME.fullmatch(name):
            raise WeightsError(f"Cannot fetch {file} from the Hub repository {repo}: its {header} {name!r} is no name.")


def _is_whole(path: Path) -> bool:
    """Whether a file of the Hub's cache has the hash it is filed under; True where it is filed otherwise."""
    name = path.readlink().name if path.is_symlink() else ""
    if re.fullmatch(r"[0-9a-f]{64}", name):
        return has_sha256(path, name)
    return git_oid_of(path) == name if re.fullmatch(r"[0-9a-f]{40}", name) else True


def hub_reason(error: BaseException, repo: str) -> str:
    """Why the Hub did not do what it was asked to, and what to do about it."""
    from huggingface_hub import errors

    # The client reports "not in the cache" and "damaged", and tells in the cause why it could not look elsewhere.
    while isinstance(error, errors.LocalEntryNotFoundError | ValueError | RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    log_in = "log in (`hf auth login`) or set HF_TOKEN"
    local = "Without a network it must be in the cache; or pass a local copy: create_model(NAME, checkpoint=FILE)"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"it is not in the cache, or damaged there, and HF_HUB_OFFLINE is set. {local}"
    if isinstance(error, errors.GatedRepoError):
        return f"it is gated. Accept its conditions on the Hub's page of {repo}, and {log_in}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"there is no such repository, or it is private. For a private one, {log_in}"
    if isinstance(error, errors.RevisionNotFoundError):
        return "it has no such revision"
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
        return "it has no such file"
    if status in (401, 403):
        return f"access is refused ({status}). Check the token's rights, or {log_in}"
    if status is not None:
        return f"the server answers {status}. Try again later"
    if _is_disk_full(error):
        return f"the disk is full. What was there is kept; free some space, or set HF_HOME ({reason(error)})"
    return f"{reason(error)}. {local}"


def url_place(url: str, sha256: str, name: str) -> Path:
    """Where the cache keeps a file from a URL, under its hash where that is known."""
    return cache_folder("downloads") / (sha256 or f"unchecked-{hashlib.sha256(url.encode()).hexdigest()[:16]}") / name


def url_file(url: str, sha256: str = "", *, name: str = "") -> Path:
    """A file from a URL, from zoo's cache or downloaded into it.

    Args:
        url: ``https``, or ``http`` on this machine.
        sha256: What it must be; "" only for what is not loaded as it is, but converted.
        name: What to call it; the last part of the URL's path by default.

    Raises:
        WeightsError: If it cannot be had, with the reason, or is not what it must be.
    """
    from filelock import FileLock
    from huggingface_hub.constants import is_offline_mode

    _check_url(url)
    name = name or urllib.parse.unquote(urllib.parse.urlparse(url).path).rpartition("/")[2]
    if not _SAFE_NAME.fullmatch(name):
        raise WeightsError(f"{url}: its last part is no file name.")
    path = url_place(url, sha256, name)
    folder, part = path.parent, path.with_name(f".{name}.part")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):  # a second process waits, and finds the file
            if path.is_file():
                if not sha256 or has_sha256(path, sha256):
                    return path
                _logger.warning("%s is damaged in the cache: fetching it again", path)
                path.unlink()
            if is_offline_mode():
                raise WeightsError(
                    f"Cannot fetch {url}: it is not in the cache, or damaged there; HF_HUB_OFFLINE is set."
                )
            _retrying(lambda: _download(url, part), url)
            found = sha256_of(part)
            if sha256 and found != sha256:
                part.unlink()
                raise WeightsError(f"{url}: its sha256 is {found}, expected {sha256}. It is not loaded.")
            part.replace(path)
            return path
    except (OSError, http.client.HTTPException) as error:
        if _is_disk_full(error):
            part.unlink(missing_ok=True)
            raise WeightsError(f"Cannot fetch {url}: the disk is full ({reason(error)}).") from error
        raise WeightsError(f"Cannot fetch {url}: {reason(error)}.") from error


def _check_url(url: str) -> None:
    parsed = urllib.parse.urlparse(url)
    here = parsed.scheme == "http" and parsed.hostname in ("127.0.0.1", "::1", "localhost")
    if parsed.scheme != "https" and not here:
        raise WeightsError(f"{url}: expected an https address.")


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but to no address that would not have been accepted itself."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        _check_url(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _download(url: str, part: Path) -> None:
    """Download a URL into ``part``, going on where an earlier attempt left off."""
    from huggingface_hub.constants import HF_HUB_DOWNLOAD_TIMEOUT
    from huggingface_hub.utils import tqdm

    have = part.stat().st_size if part.is_file() else 0
    headers = {"User-Agent": f"zoo/{zoo.__version__}", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    opener = urllib.request.build_opener(_Redirects)
    try:
        answer = opener.open(urllib.request.Request(url, headers=headers), timeout=HF_HUB_DOWNLOAD_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing is left to send: it is whole, or of another file
            if error.headers.get("Content-Range") != f"bytes */{have}":
                part.unlink()
                raise ConnectionError("the file has changed since the download began") from error
            return
        raise
    with answer:
        if answer.status != 206:  # the server does not resume
            have = 0
        length = answer.headers.get("Content-Length")
        total = have + int(length) if length else None
        if length and int(length) > (free := shutil.disk_usage(part.parent).free):
            raise OSError(errno.ENOSPC, f"{int(length):,} bytes are needed, {free:,} are free")
        with (
            part.open("ab" if have else "wb") as file,
            tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=part.name[1:-5], leave=False) as progress,
        ):
            while chunk := answer.read1(_CHUNK):  # what has arrived, so that a kill loses little
                file.write(chunk)
                progress.update(len(chunk))
            file.flush()
            os.fsync(file.fileno())
    if total is not None and part.stat().st_size != total:
        raise ConnectionError(f"the connection was cut after {part.stat().st_size:,} of {total:,} bytes")


def _retrying(action: Callable[[], _Result], what: str) -> _Result:
    """The result of an action that may fail for a while: tried again, after as long as the server asks or doubles."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return action()
        except Exception as error:
            wait = _wait(error, attempt)
            if wait is None or attempt == ATTEMPTS:
                raise
            _logger.warning("%s: %s; trying again in %g s", what, reason(error), wait)
            time.sleep(wait)
    raise AssertionError("unreachable")


def _wait(error: Exception, attempt: int) -> float | None:
    """Seconds to wait before the next attempt; None for an error that another attempt would meet again."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    broken = (HTTPError, ConnectionError, TimeoutError, urllib.error.URLError, http.client.HTTPException)
    status: int | None = None
    headers: Mapping[str, str] = {}
    if isinstance(error, HfHubHTTPError):
        status, headers = error.response.status_code, error.response.headers
    elif isinstance(error, urllib.error.HTTPError):
        status, headers = error.code, error.headers  # type: ignore[assignment]
    elif isinstance(error, OfflineModeIsEnabled | WeightsError | FileNotFoundError):
        status = 404  # nothing that changes by itself
    elif not isinstance(error, broken) and "Consistency check failed" not in str(error):
        return None  # the client says that of a download of another length than announced
    if status is not None and status not in _TRANSIENT:
        return None
    asked = headers.get("Retry-After", "")
    wait = float(asked) if asked.isdigit() else 2.0 ** (attempt - 1)
    return wait if wait <= LONGEST_WAIT else None


def _is_disk_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
