"""The MODEL.BALANCE node, made from the constructors' signatures, so that a default lives once."""

from __future__ import annotations

import inspect
import re
from itertools import chain

from detectron2.config import CfgNode

from d2_balance.losses import BOX_LOSSES, CLS_LOSSES
from d2_balance.modeling.build import argument_key, one_class_losses
from d2_balance.reweight import REWEIGHTERS
from d2_balance.sampling import ANCHOR_SAMPLERS, PROPOSAL_SAMPLERS

REGISTRIES = {
    "CLS_LOSS": CLS_LOSSES,
    "BOX_LOSS": BOX_LOSSES,
    "REWEIGHTERS": REWEIGHTERS,
    "PROPOSAL_SAMPLER": PROPOSAL_SAMPLERS,
    "ANCHOR_SAMPLER": ANCHOR_SAMPLERS,
}
"""Registries by the key below MODEL.BALANCE that takes their names."""

# Keys of earlier versions: full name to the new one and, if the value changes as well, what to set.
RENAMED_KEYS = {
    "MODEL.BALANCE.REWEIGHT": (
        "MODEL.BALANCE.REWEIGHTERS",
        "OHEM, ISRN and IoUBalanced are named in MODEL.BALANCE.PROPOSAL_SAMPLER.",
    ),
    "MODEL.BALANCE.SAMPLE_PROPOSALS": (
        "MODEL.BALANCE.SAMPLING_FREE",
        "SAMPLE_PROPOSALS False is SAMPLING_FREE True.",
    ),
    "MODEL.BALANCE.RPN.SAMPLE": (
        "MODEL.BALANCE.RPN.SAMPLING_FREE",
        "SAMPLE False is SAMPLING_FREE True.",
    ),
    "MODEL.BALANCE.CLS_WEIGHT": ("MODEL.BALANCE.CLS_LOSS_WEIGHT", ""),
    "MODEL.BALANCE.BOX_WEIGHT": ("MODEL.BALANCE.BOX_LOSS_WEIGHT", ""),
    "MODEL.BALANCE.RPN.CLS_WEIGHT": ("MODEL.BALANCE.RPN.CLS_LOSS_WEIGHT", ""),
    "MODEL.BALANCE.RPN.BOX_WEIGHT": ("MODEL.BALANCE.RPN.BOX_LOSS_WEIGHT", ""),
    "MODEL.BALANCE.EQL.LAMBDA_": ("MODEL.BALANCE.EQL.LAMBDA", ""),
    "MODEL.BALANCE.SOFTMAXEQL.LAMBDA_": ("MODEL.BALANCE.SOFTMAXEQL.LAMBDA", ""),
    "MODEL.BALANCE.DROPLOSS.LAMBDA_": ("MODEL.BALANCE.DROPLOSS.LAMBDA", ""),
    "MODEL.BALANCE.EQL.IMAGE_LABELS": ("MODEL.BALANCE.EQL.USE_IMAGE_LEVEL_LABELS", ""),
    "MODEL.BALANCE.FEDERATED.IMAGE_LABELS": ("MODEL.BALANCE.FEDERATED.USE_IMAGE_LEVEL_LABELS", ""),
    "MODEL.BALANCE.CLASS_STATISTICS": ("MODEL.BALANCE.CLASS_COUNTS_FILE", ""),
    "MODEL.BALANCE.TRAIN_ONLY": ("MODEL.BALANCE.TRAINABLE", ""),
    "SOLVER.ACCUMULATE": ("SOLVER.GRAD_ACCUM_STEPS", ""),
    "SOLVER.REFERENCE_BATCH": ("SOLVER.REFERENCE_IMS_PER_BATCH", ""),
    "DATALOADER.MAX_BROKEN_IMAGES": ("DATALOADER.MAX_UNREADABLE_IMAGES", ""),
}


def constructor_node(cls: type) -> CfgNode:
    """One key for each constructor argument that has a default; the others come from the data."""
    parameters = inspect.signature(cls).parameters.values()
    return CfgNode(
        {argument_key(p.name): p.default for p in parameters if p.default is not p.empty}
    )


