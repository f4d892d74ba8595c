"""Building the C++ half of an operator."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from zoo.ops._extension import Extension, compiler, ninja

pytestmark = pytest.mark.skipif(not (compiler() and ninja()), reason="needs a C++ compiler and ninja")

STARTED_AND_NEVER_DONE = """
import pathlib, sys, time
from torch.utils import cpp_extension
from zoo.ops._extension import Extension
def load(name, *args, build_directory, **kwargs):
    pathlib.Path(build_directory, "lock").touch()
    pathlib.Path(sys.argv[2]).touch()
    time.sleep(600)
cpp_extension.load = load
Extension("tiny", pathlib.Path(sys.argv[1])).unavailable()
"""


def test_a_build_that_was_killed_keeps_nobody_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "extensions"
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(root))
    source, started = tmp_path / "tiny.cpp", tmp_path / "started"
    source.write_text("int zoo_tiny() { return 1; }\n")  # without torch's headers it compiles in no time
    command = [sys.executable, "-c", STARTED_AND_NEVER_DONE, str(source), str(started)]
    with subprocess.Popen(command) as process:
        while not started.exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.kill()
    assert Extension("tiny", source).unavailable() is None
    (library,) = root.glob("*.so")
    again = Extension("tiny", source)
    monkeypatch.setattr(again, "_build_and_load", None)  # built once
    assert again.unavailable() is None
    assert library.is_file()


def test_what_does_not_compile_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    source = tmp_path / "wrong.cpp"
    source.write_text("int zoo_wrong( {\n")
    why = Extension("wrong", source).unavailable()
    assert why is not None
    assert why.startswith("not built: ")
    assert not list((tmp_path / "extensions").glob("*.so"))
