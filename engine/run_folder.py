"""Where things lie in a run's folder, known without torch: the checkpoints and the configuration that wrote them."""

from pathlib import Path


def find(path: str | Path) -> Path | None:
    """The checkpoint folder that `path` means: itself, or the newest complete one below it; None if there is none."""
    path = Path(path)
    if (path / "metadata.json").is_file():
        return path
    if (path / "checkpoints").is_dir():
        path = path / "checkpoints"
    folders = sorted(f for f in path.glob("iter_*") if f.suffix == "" and (f / "metadata.json").is_file()) if path.is_dir() else []
    return folders[-1] if folders else None
