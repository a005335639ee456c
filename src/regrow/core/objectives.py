"""Objectives: what a network's outputs are trained for and scored by, chosen from labels and outputs or by the user."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from regrow.core.errors import InputError, first_line
from regrow.core.sources import MISFITS, Batch, describe, logits_in

# A user's loss: (what the network returned, labels of the batch) → scalar
LossFunction = Callable[[object, object], Tensor]
# The class label of a position that is not counted
IGNORED = -100


@dataclass(frozen=True)
class Score:
    """Sum (``total``) and sum of squares of ``count`` scores, so that those of batches can be added by ``+``."""

    total: float = 0.0
    squares: float = 0.0
    count: int = 0

    def __add__(self, other: "Score") -> "Score":
        return Score(self.total + other.total, self.squares + other.squares, self.count + other.count)

    @property
    def mean(self) -> float:
        """The mean score, higher is better; NaN without scores."""
        return self.total / self.count if self.count else float("nan")

    @property
    def error(self) -> float:
        """The standard error of the mean, √((mean of squares − mean²) / n); NaN without scores."""
        if not self.count:
            return float("nan")
        return (max(self.squares / self.count - self.mean**2, 0.0) / self.count) ** 0.5


@dataclass(frozen=True)
class Objective:
    """What a network is trained for: a loss of its outputs, and a score per example.

    Args:
        name: Its name: one of ``OBJECTIVES``, or ``custom``.
        loss: (what the network returned, labels) → the mean loss over the labelled positions, a scalar.
        metric: The name of the score.
        score: (what the network returned, labels) → the score of each labelled position, ``[positions]``; higher is
            better. ``None``: the negative loss serves as the score.
    """

    name: str
    loss: LossFunction
    metric: str = "negative loss"
    score: Callable[[object, Tensor], Tensor] | None = None

    def compute_loss(self, output: object, batch: Batch) -> Tensor:
        """Return the mean loss of a batch, a scalar; raise ``InputError`` if its labels do not fit the ``output``."""
        where = f"{batch.where}: " if batch.where else ""
        try:
            loss = self.loss(output, batch.labels)
        except InputError as error:
            raise InputError(f"{where}{error}") from error
        except MISFITS as error:
            if not where or type(error) not in MISFITS:
                raise
            raise InputError(
                f"{where}labels ({describe(batch.labels)}) do not fit the loss: {type(error).__name__}: "
                f"{first_line(error)}; give labels as the loss takes them"
            ) from error
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            shape = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise InputError(f"the loss must be a scalar tensor, got {shape}; reduce it, for example with .mean()")
        return loss.reshape(())

    def compute_score(self, output: object, batch: Batch) -> Score:
        """Return the scores of a batch, for which the network returned ``output``, as sums over labelled positions.

        Without a score function or labels each of them counts as the negative mean loss.
        """
        if self.score is None or not isinstance(batch.labels, Tensor):
            value, n = -float(self.compute_loss(output, batch)), batch.size
            return Score(value * n, value**2 * n, n)
        scores = self.score(output, batch.labels).double()
        return Score(float(scores.sum()), float(scores.square().sum()), scores.numel())


def class_loss(output: object, labels: object) -> Tensor:
    """Return the mean cross-entropy of class labels in nats, a scalar; the label −100 is not counted.

    ``output``: holds logits (:func:`regrow.core.sources.logits_in`), ``[..., classes]`` or ``[N, classes, ...]``; of a
    segmentation, they are resized to its masks.

    >>> round(float(class_loss(torch.zeros(2, 4), torch.tensor([1, -100]))), 4)
    1.3863
    """
    classes = _check_tensor(labels)
    logits = _resize(logits_in(output), classes)
    check_classes(logits, classes)
    if logits.dim() > 2 and logits.shape[:-1] == classes.shape:
        logits, classes = logits.flatten(0, -2), classes.flatten()
    return F.cross_entropy(_to_float(logits), classes, ignore_index=IGNORED)


def check_classes(logits: Tensor, labels: Tensor) -> None:
    """Raise InputError if logits, ``[..., classes]`` or ``[N, classes, ...]``, are of a single class."""
    if logits.dim() > 1 and logits.shape[-1 if logits.shape[:-1] == labels.shape else 1] == 1:
        raise InputError(
            f"labels are classes, and the network has one output for each ({describe(logits)}), which is no choice; "
            "give labels as floats of the outputs' shape, such as labels.float()[:, None]"
        )


def _resize(logits: Tensor, masks: Tensor) -> Tensor:
    """Return the logits of a segmentation, ``[N, classes, h, w]``, at the size of its masks; others as they are."""
    is_small = logits.dim() == 4 and masks.dim() == 3 and logits.shape[2:] != masks.shape[1:]
    if not is_small or logits.shape[:-1] == masks.shape or len(logits) != len(masks):
        return logits
    return F.interpolate(logits, size=masks.shape[1:], mode="bilinear", align_corners=False)


def class_score(output: object, labels: Tensor) -> Tensor:
    """Return per labelled position whether the greatest logit is that of its class; arguments as :func:`class_loss`.

    The result is ``[positions]`` bool; positions with the label −100 are left out.
    """
    return select_logits(output, labels).argmax(-1) == labels[labels != IGNORED]


def select_logits(output: object, labels: Tensor) -> Tensor:
    """Return the logits of all labelled positions, ``[positions, classes]``; arguments as :func:`class_loss`."""
    logits = put_classes_last(output, labels)
    return logits[labels.to(logits.device) != IGNORED]


def put_classes_last(output: object, labels: Tensor) -> Tensor:
    """Return the logits of all positions, ``[..., classes]``; arguments as :func:`class_loss`."""
    logits = _resize(logits_in(output), labels)
    return logits if logits.shape[:-1] == labels.shape else logits.movedim(1, -1)  # [N, classes, …]


def binary_loss(output: object, labels: object) -> Tensor:
    """Return the mean binary cross-entropy in nats, one label per logit; ``InputError`` if one is not from 0 to 1."""
    logits, chances = _to_float(logits_in(output)), _check_tensor(labels)
    if bool(((chances < 0) | (chances > 1)).any()):
        raise InputError('labels of the loss multi-label are from 0 to 1; give loss="regression" for other values')
    return F.binary_cross_entropy_with_logits(logits, chances.to(logits.dtype).reshape(logits.shape))


def binary_score(output: object, labels: Tensor) -> Tensor:
    """Return per label whether its logit is on the right side of 0 (a label above 0.5 is true), ``[labels]`` bool."""
    return (logits_in(output).flatten() > 0) == (labels.flatten() > 0.5)


def squared_loss(output: object, labels: object) -> Tensor:
    """Return the mean squared error of the predictions in a network's output, one per label, as a scalar."""
    values = _to_float(logits_in(output))
    return F.mse_loss(values, _check_tensor(labels).to(values.dtype).reshape(values.shape))


