"""zoo.pretrained.files: a hash is computed once for a file as it is, and again when anything about it changed."""

import hashlib
import os
from pathlib import Path

import pytest

from zoo.pretrained import files

CONTENT = bytes(range(256)) * 10
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files whose hash was computed."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    seen: list[Path] = []
    honest = files.sha256_of
    monkeypatch.setattr(files, "sha256_of", lambda path: seen.append(path) or honest(path))
    return seen


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "a").write_bytes(CONTENT)
    return tmp_path / "a"


def test_once_is_enough(file: Path, computed: list[Path]) -> None:
    assert files.has_sha256(file, SHA256)
    assert files.has_sha256(file, SHA256)
    assert len(computed) == 1
    files.forget_verified()
    assert files.has_sha256(file, SHA256)
    assert len(computed) == 2


def test_a_wrong_hash_is_never_remembered(file: Path, computed: list[Path]) -> None:
    assert not files.has_sha256(file, "0" * 64)
    assert not files.has_sha256(file, "0" * 64)
    assert len(computed) == 2


def test_a_change_is_found_even_when_its_time_is_set_back(file: Path, computed: list[Path]) -> None:
    assert files.has_sha256(file, SHA256)
    before = file.stat()
    file.write_bytes(CONTENT[::-1])
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = file.stat()
    assert (before.st_size, before.st_mtime_ns, before.st_ino) == (after.st_size, after.st_mtime_ns, after.st_ino)
    assert not files.has_sha256(file, SHA256)


def test_another_file_in_its_place_is_looked_at(file: Path, computed: list[Path]) -> None:
    assert files.has_sha256(file, SHA256)
    (file.parent / "b").write_bytes(CONTENT[::-1])
    (file.parent / "b").replace(file)
    assert not files.has_sha256(file, SHA256)


def test_a_cache_that_cannot_be_written_only_costs_time(file: Path, computed: list[Path]) -> None:
    (file.parent / "home").write_text("in the way")
    assert files.has_sha256(file, SHA256)
    assert files.has_sha256(file, SHA256)
    assert len(computed) == 2


def test_git_names_small_files_so(file: Path) -> None:
    file.write_bytes(b"test content\n")  # the example of git's own book
    assert files.git_oid_of(file) == "d670460b4b4aece5915caf5c68d12f560a9fe3e4"
