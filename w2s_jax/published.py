"""Published vision checkpoints by name: found where PyTorch keeps them, or downloaded to there, and checked.

The names are those of torchvision and torch.hub. Addresses: torchvision's models/alexnet.py and models/resnet.py (pytorch/vision;
`resnet50` is its IMAGENET1K_V1, `resnet50_v2` its IMAGENET1K_V2), hubconf.py of facebookresearch/dino, dinov2/hub/backbones.py and
README.md of facebookresearch/dinov2. torchvision writes the first eight hex digits of a file's sha256 into its name; Meta's files
have no published hash, of theirs the size alone is checked.

What is downloaded is a pickle to PyTorch; here `models.torchfile.TorchFile` reads it, and nothing runs it.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import NamedTuple

from w2s_jax.errors import UserError, nearest
from w2s_jax.progress import Progress, say

TORCHVISION = "https://download.pytorch.org/models"
META = "https://dl.fbaipublicfiles.com"
MIRROR = "W2S_CHECKPOINTS_URL"  # environment variable: http(s) folder that holds the same files, where the publishers cannot be reached
ATTEMPTS, PAUSE, TIMEOUT = 5, 2.0, 30.0  # a connection that breaks is taken up again; seconds between attempts, and of silence
CHUNK = 2**20  # bytes


class Published(NamedTuple):
    """Where a checkpoint is published; `sha256`: its first hex digits, "" where they are not known."""

    url: str
    sha256: str = ""

    @property
    def file(self) -> str:
        return self.url.rsplit("/", 1)[1]


def _dino(name: str) -> Published:
    return Published(f"{META}/dino/dino_{name}_pretrain/dino_{name}_pretrain.pth")


def _dinov2(name: str, registers: str = "") -> Published:
    return Published(f"{META}/dinov2/dinov2_{name}/dinov2_{name}{registers}_pretrain.pth")


PUBLISHED = {
    "alexnet": Published(f"{TORCHVISION}/alexnet-owt-7be5be79.pth", "7be5be79"),
    "resnet50": Published(f"{TORCHVISION}/resnet50-0676ba61.pth", "0676ba61"),
    "resnet50_v2": Published(f"{TORCHVISION}/resnet50-11ad3fa6.pth", "11ad3fa6"),
    "dino_resnet50": _dino("resnet50"),
    "dino_vits16": _dino("deitsmall16"),
    "dino_vits8": _dino("deitsmall8"),
    "dino_vitb16": _dino("vitbase16"),
    "dino_vitb8": _dino("vitbase8"),
    "dinov2_vits14": _dinov2("vits14"),
    "dinov2_vitb14": _dinov2("vitb14"),
    "dinov2_vitl14": _dinov2("vitl14"),
    "dinov2_vits14_reg": _dinov2("vits14", "_reg4"),
    "dinov2_vitb14_reg": _dinov2("vitb14", "_reg4"),
    "dinov2_vitl14_reg": _dinov2("vitl14", "_reg4"),
}


def folder() -> Path:
    """Where PyTorch keeps downloaded checkpoints: $TORCH_HOME/hub/checkpoints, by default ~/.cache/torch/hub/checkpoints."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("TORCH_HOME") or os.path.join(cache, "torch")).expanduser() / "hub" / "checkpoints"


def fetch(name: str) -> Path:
    """The file of the published checkpoint `name` (a key of PUBLISHED), downloaded into `folder()` unless it is there.

    A download that broke is taken up where it ended, by this call or a later one, if the server's file is still the same; a file
    appears under its name when it is whole and its size and hash are right. Several processes may ask at once: one downloads.

    Raises:
      UserError: an unknown name, no network (with the address and where to put the file by hand), the server's refusal, a
        connection that keeps breaking, a wrong hash (also of a file that was there), a folder that cannot be written.
    """
    import filelock

    if name not in PUBLISHED:
        raise UserError(f"{name!r}: not a published checkpoint; expected one of {', '.join(PUBLISHED)}{nearest(name, PUBLISHED)}")
    entry, place = PUBLISHED[name], folder()
    file = place / entry.file
    if not file.exists():
        url = _address(entry)
        try:
            place.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(place / f".{entry.file}.lock"):
                if not file.exists():
                    _download(name, url, file, entry.sha256)
                    return file
        except OSError as error:
            raise UserError(f"{file}: cannot be written ({error}); set TORCH_HOME to another folder") from None
    if not _right(file, entry.sha256):
        raise UserError(f"{file}: its sha256 does not begin with {entry.sha256}: damaged, or not {name}'s published file; remove it")
    return file


