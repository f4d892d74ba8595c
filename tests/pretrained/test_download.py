"""zoo.pretrained.download against the Hub's protocol and a plain server, with everything that goes wrong on the way."""

import ast
import hashlib
import random
import resource
import time
from pathlib import Path
from typing import Any

import pytest

import zoo

REPO = "owner/model"
FILE = "model.safetensors"
CONTENT = random.Random(0).randbytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()

HUB = f"""
from zoo.pretrained.download import hub_file
path = hub_file("{REPO}", "{FILE}")
print(path)
"""


@pytest.fixture
def commit(hub: Any) -> str:
    return hub.add(REPO, {FILE: CONTENT})


def test_cold_then_warm(hub: Any, client: Any, commit: str) -> None:
    path = Path(client.run(HUB))
    assert path.read_bytes() == CONTENT
    assert path.is_relative_to(client.home)
    assert hub.downloads() == [f"/{REPO}/resolve/main/{FILE}"]
    assert all(f"zoo/{zoo.__version__}" in headers["User-Agent"] for _, _, headers in hub.requests)
    cold = len(hub.requests)
    assert client.run(HUB) == str(path)
    assert [method for method, _, _ in hub.requests[cold:]] == ["HEAD"]  # is there a newer one?


def test_large_files_come_from_another_address(hub: Any, client: Any, commit: str) -> None:
    hub.redirects = True
    assert Path(client.run(HUB, HF_TOKEN="hf_secret")).read_bytes() == CONTENT
    (moved,) = [headers for method, path, headers in hub.requests if path.startswith("/cdn/") and method == "GET"]
    assert "Authorization" not in moved


def test_a_pinned_revision_stays(hub: Any, client: Any, commit: str) -> None:
    newer = hub.add(REPO, {FILE: CONTENT[::-1]})
    code = HUB.replace(f'"{FILE}")', f'"{FILE}", "{{}}")')
    pinned = client.run(code.format(commit))
    assert Path(pinned).read_bytes() == CONTENT
    assert Path(client.run(code.format("main"))).read_bytes() == CONTENT[::-1]
    assert Path(client.run(code.format(newer))).read_bytes() == CONTENT[::-1]
    before = len(hub.requests)
    assert client.run(code.format(commit)) == pinned
    assert len(hub.requests) == before  # a commit cannot have changed


def test_cut_in_the_middle_is_continued(hub: Any, client: Any) -> None:
    piece = 10 << 20  # bytes that the client keeps of what arrives
    content = bytes(2 * piece) + CONTENT
    hub.add(REPO, {FILE: content})
    hub.fail(FILE, cut_after=piece + 1000, times=2)
    assert Path(client.run(HUB)).read_bytes() == content
    ranges = [headers.get("Range") for method, _, headers in hub.requests if method == "GET"]
    assert ranges == [None, f"bytes={piece}-", f"bytes={2 * piece}-"]


def test_killed_in_the_middle_starts_anew(hub: Any, client: Any) -> None:
    hub.add(REPO, {FILE: CONTENT})
    hub.fail(FILE, cut_after=100_000, hang=60.0)
    client.setup = "pauses = []\n"
    killed = client.start(HUB)
    deadline = time.monotonic() + 60
    while not hub.downloads():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    killed.kill()
    killed.communicate()
    assert Path(client.run(HUB)).read_bytes() == CONTENT
    assert "Range" not in hub.requests[-1][2]  # huggingface_hub continues within a process only


def test_cut_again_and_again_is_an_error_and_leaves_nothing(hub: Any, client: Any, commit: str) -> None:
    hub.fail(FILE, cut_after=0, times=1000)
    assert "refused: Cannot fetch model.safetensors from the Hub repository owner/model (main)" in client.run(HUB)
    assert not [path for path in client.home.rglob("*") if path.is_file() and path.stat().st_size > 1000]


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_a_busy_server_is_asked_again_when_it_says(
    status: int, method: str, hub: Any, client: Any, commit: str
) -> None:
    hub.fail(FILE, method=method, status=status, headers={"Retry-After": "7"}, times=2)
    out = client.run(HUB + "print(pauses)")
    path, pauses = out.splitlines()
    assert Path(path).read_bytes() == CONTENT
    if method == "GET":
        waits = [pause for pause in ast.literal_eval(pauses) if pause >= 1]
        assert all(wait in (7, 8) for wait in waits)  # the client's own waits are a second longer
        assert len(waits) == 2


