"""Published checkpoints by name, from a real server on this machine."""

import hashlib
import http.server
import threading
from pathlib import Path

import numpy as np
import pytest

from w2s_jax import published
from w2s_jax.errors import UserError

CONTENT = np.random.default_rng(0).bytes(3 * 2**20 + 12345)
NAME = "alexnet"


class Server(http.server.ThreadingHTTPServer):
    """Serves CONTENT under every name, as it is told: what it does stands in its fields."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.tag, self.cuts, self.ranges, self.status, self.sized, self.asked = CONTENT, '"one"', [], True, 200, True, []

    url = property(lambda self: f"http://127.0.0.1:{self.server_port}/files")


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        s = self.server
        s.asked.append((self.path, self.headers["Range"]))
        if s.status != 200:
            return self.send_error(s.status)
        start, stop = 0, s.cuts.pop(0) if s.cuts else None
        if s.ranges and self.headers["Range"] and self.headers["If-Range"] == s.tag:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(s.content) - 1}/{len(s.content)}")
        if s.sized:
            self.send_header("Content-Length", str(len(s.content) - start))
        if s.tag:
            self.send_header("ETag", s.tag)
        self.end_headers()
        try:
            self.wfile.write(s.content[start:stop])
        except OSError:  # the client asks only for the headers first
            pass

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    made = Server()
    threading.Thread(target=made.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv(published.MIRROR, made.url)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(published, "PAUSE", 0.01)
    entry = published.PUBLISHED[NAME]._replace(sha256=hashlib.sha256(CONTENT).hexdigest()[:8])
    monkeypatch.setitem(published.PUBLISHED, NAME, entry)
    yield made
    made.shutdown()
    made.server_close()


def left(file: Path) -> list[str]:
    return sorted(p.name for p in file.parent.iterdir() if not p.name.endswith(".lock"))


def test_the_table():
    assert len({p.file for p in published.PUBLISHED.values()}) == len(published.PUBLISHED) == 14
    for entry in published.PUBLISHED.values():
        assert entry.url.startswith("https://") and entry.url.endswith(".pth") and entry.sha256 in entry.file
    assert published.PUBLISHED["dino_vitb8"].url == "https://dl.fbaipublicfiles.com/dino/dino_vitbase8_pretrain/dino_vitbase8_pretrain.pth"
    assert published.PUBLISHED["dinov2_vits14_reg"].url.endswith("/dinov2/dinov2_vits14/dinov2_vits14_reg4_pretrain.pth")


def test_torchs_own_folder(monkeypatch):
    torch = pytest.importorskip("torch")

    for home, cache in (("/a/b", None), (None, "/c"), (None, None)):
        for key, value in (("TORCH_HOME", home), ("XDG_CACHE_HOME", cache)):
            monkeypatch.setenv(key, value) if value else monkeypatch.delenv(key, raising=False)
        assert str(published.folder()) == f"{torch.hub.get_dir()}/checkpoints"


def test_downloaded_once(server, tmp_path, capsys):
    file = published.fetch(NAME)
    assert file == tmp_path / "torch/hub/checkpoints/alexnet-owt-7be5be79.pth" and file.read_bytes() == CONTENT
    assert "3 MB to" in capsys.readouterr().err and left(file) == [file.name]
    assert published.fetch(NAME) == file and [path for path, _ in server.asked] == [f"/files/{file.name}"]


def test_a_connection_that_breaks_is_taken_up(server):
    server.cuts = [1_000_000, None, 2_500_000]  # each new attempt asks which version the server has, then for the rest
    file = published.fetch(NAME)
    assert file.read_bytes() == CONTENT and left(file) == [file.name]
    assert [r for _, r in server.asked] == [None, None, "bytes=1000000-", None, "bytes=2500000-"]


@pytest.mark.parametrize("change", ["nothing", "content", "no ranges", "no tag", "weak tag"])
def test_a_later_call_goes_on(server, monkeypatch, change):
    if change in ("no tag", "weak tag"):
        server.tag = "" if change == "no tag" else 'W/"one"'
    monkeypatch.setattr(published, "ATTEMPTS", 1)
    server.cuts = [1_000_000]
    with pytest.raises(UserError, match="after 1000000 of 3158073 bytes.*start again to go on"):
        published.fetch(NAME)
    place = published.folder()
    assert [p.stat().st_size for p in place.glob(".*.part")] == [1_000_000] and not list(place.glob("*.pth"))
    server.asked.clear()
    if change == "content":
        server.content, server.tag = CONTENT[::-1], '"two"'
        entry = published.PUBLISHED[NAME]._replace(sha256=hashlib.sha256(server.content).hexdigest()[:8])
        monkeypatch.setitem(published.PUBLISHED, NAME, entry)
    server.ranges = change != "no ranges"
    file = published.fetch(NAME)
    assert file.read_bytes() == server.content and left(file) == [file.name]
    asked = [r for _, r in server.asked if r]
    assert asked == (["bytes=1000000-"] if change in ("nothing", "no ranges") else [])


def test_complete_but_not_yet_renamed(server, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(published.os, "replace", killed)
        published.fetch(NAME)
    file = published.fetch(NAME)
    assert file.read_bytes() == CONTENT and left(file) == [file.name]


def test_a_wrong_hash(server, monkeypatch):
    server.content = CONTENT[:-1] + bytes([CONTENT[-1] ^ 1])
    with pytest.raises(UserError, match="has another sha256 than"):
        published.fetch(NAME)
    assert left(published.folder() / "x") == []
    file = published.folder() / published.PUBLISHED[NAME].file
    file.write_bytes(server.content)  # as if it had been put there by hand
    with pytest.raises(UserError, match=f"{file}: its sha256 does not begin with .*; remove it"):
        published.fetch(NAME)


def test_refusals(server, monkeypatch, tmp_path):
    place = published.folder() / published.PUBLISHED[NAME].file
    with pytest.raises(UserError, match="'alexnt': not a published checkpoint.*did you mean 'alexnet'"):
        published.fetch("alexnt")
    server.status = 404
    with pytest.raises(UserError, match=f"{server.url}/.*: the server answers 404 Not Found; download it elsewhere and put it at {place}"):
        published.fetch(NAME)
    server.status, server.sized = 200, False
    with pytest.raises(UserError, match="does not say how large"):
        published.fetch(NAME)
    monkeypatch.setenv(published.MIRROR, "http://127.0.0.1:1/files")
    with pytest.raises(UserError, match=f"http://127.0.0.1:1/files/.*: no answer .*put it at {place}"):
        published.fetch(NAME)
    monkeypatch.setenv(published.MIRROR, "file:///etc")
    with pytest.raises(UserError, match=f"{published.MIRROR}=file:///etc: expected the address of a folder"):
        published.fetch(NAME)
    assert left(place) == []
    (tmp_path / "a file").touch()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "a file"))
    monkeypatch.setenv(published.MIRROR, server.url)
    with pytest.raises(UserError, match="cannot be written .*set TORCH_HOME"):
        published.fetch(NAME)


def test_several_at_once(server):
    found = []
    threads = [threading.Thread(target=lambda: found.append(published.fetch(NAME))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len(server.asked) == 1 and found[0].read_bytes() == CONTENT
