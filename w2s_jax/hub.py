"""Model folders in Hugging Face's format, on disk or on the hub: where they are, what is in them, their tokenizer.

Weights are only ever read from safetensors: nothing here unpickles or runs a checkpoint's code.
"""

import base64
import hashlib
import json
import os
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from w2s_jax import config as configs
from w2s_jax import distributed
from w2s_jax.errors import UserError
from w2s_jax.files import read_json

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.tiktoken"]  # of a hub repository; nothing in its subfolders
UNWANTED = ["*/*", "consolidated*"]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
                   "merges.txt", "vocab.txt", "*.model", "*.tiktoken")
TEXTS_AT_ONCE = 4096
QWEN_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


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


def config_json(model: str, revision: str = "main") -> tuple[dict, str]:
    """A model's config.json without its weights, and where it is from: a local folder, the hub or its cache ("hub:id@commit"), else the
    published fields that ship with this package (configs/shapes).

    UserError: none of these has it.
    """
    if is_local(model):
        return read_json(Path(os.path.expanduser(model)) / "config.json"), "folder"
    try:
        folder = _download(model, revision, ("config.json",))
        return read_json(Path(folder.path) / "config.json"), f"hub:{model}@{folder.commit}"
    except UserError as error:
        known = {str(f.relative_to(shapes()).with_suffix("")): f for f in shapes().rglob("*.json")}
        if (file := known.get(model.removeprefix("openai-community/"))) is None:
            raise UserError(f"{error}; and configs/shapes has only {', '.join(sorted(known))}") from None
        return read_json(file), "configs/shapes"


def config_jsons(config) -> dict[str, tuple[dict, str]]:
    """`config_json` of every model that a plan's config names, by name."""
    return {name: config_json(name, config.revision or "main") for name in config.models or (config.model,)}


def shapes() -> Path:
    """The folder of published config.json fields."""
    return configs.folder() / "shapes"


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
        raise UserError(f"tokenizer={tokenizer}: holds no tokenizer; expected tokenizer.json, vocab.json and merges.txt, or *.tiktoken")
    return folder


def _check(model: str, path: Path) -> None:
    if not (path / "config.json").is_file():
        raise UserError(f"model={model}: has no config.json; expected a model in Hugging Face's format")
    if not any((path / name).is_file() for name in WEIGHTS):
        pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in path.glob(pattern))
        found = f" but {pickled[0]}, a pickle, which is not read" if pickled else ""
        raise UserError(f"model={model}: has no {WEIGHTS[0]} or {WEIGHTS[1]}{found}; convert it with transformers: "
                        f"AutoModelForCausalLM.from_pretrained({model!r}).save_pretrained('FOLDER') (AutoModel for an encoder), "
                        "its tokenizer likewise, and give model=FOLDER")


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
    patterns = ("config.json", "preprocessor_config.json", *TOKENIZER_FILES, "*.safetensors", WEIGHTS[1])
    return sorted({f for pattern in patterns for f in path.glob(pattern) if f.is_file()}, key=lambda f: f.name)


def fingerprint(folder: str | os.PathLike) -> str:
    """sha256 (hex) over the names and bytes of config.json, tokenizer files and safetensors; where they lie plays no part.

    Of several processes process 0 reads the bytes. UserError where the files of another have other names or sizes.
    """
    files = _files(Path(folder))
    sizes = {file.name: file.stat().st_size for file in files}

    def read() -> list:
        total = hashlib.sha256()
        for file in files:
            total.update(f"{file.name}\0{fingerprint_file(file)}\n".encode())
        return [sizes, total.hexdigest()]

    there, found = distributed.once(read, "fingerprint")
    if there != sizes:
        file = min(there.keys() ^ sizes.keys() or [name for name in sizes if sizes[name] != there[name]])
        raise UserError(f"model={os.fspath(folder)}: {file} has {sizes.get(file, 'no')} bytes here, {there.get(file, 'no')} for process 0; "
                        "expected the same files")
    return found


def fingerprint_file(file: str | os.PathLike) -> str:
    """sha256 (hex) over the bytes of one file."""
    file = Path(file)
    stat = file.stat()
    return _sha256(str(file.resolve()), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=4096)
