"""One stage of the tiny run by the real command, in a process that kill_and_resume.py kills: FOLDER STAGE."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tiny_run import tiny_surroundings

from jaxnr import cli

if __name__ == "__main__":
    folder, stage = Path(sys.argv[1]), sys.argv[2]
    sys.argv = ["jaxnr", stage, str(folder / "config.toml"), "--out", str(folder), "--resume"]
    with tiny_surroundings(folder.parent):
        cli.main()