def test_a_server_that_asks_for_an_hour_is_not_waited_for(hub: Any, client: Any, commit: str) -> None:
    hub.fail(FILE, status=503, headers={"Retry-After": "3600"}, times=100)
    assert "refused: Cannot fetch" in client.run(HUB)
    assert len(hub.downloads()) == 1


def test_a_busy_server_is_given_up_on(hub: Any, client: Any, commit: str) -> None:
    hub.fail(FILE, status=503, times=100)
    assert "the server answers 503" in client.run(HUB)
    assert len(hub.downloads()) == 5


@pytest.mark.parametrize(
    "status, headers, message",
    [
        (401, {"X-Error-Code": "RepoNotFound"}, "no such repository, or it is private. For a private one, log in (`hf"),
        (401, {"X-Error-Message": "Invalid credentials in Authorization header"}, "access is refused (401)"),
        (
            403,
            {"X-Error-Message": "This token may not"},
            "access is refused (403). Check the token's rights, or log in",
        ),
        (
            403,
            {"X-Error-Code": "GatedRepo"},
            "it is gated. Accept its conditions on the Hub's page of owner/model, and",
        ),
        (404, {"X-Error-Code": "RepoNotFound"}, "there is no such repository"),
        (404, {"X-Error-Code": "RevisionNotFound"}, "it has no such revision"),
        (404, {"X-Error-Code": "EntryNotFound"}, "it has no such file"),
    ],
)
def test_refusals_say_why(
    status: int, headers: dict[str, str], message: str, hub: Any, client: Any, commit: str
) -> None:
    hub.fail(FILE, method="HEAD", status=status, headers=headers, times=10)
    out = client.run(HUB)
    assert out.startswith("refused: Cannot fetch model.safetensors from the Hub repository owner/model (main): ")
    assert message in out
    assert "\n" not in out
    assert not hub.downloads()


@pytest.mark.parametrize("name", ["", "owner", "owner/model/more", "../up", "owner/mo del"])
def test_no_repository(name: str, hub: Any, client: Any) -> None:
    assert "refused" in client.run(HUB.replace(REPO, name))
    assert not hub.downloads()


def test_wrong_hash(hub: Any, client: Any, commit: str) -> None:
    out = client.run(HUB.replace(f'"{FILE}")', f'"{FILE}", sha256="{"0" * 64}")'))
    assert f"its sha256 is {SHA256}, expected 0000" in out


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_cache_entry_is_fetched_again(damage: str, hub: Any, client: Any, commit: str) -> None:
    blob = Path(client.run(HUB)).resolve()
    ruined = {"flip": CONTENT[:-1] + b"?", "cut": CONTENT[:1000], "empty": b""}[damage]
    blob.write_bytes(ruined)
    offline = client.run(HUB, HF_HUB_OFFLINE="1")
    assert "damaged there, and HF_HUB_OFFLINE is set" in offline
    assert blob.read_bytes() == ruined
    assert Path(client.run(HUB)).read_bytes() == CONTENT
    assert "is damaged in the cache: fetching it again" in client.log
    assert len(hub.downloads()) == 2


def test_a_download_that_the_network_ruins_is_refused(hub: Any, client: Any, commit: str) -> None:
    claimed = {"ETag": f'"{"0" * 64}"'}
    for method in ("HEAD", "GET"):
        hub.fail(FILE, method=method, headers=claimed, times=100)
    assert "not what the Hub says it is" in client.run(HUB)


def test_small_files_are_checked_too(hub: Any, client: Any) -> None:
    hub.add(REPO, {"config.json": b"{}"})
    code = HUB.replace(FILE, "config.json")
    path = Path(client.run(code))
    path.resolve().write_bytes(b"{!")
    assert Path(client.run(code)).read_bytes() == b"{}"


