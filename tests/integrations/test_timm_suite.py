"""timm's own tests of its models, run on ours: what timm's users and tools expect of a model, in timm's words.

The tests come from the source distribution of the installed timm, which is fetched once; none of its text is kept here.
"""

import os
import subprocess
import sys
import tarfile
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

import pytest
import timm

import zoo

ROOT = Path(__file__).parents[2]

# What every one of our models must have gone through, whichever release of timm is installed.
REQUIRED = {
    "test_model_forward",
    "test_model_backward",
    "test_model_default_cfgs",
    "test_model_forward_torchscript",
    "test_model_forward_features",
    "test_model_forward_intermediates",
    "test_model_forward_intermediates_features",
    "test_model_forward_fx",
    "test_model_backward_fx",
    "test_model_forward_fx_torchscript",
}

SETTINGS = """\
[pytest]
addopts = -p no:cacheprovider -p timm_plugin -q
markers = base
    forward
    backward
    cfg
    cfg_nonstd
    torchscript
    features
    fxforward
    fxbackward
"""


@pytest.fixture(scope="module")
def timm_tests() -> Path:
    """The ``tests`` folder of the installed timm's source distribution."""
    cache = ROOT / ".cache"
    release = f"timm-{timm.__version__}"
    folder = cache / release / "tests"
    if not folder.is_dir():
        command = ["pip", "download", "--quiet", "--no-deps", "--no-binary", "timm", "--dest", str(cache)]
        fetched = subprocess.run(
            [sys.executable, "-m", *command, release.replace("-", "==")], capture_output=True, text=True
        )
        if fetched.returncode:
            reason = f"cannot fetch timm's tests: {fetched.stderr.strip()[-300:]}"
            if os.environ.get("CI"):
                pytest.fail(reason)
            pytest.skip(reason)
        with tarfile.open(cache / f"{release}.tar.gz") as archive:
            tests = [member for member in archive.getmembers() if member.name.startswith(f"{release}/tests/")]
            archive.extractall(cache, members=tests, filter="data")
    return folder


@pytest.mark.timeout(1600)
@pytest.mark.timm
@pytest.mark.slow
def test_timms_tests_pass_on_every_model(timm_tests: Path, tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text(SETTINGS)
    path = os.pathsep.join([str(Path(__file__).parent), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    environment.pop("GITHUB_ACTIONS", None)  # there, timm leaves tests out
    report = tmp_path / "report.xml"
    options = [f"--config-file={tmp_path / 'pytest.ini'}", f"--rootdir={tmp_path}", f"--junitxml={report}", "-n", "2"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, timm_tests / "test_models.py"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=1500,  # below pytest's own, which would leave the workers running
    )
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]

    passed = defaultdict(set)
    for case in ElementTree.parse(report).iter("testcase"):
        test = case.get("name", "").partition("[")[0]
        properties = {entry.get("name"): entry.get("value", "") for entry in case.iter("property")}
        assert case.find("skipped") is None, f"{test} skipped {properties['model_name']}"
        passed[properties["model_name"].partition(".")[0]].add(test)
    assert passed.keys() == {f"zoo_{name}" for name in zoo.list_models(task="image-classification")}
    for name, tests in passed.items():
        assert tests >= REQUIRED, f"{name} did not go through {sorted(REQUIRED - tests)}"