def _address(entry: Published) -> str:
    mirror = os.environ.get(MIRROR, "")
    if not mirror:
        return entry.url
    if urllib.parse.urlsplit(mirror).scheme not in ("http", "https"):
        raise UserError(f"{MIRROR}={mirror}: expected the address of a folder, http://... or https://...")
    return f"{mirror.rstrip('/')}/{entry.file}"


def _right(file: Path, sha256: str) -> bool:
    if not sha256:
        return True
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest().startswith(sha256)


class _Broken(Exception):
    """The connection broke: what has come is kept."""


def _download(name: str, url: str, file: Path, sha256: str) -> None:
    for attempt in range(1, ATTEMPTS + 1):
        try:
            part = _whole(name, url, file)
            break
        except _Broken as error:
            if attempt == ATTEMPTS:
                raise UserError(f"{url}: the connection broke {ATTEMPTS} times ({error}); start again to go on from there") from None
            say(f"{url}: the connection broke ({error}); trying again")
            time.sleep(PAUSE)
    if not _right(part, sha256):
        part.unlink()
        raise UserError(f"{url}: what came has another sha256 than {sha256}...; expected {name}'s published file (is it a mirror's, or a "
                        "page that asks for a login?)")
    os.replace(part, file)
    for other in file.parent.glob(f".{file.name}.*.part"):  # begun before the server's file changed
        other.unlink(missing_ok=True)


def _open(url: str, file: Path, headers: dict):
    """The server's answer. UserError where there is none, or a refusal."""
    by_hand = f"; download it elsewhere and put it at {file}"
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers={"User-Agent": "w2s_jax", **headers}), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        raise UserError(f"{url}: the server answers {error.code} {error.reason}{by_hand}") from None
    except (OSError, http.client.HTTPException, ValueError) as error:  # URLError is an OSError
        reason = " ".join(str(getattr(error, "reason", error)).split())[:200]
        raise UserError(f"{url}: no answer ({reason}){by_hand}") from None


def _whole(name: str, url: str, file: Path) -> Path:
    """Downloads what is missing of a file, into one beside it that is named after the server's version; gives that one, complete."""
    answer = _open(url, file, {})
    try:
        total = int(answer.headers.get("Content-Length", ""))
    except ValueError:
        answer.close()
        raise UserError(f"{url}: the server does not say how large the file is; download it elsewhere and put it at {file}") from None
    version = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
    tag = hashlib.sha256(f"{url} {version} {total}".encode()).hexdigest()[:12]
    part = file.with_name(f".{file.name}.{tag}.part")
    have = part.stat().st_size if part.exists() and version and not version.startswith("W/") else 0  # a weak tag names no bytes
    if 0 < have <= total:
        answer.close()
        if have == total:
            return part
        answer = _open(url, file, {"Range": f"bytes={have}-", "If-Range": version})
        if answer.status != 206 or not answer.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            have = 0  # the server sends all of it
    else:
        have = 0
    say(f"{url}: {total / 1e6:,.0f} MB to {file.parent}{f', {have / 1e6:,.0f} MB of it are there' if have else ''}")
    with answer, open(part, "ab" if have else "wb") as out, Progress(max(total // CHUNK, 1), have // CHUNK, name, "MiB") as bar:
        while have < total:
            try:
                raw = answer.read(min(CHUNK, total - have))
            except (OSError, http.client.HTTPException) as error:
                raise _Broken(f"{type(error).__name__} after {have} of {total} bytes") from None
            if not raw:
                raise _Broken(f"after {have} of {total} bytes")
            out.write(raw)
            have += len(raw)
            bar.update(have // CHUNK - bar.count)
    return part
