import pytest
from PIL import Image

from d2_balance.data.checks.images import check_image_sizes, image_size


@pytest.fixture
def records(tmp_path):
    paths = [tmp_path / f"{n}.jpg" for n in range(8)]
    for path in paths:
        Image.new("RGB", (20, 10)).save(path)
    return [
        {"file_name": str(path), "image_id": 100 + n, "height": 10, "width": 20}
        for n, path in enumerate(paths)
    ]


def test_images_of_the_written_size_pass(records):
    check_image_sizes(records, "my_train")
    check_image_sizes([{"file_name": "no size is claimed"}], "my_train")


def test_images_of_another_size_are_counted_and_named_with_both_sizes(records):
    for record in records[1:]:
        record["width"] = 21
    shown = r"image 101 \(.*1.jpg\) is 20 x 10, not 21 x 10; .*image 105 .* and 2 more; give the"
    with pytest.raises(ValueError, match=f"my_train: 7 of 8 .*{shown}"):
        check_image_sizes(records, "my_train")


def test_a_limit_looks_at_images_from_all_over_the_set(records):
    records[6]["height"] = 11
    check_image_sizes(records, "my_train", limit=2)  # looks at 0 and 4
    with pytest.raises(ValueError, match="1 of 4 .* image 106"):
        check_image_sizes(records, "my_train", limit=4)  # at 0, 2, 4 and 6


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_is_that_of_the_image_as_it_is_seen(tmp_path, orientation):
    from detectron2.data.detection_utils import read_image

    exif = Image.Exif()
    exif[274] = orientation
    path = str(tmp_path / "a.jpg")
    Image.new("RGB", (20, 10)).save(path, exif=exif)
    assert image_size(path) == read_image(path, "RGB").shape[:2]


def test_images_that_cannot_be_read_are_left_to_the_loader(records):
    records[0]["file_name"] += ".gone"
    check_image_sizes(records, "my_train")


def test_what_is_no_image_is_named(tmp_path):
    (tmp_path / "a.jpg").write_text("no image")
    for name in ("a.jpg", "b.jpg"):
        with pytest.raises(ValueError, match=f"{name}: no image that can be read"):
            image_size(str(tmp_path / name))


@pytest.mark.parametrize(("mode", "suffix"), [("I;16", "png"), ("F", "tiff"), ("I", "tiff")])
def test_images_of_more_than_8_bits_are_warned_of(tmp_path, caplog, mode, suffix):
    path = str(tmp_path / f"a.{suffix}")
    Image.new(mode, (8, 6)).save(path)
    record = {"file_name": path, "height": 6, "width": 8, "image_id": 1}
    with caplog.at_level("WARNING", logger="d2_balance.data.checks.images"):
        check_image_sizes([record], "mine")
    assert "more than 8 bits" in caplog.text and "mode " in caplog.text and path in caplog.text


def test_a_turned_image_is_named_with_its_exif_orientation(tmp_path):
    path = str(tmp_path / "a.jpg")
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (8, 6)).save(path, exif=exif)
    record = {"file_name": path, "height": 6, "width": 8, "image_id": 1}
    with pytest.raises(ValueError, match="EXIF orientation 6.*remove the tag"):
        check_image_sizes([record], "mine")


def test_an_image_above_the_limit_of_pillow_is_named(tmp_path, monkeypatch):
    path = str(tmp_path / "big.png")
    Image.new("RGB", (80, 60)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="big.png: .*tiles"):
        image_size(path)
