"""What may be read of a folder that came from elsewhere: files that lie in it, and a configuration of plain values.

    path = inside(folder, "position.json")       # ValueError for a name or a link that leads out
    raw = written_config(folder)                 # config.yaml; ValueError for anything that would be looked up in this process

SECURITY.md says what is trusted. Known without torch. Left out: pickles (engine/mcore/safe_load.py, stream.py).
"""

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

CONFIG = "config.yaml"


def inside(folder: str | Path, name: str) -> Path:
    """A file of a folder. Raises ValueError for a name, or a link, that leads to another folder."""
    path = Path(folder) / name
    if Path(name).name != name or path.resolve().parent != Path(folder).resolve():
        raise ValueError(f"{name!r} lies outside {folder}; a checkpoint holds its files itself: copy them there in the place of links")
    return path


def written_config(folder: str | Path) -> dict[str, Any]:
    """config.yaml of a checkpoint or of a run, as plain Python.

    A run writes values alone. Raises ValueError for anything else, such as `${oc.env:NAME}`, which would be read of this process; OSError.
    """
    try:
        raw = OmegaConf.to_container(OmegaConf.load(inside(folder, CONFIG)))
    except (YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"{Path(folder) / CONFIG}: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{Path(folder) / CONFIG} holds no mapping of sections")
    _refuse_interpolations(raw, str(Path(folder) / CONFIG))
    return raw


def _refuse_interpolations(node, where: str) -> None:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        if any("${" in text for text in (key, value) if isinstance(text, str)):
            raise ValueError(f"{where} interpolates {key}={value!r}; write the value itself, as every run does")
        _refuse_interpolations(value, where)
