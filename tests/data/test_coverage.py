import logging

from d2_balance.data.checks.coverage import (
    classes_with_objects,
    log_left_out_negatives,
    log_unseen_classes,
)

RECORDS = [
    {"annotations": [{"category_id": 0}, {"category_id": 2, "iscrowd": 1}]},
    {"annotations": [{"category_id": 2, "iscrowd": 1}], "neg_category_ids": [4]},
    {"annotations": [], "neg_category_ids": [4]},
    {"annotations": [], "neg_category_ids": [], "not_exhaustive_category_ids": []},
    {"annotations": [{"category_id": 1}], "neg_category_ids": [4]},
    {},  # a record of a set without annotations
]


def test_crowds_are_no_objects():
    assert classes_with_objects(RECORDS) == {0, 1}


def test_classes_that_training_never_saw_are_named_with_both_sets(caplog):
    names = [f"class{k}" for k in range(20)]
    with caplog.at_level(logging.WARNING):
        assert log_unseen_classes({0, 1}, {1, 0}, names, ("my_train", "my_val")) == []
        assert not caplog.records
        unseen = log_unseen_classes({0, 1}, set(range(13)), names, ("my_train", "my_val"))
    assert unseen == names[2:13]
    (message,) = caplog.messages
    assert message.startswith("11 classes of my_val without an object in my_train")
    assert "class2, class3" in message and "class11 and 1 more; add training" in message


def test_images_with_labels_that_the_filter_drops_are_counted(caplog):
    with caplog.at_level(logging.INFO):
        assert log_left_out_negatives(RECORDS, "my_train") == 2
        assert log_left_out_negatives(RECORDS[:1], "other") == 0
    (message,) = caplog.messages
    assert message.startswith("2 images of my_train") and "FILTER_EMPTY_ANNOTATIONS" in message
