"""Every detection config of Detectron2's zoo trains with a few lines added, YAML and Python.

The models keep their structure and are built narrow; each takes one step on two images of noise.
"""

import warnings
from pathlib import Path

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, instantiate
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling.roi_heads.rotated_fast_rcnn import RROIHeads
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints, PolygonMasks
from detectron2.utils.events import EventStorage
from omegaconf import OmegaConf

from d2_balance.data.class_counts import ClassCounts
from d2_balance.engine import BalancedTrainer, balance_model, find_config, read_config
from d2_balance.engine.setup.config_file import ZOO
from d2_balance.engine.setup.lazy_model import output_layers
from d2_balance.engine.setup.validate import check_losses_are_used, check_registered_names
from d2_balance.losses import EQLLoss, GHMCLoss
from d2_balance.modeling import BalancedCascadeROIHeads, BalancedFastRCNNOutputLayers

YAML = sorted(p.relative_to(ZOO).as_posix() for p in Path(ZOO).rglob("*.yaml"))
YAML = [name for name in YAML if "semantic" not in name]  # no detections
# one of each structure; the others differ in depth, schedule or norm
QUICK = (
    "COCO-Detection/fast_rcnn_R_50_FPN_1x.yaml",
    "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
    "COCO-Detection/rpn_R_50_C4_1x.yaml",
    "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x.yaml",
    "COCO-InstanceSegmentation/mask_rcnn_R_50_DC5_1x.yaml",
    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x_giou.yaml",
    "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml",
    "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml",
    "LVISv1-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
    "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml",
    "Misc/mask_rcnn_R_50_FPN_1x_dconv_c3-c5.yaml",
)
LINES = {
    "RetinaNet": "META_ARCHITECTURE: BalancedRetinaNet, BALANCE: {CLS_LOSS: GHMC}",
    "ProposalNetwork": "PROPOSAL_GENERATOR: {NAME: BalancedRPN}, BALANCE: {RPN: {CLS_LOSS: GHMC}}",
    "GeneralizedRCNN": "META_ARCHITECTURE: BalancedRCNN, ROI_HEADS: {NAME: Balanced%s},"
    " BALANCE: {CLS_LOSS: EQL}",
    "PanopticFPN": "META_ARCHITECTURE: BalancedPanopticFPN, ROI_HEADS: {NAME: Balanced%s},"
    " BALANCE: {CLS_LOSS: EQL}",
}
SIZE = 64
CLASSES = 7


def slow_unless(quick, names):
    return [n if n in quick else pytest.param(n, marks=pytest.mark.slow) for n in names]


def make_batch(masks="", keypoints=0, semantic=False, proposals=False):
    """Two images of noise with two objects each, as the dataset mapper gives them."""
    boxes = torch.tensor([[4.0, 4.0, 30.0, 28.0], [20.0, 16.0, 60.0, 60.0]])
    batch = []
    for index in range(2):
        objects = Instances((SIZE, SIZE), gt_boxes=Boxes(boxes - index))
        objects.gt_classes = torch.tensor([0, 1 if not keypoints else 0])
        if masks == "polygon":
            corners = [[x0, y0, x1, y0, x1, y1, x0, y1] for x0, y0, x1, y1 in boxes.tolist()]
            objects.gt_masks = PolygonMasks([[corner] for corner in corners])
        elif masks:
            objects.gt_masks = BitMasks(torch.ones(2, SIZE, SIZE, dtype=torch.bool))
        if keypoints:
            points = torch.rand(2, keypoints, 3) * 20 + 22
            points[..., 2] = 2
            objects.gt_keypoints = Keypoints(points)
        record = {"image": torch.randint(256, (3, SIZE, SIZE), dtype=torch.uint8)}
        record["instances"] = objects
        if semantic:
            record["sem_seg"] = torch.randint(0, 3, (SIZE, SIZE))
        if proposals:
            record["proposals"] = Instances(
                (SIZE, SIZE),
                proposal_boxes=Boxes(boxes.repeat(6, 1) + 2),
                objectness_logits=torch.zeros(12),
            )
        batch.append(record)
    return batch


