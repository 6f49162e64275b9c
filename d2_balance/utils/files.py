"""Files: output that is whole or not there at all, and JSON whose errors say what is wrong."""

import codecs
import gc
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Annotated, Any, TypeVar

import msgspec
import yaml

_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_GZIP = b"\x1f\x8b"

T = TypeVar("T")
Count = Annotated[int, msgspec.Meta(ge=0)]
"""Type of a field for `convert`: an integer of at least 0."""


@contextmanager
def atomic_path(path: str, *, sync: bool = False) -> Iterator[str]:
    """Yield a temporary path in the directory of `path`; move it to `path` when the block succeeds.

    The directory is made where it is missing. On an exception the temporary file is removed and
    whatever was at `path` stays as it was.

    Args:
        path: where the file goes.
        sync: True waits until the file is on the disk before it is moved, and the directory
            afterwards, so that a power cut leaves the old file or the new one.
    """
    directory = os.path.dirname(os.path.abspath(path))
    os.makedirs(directory, exist_ok=True)
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        yield temporary
        if sync:
            _sync(temporary)
        os.replace(temporary, path)
        if sync:
            _sync(directory)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def _sync(path: str) -> None:
    if os.path.isdir(path) and os.name == "nt":
        return  # Windows opens no directories
    handle = os.open(path, os.O_RDONLY if os.path.isdir(path) else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: str, text: str, *, sync: bool = False) -> None:
    """Write a text file as UTF-8, atomically; `sync` as in `atomic_path`."""
    with atomic_path(path, sync=sync) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(text)


def write_json(path: str, data: Any, *, indent: int | None = None, sync: bool = False) -> None:
    """Write a JSON file, atomically; `sync` as in `atomic_path`."""
    write_text(path, json.dumps(data, ensure_ascii=False, indent=indent), sync=sync)


def check_new(paths: Iterable[str | None], overwrite: bool) -> None:
    """Refuse to replace files; called before the work that they are the result of.

    Args:
        paths: files to be written; None and "" are left out.
        overwrite: True allows it.

    Raises:
        FileExistsError: naming the first file that exists.
    """
    for path in paths:
        if path and os.path.exists(path) and not overwrite:
            raise FileExistsError(f"{path} exists; --overwrite replaces it (overwrite=True)")


def read_json(path: str) -> Any:
    """Parse a JSON file.

    Raises:
        ValueError: if the file is missing or is not JSON, naming the file and the position.
    """
    return parse_json(read_bytes(path), path)


def convert(data: Any, form: type[T], source: str) -> T:
    """Return plain data, as JSON has them, as an object of a class with typed fields.

    Args:
        data: lists, mappings, texts and numbers.
        form: a dataclass or a `msgspec.Struct`; fields without a default must be there.
        source: what the data come from, for messages.

    Raises:
        ValueError: naming the source, the field and what it must be.
    """
    try:
        return msgspec.convert(data, form)
    except msgspec.ValidationError as error:
        what, _, place = str(error).partition(" - at ")
        place = place.strip("`").removeprefix("$").lstrip(".")
        what = what.replace("Object missing required", "lacks the").replace("Expected", "must be")
        raise ValueError(f"{source}: {place} {what}".replace(":  ", ": ")) from error


def read_yaml(path: str) -> Any:
    """Parse a YAML file without tags that run code.

    Raises:
        ValueError: if it cannot be read or is not YAML, naming the file.
    """
    try:
        with open(path, encoding="utf-8") as file:
            return yaml.safe_load(file)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error


def read_records(path: str) -> Iterator[dict[str, Any]]:
    """Yield the records of a file with one JSON object a line, such as metrics.json.

    A file that is missing has none. A line that was cut off by a kill is left out.
    """
    if os.path.isfile(path):
        with open(path, encoding="utf-8") as file:
            for line in file:
                with suppress(json.JSONDecodeError):
                    yield json.loads(line)


def read_bytes(path: str) -> bytes:
    """Read a file; text in UTF-16 or with a byte-order mark becomes plain UTF-8.

    Args:
        path: of a local file, or a URL that Detectron2's PathManager knows.

    Raises:
        ValueError: if it cannot be read or is compressed, naming it.
    """
    try:
        if "://" in path:
            from detectron2.utils.file_io import PathManager

            with PathManager.open(path, "rb") as file:
                content = file.read()
        else:
            with open(path, "rb") as file:
                content = file.read()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from error
    if content.startswith(_GZIP):
        raise ValueError(f"{path}: the file is compressed by gzip; unpack it (gunzip)")
    if content.startswith(codecs.BOM_UTF8):
        return content[len(codecs.BOM_UTF8) :]
    if content.startswith(_UTF_16):
        try:
            return content.decode("utf-16").encode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: the text is cut off or no UTF-16: {error.reason}") from error
    return content


def parse_json(content: bytes, path: str) -> Any:
    """Parse JSON; `path` is its file, for messages.

    Raises:
        ValueError: if it is not JSON, naming the file and the position.
    """
    collecting = gc.isenabled()
    gc.disable()  # millions of new objects, none of them garbage, would be walked again and again
    try:
        try:
            return msgspec.json.decode(content)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return json.loads(content)  # NaN and Infinity, and an error with a position
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
    except RecursionError as error:
        raise ValueError(f"{path}: lists or objects are nested too deep to be read") from error
    finally:
        if collecting:
            gc.enable()
