"""Every method with its papers, file, configuration and headline number."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from d2_balance.utils.text import table

COCO, LVIS05, LVIS1 = (
    "configs/COCO-Detection",
    "configs/LVISv0.5-InstanceSegmentation",
    "configs/LVISv1-InstanceSegmentation",
)


@dataclass(frozen=True)
class Method:
    """A row of the list.

    Args:
        names: names of registries, or the keys below MODEL.BALANCE (or of another node) that
            switch it on.
        purpose: what it is for.
        papers: arXiv numbers.
        config: YAML at the paper's setting.
        published: the headline number of the paper or of its authors' release.
        file: where it is, for what is in no registry.
    """

    names: tuple[str, ...]
    purpose: str
    papers: tuple[str, ...] = ()
    config: str = ""
    published: str = ""
    file: str = ""


METHODS = (
    Method(
        ("SigmoidCE", "BalancedCE", "SoftmaxCE"),
        "baselines",
        config=f"{COCO}/retinanet_R_50_FPN_1x_balanced_ce.yaml",
    ),
    Method(
        ("Focal",),
        "easy examples",
        ("1708.02002",),
        f"{COCO}/retinanet_R_50_FPN_1x_focal.yaml",
        "COCO AP 37.4 (R-50 1x, model zoo)",
    ),
    Method(
        ("GHMC", "GHMR"),
        "easy examples, outliers",
        ("1811.05181",),
        f"{COCO}/retinanet_R_50_FPN_1x_ghm.yaml",
        "COCO AP 35.6 -> 37.0 (R-50)",
    ),
    Method(
        ("DR",),
        "background",
        ("1907.10156",),
        f"{COCO}/retinanet_R_50_FPN_1x_dr.yaml",
        "COCO AP 36.1 -> 37.4 (R-50), 39.1 -> 41.7 (R-101)",
    ),
    Method(
        ("SmoothL1", "BETA_DECAY"),
        "box loss that sharpens",
        ("1907.10156v1",),
        f"{COCO}/retinanet_R_50_FPN_1x_dr_beta_decay.yaml",
        "COCO AP 40.6 -> 41.1 (R-101, with DR)",
    ),
    Method(
        ("AP",),
        "background",
        ("1904.06373",),
        f"{COCO}/retinanet_R_50_FPN_ap.yaml",
        "COCO AP 37.4 (R-101, 500 px)",
    ),
    Method(
        ("ALRP",),
        "background, boxes",
        ("2009.13592",),
        f"{COCO}/retinanet_R_50_FPN_alrp.yaml",
        "COCO AP 35.4 (AP-loss) -> 39.0 (R-50, 500 px, 100 epochs)",
    ),
    Method(
        ("RankSort",),
        "background, boxes",
        ("2107.11669",),
        f"{COCO}/faster_rcnn_R_50_FPN_1x_rank_sort.yaml",
        "COCO AP 39.6 (Faster R-50, 12 epochs)",
    ),
    Method(
        ("QFL",),
        "quality of boxes in scores",
        ("2006.04388",),
        f"{COCO}/retinanet_R_50_FPN_1x_qfl.yaml",
    ),
    Method(
        ("VFL",),
        "quality of boxes in scores",
        ("2008.13367",),
        f"{COCO}/retinanet_R_50_FPN_1x_vfl.yaml",
    ),
    Method(
        ("SAMPLING_FREE", "GUIDED_SCALE", "PRIOR_FILE", "CLASS_THRESHOLDS"),
        "background, without sampling",
        ("1909.04868",),
        f"{COCO}/faster_rcnn_R_50_FPN_1x_sampling_free.yaml",
        "COCO AP 36.4 -> 36.8 (RetinaNet R-50), 36.8 -> 38.4 (Faster R-50)",
        "d2_balance/reweight/guided.py",
    ),
    Method(
        ("OHEM",),
        "easy proposals",
        ("1604.03540",),
        f"{COCO}/faster_rcnn_R_50_FPN_1x_ohem.yaml",
        "VOC07 mAP 66.9 -> 69.9 (VGG16)",
    ),
    Method(
        ("HardNegatives",),
        "easy background in dense heads and the RPN",
        ("1512.02325",),
        f"{COCO}/retinanet_R_50_FPN_1x_hard_negatives.yaml",
    ),
    Method(
        ("ECM",),
        "rare classes",
        config=f"{LVIS1}/mask_rcnn_R_50_FPN_1x_ecm.yaml",
        published="LVIS v1 mask AP 26.4 (R-50 1x, cosine classifier)",
    ),
    Method(
        ("ACSL",),
        "rare classes, last layer",
        ("2104.00885",),
        f"{LVIS05}/mask_rcnn_R_50_FPN_1x_acsl.yaml",
        "LVIS v0.5 box AP 21.2 -> 26.4 (Faster R-50)",
    ),
    Method(
        ("ClassWeights",),
        "rare classes, any elementwise loss",
        ("1901.05555",),
        f"{LVIS1}/mask_rcnn_R_50_FPN_1x_class_weights.yaml",
    ),
    Method(
        ("ISR", "ISRN", "CARL"),
        "prime samples (PISA)",
        ("1904.04821",),
        f"{COCO}/faster_rcnn_R_50_FPN_1x_pisa.yaml",
        "COCO AP 36.4 -> 38.4 (Faster R-50)",
    ),
    Method(
        ("IoUBalanced", "BalancedL1"),
        "easy background; outliers (Libra R-CNN)",
        ("1904.02701",),
        f"{COCO}/faster_rcnn_R_50_FPN_1x_libra.yaml",
        "COCO AP 37.4 -> 38.3 (Faster R-50, with its pyramid)",
    ),
    Method(
        ("GIoU", "DIoU", "CIoU"),
        "boxes",
        ("1902.09630", "1911.08287"),
        f"{COCO}/faster_rcnn_R_50_FPN_1x_giou.yaml",
    ),
    Method(
        ("EQL",),
        "rare classes",
        ("2003.05176",),
        f"{LVIS05}/mask_rcnn_R_50_FPN_1x_eql.yaml",
        "LVIS v0.5 mask AP 21.2 -> 24.0, with RFS 26.1 (R-50)",
    ),
    Method(
        ("SoftmaxEQL",),
        "rare classes",
        ("2003.05176",),
        f"{LVIS05}/mask_rcnn_R_50_FPN_1x_softmax_eql.yaml",
    ),
    Method(
        ("DropLoss",),
        "rare classes",
        ("2104.06402",),
        f"{LVIS05}/mask_rcnn_R_50_FPN_1x_drop_loss.yaml",
    ),
    Method(
        ("GOL", "GumbelCE"),
        "rare classes; scores that are rarely high",
        ("2207.10936",),
        f"{LVIS1}/mask_rcnn_R_50_FPN_2x_gol_rfs.yaml",
        "LVIS v1 mask AP 16.4 -> 19.0 (GumbelCE, R-50 1x), 27.7 (GOL, R-50 2x, RFS)",
    ),
    Method(
        ("EQLv2", "SoftmaxEQLv2"),
        "rare classes",
        ("2012.08548",),
        f"{LVIS1}/mask_rcnn_R_50_FPN_1x_eqlv2.yaml",
        "LVIS v1 mask AP 16.1 -> 23.7 (R-50 1x)",
    ),
    Method(
        ("FCBL",),
        "rare classes that are mistaken for others",
        ("2308.02213",),
        f"{LVIS05}/mask_rcnn_R_50_FPN_1x_fcbl.yaml",
        "LVIS v0.5 box AP 22.0 -> 27.8 (Faster R-50, with its feature hallucination)",
    ),
    Method(
        ("EFL",),
        "rare classes, dense heads",
        ("2201.02593",),
        "configs/LVISv1-Detection/retinanet_R_50_FPN_2x_efl.yaml",
        "LVIS v1 box AP 27.5 (R-50)",
    ),
    Method(
        ("Seesaw", "SeesawFocal"),
        "rare classes",
        ("2008.10032",),
        f"{LVIS1}/mask_rcnn_R_50_FPN_2x_seesaw_rfs.yaml",
        "LVIS v1 mask AP 23.7 -> 26.4 (R-50 2x, RFS)",
    ),
    Method(
        ("Federated", "FederatedSoftmax"),
        "classes that are not annotated exhaustively",
        ("2103.07461",),
        f"{LVIS1}/mask_rcnn_R_50_FPN_1x_federated.yaml",
        "LVIS v1 box AP 26.5 -> 28.3 (CenterNet2 R-50)",
    ),
    Method(
        ("BalancedSoftmax",),
        "rare classes",
        ("2007.10740",),
        f"{LVIS05}/mask_rcnn_R_50_FPN_1x_balanced_softmax.yaml",
        "LVIS v0.5 mask AP 24.1 -> 26.4 (R-50)",
    ),
    Method(
        ("LogitAdjusted",),
        "rare classes",
        ("2007.07314",),
        f"{LVIS05}/mask_rcnn_R_50_FPN_1x_logit_adjusted.yaml",
    ),
    Method(
        ("NORCAL.GAMMA",),
        "rare classes, at test time",
        ("2107.02170",),
        f"{LVIS1}/mask_rcnn_R_50_FPN_2x_norcal_rfs.yaml",
        "LVIS v1 mask AP 23.7 -> 25.2 (R-50, RFS)",
        "d2_balance/modeling/postprocess/norcal.py",
    ),
    Method(
        ("CALIBRATION.NAME logit_adjustment",),
        "rare classes, at test time",
        ("2007.07314",),
        "configs/quick_schedules/faster_rcnn_R_18_logit_adjustment_mini_lvis.yaml",
        file="d2_balance/modeling/postprocess/calibration.py",
    ),
    Method(
        ("CALIBRATION.NAME logn",),
        "rare classes, at test time",
        ("2203.17020",),
        f"{LVIS1}/mask_rcnn_R_50_FPN_2x_logn_rfs.yaml",
        file="d2_balance/modeling/postprocess/calibration.py",
    ),
    Method(
        ("CALIBRATION.NAME fracal",),
        "rare classes, at test time",
        ("2410.11774",),
        f"{LVIS1}/mask_rcnn_R_50_FPN_2x_fracal_rfs.yaml",
        "LVIS v1 mask AP 28.5 (FRACAL, R-50 2x, RFS, CARAFE)",
        "d2_balance/modeling/postprocess/calibration.py",
    ),
    Method(
        ("CLASSIFIER cosine", "MASK_PREDICTOR normalized"),
        "large weights of frequent classes",
        ("2008.10032",),
        f"{LVIS1}/mask_rcnn_R_50_FPN_2x_seesaw_cosine_rfs.yaml",
        "LVIS v1 mask AP 26.4 -> 26.8 (Seesaw, R-50 2x, RFS)",
        "d2_balance/modeling/roi_heads/cosine.py",
    ),
    Method(
        ("DISALIGN",),
        "rare classes, second stage",
        ("2103.16370",),
        f"{LVIS1}/mask_rcnn_R_50_FPN_disalign.yaml",
        "LVIS v1 mask AP 18.3 -> 21.3 (R-50 1x)",
        "d2_balance/modeling/roi_heads/disalign.py",
    ),
    Method(
        ("TEST_NMS", "MASKNESS"),
        "crowded objects; poor masks, at test time",
        ("1704.04503", "1912.04488"),
        "configs/quick_schedules/mask_rcnn_R_18_soft_nms_mini_lvis.yaml",
        file="d2_balance/modeling/postprocess/soft_nms.py",
    ),
    Method(
        ("BAGS",),
        "rare classes, last layer",
        ("2006.10408",),
        f"{LVIS05}/mask_rcnn_R_50_FPN_1x_bags.yaml",
        "LVIS v0.5 box AP 21.0 -> 26.0 (Faster R-50)",
    ),
    Method(
        ("LOCE", "LOCE_MEMORY"),
        "rare classes",
        ("2108.07507",),
        f"{LVIS1}/mask_rcnn_R_50_FPN_loce.yaml",
        "LVIS v1 mask AP 23.7 -> 26.6 (R-50 2x)",
    ),
    Method(
        ("DATALOADER.SAMPLER_TRAIN ClassAwareTrainingSampler",),
        "rare classes, by sampling",
        ("1512.05830",),
        "configs/quick_schedules/faster_rcnn_R_18_class_aware_mini_lvis.yaml",
        file="d2_balance/data/samplers.py",
    ),
    Method(
        ("DATALOADER.REPEAT_FORM irfs",),
        "rare classes, by sampling on images and objects",
        ("2305.08069",),
        f"{LVIS1}/mask_rcnn_R_50_FPN_1x_irfs.yaml",
        file="d2_balance/data/samplers.py",
    ),
    Method(
        ("DATALOADER.REPEAT_FORM eirfs",),
        "rare classes, by sampling with exponential factors",
        ("2503.21893",),
        "configs/quick_schedules/faster_rcnn_R_18_eirfs_mini_lvis.yaml",
        file="d2_balance/data/samplers.py",
    ),
    Method(
        ("DATALOADER.COPY_PASTE",),
        "rare classes, pasted into other images",
        ("2012.07177",),
        f"{LVIS1}/mask_rcnn_R_50_FPN_2x_copy_paste_rfs.yaml",
        "LVIS v1 mask AP +3.6 on rare classes over the winner of 2020 (EfficientNet-B7)",
        "d2_balance/data/copy_paste.py",
    ),
    Method(
        ("DATALOADER.SAMPLER_TRAIN RepeatFactorTrainingSampler",),
        "rare classes, by sampling (Detectron2's)",
        ("1908.03195",),
        f"{LVIS05}/mask_rcnn_R_50_FPN_1x_eql_rfs.yaml",
        "LVIS v0.5 mask AP 24.0 -> 26.1 (EQL, R-50)",
    ),
)

ARXIV = "https://arxiv.org/abs/"

HEAD_COLUMNS = {
    "RetinaNet": "RetinaNet",
    "FCOS": "FCOS",
    "RPN": "the RPN",
    "RoI heads": "RoI heads",
}


def method_table(links: bool, root: str = "") -> str:
    """Return the list of methods as a Markdown table.

    Args:
        links: whether files and papers are links.
        root: path from the page to the project's directory, "" or one that ends with a slash.
    """
    rows = []
    for m in METHODS:
        papers = [f"[{p}]({ARXIV}{p})" if links else p for p in m.papers]
        file, config = "", m.config
        if links:
            file = source_file(m)
            file = f"[{Path(file).name}]({root}{file})" if file else "Detectron2"
            config = f"[{Path(config).stem}]({root}{config})"
        names = ", ".join(f"`{n}`" if links else n for n in m.names)
        rows.append([names, m.purpose, ", ".join(papers), file, config, m.published])
    headers = ["name in YAML", "against", "paper", "file", "config", "published"]
    if not links:  # a terminal is narrower
        headers, rows = headers[:3] + headers[5:], [row[:3] + row[5:] for row in rows]
    return table(rows, headers)


def source_file(method: Method) -> str:
    """Return the file of a method from the project's directory on; "" if it is Detectron2's."""
    from d2_balance.config import REGISTRIES

    root = Path(__file__).parents[1]
    for registry in REGISTRIES.values():
        if method.names[0] in registry:
            path = inspect.getfile(registry.get(method.names[0]))
            return Path(path).relative_to(root).as_posix()
    return method.file


def goes_together(cls_name: str) -> dict[str, bool]:
    """Return whether a classification loss works in each head and with each other part, by column.

    The heads are asked with SmoothL1; anchor samplers in RetinaNet, and the other columns in RoI
    heads, whose losses are the most.
    """
    from d2_balance.config import REGISTRIES

    loss, boxes = REGISTRIES["CLS_LOSS"].get(cls_name), REGISTRIES["BOX_LOSS"]
    roi = {"head": "RoI heads", "box_loss": boxes.get("SmoothL1")}
    asked = {column: {**roi, "head": head} for column, head in HEAD_COLUMNS.items()}
    asked["GHMR"] = {**roi, "box_loss": boxes.get("GHMR")}
    for name, cls in sorted(REGISTRIES["REWEIGHTERS"]):
        asked[name] = {**roi, "reweighters": [cls]}
    for name, cls in sorted(REGISTRIES["PROPOSAL_SAMPLER"]):
        asked[name] = {**roi, "proposal_sampler": cls}
    for name, cls in sorted(REGISTRIES["ANCHOR_SAMPLER"]):
        asked[name] = {**roi, "head": "RetinaNet", "anchor_sampler": cls}
    asked["GUIDED_SCALE"] = {**roi, "guided": True}
    for name in ("norcal", "logit_adjustment", "fracal", "logn"):
        asked[name] = {**roi, "calibration": name}
    return {column: _works(loss, **parts) for column, parts in asked.items()}


def _works(loss: type, head: str, **parts: Any) -> bool:
    from d2_balance.modeling import compatibility as rules

    try:
        rules.check_parts(rules.Parts(rules.HEADS[head], loss, **parts))
    except ValueError:
        return False
    return True


def pair_table() -> str:
    """Return which losses work in which heads and with which other parts, as Markdown."""
    from d2_balance.losses import CLS_LOSSES

    names = sorted(name for name, _ in CLS_LOSSES)
    found = {name: goes_together(name) for name in names}
    headers = ["CLS_LOSS", *found[names[0]]]
    rows = [[name, *("x" if works else "" for works in found[name].values())] for name in names]
    return tabulate(
        rows, headers, tablefmt="github", colalign=["left"] + ["center"] * len(rows[0][1:])
    )


def blocks(root: str = "") -> dict[str, str]:
    """Return the generated tables by the name of their markers; `root` as in `method_table`."""
    return {"methods": method_table(links=True, root=root), "pairs": pair_table()}


def root_from(page: Path) -> str:
    """Return the path from a page of the project to its directory; "" for a page elsewhere."""
    try:
        depth = len(page.resolve().relative_to(Path(__file__).parents[1]).parts) - 1
    except ValueError:
        return ""
    return "../" * depth
