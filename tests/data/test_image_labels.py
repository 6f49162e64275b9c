import pytest
import torch
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.structures import Instances

from d2_balance.data import ImageLabels, register_json, require_image_labels

from .conftest import lvis_data


def _input(classes=None, **fields):
    record = {"file_name": "some/image.png"} | fields
    if classes is not None:
        gt_classes = torch.tensor(classes, dtype=torch.int64)
        record["instances"] = Instances((30, 40), gt_classes=gt_classes)
    return record


def _listed(mask):
    return [row.nonzero().flatten().tolist() for row in mask]


def test_listed_is_annotated_with_negative_with_not_exhaustive(names):
    labels = ImageLabels([names()], 6)
    mask = labels.verified(
        [
            # raw ids start at 1 here, as in Detectron2's LVIS sets: 1 -> 0, 6 -> 5, 3 -> 2
            _input([4, 4, 2], neg_category_ids=[1, 6], not_exhaustive_category_ids=[3]),
            _input([], neg_category_ids=[2], not_exhaustive_category_ids=[]),
            _input([3], neg_category_ids=[]),
        ],
        "cpu",
    )
    assert mask.shape == (3, 6) and mask.dtype == torch.bool
    assert _listed(mask) == [[0, 2, 4, 5], [1], [3]]


def test_partial_is_what_is_not_exhaustive(names):
    labels = ImageLabels([names()], 6)
    batch = [
        _input([4, 2], neg_category_ids=[1], not_exhaustive_category_ids=[3, 5]),
        _input([], neg_category_ids=[2]),
    ]
    mask = labels.not_exhaustive(batch, "cpu")
    assert mask.shape == (2, 6) and mask.dtype == torch.bool
    assert _listed(mask) == [[2, 4], []]
    assert labels.not_exhaustive(batch[1:], "cpu") is None
    with pytest.raises(ValueError, match="hold .7.; must be category ids of the 6"):
        labels.not_exhaustive([_input([], not_exhaustive_category_ids=[7])], "cpu")


def test_no_labels_no_mask(names):
    labels = ImageLabels([names()], 6)
    assert labels.verified([_input([1]), _input([2])], "cpu") is None
    assert labels.verified([], "cpu") is None


def test_image_without_labels_lists_its_annotated_classes_beside_one_with_labels(names):
    labels = ImageLabels([names()], 4)
    mask = labels.verified([_input([1]), _input([], neg_category_ids=[4])], "cpu")
    assert _listed(mask) == [[1], [3]]


def test_input_without_instances_lists_the_image_labels(names):
    mask = ImageLabels([names()], 4).verified([_input(neg_category_ids=[2])], "cpu")
    assert _listed(mask) == [[1]]


def test_map_of_the_training_set_is_read_at_first_use(names):
    name = names()
    labels = ImageLabels([name], 2)
    MetadataCatalog.get(name).thing_dataset_id_to_contiguous_id = {3: 0, 7: 1}
    assert _listed(labels.verified([_input([], neg_category_ids=[7])], "cpu")) == [[1]]


def test_equal_maps_are_fine_and_different_ones_name_both_sets(names):
    first, second, third = names(), names(), names()
    MetadataCatalog.get(first).thing_dataset_id_to_contiguous_id = {1: 0, 2: 1}
    MetadataCatalog.get(third).thing_dataset_id_to_contiguous_id = {2: 0, 3: 1}
    batch = [_input([], neg_category_ids=[2])]
    # the second set has no map, which means id - 1, as the first one's map does
    assert _listed(ImageLabels([first, second], 2).verified(batch, "cpu")) == [[1]]
    with pytest.raises(ValueError, match=f"'{first}' and '{third}' map category ids .*differently"):
        ImageLabels([first, third], 2).verified(batch, "cpu")


@pytest.mark.parametrize("raw", [0, 5, -1])
def test_id_outside_names_the_image(names, raw):
    name = names()
    with pytest.raises(ValueError, match=rf"some/image.png: .*\[{raw}\].*4 classes of {name}"):
        ImageLabels([name], 4).verified([_input([], neg_category_ids=[raw])], "cpu")


def test_id_that_the_map_lacks_names_the_image(names):
    name = names()
    MetadataCatalog.get(name).thing_dataset_id_to_contiguous_id = {3: 0, 7: 1}
    with pytest.raises(ValueError, match=r"some/image.png: .*\[5\]"):
        ImageLabels([name], 2).verified([_input([], not_exhaustive_category_ids=[3, 5])], "cpu")


def test_annotated_class_outside_names_the_image(names):
    with pytest.raises(ValueError, match=r"image.png: .*annotations run from 1 to 4; .*\[0, 4\)"):
        ImageLabels([names()], 4).verified([_input([4, 1], neg_category_ids=[1])], "cpu")


def test_number_of_classes_must_be_positive():
    with pytest.raises(ValueError, match="num_classes must be at least 1"):
        ImageLabels([], 0)


def test_labels_reach_the_mask_through_loader_and_mapper(cfg, write, names):
    cfg.INPUT.RANDOM_FLIP = "none"
    name = names()
    register_json(name, *write(lvis_data()))
    mapper = DatasetMapper(cfg, is_train=True)
    batch = [mapper(record) for record in DatasetCatalog.get(name)]
    # ids 3, 7 are classes 0, 1; image 1 shows both, image 2 shows 7 and has 3 as a negative
    assert _listed(ImageLabels([name], 2).verified(batch, "cpu")) == [[0, 1], [0, 1]]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_mask_goes_to_the_device_without_waiting_for_it(names):
    labels = ImageLabels([names()], 1203)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        mask = labels.verified([_input([7], neg_category_ids=[1, 1203])], "cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert mask.is_cuda and _listed(mask) == [[0, 7, 1202]]


def test_set_without_image_labels_names_the_set_and_the_remedy():
    message = "'my_train' has no image-level labels: set MODEL.BALANCE.EQL.USE_IMAGE_LEVEL_LABELS"
    empty = {"neg_category_ids": [], "not_exhaustive_category_ids": []}
    for records in ([], [{"file_name": "a"}], [empty, empty]):
        with pytest.raises(ValueError, match=message):
            require_image_labels(records, "my_train")
    require_image_labels([empty, {"neg_category_ids": [4]}], "my_train")
    require_image_labels([{"not_exhaustive_category_ids": [4]}], "my_train")
