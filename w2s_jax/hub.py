"""Model folders in Hugging Face's format, on disk or on the hub: where they are, what is in them, their tokenizer.

Weights are only ever read from safetensors: nothing here unpickles or runs a checkpoint's code.
"""

import hashlib
import os
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from w2s_jax.errors import UserError

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
WANTED = ["*.json", "*.safetensors", "*.model", "*.txt"]  # of a hub repository; nothing in its subfolders
UNWANTED = ["*/*", "consolidated*"]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
                   "merges.txt", "vocab.txt", "*.model")
TEXTS_AT_ONCE = 4096


class Folder(NamedTuple):
    """A model on this machine: `path`, and the hub's commit hash ("" for a folder that did not come from the hub)."""

    path: str
    commit: str = ""

    def __fspath__(self) -> str:
        return self.path


def is_local(model: str) -> bool:
    """True where `model` can only be a folder of this machine, or is one."""
    return os.path.isdir(os.path.expanduser(model)) or model.startswith(("/", ".", "~"))


def resolve(model: str, revision: str = "main") -> Folder:
    """The folder of `model`: a local folder (checked), or a hub id, downloaded at `revision` unless it is in the cache.

    UserError: a path that does not exist, no config.json, no safetensors, an id or a revision that the hub does not know,
    no network and not in the cache.
    """
    model = str(model)
    if is_local(model):
        path = os.path.expanduser(model)
        if not os.path.isdir(path):
            raise UserError(f"model={model}: no such folder")
        folder = Folder(os.path.abspath(path))
    else:
        folder = _download(model, revision)
    _check(model, Path(folder.path))
    return folder


def resolve_tokenizer(tokenizer: str, revision: str = "main") -> Folder:
    """The folder of a tokenizer: a local folder, or a hub id, of which only the tokenizer's files are downloaded.

    UserError: as for `resolve`; a folder without tokenizer files.
    """
    if is_local(tokenizer):
        folder = Folder(os.path.abspath(os.path.expanduser(tokenizer)))
        if not os.path.isdir(folder.path):
            raise UserError(f"tokenizer={tokenizer}: no such folder")
    else:
        folder = _download(tokenizer, revision, ["config.json", *TOKENIZER_FILES])
    if not any(f for pattern in TOKENIZER_FILES for f in Path(folder.path).glob(pattern)):
        raise UserError(f"tokenizer={tokenizer}: holds no tokenizer; expected tokenizer.json, or vocab.json and merges.txt")
    return folder


def _check(model: str, path: Path) -> None:
    if not (path / "config.json").is_file():
        raise UserError(f"model={model}: has no config.json; expected a model in Hugging Face's format")
    if not any((path / name).is_file() for name in WEIGHTS):
        pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in path.glob(pattern))
        found = f" but {pickled[0]}, a pickle, which is not read" if pickled else ""
        raise UserError(f"model={model}: has no {WEIGHTS[0]} or {WEIGHTS[1]}{found}; convert it with transformers: "
                        f"AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)")


def _download(model: str, revision: str, wanted=tuple(WANTED)) -> Folder:
    from huggingface_hub import errors, snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    try:
        path = snapshot_download(model, revision=revision, allow_patterns=list(wanted), ignore_patterns=UNWANTED)
    except errors.HFValidationError:
        raise UserError(f"model={model}: neither a folder here nor the form of a hub id (owner/name)") from None
    except errors.RevisionNotFoundError:
        raise UserError(f"revision={revision}: the hub's {model} has no such branch, tag or commit") from None
    except errors.GatedRepoError:
        raise UserError(f"model={model}: gated on the hub; accept its terms there and log in (hf auth login)") from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"model={model}: no such folder here, and no such model on the hub (or a private one)") from None
    except Exception as error:  # offline, a proxy, a full disk, ...: the HTTP library under huggingface_hub differs by version
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"model={model}: no such folder here, and not to be had from the hub or its cache ({reason[:200]})") from None
    return Folder(path, Path(path).name)  # a snapshot's folder is named by its commit


def _files(path: Path) -> list[Path]:
    """The files that determine a model and its tokens, by name."""
    patterns = ("config.json", *TOKENIZER_FILES, "*.safetensors", WEIGHTS[1])
    return sorted({f for pattern in patterns for f in path.glob(pattern) if f.is_file()}, key=lambda f: f.name)


def fingerprint(folder: str | os.PathLike) -> str:
    """sha256 (hex) over the names and bytes of config.json, tokenizer files and safetensors; where they lie plays no part."""
    total = hashlib.sha256()
    for file in _files(Path(folder)):
        stat = file.stat()
        digest = _sha256(str(file.resolve()), stat.st_size, stat.st_mtime_ns)
        total.update(f"{file.name}\0{digest}\n".encode())
    return total.hexdigest()


@lru_cache(maxsize=4096)
def _sha256(path: str, size: int, modified: int) -> str:
    """Of one file; a sweep asks for the same folders many times."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tokenize(folder: str | os.PathLike, texts) -> list[np.ndarray]:
    """Token ids of each text, int32 [tokens], without added special tokens, truncation or padding; an empty text gives an empty array.

    UserError: the folder has no tokenizer. tokenizer.json is read by the library that transformers' fast tokenizers
    wrap (a few ms instead of the seconds that importing transformers takes); older folders (vocab.json and merges.txt,
    *.model) go through AutoTokenizer.
    """
    encode = _encoder(str(Path(folder)))
    texts = list(texts)
    ids = []
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        ids += [np.asarray(t, np.int32) for t in encode(texts[start : start + TEXTS_AT_ONCE])]
    return ids


def vocabulary_size(folder: str | os.PathLike) -> int:
    """Token ids of the folder's tokenizer: the largest one + 1, added tokens included. UserError as for `tokenize`."""
    file = Path(folder) / "tokenizer.json"
    if file.is_file():
        return max(_fast(file).get_vocab(with_added_tokens=True).values()) + 1
    return max(_slow(str(folder)).get_vocab().values()) + 1


def _fast(file: Path):
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{file}: not a tokenizer ({error})") from None


def _slow(folder: str):
    if not any(f for pattern in TOKENIZER_FILES for f in Path(folder).glob(pattern)):
        raise UserError(f"{folder}: has no tokenizer (tokenizer.json); give input_ids, or a model folder with one")
    from transformers import AutoTokenizer, logging

    logging.set_verbosity_error()
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise UserError(f"{folder}: the tokenizer cannot be read ({type(error).__name__}: {error})") from None


@lru_cache(maxsize=8)
def _encoder(folder: str):
    file = Path(folder) / "tokenizer.json"
    if file.is_file():
        tokenizer = _fast(file)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return lambda texts: [e.ids for e in tokenizer.encode_batch(texts, add_special_tokens=False)]
    slow = _slow(folder)
    return lambda texts: slow(texts, add_special_tokens=False, verbose=False)["input_ids"]
