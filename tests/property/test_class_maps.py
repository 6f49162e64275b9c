"""Class maps over random names: what is mapped, left out, unmatched and uncovered adds up."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from d2_balance.data.class_map import (
    load_class_map,
    read_class_map,
    resolve_class_map,
    write_class_map,
)

names = st.text("abcxyz", min_size=1, max_size=4)
sides = st.lists(names, min_size=1, max_size=8, unique=True)


def categories(names, start=1):
    return [{"id": start + index, "name": name} for index, name in enumerate(names)]


@given(sides, sides)
def test_equal_names_match_and_every_class_is_named_once(source, target):
    result = resolve_class_map(None, categories(source), categories(target, start=100))
    assert sorted(a for a, _ in result.matched) == sorted(set(source) & set(target))
    assert all(a == b for a, b in result.matched)
    assert sorted([a for a, _ in result.matched] + result.unmatched) == sorted(source)
    assert sorted([b for _, b in result.matched] + result.uncovered) == sorted(target)


@given(sides)
def test_case_and_separators_do_not_count(source):
    changed = [name.upper().replace("A", "a").replace("X", "-X") for name in source]
    target = [name.replace("x", "_x") for name in source]
    result = resolve_class_map(None, categories(changed), categories(target, start=50))
    assert len(result.ids) + len(result.unmatched) == len(source)
    for number, other in result.ids.items():
        assert other - 50 == number - 1


@given(sides, st.data())
def test_entries_decide_alone(source, data):
    target = categories(["one", "two", "three"], start=10)
    choice = st.sampled_from(["one", "two", "three", None])
    entries = {name: data.draw(choice) for name in source[: data.draw(st.integers(1, len(source)))]}
    result = resolve_class_map(entries, categories(source), target)
    by_name = {c["name"]: c["id"] for c in target}
    expected = {source.index(name) + 1: by_name[other] for name, other in entries.items() if other}
    assert result.ids == expected
    assert sorted(result.left_out) == sorted(n for n, other in entries.items() if other is None)
    assert sorted(result.unmatched) == sorted(set(source) - set(entries))


@given(sides, sides)
def test_a_written_map_reads_back_as_the_same_map(tmp_path_factory, source, target):
    path = str(tmp_path_factory.mktemp("maps") / "map.yaml")
    written = write_class_map(path, categories(source), categories(target))
    assert set(read_class_map(path)) == set(source)
    assert load_class_map(path, categories(source), categories(target)).ids == written.ids


@given(sides, names)
def test_a_name_that_no_side_has_is_refused_with_the_name(source, name):
    if name in source:
        return
    with pytest.raises(ValueError, match=name):
        resolve_class_map({name: None}, categories(source), categories(["a"]))


@given(st.recursive(st.none() | st.integers() | st.text(max_size=5), st.lists, max_leaves=4))
def test_a_file_of_anything_else_is_refused(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("maps") / "map.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match="class map"):
        read_class_map(str(path))