def add_balance_config(cfg: CfgNode) -> None:
    """Adds MODEL.BALANCE and DATASETS.REGISTER to a Detectron2 config.

    Args:
        cfg: config as `detectron2.config.get_cfg()` returns it; changed in place.
    """
    # Datasets to register: entries [name, annotation JSON, image directory]; COCO or LVIS style
    # is recognised.
    cfg.DATASETS.REGISTER = []

    # Different training images of a process that may be unreadable, at least 0: they are skipped
    # and named, and one more ends the run.
    cfg.DATALOADER.MAX_UNREADABLE_IMAGES = 10

    # How factors of RepeatFactorTrainingSampler and WeightedRepeatFactorTrainingSampler follow from
    # frequencies: "rfs" (LVIS), "rfs_linear" without the root, "irfs" by images and objects,
    # "eirfs" exponential (its paper: REPEAT_THRESHOLD 1e-4).
    cfg.DATALOADER.REPEAT_FORM = "rfs"

    # Factor in the exponent of REPEAT_FORM "eirfs", above 0.
    cfg.DATALOADER.REPEAT_ALPHA = 2.0

    # Objects of rare classes that are pasted into other training images (arXiv:2012.07177).
    cfg.DATALOADER.COPY_PASTE = CfgNode()
    # Whether objects are pasted. Masks need INPUT.MASK_FORMAT bitmask.
    cfg.DATALOADER.COPY_PASTE.ENABLED = False
    # Classes in a smaller fraction of the training images are pasted, the rarer the more often,
    # above 0.
    cfg.DATALOADER.COPY_PASTE.THRESHOLD = 0.001
    # Objects pasted into an image are 0 to so many, all numbers equally often; at least 1.
    cfg.DATALOADER.COPY_PASTE.MAX_OBJECTS = 3
    # Least and largest factor of an object's size, above 0. The paper's large-scale jitter is
    # [0.1, 2.0], its standard jitter [0.8, 1.25].
    cfg.DATALOADER.COPY_PASTE.SCALE = [0.8, 1.25]
    # An object that is partly covered stays if no side of its box moves by more pixels, at least 0,
    cfg.DATALOADER.COPY_PASTE.MAX_SHIFT = 10.0
    # or if more pixels of it than that are left, at least 0.
    cfg.DATALOADER.COPY_PASTE.MIN_PIXELS = 300
    # Memory in each worker for objects that were read, at least 0. Another image must be read for
    # an object that is not among them.
    cfg.DATALOADER.COPY_PASTE.CACHE_MB = 64.0

    # Detections that the evaluation counts: per image with LVIS rules, per image and class with
    # COCO rules; 0 takes the rules' own limits, 300 and 100. TEST.DETECTIONS_PER_IMAGE is what the
    # model gives.
    cfg.TEST.EVAL_MAX_DETS = 0

    # Best detections of each class over a test set that are kept, without a limit per image, for
    # AP-fixed and AP-pool (arXiv:2102.01066: 10000); 0 is off. Models with masks run twice. The
    # model's own SCORE_THRESH_TEST holds as well: set it to 0.
    cfg.TEST.DETECTIONS_PER_CLASS = 0

    # Whether evaluations have boundary AP (arXiv:2103.16562) beside mask AP.
    cfg.TEST.BOUNDARY_AP = False

    # Variants of an image (sizes, flipped) that go through the model at once with TEST.AUG, at
    # least 1. TEST.AUG.ENABLED holds for --eval-only; evaluations while training are plain.
    cfg.TEST.AUG.IMS_PER_BATCH = 1

    # Weights of training sets, entries [name, factor above 0], for the samplers whose names begin
    # with Weighted; sets without one have 1.
    cfg.DATASETS.TRAIN_REPEAT_FACTOR = []

    # Files of objects that a training set leaves out: entries [dataset, COCO-style JSON] or
    # [dataset, JSON, class map]. Background inside their boxes does not count.
    cfg.DATASETS.IGNORE_REGIONS = []

    # Training sets of other classes, mapped to those of a target set: entries {NAME, JSON, IMAGES,
    # TARGET}, with CLASS_MAP (file) and EXHAUSTIVE (whether shared classes without annotation are
    # absent) where needed; see docs/external_data.md.
    cfg.DATASETS.EXTERNAL = []

    # FCOS, where MODEL.META_ARCHITECTURE is BalancedFCOS. Detectron2 has no keys for its FCOS; the
    # names are those of MODEL.RETINANET.
    cfg.MODEL.FCOS = CfgNode()
    # Number of classes.
    cfg.MODEL.FCOS.NUM_CLASSES = 80
    # Feature maps of the head. A map of stride s takes boxes whose farthest side is 4 s to 8 s from
    # the anchor point; the first has no lower bound and the last no upper one.
    cfg.MODEL.FCOS.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    # Convolutions before the outputs of the head.
    cfg.MODEL.FCOS.NUM_CONVS = 4
    # Normalisation of these convolutions; "" for none.
    cfg.MODEL.FCOS.NORM = "GN"
    # Initial probability of every class, in (0, 1); sets the bias of the classifier.
    cfg.MODEL.FCOS.PRIOR_PROB = 0.01
    # Anchor points are positive that far from the centre of a box at most, in strides.
    cfg.MODEL.FCOS.CENTER_SAMPLING_RADIUS = 1.5
    # Weight of positives in the stock focal loss.
    cfg.MODEL.FCOS.FOCAL_LOSS_ALPHA = 0.25
    # Exponent of the stock focal loss.
    cfg.MODEL.FCOS.FOCAL_LOSS_GAMMA = 2.0
    # Detections below this score are dropped; it is the root of class score times centerness.
    cfg.MODEL.FCOS.SCORE_THRESH_TEST = 0.2
    # Detections per feature map that go into non-maximum suppression.
    cfg.MODEL.FCOS.TOPK_CANDIDATES_TEST = 1000
    # IoU of non-maximum suppression.
    cfg.MODEL.FCOS.NMS_THRESH_TEST = 0.6

    _C = cfg.MODEL.BALANCE = CfgNode()
    # Classification loss, a name of CLS_LOSSES; "" keeps the stock loss of the head.
    _C.CLS_LOSS = ""
    # Box loss, a name of BOX_LOSSES; "" keeps the stock loss of the head.
    _C.BOX_LOSS = ""
    # Names of REWEIGHTERS, whose weights multiply. They need elementwise losses.
    _C.REWEIGHTERS = []
    # Name of PROPOSAL_SAMPLERS, which samples the proposals of RoI heads; "" is Detectron2's random
    # sampling.
    _C.PROPOSAL_SAMPLER = ""
    # Name of ANCHOR_SAMPLERS, which keeps some anchors of RetinaNet or FCOS by their loss; "" keeps
    # all. It needs an elementwise loss that does not weigh difficulty itself.
    _C.ANCHOR_SAMPLER = ""
    # Whether RoI heads train on all proposals that are not ignored, in place of
    # BATCH_SIZE_PER_IMAGE sampled ones (arXiv:1909.04868).
    _C.SAMPLING_FREE = False
    # With SAMPLING_FREE: positives of an image that train mask and keypoint heads at most.
    _C.MASKS_PER_IMAGE = 128
    # Fraction of a background anchor's or proposal's area, in (0, 1], that an ignore region must
    # hold for the anchor or proposal not to count; see DATASETS.IGNORE_REGIONS.
    _C.IGNORE_IOA = 0.5
    # Factor of the classification loss.
    _C.CLS_LOSS_WEIGHT = 1.0
    # Factor of the box loss; the GHM-R release uses 10.
    _C.BOX_LOSS_WEIGHT = 1.0
    # Initial probability of every class in RoI heads without a softmax; sets the bias of the
    # classifier. RetinaNet has its own key, MODEL.RETINANET.PRIOR_PROB.
    _C.PRIOR_PROB = 0.001
    # Whether RoI heads without a softmax keep Detectron2's K + 1 outputs and ignore the last, so
    # that model-zoo weights fit; False: K outputs, as the EQL authors' weights have.
    _C.BACKGROUND_COLUMN = True
    # Guided loss scaling (arXiv:1909.04868): the classification loss is brought to this many times
    # the size of the box loss; 0 is off. The authors use 1 in RetinaNet and 2 in RoI heads.
    _C.GUIDED_SCALE = 0.0
    # Bound of the ratio of box loss to classification loss in guided scaling, above 0.
    _C.GUIDED_MAX_RATIO = 1e4
    # Parts of parameter names, such as box_predictor.cls_score: all other parameters and their
    # batch norms are frozen (decoupled training); empty trains the whole model.
    _C.TRAINABLE = []
    # JSON file with class counts (ClassCounts.save), also below $DETECTRON2_DATASETS; "" counts
    # on DATASETS.TRAIN; "checkpoint" takes them from the loaded weights, for inference only.
    _C.CLASS_COUNTS_FILE = ""

    # JSON file of `d2-balance prior`: classifiers start at the counted fraction of foreground in
    # place of PRIOR_PROB; "" is off.
    _C.PRIOR_FILE = ""
    # Whether a class's score threshold is its fraction of the samples, by PRIOR_FILE, in place of
    # SCORE_THRESH_TEST (arXiv:1909.04868, equation 7).
    _C.CLASS_THRESHOLDS = False

    # Losses of the RPN, where MODEL.PROPOSAL_GENERATOR.NAME is BalancedRPN. Sub-nodes hold the
    # arguments of those that work with one class.
    _C.RPN = CfgNode()
    # Classification loss of the RPN; "" keeps cross-entropy.
    _C.RPN.CLS_LOSS = ""
    # Box loss of the RPN; "" keeps MODEL.RPN.BBOX_REG_LOSS_TYPE.
    _C.RPN.BOX_LOSS = ""
    # Factor of the RPN's classification loss, times MODEL.RPN.LOSS_WEIGHT.
    _C.RPN.CLS_LOSS_WEIGHT = 1.0
    # Factor of the RPN's box loss, times MODEL.RPN.LOSS_WEIGHT and BBOX_REG_LOSS_WEIGHT.
    _C.RPN.BOX_LOSS_WEIGHT = 1.0
    # As MODEL.BALANCE.GUIDED_SCALE, in the RPN; the authors use 1.
    _C.RPN.GUIDED_SCALE = 0.0
    # Whether the RPN trains on all anchors that are not ignored, in place of BATCH_SIZE_PER_IMAGE.
    _C.RPN.SAMPLING_FREE = False
    # As MODEL.BALANCE.ANCHOR_SAMPLER, in place of BATCH_SIZE_PER_IMAGE random anchors.
    _C.RPN.ANCHOR_SAMPLER = ""
    # Initial probability of an object; 0.5 is Detectron2's bias of 0.
    _C.RPN.PRIOR_PROB = 0.5

    # Schedule that lowers the beta of SmoothL1 from MODEL.BALANCE.SMOOTHL1.BETA (stock heads: from
    # their own beta); with t the iteration:
    _C.BETA_DECAY = CfgNode()
    # Whether the schedule runs.
    _C.BETA_DECAY.ENABLED = False
    # "floor": beta - AMOUNT * floor(t / PERIOD); "sawtooth": beta - AMOUNT * (t mod PERIOD), the
    # printed formula; "linear": beta - AMOUNT * t / PERIOD.
    _C.BETA_DECAY.MODE = "floor"
    # How much beta falls per step, at least 0.
    _C.BETA_DECAY.AMOUNT = 0.01
    # Iterations per step, at least 1.
    _C.BETA_DECAY.PERIOD = 10000
    # Beta never falls below this, at least 0.
    _C.BETA_DECAY.MIN = 0.0

    # Calibration of the class logits after training, at test time only.
    _C.CALIBRATION = CfgNode()
    # "logit_adjustment", "fracal" or "logn"; "" is off. NorCal has a key of its own.
    _C.CALIBRATION.NAME = ""
    # Link function of the class's frequency: "raw", "base2", "base10", "smooth", "prob", "normit"
    # or "gombit"; "" is that of the method, raw for logit_adjustment and base10 for fracal.
    _C.CALIBRATION.LINK = ""
    # Frequencies are of "images" or of "objects".
    _C.CALIBRATION.COUNT = "images"
    # Count whose shift is 0 with logit_adjustment: "none" raises all classes against background,
    # "one" lowers all, "average" leaves classes of average frequency; fracal has "average".
    _C.CALIBRATION.REFERENCE = "none"
    # Strength of logit_adjustment, at least 0.
    _C.CALIBRATION.TAU = 1.0
    # Exponent of the fractal dimension of fracal, at least 0.
    _C.CALIBRATION.POWER = 2.0
    # JSON file of `d2-balance calibrate`: fractal dimensions for fracal, which "" counts on
    # DATASETS.TRAIN; mean and variance of the logits of these weights for logn, which "" collects
    # at the end of a training. Both are saved with the weights, and "" finds them there.
    _C.CALIBRATION.STATISTICS = ""
    # Training batches of logn's pass at the end of a training, at least 0; 0 is one epoch.
    _C.CALIBRATION.MAX_ITER = 0
    # Fraction of a new batch in the moving averages of the authors' logn, in [0, 1): 1e-4 in their
    # code, 5e-5 in their configs; 0 has the exact mean and variance.
    _C.CALIBRATION.MOMENTUM = 0.0

    # Layer that gives the class logits of RoI heads: "linear", or "cosine" of normalised features
    # and weights (in each stage of a cascade).
    _C.CLASSIFIER = "linear"
    # Last layer of mask heads: "conv", or "normalized" as the cosine classifier.
    _C.MASK_PREDICTOR = "conv"
    # The cosine classifier and the normalised mask predictor.
    _C.COSINE = CfgNode()
    # Factor of the cosine, above 0.
    _C.COSINE.TEMPERATURE = 20.0
    # Exponent of the norms, above 0; 1 gives a cosine.
    _C.COSINE.POWER = 1.0
    # Whether the temperature is learned.
    _C.COSINE.LEARNED = False
    # Whether RoI heads align the class logits of a trained model (DisAlign, arXiv:2103.16370);
    # TRAINABLE ["box_predictor.align"] trains that alone.
    _C.DISALIGN = False

    # Suppression of overlapping boxes of a class at test time, in RoI heads and dense heads.
    _C.TEST_NMS = CfgNode()
    # "hard" is Detectron2's, "linear" and "gaussian" lower scores in place of dropping boxes.
    _C.TEST_NMS.METHOD = "hard"
    # IoU above which linear lowers scores, in [0, 1].
    _C.TEST_NMS.IOU = 0.3
    # Width of the Gaussian, above 0.
    _C.TEST_NMS.SIGMA = 0.5
    # Boxes whose score falls below are dropped, at least 0; with LVIS's score threshold of 1e-4 at
    # most that.
    _C.TEST_NMS.MIN_SCORE = 0.001
    # Multiplies scores by the mean probability of the pixels above this threshold in their mask,
    # in (0, 1); 0 is off. It changes the scores of boxes as well.
    _C.MASKNESS = 0.0

    # NorCal (arXiv:2107.02170) of RoI heads and dense heads.
    _C.NORCAL = CfgNode()
    # Exponent of the class's image count that its score is divided by, at least 0; 0 is off. Choose
    # it on training images.
    _C.NORCAL.GAMMA = 0.0

    # Memory of RoI features of CLS_LOSS LOCE (arXiv:2108.07507, section 3.4), in RoI heads:
    # features of classes with low mean scores train again. Cascade stages have one each.
    _C.LOCE_MEMORY = CfgNode()
    # Whether there is a memory.
    _C.LOCE_MEMORY.ENABLED = False
    # Entries of all classes together, at least one per class. An entry of 256 x 7 x 7 takes 25 kB
    # on the device and in checkpoints; the paper has room for PER_CLASS entries of every class
    # (2.4 GB for LVIS v1).
    _C.LOCE_MEMORY.CAPACITY = 4096
    # Entries of one class at most, at least 1.
    _C.LOCE_MEMORY.PER_CLASS = 80
    # Classes sampled in each step, at least 1.
    _C.LOCE_MEMORY.CLASSES_PER_STEP = 8
    # Entries sampled of each of these classes, at least 1.
    _C.LOCE_MEMORY.FEATURES_PER_CLASS = 4

    for name, cls in chain(*REGISTRIES.values()):
        node = constructor_node(cls)
        if node:
            _C[name.upper()] = node
    for registry in (CLS_LOSSES, BOX_LOSSES, ANCHOR_SAMPLERS):
        for name, cls in one_class_losses(registry):
            node = constructor_node(cls)
            if node:
                _C.RPN[name.upper()] = node
    for old, (new, note) in RENAMED_KEYS.items():
        cfg.register_renamed_key(old, new, message=note or None)
    add_training_config(cfg)