def _sha256(path: str, size: int, modified: int) -> str:
    """Of one file; a sweep asks for the same folders many times."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tokenize(folder: str | os.PathLike, texts, special: bool = False) -> list[np.ndarray]:
    """Token ids of each text, int32 [tokens], without truncation or padding; an empty text gives an empty array.

    `special`: with the tokens that the model's own tokenizer puts around a text ([CLS] ... [SEP], <s> ...), as the references
    fine-tune on them. UserError: the folder has no tokenizer. tokenizer.json is read by the library that transformers' fast
    tokenizers wrap (a few ms instead of the seconds that importing transformers takes); older folders (vocab.json and
    merges.txt, *.model) go through AutoTokenizer, Qwen's first version through its *.tiktoken file.
    """
    encode = _encoder(str(Path(folder)))
    texts = list(texts)
    out = []
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        for ids, added in encode(texts[start : start + TEXTS_AT_ONCE], special):
            out.append(np.asarray([] if all(added) else ids, np.int32))
    return out


def closing_tokens(folder: str | os.PathLike) -> int:
    """How many special tokens the tokenizer puts behind a text; a text that is cut keeps them."""
    [(_, added)] = _encoder(str(Path(folder)))(["a"], True)
    return next((i for i, special in enumerate(reversed(added)) if not special), 0)


def single_token(folder: str | os.PathLike, text: str, key: str = "answers") -> int:
    """The id of the one token that `text` is for a folder's tokenizer.

    That is how it is cut when it stands alone, or, where a tokenizer marks the start of a text by a token of its own
    (SentencePiece's "\u2581"), the vocabulary's entry of exactly that name. UserError, naming the tokens: it is none or several, or
    is unknown; `key` names the config's key.
    """
    [ids] = tokenize(folder, [text])
    fast = _fast(Path(folder))
    slow = None if fast is not None else _slow(str(folder))
    entry = fast.token_to_id(text) if fast is not None else slow.get_vocab().get(text)
    if len(ids) > 1 and entry is not None:
        return int(entry)
    names = [fast.id_to_token(int(i)) for i in ids] if fast is not None else slow.convert_ids_to_tokens(ids.tolist())
    unknown = getattr(fast.model, "unk_token", None) if fast is not None else slow.unk_token
    if len(ids) != 1 or names[0] == unknown != text:
        found = f"the tokens {', '.join(map(repr, names))}" if len(ids) else "no token"
        raise UserError(f"{key}: {text!r} is {found} to the tokenizer in {folder}; expected a single token that it knows")
    return int(ids[0])


def vocabulary_size(folder: str | os.PathLike) -> int:
    """Token ids of the folder's tokenizer: the largest one + 1, added tokens included. UserError as for `tokenize`."""
    if (fast := _fast(Path(folder))) is not None:
        return max(fast.get_vocab(with_added_tokens=True).values()) + 1
    return max(_slow(str(folder)).get_vocab().values()) + 1


def tiktoken_as_json(folder: str | os.PathLike) -> dict[str, str] | None:
    """Files that make a folder's *.tiktoken a tokenizer that transformers reads, by name; None where there is none, or no need."""
    if (Path(folder) / "tokenizer.json").is_file() or not list(Path(folder).glob("*.tiktoken")):
        return None
    end = "<|endoftext|>"
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "pad_token": end, "clean_up_tokenization_spaces": False}
    return {"tokenizer.json": _fast(Path(folder)).to_str(), "tokenizer_config.json": json.dumps(config, indent=1) + "\n"}


def _fast(folder: Path):
    """The tokenizers.Tokenizer of a folder, or None where only transformers can read its files."""
    from tokenizers import Tokenizer

    file = folder / "tokenizer.json"
    if not file.is_file():
        found = sorted(folder.glob("*.tiktoken"))
        return _tiktoken(found[0]) if found else None
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{file}: not a tokenizer ({error})") from None


def _tiktoken(file: Path):
    """Qwen's first tokenizer, from its ranks of byte sequences; the rest stands in its remote code, which is never run.

    Pattern, NFC and the 208 special tokens as in Qwen/Qwen-7B's tokenization_qwen.py.
    """
    from tokenizers import normalizers
    from transformers.convert_slow_tokenizer import TikTokenConverter

    ranks = {}
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise UserError(f"{file}, line {number}: expected a byte sequence in base64 and its rank") from None
    if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([b]) not in ranks for b in range(256)):
        raise UserError(f"{file}: expected ranks from 0 without a gap, all 256 bytes among them")

    class Converter(TikTokenConverter):
        @staticmethod
        def load_tiktoken_bpe(_):
            return ranks

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205))]
    tokenizer = Converter(str(file), pattern=QWEN_PATTERN, extra_special_tokens=special).converted()
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


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
    """texts, special -> for each text its token ids, and which of them are added around it (1) or the text's own (0)."""
    fast = _fast(Path(folder))
    if fast is not None:
        fast.no_truncation()
        fast.no_padding()
        return lambda texts, special: [(e.ids, _added(e)) for e in fast.encode_batch(texts, add_special_tokens=special)]
    slow = _slow(folder)

    def encode(texts, special):
        both = slow(texts, add_special_tokens=special, return_special_tokens_mask=True, verbose=False)
        own = slow(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return [(ids, mask if own_ids else [1]) for ids, mask, own_ids in zip(both["input_ids"], both["special_tokens_mask"], own)]

    return encode


def _added(encoding) -> list[int]:
    # A special token that stands in the text itself has a place there; one that is put around it has none.
    return [int(special and start == end) for special, (start, end) in zip(encoding.special_tokens_mask, encoding.offsets)]
