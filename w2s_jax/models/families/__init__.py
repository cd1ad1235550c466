"""The families, by `model_type` of config.json."""

import os
from pathlib import Path

from w2s_jax.errors import UserError, nearest
from w2s_jax.files import read_json
from w2s_jax.models.architecture import Architecture
from w2s_jax.models.families import bert, gemma, gpt2, llama, modernbert, neox, qwen1
from w2s_jax.models.families.family import Family
from w2s_jax.models.families.reader import Fields

FAMILIES: dict[str, Family] = {family.model_type: family for family in (
    gpt2.FAMILY, neox.FAMILY, *llama.FAMILIES, qwen1.FAMILY, *gemma.FAMILIES, *bert.FAMILIES, modernbert.FAMILY)}


def read_raw(folder: str | os.PathLike) -> dict:
    """What stands in `folder`/config.json. UserError: no such file, no JSON object, no model_type."""
    file = Path(folder) / "config.json"
    raw = read_json(file)
    if "model_type" not in raw:
        raise UserError(f"{file}: has no key model_type; expected one of {', '.join(FAMILIES)}")
    return raw


def read_config(folder: str | os.PathLike) -> Architecture:
    """The architecture in `folder`/config.json. UserError: no such file, not JSON, a family or a value that is not supported."""
    return parse(read_raw(folder), str(Path(folder) / "config.json"))


def parse(raw: dict, file: str) -> Architecture:
    """The architecture that a parsed config.json describes; `file` names it in errors. UserError as for `read_config`."""
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise UserError(f"{file}: model_type={family!r} is not supported{nearest(str(family), FAMILIES)}; expected one of "
                        f"{', '.join(FAMILIES)}")
    return FAMILIES[family].read(Fields(raw, file))


__all__ = ["FAMILIES", "Family", "parse", "read_config", "read_raw"]
