"""zoo.atomic: a file is whole, or it is the one that was there before."""

import errno
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from zoo.atomic import save_safetensors, write_atomically


def test_replaces_the_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with write_atomically(path) as file:
        file.write(b"new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_error_while_writing_keeps_the_previous_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(TypeError), write_atomically(path) as file:
        print("not bytes", file=file)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_full_disk_is_an_oserror_and_keeps_the_previous_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_safetensors({"a": torch.zeros(3)}, path)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # stands in for a full disk
    try:
        with pytest.raises(OSError) as raised:  # noqa: PT011 -- its number is checked below
            save_safetensors({"a": torch.zeros(100_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert raised.value.errno == errno.EFBIG
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_kill_while_writing_keeps_the_previous_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    code = (
        "import os, signal, sys; from zoo.atomic import write_atomically\n"
        "with write_atomically(sys.argv[1]) as file:\n"
        "    file.write(b'x' * 100_000)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.read_text() == "old"


def test_safetensors_keep_metadata_and_need_not_be_contiguous(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    tensor = torch.arange(6.0).reshape(2, 3).T.requires_grad_()
    save_safetensors({"a": tensor}, path, {"model": "efficientvit_m0"})
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "model": "efficientvit_m0"}
        assert torch.equal(file.get_tensor("a"), tensor)


def test_missing_folder_is_an_oserror(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        save_safetensors({"a": torch.zeros(1)}, tmp_path / "none" / "model.safetensors")