def step(model, batch):
    """One step of SGD; the model has changed and all losses are finite."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in parameters]
    with EventStorage():
        losses = model.train()(batch)
    assert all(value.isfinite() for value in losses.values()), losses
    sum(losses.values()).backward()
    torch.optim.SGD(parameters, 1e-3).step()
    assert any(not torch.equal(p, b) for p, b in zip(parameters, before, strict=True))
    return losses


@pytest.fixture(scope="module")
def counts(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("zoo") / "counts.json")
    images = torch.tensor([90, 40, 9, 3, 2, 1, 1])
    ClassCounts(images, images * 2, 100, tuple("abcdefg")).save(path)
    return path


@pytest.mark.parametrize("name", slow_unless(QUICK, YAML))
def test_a_yaml_of_the_zoo_trains_with_three_lines_more(name, counts, tmp_path):
    stock = read_config(name)
    lines = LINES[stock.MODEL.META_ARCHITECTURE]
    lines = lines % stock.MODEL.ROI_HEADS.NAME if "%s" in lines else lines
    own = tmp_path / "own.yaml"
    own.write_text(f"_BASE_: {name}\nMODEL: {{{lines}}}\n")
    cfg = read_config(str(own), ["MODEL.BALANCE.CLASS_COUNTS_FILE", counts])
    check_registered_names(cfg)
    check_losses_are_used(cfg)
    model = BalancedTrainer.build_model(narrow(cfg))
    for module in model.modules():  # random values in place of those of the weights file
        if isinstance(module, FrozenBatchNorm2d):
            module.weight.fill_(0.5)
    arguments = {"masks": cfg.INPUT.MASK_FORMAT if cfg.MODEL.MASK_ON else ""}
    arguments["keypoints"] = 17 if cfg.MODEL.KEYPOINT_ON else 0
    arguments["semantic"] = "Panoptic" in cfg.MODEL.META_ARCHITECTURE
    arguments["proposals"] = cfg.MODEL.LOAD_PROPOSALS
    step(model, make_batch(**arguments))


def narrow(cfg):
    """A config whose model has the same parts with few channels and proposals."""
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""
    # group norm has 32 groups
    groups = cfg.MODEL.RESNETS.NUM_GROUPS
    width = 32 if cfg.MODEL.RESNETS.NORM == "GN" else 8
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS, cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = 2 * width, width
    cfg.MODEL.RESNETS.WIDTH_PER_GROUP = max(width // groups, 1)
    cfg.MODEL.FPN.OUT_CHANNELS = 32
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM, cfg.MODEL.ROI_BOX_HEAD.CONV_DIM = 16, 32
    cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM = 32
    cfg.MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS = (8,)
    classes = 1 if cfg.MODEL.KEYPOINT_ON else CLASSES
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.RETINANET.NUM_CLASSES = classes
    if classes == 1:
        cfg.MODEL.BALANCE.CLS_LOSS = "SigmoidCE"  # counts of one class say nothing
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 16
    for phase in ("TRAIN", "TEST"):
        cfg.MODEL.RPN[f"PRE_NMS_TOPK_{phase}"] = cfg.MODEL.RPN[f"POST_NMS_TOPK_{phase}"] = 20
    for node in (cfg.MODEL.RESNETS, cfg.MODEL.FPN, cfg.MODEL.ROI_BOX_HEAD, cfg.MODEL.ROI_MASK_HEAD):
        node.NORM = node.NORM.replace("SyncBN", "BN")  # what SyncBN is on one process
    return cfg


def test_an_unknown_name_is_answered_with_those_that_look_like_it():
    with pytest.raises(ValueError, match=r"did you mean .*COCO-Detection/retinanet_R_50_FPN_1x"):
        read_config("COCO-Detection/retinanet_R50_FPN_1x.yaml")


def test_a_base_that_leads_back_to_itself_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("_BASE_: b.yaml\n")
    (tmp_path / "b.yaml").write_text("_BASE_: a.yaml\n")
    with pytest.raises(ValueError, match="leads back to itself"):
        read_config(str(tmp_path / "a.yaml"))


LAZY = sorted(p.relative_to(ZOO).as_posix() for p in Path(ZOO).rglob("*.py"))
LAZY = [name for name in LAZY if not name.startswith("common/") and "torchvision" not in name]
LAZY = [name for name in LAZY if "mmdet" not in name]  # made of another library
MODELS = sorted(p.relative_to(ZOO).as_posix() for p in Path(ZOO).glob("common/models/*.py"))
QUICK_LAZY = (
    "COCO-Detection/fcos_R_50_FPN_1x.py",
    "COCO-Detection/retinanet_R_50_FPN_1x.py",
    "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x.py",
    "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.py",
    "common/models/cascade_rcnn.py",
    "common/models/mask_rcnn_vitdet.py",
    "new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ.py",
)


@pytest.mark.parametrize("name", slow_unless(QUICK_LAZY, [*LAZY, *MODELS]))
def test_a_lazy_config_of_the_zoo_trains_with_other_losses(name):
    if "vitdet" in name:
        pytest.importorskip("timm")
    model = LazyConfig.load(find_config(name)).model
    narrow_lazy(model)
    keypoints = "roi_heads" in model and "keypoint_head" in model.roi_heads
    dense = "roi_heads" not in model
    loss = (
        L(GHMCLoss)()
        if dense
        else L(EQLLoss)(lambda_=0.01, class_frequency=torch.full((CLASSES,), 0.1))
    )
    balance_model(
        model,
        "some_train",
        num_classes=1 if keypoints else CLASSES,
        cls_loss="SigmoidCE" if keypoints else loss,
        rpn_cls_loss=None if dense else "Focal",
    )
    plain = OmegaConf.to_container(model, resolve=False)  # what a saved config has
    assert "use_fed_loss" not in str(plain)
    model.image_labels = None  # of a dataset that is not there
    built = instantiate(model)
    masks = "" if dense or "mask_head" not in model.roi_heads else "polygon"
    points = 17 if keypoints else 0
    step(built, make_batch(masks=masks, keypoints=points, semantic="sem_seg_head" in model))


@pytest.mark.parametrize(
    ("name", "decay"),
    [
        ("coco_mask_rcnn_vitdet_b", 0.7),
        pytest.param("lvis_cascade_mask_rcnn_vitdet_l", 0.8, marks=pytest.mark.slow),
    ],
)
def test_vitdet_trains_with_a_rate_for_every_layer(name, decay):
    pytest.importorskip("timm")
    lazy = LazyConfig.load(find_config(f"lazy/ViTDet/{name}.py"))
    assert len(lazy.model.backbone.net.window_block_indexes) == lazy.model.backbone.net.depth - 4
    narrow_lazy(lazy.model)
    lazy.model.image_labels = None
    for stage in output_layers(lazy.model):
        assert stage.get("test_topk_per_image", 100) == (300 if "lvis" in name else 100)
        if "lvis" in name:
            stage.cls_loss.class_count = [5] * 1203  # counted on LVIS
    model = instantiate(lazy.model)
    step(model, make_batch(masks="polygon"))
    lazy.optimizer.params.lr_factor_func.keywords["num_layers"] = 2  # of the narrow model
    lazy.optimizer.params.model = model
    groups = instantiate(lazy.optimizer).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    rates = {names[id(p)]: g["lr"] for g in groups for p in g["params"]}
    heads = rates["roi_heads.mask_head.predictor.weight"]
    first, last = (rates[f"backbone.net.blocks.{i}.attn.qkv.weight"] for i in (0, 1))
    assert heads == lazy.optimizer.lr
    assert last == pytest.approx(heads * decay) and first == pytest.approx(heads * decay**2)


def narrow_lazy(model):
    """Few proposals and classes; the widths stay, which the configs spread over many keys."""
    if "roi_heads" in model:
        model.proposal_generator.update(pre_nms_topk=(20, 20), post_nms_topk=(20, 20))
        model.roi_heads.batch_size_per_image = 16
    text = OmegaConf.to_yaml(model.backbone)
    if "SyncBN" in text:
        for key in ("bottom_up.stem.norm", "bottom_up.stages.norm", "bottom_up.norm", "norm"):
            if OmegaConf.select(model.backbone, key) == "SyncBN":
                OmegaConf.update(model.backbone, key, "BN")
        if "roi_heads" in model:
            for head in ("box_head", "mask_head"):
                if callable(model.roi_heads[head].get("conv_norm")):
                    model.roi_heads[head].conv_norm = "BN"
    net = model.backbone.get("net")
    if net is not None:
        net.update(img_size=64, embed_dim=48, depth=2, num_heads=3, window_block_indexes=[0])
        model.backbone.square_pad = 64


def test_every_stage_of_a_cascade_gets_losses_and_data_of_its_own():
    model = LazyConfig.load(find_config("common/models/cascade_rcnn.py")).model
    balance_model(model, ["a", "b"], num_classes=5, cls_loss="EQL", box_weight=2.0)
    assert model.roi_heads._target_ is BalancedCascadeROIHeads
    stages = list(model.roi_heads.box_predictors)
    assert len(stages) == 3
    for stage in stages:
        assert stage._target_ is BalancedFastRCNNOutputLayers and stage.box_weight == 2.0
        quantity = stage.cls_loss.class_frequency
        assert list(quantity.names) == ["a", "b"] and quantity.quantity == "class_frequency"
        assert stage.num_classes == 5
    stages[0].cls_loss.lambda_ = 0.5
    assert "lambda_" not in stages[1].cls_loss


def test_federated_keys_of_detectron2_become_losses_of_ours():
    def predictor(**keys):
        model = LazyConfig.load(find_config("common/models/mask_rcnn_fpn.py")).model
        model.roi_heads.box_predictor.update(keys)
        balance_model(model, "a", num_classes=5)
        return model.roi_heads.box_predictor

    federated = {"use_fed_loss": True, "use_sigmoid_ce": True, "fed_loss_num_classes": 7}
    layers = predictor(**federated, get_fed_cls_weights=None)
    assert layers.cls_loss._target_.__name__ == "FederatedLoss" and layers.cls_loss.num_sampled == 7
    assert not set(federated) & set(layers)
    assert predictor(use_sigmoid_ce=True).cls_loss._target_.__name__ == "SigmoidCELoss"
    assert "cls_loss" not in predictor()


def test_a_part_without_a_balanced_form_is_named():
    model = LazyConfig.load(find_config("common/models/mask_rcnn_fpn.py")).model
    model.roi_heads._target_ = RROIHeads
    with pytest.raises(ValueError, match="roi_heads: RROIHeads has no balanced form"):
        balance_model(model, "a")
    model = LazyConfig.load(find_config("common/models/retinanet.py")).model
    with pytest.raises(ValueError, match="'GHMX' is unknown; did you mean GHMC"):
        balance_model(model, "a", cls_loss="GHMX")


warnings.filterwarnings("ignore", "Importing from timm.models.layers", FutureWarning)
