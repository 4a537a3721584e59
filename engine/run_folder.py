"""Where things lie in a run's folder, known without torch: the checkpoints and the configuration that wrote them.

A checkpoint may come from elsewhere, so nothing in it leads out of its folder or into this process (SECURITY.md).
"""

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

CONFIG = "config.yaml"


def find(path: str | Path) -> Path | None:
    """The checkpoint folder that `path` means: itself, or the newest complete one below it; None if there is none."""
    path = Path(path)
    if (path / "metadata.json").is_file():
        return path
    if (path / "checkpoints").is_dir():
        path = path / "checkpoints"
    folders = sorted(f for f in path.glob("iter_*") if f.suffix == "" and (f / "metadata.json").is_file()) if path.is_dir() else []
    return folders[-1] if folders else None


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
