"""The field's words everywhere: what a reader of Detectron2 would have to translate is refused."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# What to write instead stands on the right. Each is a regular expression for whole words.
WORDS = {
    r"pictures?": "image",
    r"data sets?": "dataset",
    r"folders?": "directory",
    r"whole numbers?": "integer",
    r"(is|are) allowed|allowed (is|are)|what is allowed": "must be ...",
    r"loading process(es)?": "worker",
    r"slopes?": "gradient",
    r"spoilt|mend(s|ed|ing)?": "corrupt; fix",
    r"passed over|put back|take note|takes note": "skipped, restored, recorded",
    r"start bias": "initial bias",
    r"joins? ranks|over ranks": "across ranks, all-reduced",
    r"mirrored": "horizontally flipped",
    r"pass(es)? without gradients?|without gradient": "forward pass under no_grad",
    r"at several sizes|several sizes": "test-time augmentation",
    r"not reached|nobody looked for": "unmatched; annotated exhaustively",
    r"pieces?": "chunk",
    r"shares? of": "fraction of",
    r"looked at|looked for": "checked, counted, analysed; searched",
    r"; allowed|(is|are) not allowed": "must be one of ...",
    r"at test(?! (time|size))": "at test time, inference",
}
# In these rooms a row of logits is a sample; elsewhere tables have rows.
SAMPLE_ROOMS = (
    "losses",
    "sampling",
    "reweight",
    "modeling",
    "data/priors",
    "engine/replay",
)
SAMPLE_WORDS = {r"rows?": "sample"}

TEXT = {".py", ".md", ".yaml", ".yml", ".toml", ".cff", ".sh", ""}
ROOTS = [
    "README.md",
    "CHANGELOG.md",
    "Makefile",
    "pyproject.toml",
    "train_net.py",
    ".ci",
    ".github",
    "benchmarks",
    "configs",
    "d2_balance",
    "datasets",
    "docs",
    "examples",
    "findings",
    "scripts",
    "tests",
]
# Quotations, names that are not ours, and tables of prints: file (from the root) and the text.
QUOTED = {
    ("tests/test_words.py", ""),
}


def files(root):
    """Text files below a root; of datasets/ only the files that belong to the project."""
    path = ROOT / root
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        own = root != "datasets" or file.parent == path
        if own and file.is_file() and file.suffix in TEXT and "__pycache__" not in file.parts:
            yield file.relative_to(ROOT).as_posix()


def words_of(file):
    in_room = file.startswith(tuple(f"d2_balance/{room}/" for room in SAMPLE_ROOMS))
    return WORDS | (SAMPLE_WORDS if in_room else {})


def problems(file, text):
    """file:line: the word, and what to write, of each line with one of the words."""
    result = []
    for word, instead in words_of(file).items():
        pattern = re.compile(
            rf"(?<![A-Za-z])({word})(?![A-Za-z])".replace(" ", r"\s+"), re.IGNORECASE
        )
        for match in pattern.finditer(text):
            start = text.rfind("\n", 0, match.start()) + 1
            line = text[start : (text + "\n").find("\n", match.end())]
            if not any(file == name and quote in line for name, quote in QUOTED):
                number = text.count("\n", 0, match.start()) + 1
                result.append(f"{file}:{number}: {match[0]!r}: write {instead!r}")
    return result


@pytest.mark.parametrize("root", ROOTS)
def test_the_words_are_those_of_the_field(root):
    result = []
    for file in files(root):
        result += problems(file, (ROOT / file).read_text(encoding="utf-8"))
    assert not result, "\n".join(["", *result])


def test_words_are_found_across_lines_and_only_as_words():
    assert problems("docs/a.md", "one data\n  set of Pictures") == [
        "docs/a.md:2: 'Pictures': write 'image'",
        "docs/a.md:1: 'data\\n  set': write 'dataset'",
    ]
    assert not problems("docs/a.md", "depicted, rows, dataset, unmended")
    assert problems("docs/a.md", "folder_name") and problems("docs/a.md", "DATA SET")
    assert problems("d2_balance/losses/a.py", "rows") and problems(
        "d2_balance/modeling/a.py", "row"
    )
