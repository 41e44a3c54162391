"""R_struct: does the output keep to the format?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxnr.prompting.output import ParsedList


def structure(lists: Sequence[Sequence[ParsedList]]) -> np.ndarray:
    """valid_BG, 1 or 0: the parser named no problem (paper, R_struct: binary and rule-based)."""
    return np.array([[parsed.problem is None for parsed in row] for row in lists], np.float32)
