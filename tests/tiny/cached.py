"""Folders under the name of a repository of the Hub, without a network."""

import shutil
from pathlib import Path
from typing import Any


def as_repository(folder: Path, cache: Path, name: str = "org/model") -> dict[str, Any]:
    """Puts a folder into a cache of the Hub; gives the arguments with which `from_pretrained(name)` finds it."""
    home = cache / f"models--{name.replace('/', '--')}"
    commit = "a" * 40
    shutil.copytree(folder, home / "snapshots" / commit)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(commit)
    return {"cache_dir": cache, "local_files_only": True}
