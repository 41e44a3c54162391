"""Making a folder the folder of one run, and of no other."""

from __future__ import annotations

from pathlib import Path

from jaxnr.config import Config, flatten, load_config, save_config
from jaxnr.errors import InputError


def claim(config: Config, out: Path, *, begin: bool, resume: bool) -> bool:
    """Makes ``out`` the folder of a run of ``config``; returns whether the run is new. Never overwrites anything.

    Stages that ``begin`` a run want a new folder, unless they ``resume``; the later ones want a run of the same config.
    Raises InputError where that is not so.
    """
    saved = out / "config.toml"
    try:
        if not saved.exists():
            if not begin:
                raise InputError(f"{out} holds no run; `jaxnr data CONFIG --out {out}` begins one.")
            if out.exists() and any(path.suffix != ".partial" for path in out.iterdir()):
                raise InputError(f"{out} is not empty and holds no run; give a new folder with --out.")
            save_config(config, saved)
            return True
    except OSError as error:
        raise InputError(f"{out} cannot be the folder of a run: {error.strerror}.") from None
    if begin and not resume:
        raise InputError(f"{out} already holds a run; go on with it by --resume, or give another folder with --out.")
    asked, before = flatten(config), flatten(load_config(saved))
    if changes := [f"`{key}` was {before[key]!r}, now {asked[key]!r}" for key in asked if asked[key] != before[key]]:
        raise InputError(f"{out} holds a run of another config: {'; '.join(changes)}. Give another folder with --out.")
    return False
