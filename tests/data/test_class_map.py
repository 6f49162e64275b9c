"""Class maps: what matches without a file, what a file may say, and what is refused."""

import pytest

from d2_balance.data.class_map import (
    load_class_map,
    read_class_map,
    resolve_class_map,
    write_class_map,
)

SOURCE = [
    {"id": 10, "name": "traffic light"},
    {"id": 3, "name": "dog", "synset": "dog.n.01"},
    {"id": 5, "name": "Kitten", "synset": "cat.n.01"},
    {"id": 7, "name": "spoon"},
]
TARGET = [
    {"id": 1, "name": "Traffic_Light"},
    {"id": 2, "name": "dog", "synset": "dog.n.01"},
    {"id": 4, "name": "cat", "synset": "cat.n.01"},
    {"id": 6, "name": "zebra"},
]


def test_without_a_file_classes_of_one_name_or_synset_are_the_same():
    found = resolve_class_map(None, SOURCE, TARGET, ("COCO", "LVIS"))
    assert found.ids == {10: 1, 3: 2, 5: 4}
    assert (found.unmatched, found.uncovered) == (["spoon"], ["zebra"])
    text = found.report()
    assert "3 classes of COCO are classes of LVIS: dog, Kitten -> cat, traffic light" in text
    assert "1 of COCO without a match: spoon" in text


def test_a_file_decides_and_null_leaves_out(tmp_path):
    path = tmp_path / "map.yaml"
    path.write_text("dog.n.01: cat\nKitten: cat\nspoon: null\n")
    found = load_class_map(str(path), SOURCE, TARGET)
    assert found.ids == {3: 4, 5: 4}
    assert (found.left_out, found.unmatched) == (["spoon"], ["traffic light"])
    assert found.uncovered == ["Traffic_Light", "dog", "zebra"]


def test_a_written_map_reads_back_and_is_not_replaced(tmp_path):
    path = str(tmp_path / "map.yaml")
    written = write_class_map(path, SOURCE, TARGET)
    assert load_class_map(path, SOURCE, TARGET).ids == written.ids
    assert read_class_map(path)["spoon"] is None
    with pytest.raises(FileExistsError, match="map.yaml exists"):
        write_class_map(path, SOURCE, TARGET)


@pytest.mark.parametrize(
    "text, message",
    [
        ("dogg: dog", r"map.yaml: 'dogg': COCO has no class 'dogg'; did you mean 'dog'"),
        ("dog: zebraa", r"map.yaml: 'dog': LVIS has no class 'zebraa'; did you mean 'zebra'"),
        ("dog: dog\ndog.n.01: cat", "'dog.n.01' names a class of COCO a second time"),
        ("dog: dog\ndog: cat", "'dog' stands in two lines"),
        ("dog: [dog]", "must be two class names"),
        ("no: dog", "must be two class names"),
        ("- dog", "lines 'source class: target class'"),
        ("dog: [", "cannot be read"),
    ],
)
def test_what_a_map_may_not_say(tmp_path, text, message):
    path = tmp_path / "map.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_class_map(str(path), SOURCE, TARGET, ("COCO", "LVIS"))


def test_a_name_of_two_classes_is_refused():
    target = [{"id": 1, "name": "bow"}, {"id": 2, "name": "bow"}]
    with pytest.raises(ValueError, match="2 classes of T are called 'bow'; use synsets"):
        resolve_class_map({"bow": "bow"}, [{"id": 9, "name": "bow"}], target, ("S", "T"))
    assert resolve_class_map(None, [{"id": 9, "name": "bow"}], target).ids == {}


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="gone.yaml: the class map cannot be read: No such file"):
        read_class_map(str(tmp_path / "gone.yaml"))
