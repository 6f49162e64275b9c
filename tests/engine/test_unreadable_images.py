"""An image that cannot be read is replaced by another one, which is a function of the position."""

import pytest

from d2_balance.engine.errors import RunStopped
from d2_balance.engine.resume.unreadable_images import SKIPPED, SeededImages, UnreadableImages

RECORDS = [{"file_name": f"{i}.png", "index": i} for i in range(8)]
WIDE = [i % 2 == 0 for i in range(8)]


CUT_OFF = OSError("cut off")


def images(unreadable=(), error=CUT_OFF, seed=3):
    def mapper(record):
        if record["index"] in unreadable:
            raise error
        return dict(record)

    return SeededImages(RECORDS, mapper, WIDE, seed)


def test_another_image_of_the_same_aspect_takes_its_place():
    data = images(unreadable={4})
    found = [data[position, 4] for position in range(20)]
    assert all(WIDE[record["index"]] and record["index"] != 4 for record in found)
    assert len({record["index"] for record in found}) > 1  # not always the same one
    assert found[0][SKIPPED] == {"4.png": "OSError: cut off"}


def test_the_choice_is_a_function_of_seed_and_position():
    first = [images(unreadable={4})[position, 4]["index"] for position in range(20)]
    assert [images(unreadable={4})[position, 4]["index"] for position in range(20)] == first
    assert [images(unreadable={4}, seed=9)[p, 4]["index"] for p in range(20)] != first


def test_sound_images_are_what_they_were():
    assert images(unreadable={4})[5, 2] == images()[5, 2] == RECORDS[2]


@pytest.mark.parametrize("error", [KeyError("bbox"), ValueError("shape"), TypeError("none")])
def test_mistakes_of_the_code_are_not_taken_for_broken_images(error):
    with pytest.raises(type(error)):
        images(unreadable={4}, error=error)[0, 4]


def test_where_none_can_be_read_the_run_stops():
    record = images(unreadable=range(8))[0, 4]
    assert set(record) == {SKIPPED}
    with pytest.raises(RunStopped, match="images in a row cannot be read: 4.png"):
        UnreadableImages(100).record([record])


def test_a_image_counts_once_and_the_limit_is_what_is_allowed():
    counter = UnreadableImages(2)
    for name in ("a", "a", "b"):
        batch = [{"image": 0, SKIPPED: {name: "bad"}}]
        counter.record(batch)
        assert batch == [{"image": 0}]
    assert list(counter.found) == ["a", "b"]
    with pytest.raises(RunStopped, match=r"3 training images .* is 2: a \(bad\), b .*, c "):
        counter.record([{"image": 0, SKIPPED: {"c": "bad"}}])