def squared_score(output: object, labels: Tensor) -> Tensor:
    """Return the negative squared error of each prediction in a network's output, ``[labels]`` float64."""
    return -(logits_in(output).flatten().double() - labels.flatten().double()).square()


def returned_loss(output: object, labels: object) -> Tensor:
    """Return the loss in a network's output: ``.loss``, ``["loss"]``, or the sum of a dict of losses; else InputError.

    Detection models of torchvision return such a dict in training mode; transformers models return ``.loss`` if the
    batch holds their labels. The labels are not used: the network has seen them among its inputs.
    """
    loss = getattr(output, "loss", None)
    if loss is None and isinstance(output, Mapping):
        loss = output.get("loss")
        scalars = [part.reshape(()) for part in output.values() if isinstance(part, Tensor) and part.numel() == 1]
        if loss is None and scalars and len(scalars) == len(output):
            loss = torch.stack(scalars).sum()
    if not isinstance(loss, Tensor):
        raise InputError(
            f"there are no labels, and the network returned no loss but a {type(output).__name__}; give batches as "
            "(inputs, labels), or loss=, a function of the output and the labels"
        )
    return loss


CLASSIFICATION = Objective("classification", class_loss, "accuracy", class_score)
NEXT_TOKEN = Objective("next-token", class_loss, "token accuracy", class_score)
MULTI_LABEL = Objective("multi-label", binary_loss, "label accuracy", binary_score)
REGRESSION = Objective("regression", squared_loss, "negative squared error", squared_score)
OWN = Objective("own", returned_loss)

OBJECTIVES: Mapping[str, Objective] = {o.name: o for o in (CLASSIFICATION, NEXT_TOKEN, MULTI_LABEL, REGRESSION, OWN)}


def choose_objective(loss: "str | LossFunction | Objective | None", batch: Batch) -> Objective:
    """Return the objective that a user named, or the one that fits the labels of a batch.

    ``loss``: a name in ``OBJECTIVES`` (``InputError`` for others), a loss function, or an objective; ``None``: by the
    labels. Class labels (integers) mean ``classification``, or ``next-token`` where each position of a sequence of
    integers has one; values of 0 and 1 (floats, of two or more dimensions) mean ``multi-label``; other floats
    ``regression``; no labels mean that the network returns its loss itself (``own``).

    >>> choose_objective(None, Batch((torch.ones(2, 3),), labels=torch.tensor([0, 1]))).name
    'classification'
    >>> choose_objective(torch.nn.L1Loss(), Batch((torch.ones(2, 3),), labels=torch.ones(2, 1))).name
    'custom'
    """
    if isinstance(loss, Objective):
        return loss
    if isinstance(loss, str):
        if loss not in OBJECTIVES:
            raise InputError(f"loss must be one of {', '.join(OBJECTIVES)}, or a function, got {loss!r}")
        return OBJECTIVES[loss]
    if loss is not None:
        return Objective("custom", loss)
    labels = batch.labels
    if not isinstance(labels, Tensor):
        return OWN
    if labels.is_floating_point():
        binary = labels.dim() > 1 and bool(((labels == 0) | (labels == 1)).all())
        return MULTI_LABEL if binary else REGRESSION
    inputs = [value for value in (*batch.args, *batch.kwargs.values()) if isinstance(value, Tensor)]
    sequences = [value for value in inputs if not value.is_floating_point() and value.dim() == 2]
    return NEXT_TOKEN if any(value.shape == labels.shape for value in sequences) else CLASSIFICATION


def _to_float(values: Tensor) -> Tensor:
    """Return values in float32, or in float64 if they are already."""
    return values if values.dtype == torch.float64 else values.float()


def _check_tensor(labels: object) -> Tensor:
    """Return labels unchanged; raise ``InputError`` unless they are a tensor."""
    if not isinstance(labels, Tensor):
        raise InputError(
            f"the batch has no tensor of labels but {type(labels).__name__}; give batches as (inputs, labels)"
        )
    return labels
