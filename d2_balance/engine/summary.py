"""OUTPUT_DIR/summary.md: what was run, the table of results, the data, and plots."""

from __future__ import annotations

import datetime
import logging
import os
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import detectron2
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog

from d2_balance import __version__
from d2_balance.data import ClassCounts, bad_annotations
from d2_balance.data.catalog.register import registered_file
from d2_balance.data.groups import GROUPS
from d2_balance.evaluation.files import file_name_of
from d2_balance.evaluation.plots import plot_ap_by_count
from d2_balance.evaluation.record import TASKS, is_missing, read_per_class, title
from d2_balance.utils.config_tree import changed
from d2_balance.utils.files import read_json, read_records, write_text
from d2_balance.utils.text import count, percent, table

from .hooks.loss_stats import LOSS_STATS_FILE
from .loss_plots import plot_density, plot_losses

_CLASSES_SHOWN = 20
_CLASS_METRICS = ("box AP", "mask AP")
METRICS = ("AP", "AP50", "AP75", "APr", "APc", "APf")

logger = logging.getLogger(__name__)


def write_summary(
    cfg: CfgNode,
    results: Mapping[str, Any],
    *,
    config_file: str = "",
    eval_only: bool = False,
    inert: Sequence[str] = (),
) -> str:
    """Write summary.md and its plots into OUTPUT_DIR, from the files that the run left there.

    Args:
        cfg: config of the run.
        results: as `BalancedTrainer.test` returns them: task to metric to percent, by dataset
            where DATASETS.TEST has several.
        config_file: what the user gave, for the heading.
        eval_only: True where nothing was trained.
        inert: sentences on remedies that changed nothing, see `inert_remedies`.

    Returns:
        Path of summary.md.
    """
    directory = cfg.OUTPUT_DIR
    by_set = {cfg.DATASETS.TEST[0]: results} if len(cfg.DATASETS.TEST) == 1 else results
    per_class = {name: _per_class(directory, name) for name in by_set}
    stem = os.path.splitext(os.path.basename(config_file))[0]
    title = stem or os.path.basename(os.path.normpath(directory))
    metrics = [] if eval_only else read_metrics(os.path.join(directory, "metrics.json"))

    parts = [f"# {title}" + (" (evaluation only)" if eval_only else "")]
    for name, found in by_set.items():
        parts += [f"## Results on {name}", results_table(found, per_class[name], name)]
        parts += class_table(per_class[name])
        parts += [f"- {note}." for note in _notes(directory, name) if "left out" in note]
    parts += ["## Run", _run_table(cfg, config_file, metrics, eval_only)]
    if inert:
        parts += ["Without effect on this data:", "\n".join(f"- {text}" for text in inert)]
    parts += ["## Data", _data(cfg, eval_only)]
    plots = _draw_plots(directory, title, metrics, per_class, eval_only)
    if plots:
        parts += ["## Plots", *(f"![{caption}]({file})" for file, caption in plots.items())]
    path = os.path.join(directory, "summary.md")
    write_text(path, "\n\n".join(parts) + "\n")
    logger.info(f"Summary: {path}")
    return path


def read_metrics(path: str) -> list[dict[str, float]]:
    """Return the records of a metrics.json, by ascending iteration.

    A killed run has logged iterations that its resumption runs again; what was logged last counts.
    """
    records: dict[int, dict[str, float]] = {}
    for record in read_records(path):
        records.setdefault(record["iteration"], {}).update(record)
    return [records[iteration] for iteration in sorted(records)]


def results_table(results: Mapping[str, Any], records: Mapping[str, Any], name: str) -> str:
    """Return a Markdown table of AP in percent, "-" for NaN, and below it the reasons for each "-".

    Frequency groups that none of the classes belongs to are left out.

    Args:
        results: task to metric to percent.
        records: AP by class, as the evaluator writes it; {} where it writes none.
        name: the dataset.
    """
    tasks = [task for task in results if task.partition("_")[0] in TASKS]
    if not tasks:
        return _other_results(results, name)
    groups = {record.get("group") for record in records.values()} - {None}
    left_out = {f"AP{group}" for group in GROUPS if groups and group not in groups}
    metrics = [metric for metric in METRICS if metric not in left_out]
    rows = [[title(task), *(percent(results[task].get(m)) for m in metrics)] for task in tasks]
    text = table(rows, ["", *metrics])
    missing = [m for m in metrics if is_missing(results[tasks[0]].get(m))]
    reasons: dict[str, list[str]] = {}
    for metric in missing:
        reason = _reason(metric, metric in results[tasks[0]], records, name)
        reasons.setdefault(reason, []).append(metric)
    notes = [f"- {', '.join(keys)}: {reason}." for reason, keys in reasons.items()]
    return "\n\n".join([text, "\n".join(notes)] if notes else [text])


