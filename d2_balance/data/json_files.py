"""Reads JSON files, with messages that say what is wrong where."""

import gc
import json
from typing import Any

import orjson
from detectron2.utils.file_io import PathManager


def read_json(path: str) -> Any:
    """Parse a JSON file.

    Raises:
        ValueError: if the file is missing or is no JSON, naming the file and the position.
    """
    return parse_json(read_content(path), path)


def read_content(path: str) -> bytes:
    """The bytes of a file.

    Raises:
        ValueError: if it cannot be read, naming it.
    """
    try:
        with PathManager.open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from error


def parse_json(content: bytes, path: str) -> Any:
    """Parse JSON; `path` is its file, for messages.

    Raises:
        ValueError: if it is no JSON, naming the file and the position.
    """
    collecting = gc.isenabled()
    gc.disable()  # millions of new objects, none of them garbage, would be walked again and again
    try:
        return _parse(content)
    except json.JSONDecodeError as error:
        text = error.doc.rstrip()
        cut = error.pos >= len(text) or not text.endswith(("}", "]"))
        hint = "; the file ends too early: copy or write it again" if cut else ""
        if not text:
            raise ValueError(f"{path}: the file is empty; copy or write it again") from error
        raise ValueError(
            f"{path}: not valid JSON at character {error.pos} of {len(error.doc)} (line "
            f"{error.lineno}, column {error.colno}): {error.msg}{hint}"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not valid JSON at byte {error.start}: {error.reason}; the text must be UTF-8"
        ) from error
    finally:
        if collecting:
            gc.enable()


def _parse(content: bytes) -> Any:
    try:
        return orjson.loads(content)
    except orjson.JSONDecodeError:
        return json.loads(content)  # NaN and Infinity, and an error that is worded as ever
