"""Images on disk against what the annotations say of them."""

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image
from tqdm import tqdm

_ORIENTATION = 274  # EXIF tag
_TURNED = (5, 6, 7, 8)  # orientations that swap width and height
_SHOWN = 5


def image_size(path: str) -> tuple[int, int]:
    """(height, width) in pixels of an image as Detectron2 reads it, turned as its EXIF says.

    Reads the head of the file only.

    Raises:
        ValueError: a file that is missing or no image.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = image.getexif().get(_ORIENTATION) in _TURNED
    except (OSError, SyntaxError) as error:
        raise ValueError(
            f"{path}: no image that can be read ({type(error).__name__}); download it again or "
            "leave it out of the annotations"
        ) from error
    return (width, height) if turned else (height, width)


def check_image_sizes(
    dataset_dicts: Sequence[Mapping[str, Any]], name: str, limit: int | None = None
) -> None:
    """Compare the size of images with the height and width that the annotation file gives.

    Boxes of an image of another size point beside the objects, and nothing else would say so where
    only a part of the images was resized. Images that cannot be read are skipped: the
    loader skips, names and counts them.

    Args:
        dataset_dicts: Detectron2's standard dicts.
        name: of the dataset or file, for the message.
        limit: look at that many, spread evenly; None: at all.

    Raises:
        ValueError: with the number of images of another size, the first ones by id and file, and
            both sizes.
    """
    records = [r for r in dataset_dicts if "height" in r and "width" in r]
    if limit is not None and len(records) > limit:
        step = len(records) / limit
        records = [records[int(n * step)] for n in range(limit)]
    wrong = []
    for record in tqdm(records, "checking the sizes of images", delay=2, disable=None):
        try:
            size = image_size(record["file_name"])
        except ValueError:
            continue
        if size != (record["height"], record["width"]):
            wrong.append(
                f"image {record.get('image_id')} ({record['file_name']}) is {size[1]} x {size[0]}, "
                f"not {record['width']} x {record['height']}"
            )
    if wrong:
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise ValueError(
            f"{name}: {len(wrong)} of {len(records)} images looked at are not of the size "
            f"(width x height) that the annotations give: {'; '.join(wrong[:_SHOWN])}{more}; give "
            "the images that were annotated, or scale the boxes with them"
        )
