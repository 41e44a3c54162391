"""Imported before jaxnr: it hides torch, which jaxnr does not need, but which transformers would load where it is
installed, so that its memory would count as jaxnr's."""

import sys

sys.modules["torch"] = None  # pyright: ignore[reportArgumentType]
