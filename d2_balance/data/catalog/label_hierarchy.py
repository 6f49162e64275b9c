"""A hierarchy of labels, as Open Images publishes it, and what labels imply through it.

What is a dog is an animal: a positive label or a box holds for every class above. Where no animal
is, no dog is: a negative label holds for every class below. Parts (the wheel of a car) imply
nothing.
"""

from collections.abc import Iterable, Mapping
from typing import Any

CHILDREN = "Subcategory"


class LabelHierarchy:
    """Ancestors and descendants of each label; a label may have several parents.

    Args:
        root: node with `LabelName` and the nodes below it under `Subcategory`, as in
            bbox_labels_600_hierarchy.json.
        source: name of its file, for messages.

    Raises:
        ValueError: a node without label, or a label below itself.
    """

    def __init__(self, root: Mapping[str, Any], source: str):
        self._above: dict[str, set[str]] = {}
        self._below: dict[str, set[str]] = {}
        self._add(root, (), source)

    @property
    def labels(self) -> frozenset[str]:
        """Every label of the hierarchy, the root included."""
        return frozenset(self._above)

    def ancestors(self, label: str) -> frozenset[str]:
        """Labels above one label, itself included; a label that the hierarchy lacks is alone."""
        return frozenset(self._above.get(label, ())) | {label}

    def descendants(self, label: str) -> frozenset[str]:
        """Labels below one label, itself included."""
        return frozenset(self._below.get(label, ())) | {label}

    def expand(
        self, positives: Iterable[str], negatives: Iterable[str]
    ) -> tuple[set[str], set[str]]:
        """Everything that the labels of one image imply.

        Returns:
            Positive and negative labels. Where both claim a label, it is positive: an annotator
            who saw a puppy outweighs one who saw no animal.
        """
        yes = {up for label in positives for up in self.ancestors(label)}
        no = {down for label in negatives for down in self.descendants(label)}
        return yes, no - yes

    def _add(self, node: Mapping[str, Any], above: tuple[str, ...], source: str) -> None:
        label = node.get("LabelName") if isinstance(node, Mapping) else None
        if not isinstance(label, str):
            raise ValueError(f"{source}: a node below {above[-1:] or 'the top'} has no 'LabelName'")
        if label in above:
            raise ValueError(f"{source}: the label {label!r} stands below itself")
        self._above.setdefault(label, set()).update(above)
        self._below.setdefault(label, set())
        for ancestor in above:
            self._below[ancestor].add(label)
        for child in node.get(CHILDREN, ()):
            self._add(child, (*above, label), source)
