"""Small real image files, and tars of them."""

import io
import tarfile

import numpy as np


def pixels(seed=0, height=12, width=10):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(image=0, form="PNG", **options) -> bytes:
    """An array, a PIL image, or random pixels of a seed, as a file's bytes."""
    from PIL import Image

    if isinstance(image, int):
        image = pixels(image)
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def write_folder(folder, files):
    """Writes {path: bytes or text}; gives the folder."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def write_tar(path, files, mode="w"):
    """Writes {name: bytes, text, or a tarfile.TarInfo without content}; gives the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            if isinstance(content, tarfile.TarInfo):
                archive.addfile(content)
                continue
            content = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def classes(counts, prefix="", form="png"):
    """{path: bytes} of class folders with so many images each, all different."""
    seeds = iter(range(10_000))
    return {f"{prefix}{name}/{i:03d}.{form}": encoded(next(seeds), form.upper().replace("JPG", "JPEG"))
            for name, n in counts.items() for i in range(n)}
