"""One row's fields by name, checked and converted; what had to be mended is noted."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, TypeVar

from jaxnr.data.readers.report import Refused

_LAST_SECOND = 253_402_300_799
"""9999-12-31T23:59:59Z: a larger number cannot be unix seconds."""
_ISO_DATE = re.compile(r"\d{4}-\d\d-\d\d")
T = TypeVar("T")


class Fields:
    """A row's values by field name. Methods return one field or raise Refused; ``repairs`` names what they mended."""

    def __init__(self, values: Mapping[str, Any]):
        self.values = values
        self.repairs: list[str] = []

    def optional(self, name: str, read: Callable[[str], T]) -> T | None:
        """None where the field is missing, null or blank, else what ``read`` makes of it."""
        value = self.values.get(name)
        if value == "":
            self.repairs.append(f"blank {name} read as missing")
        return None if value is None or value == "" else read(name)

    def text(self, name: str) -> str:
        """A string, which may be empty."""
        return _text(name, self._present(name))

    def filled_text(self, name: str) -> str:
        """A string with something in it."""
        text = self.text(name)
        if not text.strip():
            raise Refused(f"blank {name}")
        return text

    def identifier(self, name: str) -> str:
        """A non-blank string; a whole number is mended to one."""
        return self._identifier(name, self._present(name))

    def identifiers(self, name: str) -> tuple[str, ...]:
        """A list of identifiers."""
        value = self._present(name)
        if not isinstance(value, list):
            raise Refused(f"{name} is not a list", repr(value)[:80])
        return tuple(self._identifier(name, item) for item in value)

    def number(self, name: str, most: float = sys.float_info.max) -> float:
        """A finite number from 0 to ``most``."""
        value = self._present(name)
        if not _is_number(value):
            raise Refused(f"{name} is not a number", repr(value)[:80])
        if not 0 <= value <= most:
            raise Refused(f"{name} is out of range", f"{str(value)[:80]}, expected 0 to {most:g}")
        return float(value)

    def whole_number(self, name: str, most: int) -> int:
        """A whole number from 0 to ``most``; 3.0 is one, because exporters make floats of columns with gaps."""
        value = self.number(name, most)
        if value != int(value):
            raise Refused(f"{name} is not a whole number", str(value))
        return int(value)

    def time(self, name: str) -> int:
        """UTC seconds, fractions cut off, from unix seconds or ISO 8601; milliseconds are mended to seconds."""
        value = self._present(name)
        seconds = _iso_seconds(name, value) if isinstance(value, str) else value
        if not _is_number(seconds):
            raise Refused(f"{name} is not a time", f"{repr(value)[:80]}, expected unix seconds or ISO 8601")
        if _LAST_SECOND < seconds <= 1000 * _LAST_SECOND:
            self.repairs.append(f"{name} in milliseconds")
            seconds //= 1000
        if not 0 <= seconds <= _LAST_SECOND:
            raise Refused(f"{name} is out of range", f"{repr(value)[:80]}, expected a time from 1970 to 9999")
        return int(seconds)

    def _present(self, name: str) -> Any:
        value = self.values.get(name)
        if value is None:
            raise Refused(f"no {name}")
        return value

    def _identifier(self, name: str, value: Any) -> str:
        if isinstance(value, int) and not isinstance(value, bool):
            if f"{name} as a number" not in self.repairs:
                self.repairs.append(f"{name} as a number")
            return str(value)
        text = _text(name, value)
        if not text.strip():
            raise Refused(f"blank {name}")
        return text


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise Refused(f"{name} is not text", repr(value)[:80])
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
        raise Refused(f"{name} is not valid Unicode", ascii(value)[:80]) from error
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _iso_seconds(name: str, value: str) -> float:
    try:
        if not _ISO_DATE.match(value):
            raise ValueError(value)
        moment = datetime.fromisoformat(value)
    except ValueError as error:
        raise Refused(f"{name} is not a time", f"{value[:80]!r}, expected unix seconds or ISO 8601") from error
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