def class_table(records: Mapping[str, Any]) -> list[str]:
    """Return a Markdown table of AP by class in percent, rarest class first.

    Args:
        records: AP by class, as the evaluator writes it.

    Returns:
        The table; nothing for more than 20 classes, which the plot by image count shows.
    """
    if not 0 < len(records) <= _CLASSES_SHOWN:
        return []
    tasks = [key for key in ("AP", "AP_segm") if any(key in r for r in records.values())]
    headers = ["class", "training images", "test objects", *_CLASS_METRICS[: len(tasks)]]
    ordered = sorted(records.items(), key=lambda item: item[1].get("train_image_count") or 0)
    rows = [
        [
            name,
            count(r.get("train_image_count")),
            count(r.get("instances", 0)),
            *(percent(r.get(task)) for task in tasks),
        ]
        for name, r in ordered
    ]
    return [table(rows, headers)]


def _reason(metric: str, measured: bool, records: Mapping[str, Any], name: str) -> str:
    if not measured:
        return f"the evaluator of {name} does not measure it"
    group = GROUPS.get(metric.removeprefix("AP"))
    if group is None:
        return f"{name} has no ground truth"
    if records and not any(record.get("group") for record in records.values()):
        return (
            f"the classes of {name} have no frequency groups: neither its file nor the training "
            "set gives image counts"
        )
    return f"{name} has no ground truth of {group} classes"


def _other_results(results: Mapping[str, Any], name: str) -> str:
    rows = [
        [task, metric, percent(value)]
        for task, metrics in results.items()
        for metric, value in metrics.items()
    ]
    if not rows:
        return f"{name} gave no results: it has no annotations, or its evaluator measures nothing."
    return table(rows, ["task", "metric", "value"])


def _run_table(
    cfg: CfgNode, config_file: str, metrics: list[dict[str, float]], eval_only: bool
) -> str:
    balance = cfg.MODEL.BALANCE
    rows = [
        ("config", config_file or "-"),
        ("model", _model(cfg)),
        ("classification loss", _loss(cfg, balance.CLS_LOSS)),
        ("box loss", _loss(cfg, balance.BOX_LOSS)),
    ]
    rows += [("reweighting", _loss(cfg, name)) for name in balance.REWEIGHTERS]
    if balance.PROPOSAL_SAMPLER:
        rows.append(("proposal sampler", _loss(cfg, balance.PROPOSAL_SAMPLER)))
    if balance.ANCHOR_SAMPLER:
        rows.append(("anchor sampler", _loss(cfg, balance.ANCHOR_SAMPLER)))
    if balance.BETA_DECAY.ENABLED:
        rows.append(("beta decay", _arguments(balance.BETA_DECAY, skip=("ENABLED",))))
    if not eval_only:
        rows += [
            ("trained on", ", ".join(cfg.DATASETS.TRAIN)),
            ("iterations", f"{cfg.SOLVER.MAX_ITER:,}, batch {cfg.SOLVER.IMS_PER_BATCH}"),
            ("sampler", cfg.DATALOADER.SAMPLER_TRAIN),
            ("training time", _training_time(metrics)),
        ]
    rows += [
        ("evaluated on", ", ".join(cfg.DATASETS.TEST)),
        ("weights at the start" if not eval_only else "weights", cfg.MODEL.WEIGHTS or "random"),
        ("seed", str(cfg.SEED)),
        ("device", _device(cfg)),
        (
            "versions",
            f"d2_balance {__version__}, Detectron2 {detectron2.__version__}, torch "
            f"{torch.__version__}, Python {platform.python_version()}",
        ),
    ]
    return table(rows, ["", ""])


def _model(cfg: CfgNode) -> str:
    parts = [cfg.MODEL.META_ARCHITECTURE]
    if "RCNN" in parts[0]:
        parts.append(cfg.MODEL.ROI_HEADS.NAME)
    backbone = cfg.MODEL.BACKBONE.NAME
    parts.append(f"ResNet-{cfg.MODEL.RESNETS.DEPTH}" if "_resnet_" in backbone else backbone)
    return ", ".join(parts) + (", masks" if cfg.MODEL.MASK_ON else "")