def test_offline(hub: Any, client: Any, commit: str) -> None:
    assert "it is not in the cache, or damaged there, and HF_HUB_OFFLINE is set" in client.run(HUB, HF_HUB_OFFLINE="1")
    path = client.run(HUB)
    before = len(hub.requests)
    assert client.run(HUB, HF_HUB_OFFLINE="1") == path
    assert len(hub.requests) == before


def test_a_hub_that_is_down_does_not_matter_to_a_full_cache(hub: Any, client: Any, commit: str) -> None:
    path = client.run(HUB)
    hub.fail("", method="HEAD", status=503, times=100)
    assert client.run(HUB) == path


def test_two_processes_at_once_download_once(hub: Any, client: Any, commit: str) -> None:
    hub.fail(FILE, wait=1.5)
    both = [client.start(HUB) for _ in range(2)]
    outs = [process.communicate(timeout=60)[0].strip() for process in both]
    assert outs[0] == outs[1]
    assert Path(outs[0]).read_bytes() == CONTENT
    assert len(hub.downloads()) == 1


# No file may become larger than this: what a full disk is to the program that writes.
FULL = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, {resource.RLIM_INFINITY}))\n"


def test_full_disk(hub: Any, client: Any, commit: str) -> None:
    assert "the disk is full" in client.run(FULL + HUB)
    assert not [path for path in client.home.rglob("*") if path.is_file() and path.stat().st_size >= 100_000]
    assert Path(client.run(HUB)).read_bytes() == CONTENT


@pytest.mark.parametrize("name", ["../../../../evil", "/tmp/evil", "..", "a/b", ""])
@pytest.mark.parametrize("header", ["ETag", "X-Repo-Commit"])
def test_an_answer_that_leads_out_of_the_cache_is_refused(
    name: str, header: str, hub: Any, client: Any, commit: str, tmp_path: Path
) -> None:
    for method in ("HEAD", "GET"):
        hub.fail(FILE, method=method, headers={header: f'"{name}"'}, times=9)
    out = client.run(HUB)
    assert out.startswith("refused"), out
    assert not hub.downloads()
    assert not list(tmp_path.rglob("*evil*"))


# Plain URLs.

URL_PATH = f"/files/{FILE}"


def fetch(hub: Any, sha256: str = SHA256, path: str = URL_PATH) -> str:
    return f"from zoo.pretrained.download import url_file\nprint(url_file({hub.endpoint + path!r}, {sha256!r}))\n"


@pytest.fixture
def served(hub: Any) -> Any:
    hub.plain[URL_PATH] = CONTENT
    return hub


def test_url_cold_warm_and_offline(served: Any, client: Any) -> None:
    assert "HF_HUB_OFFLINE is set" in client.run(fetch(served), HF_HUB_OFFLINE="1")
    path = client.run(fetch(served))
    assert Path(path).read_bytes() == CONTENT
    assert client.run(fetch(served), HF_HUB_OFFLINE="1") == path
    assert client.run(fetch(served)) == path
    assert len(served.downloads()) == 1


@pytest.mark.parametrize("ranges", [True, False])
def test_url_cut_in_the_middle_is_continued(ranges: bool, served: Any, client: Any) -> None:
    served.ranges = ranges
    served.fail(URL_PATH, cut_after=100_000)
    assert Path(client.run(fetch(served))).read_bytes() == CONTENT
    assert served.requests[-1][2]["Range"] == "bytes=100000-"


def test_url_is_continued_by_another_process(served: Any, client: Any) -> None:
    served.fail(URL_PATH, cut_after=100_000, times=1)
    served.fail(URL_PATH, status=500, times=4)
    assert "refused: Cannot fetch" in client.run(fetch(served))
    assert Path(client.run(fetch(served))).read_bytes() == CONTENT
    assert served.requests[-1][2]["Range"] == "bytes=100000-"


def test_url_that_changed_during_the_download_is_not_mixed(served: Any, client: Any) -> None:
    served.fail(URL_PATH, cut_after=100_000, times=1)
    served.fail(URL_PATH, status=500, times=4)
    client.run(fetch(served))
    served.plain[URL_PATH] = CONTENT[::-1]
    assert f"expected {SHA256}. It is not loaded" in client.run(fetch(served))
    served.plain[URL_PATH] = CONTENT
    assert Path(client.run(fetch(served))).read_bytes() == CONTENT


