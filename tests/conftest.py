"""Small models and batches that every test may use."""

import os

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.structures import BitMasks, Boxes, Instances

from d2_balance import add_balance_config
from d2_balance.engine.setup.config_file import merge_overrides

CLASSES = 6

RETINANET = """
MODEL:
  META_ARCHITECTURE: RetinaNet
  BACKBONE: {NAME: build_retinanet_resnet_fpn_backbone, FREEZE_AT: 0}
  RESNETS:
    {RES2_OUT_CHANNELS: 16, STEM_OUT_CHANNELS: 8, WIDTH_PER_GROUP: 4, NORM: BN,
     OUT_FEATURES: [res3, res4, res5]}
  FPN: {IN_FEATURES: [res3, res4, res5], OUT_CHANNELS: 16}
  ANCHOR_GENERATOR: {SIZES: [[8], [16], [32], [64], [128]]}
  RETINANET: {NUM_CONVS: 1}
"""
FASTER = """
MODEL:
  META_ARCHITECTURE: GeneralizedRCNN
  BACKBONE: {NAME: build_resnet_fpn_backbone, FREEZE_AT: 0}
  RESNETS:
    {RES2_OUT_CHANNELS: 16, STEM_OUT_CHANNELS: 8, WIDTH_PER_GROUP: 4, NORM: BN,
     OUT_FEATURES: [res2, res3, res4, res5]}
  FPN: {IN_FEATURES: [res2, res3, res4, res5], OUT_CHANNELS: 16}
  ANCHOR_GENERATOR: {SIZES: [[8], [16], [32], [64], [128]], ASPECT_RATIOS: [[0.5, 1.0, 2.0]]}
  RPN:
    IN_FEATURES: [p2, p3, p4, p5, p6]
    PRE_NMS_TOPK_TRAIN: 100
    POST_NMS_TOPK_TRAIN: 40
    PRE_NMS_TOPK_TEST: 100
    POST_NMS_TOPK_TEST: 20
  ROI_HEADS: {NAME: StandardROIHeads, IN_FEATURES: [p2, p3, p4, p5], BATCH_SIZE_PER_IMAGE: 24}
  ROI_BOX_HEAD: {NAME: FastRCNNConvFCHead, NUM_FC: 1, FC_DIM: 32, POOLER_RESOLUTION: 3}
  ROI_MASK_HEAD: {NAME: MaskRCNNConvUpsampleHead, NUM_CONV: 1, CONV_DIM: 8, POOLER_RESOLUTION: 4}
"""
FCOS = """
MODEL:
  META_ARCHITECTURE: BalancedFCOS
  BACKBONE: {NAME: build_fcos_resnet_fpn_backbone, FREEZE_AT: 0}
  RESNETS:
    {RES2_OUT_CHANNELS: 16, STEM_OUT_CHANNELS: 8, WIDTH_PER_GROUP: 4, NORM: BN,
     OUT_FEATURES: [res3, res4, res5]}
  FPN: {IN_FEATURES: [res3, res4, res5], OUT_CHANNELS: 16}
  FCOS: {NUM_CONVS: 1, NORM: ""}
"""
MASK = FASTER + "  MASK_ON: True\n"
CASCADE = FASTER.replace("StandardROIHeads", "CascadeROIHeads").replace(
    "FC_DIM: 32", "FC_DIM: 32, CLS_AGNOSTIC_BBOX_REG: True"
)
STOCK = {"retinanet": RETINANET, "faster": FASTER, "mask": MASK, "cascade": CASCADE}
KINDS = STOCK | {"fcos": FCOS}  # Detectron2's FCOS has no config of its own
BALANCED = {
    "RetinaNet": "BalancedRetinaNet",
    "GeneralizedRCNN": "BalancedRCNN",
    "StandardROIHeads": "BalancedStandardROIHeads",
    "CascadeROIHeads": "BalancedCascadeROIHeads",
}


def small_cfg(kind, *overrides, balanced=True):
    """A config of a very small model; overrides as on the command line."""
    cfg = get_cfg()
    add_balance_config(cfg)
    cfg.merge_from_other_cfg(cfg.load_cfg(KINDS[kind]))
    cfg.MODEL.DEVICE = "cpu"
    for node in (cfg.MODEL.ROI_HEADS, cfg.MODEL.RETINANET, cfg.MODEL.FCOS):
        node.NUM_CLASSES = CLASSES
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()
    if balanced:
        arch = cfg.MODEL.META_ARCHITECTURE
        cfg.MODEL.META_ARCHITECTURE = BALANCED.get(arch, arch)
        heads = cfg.MODEL.ROI_HEADS.NAME
        cfg.MODEL.ROI_HEADS.NAME = BALANCED.get(heads, heads)
    merge_overrides(cfg, overrides, "test")
    return cfg


def make_inputs(images=2, objects=3, size=64, seed=0, empty=(), **fields):
    """Random images as Detectron2's DatasetMapper gives them; `empty` images have no object."""
    generator = torch.Generator().manual_seed(seed)
    inputs = []
    for index in range(images):
        count = 0 if index in empty else objects
        corner = torch.rand(count, 2, generator=generator) * (size - 28)
        side = torch.rand(count, 2, generator=generator) * 18 + 10
        boxes = torch.cat([corner, corner + side], dim=1)
        masks = torch.zeros(count, size, size, dtype=torch.bool)
        for mask, box in zip(masks, boxes.long().tolist(), strict=True):
            mask[box[1] : box[3], box[0] : box[2]] = True
        instances = Instances(
            (size, size),
            gt_boxes=Boxes(boxes),
            gt_classes=torch.randint(0, CLASSES, (count,), generator=generator),
            gt_masks=BitMasks(masks),
        )
        image = torch.randint(0, 256, (3, size, size), generator=generator).float()
        record = {"image": image, "instances": instances, "file_name": f"{index}.png"}
        inputs.append({**record, **{key: value[index] for key, value in fields.items()}})
    return inputs


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """Class counts of test files stay out of the user's cache."""
    os.environ["D2_BALANCE_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    del os.environ["D2_BALANCE_CACHE"]


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random weights."""
    torch.manual_seed(0)


@pytest.fixture
def counts_file(tmp_path):
    """Class counts for the small models: 1000 images, classes from 400 down to 1 image."""
    from d2_balance.data.class_counts import ClassCounts

    counts = torch.tensor([400, 120, 40, 8, 2, 1])
    names = tuple(f"class{i}" for i in range(CLASSES))
    path = tmp_path / "statistics.json"
    ClassCounts(counts, counts * 2, 1000, names).save(str(path))
    return str(path)


@pytest.fixture
def cluster():
    """A Ray cluster: a head without processors and two nodes with one each."""
    pytest.importorskip("ray", reason="pip install 'd2-balance[cluster]'")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    cluster.wait_for_nodes()
    yield cluster, nodes
    cluster.shutdown()
