"""Files of an evaluation: predictions that every rank writes for itself."""

import json
import os
import re
from collections.abc import Iterator, Mapping

from d2_balance.utils.files import atomic_path
from d2_balance.utils.progress import progress


def file_name_of(dataset_name: str) -> str:
    """The dataset's name with every character that a file name cannot carry as `_`."""
    return re.sub(r"[^\w.+-]", "_", dataset_name)


class RankPredictions:
    """Detections of one dataset, one file per rank, one line per image.

    Memory does not grow with the dataset, and rank 0 reads the files instead of gathering
    pickled objects. A line is a JSON head and the JSON list of detections, parted by a tab
    (JSON text never holds a bare tab), so that merging moves text without parsing it.

    Args:
        directory: directory that all ranks share; made where it is missing.
        rank: rank whose file this object writes. A file left there by a killed run is emptied.
    """

    def __init__(self, directory: str, rank: int):
        self.directory = directory
        self._own = self._path(rank)
        os.makedirs(directory, exist_ok=True)
        with open(self._own, "w"):
            pass

    def append(self, image_id: int | str, detections: list[dict], has_masks: bool) -> None:
        """Add one image. `detections` are COCO results; `has_masks` is kept for empty lists."""
        head = json.dumps({"image_id": image_id, "masks": has_masks})
        with open(self._own, "a") as f:
            f.write(f"{head}\t{json.dumps(detections)}\n")

    def keep(self, floors: Mapping[int, float]) -> None:
        """Drop detections below a score from this rank's file.

        Args:
            floors: the least score by category id.
        """
        with atomic_path(self._own) as temporary, open(temporary, "w") as f:
            for head, body in self._read(self._own):
                found = [d for d in json.loads(body) if d["score"] >= floors[d["category_id"]]]
                f.write(f"{head}\t{json.dumps(found)}\n")

    def heads(self, ranks: list[int]) -> Iterator[tuple[int | str, bool]]:
        """Yield (image id, whether the model gives masks) of the given ranks."""
        for text, _ in self._lines(ranks):
            head = json.loads(text)
            yield head["image_id"], head["masks"]

    def write_results(self, ranks: list[int], path: str) -> None:
        """Write all detections as one COCO result list to `path`, atomically."""
        with atomic_path(path) as temporary, open(temporary, "w") as f:
            f.write("[")
            separator = ""
            lines = progress(self._lines(ranks), "merging predictions")
            for _, body in lines:
                detections = body.strip()[1:-1]
                if detections:
                    f.write(f"{separator}\n{detections}")
                    separator = ","
            f.write("\n]\n")

    def remove(self, ranks: list[int]) -> None:
        """Delete the files of the given ranks, and the directory when nothing else is in it."""
        for rank in ranks:
            if os.path.exists(self._path(rank)):
                os.remove(self._path(rank))
        if os.path.isdir(self.directory) and not os.listdir(self.directory):
            os.rmdir(self.directory)

    def _path(self, rank: int) -> str:
        return os.path.join(self.directory, f"predictions_rank{rank}")

    def _lines(self, ranks: list[int]) -> Iterator[tuple[str, str]]:
        for rank in ranks:
            path = self._path(rank)
            if not os.path.exists(path):
                raise FileNotFoundError(
                    f"{path}: the predictions of rank {rank} are missing; "
                    "the evaluator's output_dir must be on a file system that all ranks share"
                )
            yield from self._read(path)

    @staticmethod
    def _read(path: str) -> Iterator[tuple[str, str]]:
        with open(path) as f:
            for line in f:
                head, body = line.split("\t", 1)
                yield head, body