def test_url_with_another_hash(served: Any, client: Any) -> None:
    out = client.run(fetch(served, "0" * 64))
    assert f"its sha256 is {SHA256}, expected 0000" in out
    assert not [path for path in client.home.rglob("*") if path.is_file() and path.stat().st_size > 1000]


def test_url_whose_cache_entry_is_damaged(served: Any, client: Any) -> None:
    path = Path(client.run(fetch(served)))
    path.write_bytes(CONTENT[:-1])
    assert "damaged there; HF_HUB_OFFLINE is set" in client.run(fetch(served), HF_HUB_OFFLINE="1")
    assert Path(client.run(fetch(served))).read_bytes() == CONTENT


@pytest.mark.parametrize("status", [429, 503])
def test_url_of_a_busy_server(status: int, served: Any, client: Any) -> None:
    served.fail(URL_PATH, status=status, headers={"Retry-After": "9"}, times=1)
    served.fail(URL_PATH, status=status, times=2)
    path, pauses = client.run(fetch(served) + "print(pauses)").splitlines()
    assert Path(path).read_bytes() == CONTENT
    assert ast.literal_eval(pauses) == [9.0, 2.0, 4.0]


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_url_that_is_refused(status: int, served: Any, client: Any) -> None:
    served.fail(URL_PATH, status=status, times=9)
    assert f"refused: Cannot fetch {served.endpoint}{URL_PATH}: HTTP Error {status}" in client.run(fetch(served))
    assert len(served.downloads()) == 1


def test_url_two_processes_at_once_download_once(served: Any, client: Any) -> None:
    served.fail(URL_PATH, wait=1.5)
    client.setup = "pauses = []\n"  # the second waits for the first
    both = [client.start(fetch(served)) for _ in range(2)]
    outs = [process.communicate(timeout=60)[0].strip() for process in both]
    assert outs[0] == outs[1]
    assert Path(outs[0]).read_bytes() == CONTENT
    assert len(served.downloads()) == 1


def test_url_full_disk(served: Any, client: Any) -> None:
    assert "the disk is full" in client.run(FULL + fetch(served))
    assert not [path for path in client.home.rglob("*") if path.is_file() and path.stat().st_size >= 100_000]


def test_url_larger_than_the_disk(served: Any, client: Any) -> None:
    served.fail(URL_PATH, headers={"Content-Length": str(10**18)})
    assert "the disk is full (" in client.run(fetch(served))


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/model.safetensors",
        "ftp://example.com/model.safetensors",
        "file:///etc/passwd",
        "m.safetensors",
    ],
)
def test_url_that_is_not_https(url: str, hub: Any, client: Any) -> None:
    code = f"from zoo.pretrained.download import url_file\nurl_file({url!r}, {SHA256!r})"
    assert "expected an https address" in client.run(code)


def test_url_redirected_to_plain_http_elsewhere(served: Any, client: Any) -> None:
    served.fail(URL_PATH, status=302, headers={"Location": "http://example.com/model.safetensors"})
    assert "refused: http://example.com/model.safetensors: expected an https address" in client.run(fetch(served))


@pytest.mark.parametrize("path", ["/files/..", "/files/%2e%2e", "/files/", "/files/.hidden", "/files/a b"])
def test_url_whose_name_is_no_file_name(path: str, served: Any, client: Any) -> None:
    assert "its last part is no file name" in client.run(fetch(served, path=path))


def test_url_after_a_kill_is_continued(served: Any, client: Any) -> None:
    served.fail(URL_PATH, cut_after=100_000, hang=60.0)
    client.setup = "pauses = []\n"
    killed = client.start(fetch(served))
    part = client.home / "zoo" / "downloads" / SHA256 / f".{FILE}.part"
    deadline = time.monotonic() + 60
    while not (part.is_file() and part.stat().st_size):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    killed.kill()
    killed.communicate()
    have = part.stat().st_size
    assert 0 < have <= 100_000
    assert Path(client.run(fetch(served))).read_bytes() == CONTENT
    assert served.requests[-1][2]["Range"] == f"bytes={have}-"
