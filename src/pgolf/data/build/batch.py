"""A batch of documents as a source holds them, and the text of each.

A source is read in batches of about a megabyte that are not parsed yet, so that the process that reads stays ahead of
those that tokenise.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pgolf.errors import UsageError


@dataclass(frozen=True)
class Batch:
    """Consecutive documents of one source."""

    where: str
    """File or hub name, for messages."""
    unit: str
    """What a document is there: "line", "row" or "document"."""
    first: int
    """Number of the first document in its source, from 1."""
    documents: list[Any]
    """Their texts as str or bytes (anything else is an error of that document), or lines of JSON."""
    cost: int
    """Bytes read for it (0 where that is unknown)."""
    is_json: bool = False
    """Whether a document is a line of JSON."""

    def texts(self, field: str, skip_bad: bool = False) -> Iterator[tuple[str, str | None]]:
        """Yield (place, text) of each document. Raises UsageError, with its place, for one that has no text.

        With `skip_bad` the text of such a document is None instead.
        """
        for number, document in enumerate(self.documents, self.first):
            place = f"{self.where}: {self.unit} {number}"
            try:
                yield place, (_json_text if self.is_json else _text)(document, field, place)
            except UsageError:
                if not skip_bad:
                    raise
                yield place, None

    def slice(self, start: int, stop: int | None = None) -> "Batch":
        """Documents `start` to `stop` of the batch."""
        return replace(self, first=self.first + start, documents=self.documents[start:stop])


def missing_field(place: str, field: str, fields: Sequence[str]) -> str:
    """The sentence for documents without the field `field`."""
    return f"{place}: no field {field!r} among {listed(fields) or 'none'}; name one of them with --field"


def listed(names: Sequence[str]) -> str:
    """The first twelve names."""
    return ", ".join(map(str, names[:12])) + (", ..." if len(names) > 12 else "")


def first_line(error: BaseException) -> str:
    """The first line of a library's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _json_text(line: bytes, field: str, place: str) -> str:
    if not line.strip():
        return ""
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise UsageError(f"{place}: byte {error.start} is not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{place}: not valid JSON ({first_line(error)}); each line must be one JSON object") from None
    if not isinstance(value, dict):
        raise UsageError(
            f"{place}: not a JSON object; each line must be one, such as {{{json.dumps(field, allow_nan=False)}: ...}}"
        )
    if field not in value:
        raise UsageError(missing_field(place, field, list(value)))
    return _text(value[field], field, place)


def _text(value: Any, field: str, place: str) -> str:
    try:
        text = value.decode() if isinstance(value, bytes) else value
        if not isinstance(text, str):
            what = "null" if value is None else type(value).__name__
            raise UsageError(f"{place}: field {field!r} holds {what}, not a string")
        text.encode()
    except UnicodeDecodeError as error:
        raise UsageError(f"{place}: byte {error.start} is not UTF-8") from None
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{place}: character {error.start} is half of a surrogate pair, which UTF-8 cannot express"
        ) from None
    return text
