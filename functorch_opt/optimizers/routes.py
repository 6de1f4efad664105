"""Which parameters go to an optimizer for matrices, and which to AdamW: by shape, type and name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from functorch_opt import tree
from functorch_opt._core.chain import chain
from functorch_opt._core.groups import LabelsOrFn, partition
from functorch_opt._core.transformation import (
    GradientTransformation,
    ScalarOrSchedule,
    check_range,
    transformation,
)
from functorch_opt.optimizers.adam import adamw
from functorch_opt.optimizers.matrices import ORDINARY, MatrixDims, Scaling
from functorch_opt.optimizers.muon import scale_by_muon
from functorch_opt.optimizers.orthogonal import Coefficients
from functorch_opt.transforms.decay import add_decayed_weights
from functorch_opt.transforms.scale import scale_by_learning_rate
from functorch_opt.tree import PyTree

__all__ = ["MatrixLabels", "matrix_labels", "muon_with_adamw"]

NOT_HIDDEN = (
    *("embed", "embedding", "embeddings", "embed_tokens", "wte", "wpe", "tok", "pos"),
    *("head", "lm_head", "classifier", "unembed", "norm", "router", "gate"),
)
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)


class MatrixLabels:
    """A label for each parameter, "muon" or "adamw" or a pattern of `dims`; and why it has it.

    Printed, it is a table. `matrix_labels` makes it, and `partition` and `muon_with_adamw` take it.

    Args:
        labels: ``{path: label}``.
        why: ``{path: the reason}``.
        shapes: ``{path: shape}``.

    Attributes:
        labels: as given; change it to send a parameter elsewhere.
    """

    def __init__(
        self,
        labels: Mapping[str, str],
        why: Mapping[str, str],
        shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        self.labels = dict(labels)
        self.why = dict(why)
        self.shapes = dict(shapes)

    def __call__(self, path: str, p: Tensor) -> str:
        """The label of the parameter at `path`.

        Raises:
            ValueError: there was no such parameter when the labels were made.
        """
        if path not in self.labels:
            raise ValueError(
                f"there is no label for the parameter at {path!r}. "
                "Make the labels from the same model or params: matrix_labels(model)."
            )
        return self.labels[path]

    def __repr__(self) -> str:
        return f"MatrixLabels({self.labels!r}, {self.why!r}, {self.shapes!r})"

    def __str__(self) -> str:
        shapes = [str(list(shape)) for shape in self.shapes.values()]
        columns = [*self.labels], shapes, [*self.labels.values()]
        widths = [max(map(len, column), default=0) for column in columns]
        rows = zip(*columns, self.why.values(), strict=True)
        return "\n".join(
            f"{path:{widths[0]}}  {shape:{widths[1]}}  {label:{widths[2]}}  {why}"
            for path, shape, label, why in rows
        )


def matrix_labels(
    params: nn.Module | PyTree,
    dims: Mapping[str, MatrixDims] | None = None,
    adamw: Sequence[str] = NOT_HIDDEN,
) -> MatrixLabels:
    """Say of each parameter whether it is a hidden matrix, for Muon, or one for AdamW.

    The first of these that holds decides:

    1. its path has a pattern of `dims`: a hidden matrix;
    2. fewer than two dims (biases, norms, numbers), or one row or one column: AdamW;
    3. it belongs to an embedding, a norm or another module that is no layer: AdamW. This needs the
       model; a tree of params has no types;
    4. a part of its path has a name in `adamw`: AdamW;
    5. three dims, which may be a 1-dim convolution or a batch of matrices: AdamW;
    6. a convolution of one channel each: AdamW;
    7. all else: a hidden matrix.

    Args:
        params: a model, or a tree of params.
        dims: ``{pattern: dims}`` for tensors whose matrices are others than ``[first dim, the
            rest]``, such as stacked experts or a fused qkv. A pattern is for the whole path,
            and ``*`` stands for any characters, as in ``"*.qkv.weight"``. It is the label too.
        adamw: the names of what is no hidden layer. A name is a whole part of the path, without the
            numbers at its end, in any case.

    Example:
        >>> import torch, functorch_opt as fo
        >>> layers = {"wte": torch.nn.Embedding(50, 8), "up": torch.nn.Linear(8, 32)}
        >>> print(fo.matrix_labels(torch.nn.ModuleDict(layers)))
        up.bias     [32]     adamw  fewer than two dims
        up.weight   [32, 8]  muon   a matrix
        wte.weight  [50, 8]  adamw  Embedding
    """
    modules = dict(params.named_modules()) if isinstance(params, nn.Module) else {}
    named = dict(params.named_parameters()) if modules else params
    labels, why, shapes = {}, {}, {}
    leaves, _ = tree.flatten(named)
    for path, p in zip(tree.paths(named), leaves, strict=True):
        if p is None:
            continue
        owner = modules.get(path.rpartition(".")[0])
        pattern = _first_match(path, [*(dims or {})])
        reason = None if pattern else _why_adamw(path, p, owner, adamw)
        labels[path] = pattern or ("adamw" if reason else "muon")
        why[path] = f"{(dims or {})[pattern]}" if pattern else reason or "a matrix"
        shapes[path] = tuple(p.shape)
    return MatrixLabels(labels, why, shapes)


def _first_match(path: str, patterns: list[str]) -> str | None:
    found = [pattern for pattern in patterns if fits(path, pattern)]
    return found[0] if found else None


def fits(path: str, pattern: str) -> bool:
    """Whether `path` is `pattern`, in which ``*`` stands for any characters."""
    first, *rest = pattern.split("*")
    if not rest or not path.startswith(first):
        return path == pattern
    path = path[len(first) :]
    for part in rest[:-1]:
        at = path.find(part)
        if at < 0:
            return False
        path = path[at + len(part) :]
    return path.endswith(rest[-1])


def _why_adamw(
    path: str, p: Tensor, owner: nn.Module | None, names: Sequence[str]
) -> str | None:
    """Why a parameter is no hidden matrix; None if it is one."""
    if p.dim() < 2:
        return "fewer than two dims"
    rows, columns = p.shape[0], p.shape[1:].numel()
    if min(rows, columns) < 2:
        return "one row or column"
    kind = type(owner).__name__
    if isinstance(owner, EMBEDDINGS) or kind.endswith("Norm"):
        return kind
    names_in_path = path.replace("/", ".").split(".")
    parts = [part.rstrip("0123456789_").lower() for part in names_in_path]
    if found := [part for part in parts if part in names]:
        return f"its name has {found[0]!r}"
    if p.dim() == 3:
        return "three dims"
    may_be_convolution = owner is None or isinstance(owner, CONVOLUTIONS)
    if p.dim() > 3 and p.shape[1] == 1 and may_be_convolution:
        return "one channel each"
    return None


@transformation
def muon_with_adamw(
    learning_rate: ScalarOrSchedule,
    adamw_learning_rate: ScalarOrSchedule,
    labels: LabelsOrFn | None = None,
    weight_decay: ScalarOrSchedule = 0.0,
    adamw_weight_decay: ScalarOrSchedule = 0.0,
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.95,
    eps: ScalarOrSchedule = 1e-8,
    *,
    dims: Mapping[str, MatrixDims] | None = None,
    ns_coeffs: Coefficients = (3.4445, -4.775, 2.0315),
    ns_steps: int = 5,
    beta: ScalarOrSchedule = 0.95,
    nesterov: bool = True,
    scaling: Scaling = "original",
    ns_dtype: torch.dtype | None = None,
) -> GradientTransformation:
    """Muon for the hidden matrices, and AdamW for embeddings, heads, norms, biases and the rest.

    To see what goes where, each with its learning rate, ``print(fo.routing_table(tx, model))``. To
    see the labels before there is an optimizer, print what `matrix_labels` returns. For another optimizer of matrices, write
    the `partition` with these labels.

    Args:
        learning_rate: of the matrices; 0 or greater, or a schedule.
        adamw_learning_rate: of the rest.
        labels: what `matrix_labels` returned, or "muon" or "adamw" for each parameter, as in
            `partition`. None means the rules of `matrix_labels` for a tree of params, which knows
            shapes and names but no types. In a list of parameters without names only shapes decide:
            an embedding and a head go to Muon.
        weight_decay: of the matrices, multiplied by `learning_rate`.
        adamw_weight_decay: of the rest, multiplied by `adamw_learning_rate`. It is 0, as for Muon's
            authors: biases and norms are among the rest.
        b1, b2, eps: of `adamw`.
        dims: see `matrix_labels`; give the same to both.
        ns_coeffs, ns_steps, beta, nesterov, scaling, ns_dtype: see `scale_by_muon`.

    Raises:
        ValueError: an argument outside its range; a parameter without a label.

    Source: Jordan et al., "Muon", 2024: which parameters are for Muon.

    Example:
        >>> import torch, functorch_opt as fo
        >>> model = torch.nn.Sequential(torch.nn.Embedding(50, 8), torch.nn.Linear(8, 4))
        >>> tx = fo.muon_with_adamw(0.02, 3e-4, fo.matrix_labels(model))
        >>> state = tx.init(dict(model.named_parameters()))
        >>> list(fo.get(state, "scale_by_muon/mu")), list(fo.get(state, "scale_by_adam/mu"))
        (['1.weight'], ['0.weight', '1.bias'])
    """
    check_range(0, float("inf"), adamw_learning_rate=adamw_learning_rate)
    check_range(0, float("inf"), adamw_weight_decay=adamw_weight_decay)
    rest = adamw(adamw_learning_rate, b1, b2, eps, weight_decay=adamw_weight_decay)

    def of_matrices(form: MatrixDims = ORDINARY) -> GradientTransformation:
        direction = scale_by_muon(
            ns_coeffs,
            ns_steps,
            beta,
            nesterov=nesterov,
            scaling=scaling,
            dims=form,
            ns_dtype=ns_dtype,
        )
        decay = add_decayed_weights(weight_decay)
        return chain(direction, decay, scale_by_learning_rate(learning_rate))

    given = {pattern: of_matrices(form) for pattern, form in (dims or {}).items()}
    stages = {"muon": of_matrices(), **given, "adamw": rest}
    return partition(stages, _by_shape_and_name(dims) if labels is None else labels)


def _by_shape_and_name(dims: Mapping[str, MatrixDims] | None) -> LabelsOrFn:
    """The label of a parameter of which the path and the tensor are known."""

    def label(path: str, p: Tensor) -> str:
        return matrix_labels({path: p}, dims).labels[path]

    return label