def add_training_config(cfg: CfgNode) -> None:
    """Adds the keys of the training loop: precision, accumulation, averages, best model, logs."""
    # Type of mixed precision where SOLVER.AMP.ENABLED is True: "fp16", whose gradients are scaled,
    # or "bf16". Losses are computed in float32.
    cfg.SOLVER.AMP.PRECISION = "fp16"
    # Scale of the loss at the start, for fp16; above 0.
    cfg.SOLVER.AMP.INIT_SCALE = 65536.0
    # Overflows in a row that end the run; each alone skips one step. At least 1.
    cfg.SOLVER.AMP.MAX_SKIPPED = 50
    # Micro-batches that the images of a rank in IMS_PER_BATCH are split into, at least 1: less
    # memory for the same batch. Costs a second forward pass.
    cfg.SOLVER.GRAD_ACCUM_STEPS = 1
    # Seconds after Ctrl-C or SIGTERM, above 0, in which a run must have saved its checkpoint; it
    # ends then without one.
    cfg.SOLVER.INTERRUPT_TIMEOUT = 30.0
    # IMS_PER_BATCH that learning rate, warm-up, steps, length and periods of the config were chosen
    # for; they are scaled where IMS_PER_BATCH is another. 0 is off.
    cfg.SOLVER.REFERENCE_IMS_PER_BATCH = 0

    # Moving average of the weights.
    cfg.SOLVER.EMA = CfgNode()
    # Whether it is kept, evaluated in place of the weights, and saved as model_final_ema.pth.
    cfg.SOLVER.EMA.ENABLED = False
    # Fraction of the old average, in [0, 1); smaller in the first steps t: (1 + t) / (10 + t).
    cfg.SOLVER.EMA.DECAY = 0.9998

    # The best model by a metric, saved as model_best.pth.
    cfg.TEST.BEST = CfgNode()
    # Name of the metric as metrics.json has it: bbox/AP, bbox/APr, segm/APr, val_loss/total_loss;
    # with several test sets <dataset>/bbox/AP. "" is off.
    cfg.TEST.BEST.METRIC = ""
    # "max", or "min" for losses.
    cfg.TEST.BEST.MODE = "max"
    # Evaluations without a better TEST.BEST.METRIC that end the run; 0 is off.
    cfg.TEST.BEST.PATIENCE = 0
    # How much better a metric must be to count as better for PATIENCE, at least 0.
    cfg.TEST.BEST.MIN_DELTA = 0.0

    # Losses on DATASETS.TEST while training, as val_loss/<name>.
    cfg.TEST.LOSS = CfgNode()
    # Iterations between two measurements; 0 is off.
    cfg.TEST.LOSS.PERIOD = 0
    # Images of each dataset, the first ones of its file; 0 takes all.
    cfg.TEST.LOSS.IMAGES = 0
    # Whether AP of every class goes to TensorBoard after each evaluation.
    cfg.TEST.CLASS_AP = True

    # Logs besides metrics.json and TensorBoard.
    cfg.LOG = CfgNode()
    # Whether metrics.csv is written: lines of iteration, name, value.
    cfg.LOG.CSV = False
    # Project of Weights & Biases to log to; "" is off. Needs the package wandb.
    cfg.LOG.WANDB_PROJECT = ""
    # "online", or "offline" for machines without network.
    cfg.LOG.WANDB_MODE = "online"
    # Experiment of MLflow to log to; "" is off. Needs the package mlflow or mlflow-skinny.
    cfg.LOG.MLFLOW_EXPERIMENT = ""
    # Where MLflow keeps its runs, such as http://HOST:5000; "" is OUTPUT_DIR/mlruns.
    cfg.LOG.MLFLOW_URI = ""
    # Images of the first test set whose detections are drawn after each evaluation, for
    # TensorBoard, Weights & Biases and MLflow, at least 0.
    cfg.LOG.IMAGES = 4
    # Score from which these detections are drawn, in [0, 1].
    cfg.LOG.IMAGES_MIN_SCORE = 0.3

    _C = cfg.MODEL.BALANCE
    # Whether torch.compile compiles the losses; where that fails they run as ever, with a warning.
    _C.COMPILE = False
    # Parts of parameter names that are not taken from MODEL.WEIGHTS, such as cls_score where the
    # number of classes is the same and the classes are others.
    _C.REINITIALIZE = []


def argument_help(cls: type) -> dict[str, str]:
    """The Args section of a class docstring: argument name to its text."""
    doc = inspect.getdoc(cls) or ""
    section = re.search(r"^Args:\n((?:[ ]+.*\n?|\n)+)", doc, re.MULTILINE)
    entries = (
        re.findall(r"^    (\w+): ((?:.*)(?:\n        .*)*)", section.group(1), re.M)
        if section
        else []
    )
    return {name: " ".join(text.split()) for name, text in entries}
