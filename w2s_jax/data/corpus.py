"""Text for pretraining: files of documents, and the pieces of tokens that they are cut into."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import zlib

import numpy as np

from w2s_jax.data import sources
from w2s_jax.errors import UserError

FORMATS = (".txt", ".jsonl")  # and either of them gzipped: .txt.gz, .jsonl.gz


@dataclasses.dataclass(frozen=True)
class Text:
    """Documents of a corpus, exactly as the files hold them.

    Attributes:
      documents: their text; nothing is stripped or joined.
      names: one a document, for messages: the file, and the row in a .jsonl.
      fingerprint: sha256 hex over the files' names and bytes.
      left_out: files of the folder that are not in one of the FORMATS.
    """

    documents: list[str]
    names: list[str]
    fingerprint: str
    left_out: list[str]


def read(path) -> Text:
    """A file, or every file of a folder and its subfolders (hidden ones apart), by name.

    A .txt is one document, a .jsonl one a row (column text).

    Raises:
      UserError: nothing there to read, a damaged .gz, text that is not UTF-8, a row without text; names the file and row.
    """
    from etils import epath

    path = epath.Path(path).expanduser()
    if not path.exists():
        raise UserError(f"corpus={path}: no such file or folder; expected 'world', or text in {', '.join(FORMATS)}, or these and .gz")
    files = sorted(_walk(path), key=str) if path.is_dir() else [path]
    chosen = [f for f in files if _format(f.name)]
    if not chosen:
        what = "holds no file" if path.is_dir() else "is no file"
        raise UserError(f"corpus={path}: {what} that ends in {', '.join(FORMATS)}, or one of these and .gz")
    documents, names, total = [], [], hashlib.sha256()
    for file in chosen:
        raw = _bytes(file)
        name = file.relative_to(path).as_posix() if path.is_dir() else file.name
        total.update(f"{name}\0{hashlib.sha256(raw).hexdigest()}\n".encode())
        if _format(file.name) == ".txt":
            documents.append(sources.decode(raw, str(file)))
            names.append(name)
            continue
        for number, row in enumerate(sources.parse_jsonl(raw, str(file)), 1):
            if not isinstance(row.get("text"), str):
                raise UserError(f"{file}, row {number}: expected a column text that holds a text, found {sorted(row) or 'no columns'}")
            documents.append(row["text"])
            names.append(f"{name} row {number}")
    if not any(documents):
        raise UserError(f"corpus={path}: {len(chosen)} files, all of them empty")
    left_out = [f.relative_to(path).as_posix() for f in files if not _format(f.name)]
    return Text(documents, names, total.hexdigest(), left_out)


def _walk(folder):
    """Files of a folder and its subfolders; hidden ones are none of the user's text."""
    for path in folder.iterdir():
        if not path.name.startswith("."):
            yield from _walk(path) if path.is_dir() else (path,)


def _format(name: str) -> str:
    name = name.removesuffix(".gz")
    return next((form for form in FORMATS if name.endswith(form)), "")


def _bytes(file) -> bytes:
    try:
        raw = file.read_bytes()
        return gzip.decompress(raw) if file.name.endswith(".gz") else raw
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{file}: truncated or damaged gzip file ({error})") from error
    except OSError as error:
        raise UserError(f"{file}: can't be read ({error.strerror or error})") from error


@dataclasses.dataclass(frozen=True)
class Pieces:
    """What a language model is trained on.

    Attributes:
      tokens: int32 token ids of each piece, 2 to `max_length` of them.
      document: number of the document that each piece comes from, int `[pieces]`.
      counts: documents; tokens (of all documents); cut (documents in more than one piece); pieces; empty and single
        (documents of no and of one token, in which there is nothing to predict: they are in no piece).
    """

    tokens: list[np.ndarray]
    document: np.ndarray
    counts: dict[str, int]


def cut(documents: list[np.ndarray], max_length: int) -> Pieces:
    """Cut token ids into pieces of at most `max_length` tokens.

    A document's pieces overlap by one token, so that every token but a document's first is predicted exactly once.
    """
    if max_length < 2:
        raise UserError(f"max_length={max_length}: expected 2 or more, for a next token to predict")
    tokens, document = [], []
    counts = {"documents": len(documents), "tokens": int(sum(map(len, documents))), "cut": 0, "pieces": 0, "empty": 0, "single": 0}
    for d, ids in enumerate(documents):
        if len(ids) < 2:
            counts["single" if len(ids) else "empty"] += 1
            continue
        starts = range(0, len(ids) - 1, max_length - 1)
        tokens += [ids[s:s + max_length] for s in starts] if len(starts) > 1 else [ids]
        document += [d] * len(starts)
        counts["cut"] += len(starts) > 1
    counts["pieces"] = len(tokens)
    return Pieces(tokens, np.array(document, np.int64), counts)


def hold_out(pieces: Pieces, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the pieces for training, in their order, and of the `n` held out.

    Held out are the last pieces once the documents are shuffled by `seed`: whole documents, and the end of one.

    Raises:
      UserError: fewer than half of the pieces would be left to train on.
    """
    if 2 * n > len(pieces.tokens):
        raise UserError(f"n_heldout={n}: the corpus has {len(pieces.tokens)} pieces, expected at most half of them to be held out")
    rank = np.random.default_rng(np.random.SeedSequence([seed, 0xC0B])).permutation(pieces.counts["documents"])
    order = np.argsort(rank[pieces.document], kind="stable")
    kept = len(order) - n
    return np.sort(order[:kept]), np.sort(order[kept:])