def _loss(cfg: CfgNode, name: str) -> str:
    if not name:
        return "Detectron2's"
    arguments = _arguments(cfg.MODEL.BALANCE.get(name.upper(), {}))
    return f"{name} ({arguments})" if arguments else name


def _arguments(node: Mapping[str, Any], skip: tuple[str, ...] = ()) -> str:
    return ", ".join(f"{key} {value}" for key, value in node.items() if key not in skip)


def _device(cfg: CfgNode) -> str:
    if cfg.MODEL.DEVICE.startswith("cuda") and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return cfg.MODEL.DEVICE


def _training_time(metrics: list[dict[str, float]]) -> str:
    """Time in training steps, evaluation not counted, from the median times of the log."""
    seconds, before = 0.0, -1.0
    for record in metrics:
        if "time" in record:
            seconds += record["time"] * (record["iteration"] - before)
            before = record["iteration"]
    if before < 0:
        return "not measured"
    return str(datetime.timedelta(seconds=round(seconds)))


def _data(cfg: CfgNode, eval_only: bool) -> str:
    parts = []
    if not eval_only:
        try:
            # what was trained on, not a file's counts
            counts = ClassCounts.from_config(changed(cfg, {"MODEL.BALANCE.CLASS_COUNTS_FILE": ""}))
            parts.append(
                f"Training: {counts.num_images:,} images, "
                f"{int(counts.instance_count.sum()):,} annotations of {counts.num_classes:,} "
                "classes, as the loader sees them (crowds not counted)."
            )
        except (ValueError, KeyError, TypeError) as error:
            # for example a torch dataset in place of dicts; the results must not be lost for it
            parts.append(f"Training: not counted ({error}).")
    train = () if eval_only else cfg.DATASETS.TRAIN
    for name in dict.fromkeys((*train, *cfg.DATASETS.TEST)):
        if name in train and bad_annotations(name) is None and _is_file(name):
            try:
                DatasetCatalog.get(name)  # its counts came from the cache, its report does not
            except ValueError as error:
                parts.append(f"{name}: not checked ({error}).")
        report = bad_annotations(name)
        if report:
            parts.append(f"{name}:\n\n```\n{report.describe()}\n```")
        elif report is not None:
            parts.append(f"{name}: no bad annotations.")
        if report is not None and report.crowds:
            parts.append(f"{name}: {report.describe_crowds()}.")
    return "\n\n".join(parts) or "Nothing was counted."


def _is_file(name: str) -> bool:
    return name in DatasetCatalog and registered_file(name) is not None


def _draw_plots(
    directory: str,
    title: str,
    metrics: list[dict[str, float]],
    per_class: Mapping[str, Mapping[str, Any]],
    eval_only: bool,
) -> dict[str, str]:
    """Draw what the run has data for; return file name to caption."""
    plots = {}
    if any("total_loss" in record for record in metrics):
        plot_losses(metrics, os.path.join(directory, "losses.png"), f"{title}: training losses")
        plots["losses.png"] = "Training losses"
    for name, records in per_class.items():
        for metric, task in (("AP", "box"), ("AP_segm", "mask")):
            drawn = [
                r
                for r in records.values()
                if r.get("train_image_count") is not None and not is_missing(r.get(metric))
            ]
            if drawn:
                file = f"ap_by_count_{file_name_of(name)}_{task}.png"
                caption = f"{task} AP of each class of {name} by training images"
                plot_ap_by_count(dict(records), os.path.join(directory, file), metric, caption)
                plots[file] = caption
    stats = os.path.join(directory, LOSS_STATS_FILE)
    history = read_json(stats) if os.path.isfile(stats) and not eval_only else []
    for source, vectors in history[-1]["stats"].items() if history else ():
        if {"density", "weight"} <= vectors.keys():
            plot_density(history, source, os.path.join(directory, f"density_{source}.png"))
            plots[f"density_{source}.png"] = f"Gradient density of {source}"
    return plots


def _per_class(directory: str, name: str) -> dict[str, dict]:
    path = os.path.join(directory, "inference", f"per_class_ap_{file_name_of(name)}.json")
    return read_per_class(path) if os.path.isfile(path) else {}


def _notes(directory: str, name: str) -> list[str]:
    """Return what the evaluator noted beside its figures."""
    path = os.path.join(directory, "inference", f"evaluation_{file_name_of(name)}.json")
    return read_json(path).get("notes", []) if os.path.isfile(path) else []
