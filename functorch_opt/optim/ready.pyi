"""Each ready-made optimizer as a class; ``python -m tests.ready_stub`` writes this file."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from functorch_opt._core.groups import LabelsOrFn, MaskOrFn
from functorch_opt._core.transformation import Scalar, ScalarOrSchedule
from functorch_opt.optim.adapter import Optimizer
from functorch_opt.optimizers.matrices import MatrixDims, Scaling
from functorch_opt.optimizers.normuon import Axis
from functorch_opt.optimizers.orthogonal import Coefficients
from functorch_opt.optimizers.psgd_kron import Diagonals
from functorch_opt.optimizers.scion import Norm
from functorch_opt.optimizers.shampoo import Grafting

__all__ = [
    "ADOPT",
    "APOLLO",
    "CAME",
    "COCOB",
    "FOCUS",
    "KLSOAP",
    "LAMB",
    "LARS",
    "MADGRAD",
    "SGLD",
    "SM3",
    "SOAP",
    "ACProp",
    "AMSGrad",
    "AdEMAMix",
    "AdaBelief",
    "AdaMuon",
    "AdamC",
    "AdamMini",
    "AdamaxW",
    "Adan",
    "DAdaptAdamW",
    "Dion",
    "DoG",
    "DoWG",
    "Fira",
    "Fromage",
    "GaLore",
    "Grams",
    "KLShampoo",
    "LaProp",
    "Lion",
    "MARSAdamW",
    "Mano",
    "MoMo",
    "MoMoAdam",
    "MuonH",
    "MuonWithAdamW",
    "NAdamW",
    "NoisySGD",
    "NorMuon",
    "NovoGrad",
    "OptimisticAdamV2",
    "OptimisticGradientDescent",
    "PSGDKron",
    "Prodigy",
    "SPlus",
    "ScheduleFreeAdamW",
    "ScheduleFreeProdigy",
    "ScheduleFreeRAdam",
    "ScheduleFreeSGD",
    "Scion",
    "Shampoo",
    "SignSGD",
    "Signum",
    "SimplifiedAdEMAMix",
    "StableAdamW",
    "StableSPAM",
    "Yogi",
]

class Ready(Optimizer): ...

class ADOPT(Ready):
    """`functorch_opt.adopt` as a class.

    ADOPT: `scale_by_adopt`, then the learning rate.

    The source, and what each argument means, are there. Numbers are options of the groups.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: ScalarOrSchedule,
        b1: ScalarOrSchedule = 0.9,
        b2: ScalarOrSchedule = 0.9999,
        eps: ScalarOrSchedule = 1e-06,
        mu_dtype: torch.dtype | None = None,
        *,
        nesterov: bool = False,
        use_clipping: bool = True,
        clip_value_fn: Callable[[Tensor], Tensor] = ...,
        compile: bool = False,
        state: str | None = None,
        capturable: bool = False,
        owners: bool = False,
    ) -> None: ...

class APOLLO(Ready):
    """`functorch_opt.apollo` as a class.

    APOLLO for the tensors with two dims or more, and `adamw` for the rest.

    The source, and what each argument means, are there. Numbers are options of the groups.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: ScalarOrSchedule,
        rank: int = 256,
        update_proj_gap: int = 200,
        scale: ScalarOrSchedule = 1.0,
        b1: ScalarOrSchedule = 0.9,
        b2: ScalarOrSchedule = 0.999,
        eps: ScalarOrSchedule = 1e-06,
        weight_decay: ScalarOrSchedule = 0.0,
        *,
        key: Tensor | int,
        scaling: Literal["channel", "tensor"] = "channel",
        adam_learning_rate: ScalarOrSchedule | None = None,
        compile: bool = False,
        state: str | None = None,
        capturable: bool = False,
        owners: bool = False,
    ) -> None: ...

class CAME(Ready):
    """`functorch_opt.came` as a class.

    CAME: `scale_by_came`, decoupled weight decay, the learning rate.

    The source, and what each argument means, are there. Numbers are options of the groups.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: ScalarOrSchedule,
        b1: ScalarOrSchedule = 0.9,
        b2: ScalarOrSchedule = 0.999,
        b3: ScalarOrSchedule = 0.9999,
        eps: ScalarOrSchedule = 1e-30,
        instability_eps: ScalarOrSchedule = 1e-16,
        clipping_threshold: ScalarOrSchedule = 1.0,
        mu_dtype: torch.dtype | None = None,
        weight_decay: ScalarOrSchedule = 0.0,
        mask: MaskOrFn | None = None,
        *,
        compile: bool = False,
        state: str | None = None,
        capturable: bool = False,
        owners: bool = False,
    ) -> None: ...

class COCOB(Ready):
    """`functorch_opt.cocob` as a class.

    COCOB: weight decay, the learning rate, `scale_by_cocob`.

    The source, and what each argument means, are there. Numbers are options of the groups.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: ScalarOrSchedule = 1.0,
        alpha: ScalarOrSchedule = 100.0,
        eps: Scalar = 1e-08,
        weight_decay: ScalarOrSchedule = 0.0,
        mask: MaskOrFn | None = None,
        *,
        compile: bool = False,
        state: str | None = None,
        capturable: bool = False,
        owners: bool = False,
    ) -> None: ...

class FOCUS(Ready):
    """`functorch_opt.focus` as a class.

    FOCUS: `scale_by_focus`, then the learning rate.

    The source, and what each argument means, are there. Numbers are options of the groups.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: ScalarOrSchedule,
        b1: ScalarOrSchedule = 0.9,
        b2: ScalarOrSchedule = 0.999,
        gamma: ScalarOrSchedule = 0.1,
        weight_decay: ScalarOrSchedule = 0.0,
        mu_dtype: torch.dtype | None = None,
        *,
        compile: bool = False,
        state: str | None = None,
        capturable: bool = False,
        owners: bool = False,
    ) -> None: ...

class KLSOAP(Ready):
    """`functorch_opt.kl_soap` as a class.

    KL-SOAP for the tensors with two dims or more, and `adamw` for the rest.

    The source, and what each argument means, are there. Numbers are options of the groups.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: ScalarOrSchedule,
        b1: ScalarOrSchedule = 0.9,
        b2: ScalarOrSchedule = 0.98,
        eps: ScalarOrSchedule = 1e-08,
        weight_decay: ScalarOrSchedule = 0.01,
        frequency: int = 10,
        *,
        b3: ScalarOrSchedule | None = None,
        init: float = 0.1,
        max_size: int = 10000,
        blocks: bool = False,
        merged: int = 0,
        adam_learning_rate: ScalarOrSchedule | None = None,
        compile: bool = False,
        state: str | None = None,
        capturable: bool = False,
        owners: bool = False,
    ) -> None: ...

class LAMB(Ready):
    """`functorch_opt.lamb` as a class.

    LAMB: `scale_by_adam`, decoupled decay, `scale_by_trust_ratio`, then the learning rate.

    The source, and what each argument means, are there. Numbers are options of the groups.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: ScalarOrSchedule,
        b1: ScalarOrSchedule = 0.9,
        b2: ScalarOrSchedule = 0.999,
        eps: ScalarOrSchedule = 1e-06,
        eps_root: ScalarOrSchedule = 0.0,
        weight_decay: ScalarOrSchedule = 0.0,
        mask: MaskOrFn | None = None,
        *,
        compile: bool = False,
        state: str | None = None,
        capturable: bool = False,
        owners: bool = False,
    ) -> None: ...

class LARS(Ready):
    """`functorch_opt.lars` as a class.

    LARS: weight decay, `scale_by_trust_ratio`, the learning rate, and then momentum.

    The source, and what each argument means, are there. Numbers are options of the groups.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: ScalarOrSchedule,
        weight_decay: ScalarOrSchedule = 0.0,
        weight_decay_mask: MaskOrFn = True,
        trust_coefficient: Scalar = 0.001,
        eps: Scalar = 0.0,
        trust_ratio_mask: MaskOrFn = True,
        momentum: ScalarOrSchedule = 0.9,
        nesterov: bool = False,
        *,
        compile: bool = False,
        state: str | None = None,
        capturable: bool = False,
        owners: bool = False,
    ) -> None: ...

class MADGRAD(Ready):
    """`functorch_opt.madgrad` as a class.

    MADGRAD: weight decay, added to the gradient, then `scale_by_madgrad`.

    The source, and what each argument means, are there. Numbers are options of the groups.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: ScalarOrSchedule,
        momentum: ScalarOrSchedule = 0.9,
        weight_decay: ScalarOrSchedule = 0.0,
        eps: ScalarOrSchedule = 1e-06,
        *,
        compile: bool = False,
        state: str | None = None,
        capturable: bool = False,
        owners: bool = False,
    ) -> None: ...

class SGLD(Ready):
    """`functorch_opt.sgld` as a class.

    Stochastic gradient Langevin dynamics: ``u = -eta g + sqrt(2 eta T) z``, z standard normal.

    The source, and what each argument means, are there. Numbers are options of the groups.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: ScalarOrSchedule,
        temperature: ScalarOrSchedule = 1.0,
        *,
        key: Tensor | int,
        compile: bool = False,
        state: str | None = None,
        capturable: bool = False,
        owners: bool = False,
    ) -> None: ...

class SM3(Ready):
    """`functorch_opt.sm3` as a class.

    SM3: `scale_by_sm3`, then the learning rate. optax takes no schedule for it.

    The source, and what each argument means, are there. Numbers are options of the groups.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: ScalarOrSchedule,
        momentum: ScalarOrSchedule = 0.9,
        *,
        compile: bool = False,
        state: str | None = None,
        capturable: bool = False,
        owners: bool = False,
    ) -> None: ...

class SOAP(Ready):
    """`functorch_opt.soap` as a class.

    SOAP: `scale_by_soap`, the learning rate, and then weight decay of the new parameters.

    The source, and what each argument means, are there. Numbers are options of the groups.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: ScalarOrSchedule,
        b1: ScalarOrSchedule = 0.95,
        b2: ScalarOrSchedule = 0.95,
        eps: ScalarOrSchedule = 1e-08,
        weight_decay: ScalarOrSchedule = 0.01,
        frequency: int = 10,
        *,
        b3: ScalarOrSchedule | None = None,
        max_size: int = 10000,
        blocks: bool = False,
        merged: int = 0,
        vectors: bool = False,
        bias_correction: bool = True,
        compile: bool = False,
        state: str | None = None,
        capturable: bool = False,
        owners: bool = False,
    ) -> None: ...

class ACProp(Ready):
    """`functorch_opt.acprop` as a class.

    ACProp: `scale_by_acprop`, decoupled weight decay, the learning rate.

    The source, and what each argument means, are there. Numbers are options of the groups.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: ScalarOrSchedule,
        b1: ScalarOrSchedule = 0.9,
        b2: ScalarOrSchedule = 0.999,
        eps: ScalarOrSchedule = 1e-16,
        eps_root: ScalarOrSchedule = 1e-16,
        weight_decay: ScalarOrSchedule = 0.0,
        mask: MaskOrFn | None = None,
        *,
        compile: bool = False,
        state: str | None = None,
        capturable: bool = False,
        owners: bool = False,
    ) -> None: ...

class AMSGrad(Ready):
    """`functorch_opt.amsgrad` as a class.

    AMSGrad: `scale_by_amsgrad`, then the learning rate.

    The source, and what each argument means, are there. Numbers are options of the groups.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: ScalarOrSchedule,
        b1: ScalarOrSchedule = 0.9,
        b2: ScalarOrSchedule = 0.999,
        eps: ScalarOrSchedule = 1e-08,
        eps_root: ScalarOrSchedule = 0.0,
        mu_dtype: torch.dtype | None = None,
        bias_correction_mu: bool = True,
        bias_correction_nu: bool = True,
        *,
        compile: bool = False,
        state: str | None = None,
        capturable: bool = False,
        owners: bool = False,
    ) -> None: ...

class AdEMAMix(Ready):
    """`functorch_opt.ademamix` as a class.

    AdEMAMix: `scale_by_ademamix`, decoupled weight decay, the learning rate.

    The source, and what each argument means, are there. Numbers are options of the groups.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: ScalarOrSchedule,
        b1: ScalarOrSchedule = 0.9,
        b2: ScalarOrSchedule = 0.999,
        b3: ScalarOrSchedule = 0.9999,
        alpha: ScalarOrSchedule = 5.0,
        eps: ScalarOrSchedule = 1e-08,
        eps_root: ScalarOrSchedule = 0.0,
        mu_dtype: torch.dtype | None = None,
        weight_decay: ScalarOrSchedule = 0.0,
        mask: MaskOrFn | None = None,
        *,
        compile: bool = False,
        state: str | None = None,
        capturable: bool = False,
        owners: bool = False,
    ) -> None: ...

class AdaBelief(Ready):
    """`functorch_opt.adabelief` as a class.

    AdaBelief: `scale_by_belief`, decoupled weight decay if one is given, the learning rate.

    The source, and what each argument means, are there. Numbers are options of the groups.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: ScalarOrSchedule,
        b1: ScalarOrSchedule = 0.9,
        b2: ScalarOrSchedule = 0.999,
        eps: ScalarOrSchedule = 1e-16,
        eps_root: ScalarOrSchedule = 1e-16,
        weight_decay: ScalarOrSchedule | None = None,
        weight_decay_mask: MaskOrFn | None = None,
        *,
        nesterov: bool = False,
        compile: bool = False,
        state: str | None = None,
        capturable: bool = False,
        owners: bool = False,
    ) -> None: ...

class AdaMuon(Ready):
    """`functorch_opt.adamuon` as a class.

    AdaMuon for the tensors with two dims or more, and `adamw` for the rest.

    The source, and what each argument means, are there. Numbers are options of the groups.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: ScalarOrSchedule,
        ns_coeffs: Coefficients = (3.4445, -4.775, 2.0315),
        ns_steps: int = 5,
        beta: ScalarOrSchedule = 0.95,
        eps: ScalarOrSchedule = 1e-08,
        weight_decay: ScalarOrSchedule = 0.0,
        *,
        nesterov: bool = True,
        adam_learning_rate: ScalarOrSchedule | None = None,
        adam_b1: ScalarOrSchedule = 0.9,
        adam_b2: ScalarOrSchedule = 0.95,
        adam_eps: ScalarOrSchedule = 1e-08,
        compile: bool = False,
        state: str | None = None,
        capturable: bool = False,
        owners: bool = False,
    ) -> None: ...

class AdamC(Ready):
    """`functorch_opt.adamc` as a class.

    AdamC: `scale_by_adam`, `corrected_weight_decay`, the learning rate.

    The source, and what each argument means, are there. Numbers are options of the groups.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: ScalarOrSchedule,
        b1: ScalarOrSchedule = 0.9,
        b2: ScalarOrSchedule = 0.999,
        eps: ScalarOrSchedule = 1e-08,
        eps_root: ScalarOrSchedule = 0.0,
        mu_dtype: torch.dtype | None = None,
        weight_decay: ScalarOrSchedule = 0.01,
        mask: MaskOrFn | None = None,
        *,
        max_learning_rate: ScalarOrSchedule | None = None,
        compile: bool = False,
        state: str | None = None,
        capturable: bool = False,
        owners: bool = False,
    ) -> None: ...

class AdamMini(Ready):
    """`functorch_opt.adam_mini` as a class.

    Adam-mini: `scale_by_adam_mini`, decoupled weight decay, the learning rate.

    The source, and what each argument means, are there. Numbers are options of the groups.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: ScalarOrSchedule,
        b1: ScalarOrSchedule = 0.9,
        b2: ScalarOrSchedule = 0.999,
        eps: ScalarOrSchedule = 1e-08,
        mu_dtype: torch.dtype | None = None,
        weight_decay: ScalarOrSchedule = 0.0,
        mask: MaskOrFn | None = None,
        *,
        head_dim: int = 1,
        blocks: LabelsOrFn | None = None,
        compile: bool = False,
        state: str | None = None,
        capturable: bool = False,
        owners: bool = False,
    ) -> None: ...

class AdamaxW(Ready):
    """`functorch_opt.adamaxw` as a class.

    Adamax with decoupled weight decay: ``p -> p - learning_rate (adamax + weight_decay p)``.

    The source, and what each argument means, are there. Numbers are options of the groups.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: ScalarOrSchedule,
        b1: ScalarOrSchedule = 0.9,
        b2: ScalarOrSchedule = 0.999,
        eps: ScalarOrSchedule = 1e-08,
        weight_decay: ScalarOrSchedule = 0.0001,
        mask: MaskOrFn | None = None,
        *,
        compile: bool = False,
        state: str | None = None,
        capturable: bool = False,
        owners: bool = False,
    ) -> None: ...

class Adan(Ready):
    """`functorch_opt.adan` as a class.

    Adan: `scale_by_adan`, decoupled weight decay, the learning rate.

    The source, and what each argument means, are there. Numbers are options of the groups.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: ScalarOrSchedule,
        b1: ScalarOrSchedule = 0.98,
        b2: ScalarOrSchedule = 0.92,
        b3: ScalarOrSchedule = 0.99,
        eps: ScalarOrSchedule = 1e-08,
        eps_root: ScalarOrSchedule = 1e-08,
        weight_decay: ScalarOrSchedule = 0.0,
        mask: MaskOrFn | None = None,
        *,
        compile: bool = False,
        state: str | None = None,
        capturable: bool = False,
        owners: bool = False,
    ) -> None: ...

class DAdaptAdamW(Ready):
    """`functorch_opt.dadapt_adamw` as a class.

    AdamW by D-Adaptation, with one d for all parameters: ``get(state, "d") * estim_lr0``.

    The source, and what each argument means, are there. Numbers are options of the groups.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: ScalarOrSchedule = 1.0,
        betas: tuple[Scalar, Scalar] = (0.9, 0.999),
        eps: ScalarOrSchedule = 1e-08,
        estim_lr0: Scalar = 1e-06,
        weight_decay: ScalarOrSchedule = 0.0,
        *,
        compile: bool = False,
        state: str | None = None,
        capturable: bool = False,
        owners: bool = False,
    ) -> None: ...

class Dion(Ready):
    """`functorch_opt.dion` as a class.

    Dion for the tensors with two dims or more, and `adamw` for the rest.

    The source, and what each argument means, are there. Numbers are options of the groups.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: ScalarOrSchedule,
        rank: int = 768,
        beta: ScalarOrSchedule = 0.95,
        eps: ScalarOrSchedule = 1e-08,
        weight_decay: ScalarOrSchedule = 0.01,
        *,
        seed: int = 0,
        adam_learning_rate: ScalarOrSchedule | None = None,
        adam_b1: ScalarOrSchedule = 0.9,
        adam_b2: ScalarOrSchedule = 0.95,
        adam_eps: ScalarOrSchedule = 1e-08,
        compile: bool = False,
        state: str | None = None,
        capturable: bool = False,
        owners: bool = False,
    ) -> None: ...

class DoG(Ready):
    """`functorch_opt.dog` as a class.

    DoG: weight decay, `scale_by_dog`, the learning rate.

    The source, and what each argument means, are there. Numbers are options of the groups.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: ScalarOrSchedule = 1.0,
        init_step: tuple[str, Scalar] = ("heuristic", 1e-06),
        eps: ScalarOrSchedule = 1e-08,
        weight_decay: ScalarOrSchedule = 0.0,
        mask: MaskOrFn | None = None,
        *,
        compile: bool = False,
        state: str | None = None,
        capturable: bool = False,
        owners: bool = False,
    ) -> None: ...

class DoWG(Ready):
    """`functorch_opt.dowg` as a class.

    DoWG: weight decay, `scale_by_dowg`, the learning rate.

    The source, and what each argument means, are there. Numbers are options of the groups.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: ScalarOrSchedule = 1.0,
        init_estim_sq_dist: ScalarOrSchedule | None = None,
        eps: ScalarOrSchedule = 0.0001,
        weight_decay: ScalarOrSchedule = 0.0,
        mask: MaskOrFn | None = None,
        *,
        compile: bool = False,
        state: str | None = None,
        capturable: bool = False,
        owners: bool = False,
    ) -> None: ...

class Fira(Ready):
    """`functorch_opt.fira` as a class.

    Fira for the tensors with two dims or more, and `adamw` for the rest.

    The source, and what each argument means, are there. Numbers are options of the groups.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: ScalarOrSchedule,
        rank: int = 128,
        update_proj_gap: int = 200,
        scale: ScalarOrSchedule = 0.25,
        b1: ScalarOrSchedule = 0.9,
        b2: ScalarOrSchedule = 0.999,
        eps: ScalarOrSchedule = 1e-06,
        weight_decay: ScalarOrSchedule = 0.0,
        *,
        adam_learning_rate: ScalarOrSchedule | None = None,
        compile: bool = False,
        state: str | None = None,
        capturable: bool = False,
        owners: bool = False,
    ) -> None: ...

class Fromage(Ready):
    """`functorch_opt.fromage` as a class.

    Fromage: ``p -> (p - learning_rate g |p| / |g|) / sqrt(1 + learning_rate^2)``.

    The source, and what each argument means, are there. Numbers are options of the groups.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: ScalarOrSchedule,
        min_norm: Scalar = 1e-06,
        *,
        compile: bool = False,
        state: str | None = None,
        capturable: bool = False,
        owners: bool = False,
    ) -> None: ...

class GaLore(Ready):
    """`functorch_opt.galore` as a class.

    GaLore for the tensors with two dims or more, and `adamw` for the rest.

    The source, and what each argument means, are there. Numbers are options of the groups.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: ScalarOrSchedule,
        rank: int = 128,
        update_proj_gap: int = 200,
        scale: ScalarOrSchedule = 0.25,
        b1: ScalarOrSchedule = 0.9,
        b2: ScalarOrSchedule = 0.999,
        eps: ScalarOrSchedule = 1e-06,
        weight_decay: ScalarOrSchedule = 0.0,
        *,
        adam_learning_rate: ScalarOrSchedule | None = None,
        compile: bool = False,
        state: str | None = None,
        capturable: bool = False,
        owners: bool = False,
    ) -> None: ...

class Grams(Ready):
    """`functorch_opt.grams` as a class.

    Grams: `scale_by_grams`, decoupled weight decay, the learning rate.

    The source, and what each argument means, are there. Numbers are options of the groups.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: ScalarOrSchedule,
        b1: ScalarOrSchedule = 0.9,
        b2: ScalarOrSchedule = 0.999,
        eps: ScalarOrSchedule = 1e-06,
        eps_root: ScalarOrSchedule = 0.0,
        mu_dtype: torch.dtype | None = None,
        weight_decay: ScalarOrSchedule = 0.0,
        mask: MaskOrFn | None = None,
        *,
        compile: bool = False,
        state: str | None = None,
        capturable: bool = False,
        owners: bool = False,
    ) -> None: ...

class KLShampoo(Ready):
    """`functorch_opt.kl_shampoo` as a class.

    KL-Shampoo for the tensors with two dims or more, and `adamw` for the rest.

    The source, and what each argument means, are there. Numbers are options of the groups.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: ScalarOrSchedule,
        b1: ScalarOrSchedule = 0.9,
        b2: ScalarOrSchedule = 0.98,
        eps: ScalarOrSchedule = 1e-08,
        weight_decay: ScalarOrSchedule = 0.01,
        frequency: int = 10,
        *,
        b3: ScalarOrSchedule | None = None,
        init: float = 0.1,
        max_size: int = 10000,
        blocks: bool = False,
        merged: int = 0,
        adam_learning_rate: ScalarOrSchedule | None = None,
        compile: bool = False,
        state: str | None = None,
        capturable: bool = False,
        owners: bool = False,
    ) -> None: ...

class LaProp(Ready):
    """`functorch_opt.laprop` as a class.

    LaProp: `scale_by_laprop`, decoupled weight decay, the learning rate.

    The source, and what each argument means, are there. Numbers are options of the groups.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: ScalarOrSchedule,
        b1: ScalarOrSchedule = 0.9,
        b2: ScalarOrSchedule = 0.999,
        eps: ScalarOrSchedule = 1e-15,
        eps_root: ScalarOrSchedule = 0.0,
        mu_dtype: torch.dtype | None = None,
        weight_decay: ScalarOrSchedule = 0.0,
        mask: MaskOrFn | None = None,
        *,
        compile: bool = False,
        state: str | None = None,
        capturable: bool = False,
        owners: bool = False,
    ) -> None: ...

class Lion(Ready):
    """`functorch_opt.lion` as a class.

    Lion: `scale_by_lion`, decoupled weight decay, then the learning rate.

    The source, and what each argument means, are there. Numbers are options of the groups.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: ScalarOrSchedule,
        b1: ScalarOrSchedule = 0.9,
        b2: ScalarOrSchedule = 0.99,
        mu_dtype: torch.dtype | None = None,
        weight_decay: ScalarOrSchedule = 0.001,
        mask: MaskOrFn | None = None,
        *,
        compile: bool = False,
        state: str | None = None,
        capturable: bool = False,
        owners: bool = False,
    ) -> None: ...

class MARSAdamW(Ready):
    """`functorch_opt.mars_adamw` as a class.

    MARS-AdamW: `scale_by_mars`, `scale_by_adam`, decoupled weight decay, the learning rate.

    The source, and what each argument means, are there. Numbers are options of the groups.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: ScalarOrSchedule,
        b1: ScalarOrSchedule = 0.95,
        b2: ScalarOrSchedule = 0.99,
        eps: ScalarOrSchedule = 1e-08,
        eps_root: ScalarOrSchedule = 0.0,
        mu_dtype: torch.dtype | None = None,
        weight_decay: ScalarOrSchedule = 0.0,
        mask: MaskOrFn | None = None,
        *,
        gamma: ScalarOrSchedule = 0.025,
        compile: bool = False,
        state: str | None = None,
        capturable: bool = False,
        owners: bool = False,
    ) -> None: ...

class Mano(Ready):
    """`functorch_opt.mano` as a class.

    Mano for the tensors with two dims or more, and `adamw` for the rest.

    The source, and what each argument means, are there. Numbers are options of the groups.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: ScalarOrSchedule,
        beta: ScalarOrSchedule = 0.95,
        eps: ScalarOrSchedule = 1e-08,
        weight_decay: ScalarOrSchedule = 0.1,
        *,
        nesterov: bool = False,
        adam_learning_rate: ScalarOrSchedule | None = None,
        adam_b1: ScalarOrSchedule = 0.9,
        adam_b2: ScalarOrSchedule = 0.95,
        adam_eps: ScalarOrSchedule = 1e-08,
        compile: bool = False,
        state: str | None = None,
        capturable: bool = False,
        owners: bool = False,
    ) -> None: ...

class MoMo(Ready):
    """`functorch_opt.momo` as a class.

    Gradient descent with momentum, whose step is at most the learning rate.

    The source, and what each argument means, are there. Numbers are options of the groups.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: ScalarOrSchedule = 1.0,
        beta: ScalarOrSchedule = 0.9,
        lower_bound: ScalarOrSchedule = 0.0,
        weight_decay: ScalarOrSchedule = 0.0,
        adapt_lower_bound: bool = False,
        *,
        compile: bool = False,
        state: str | None = None,
        capturable: bool = False,
        owners: bool = False,
    ) -> None: ...

class MoMoAdam(Ready):
    """`functorch_opt.momo_adam` as a class.

    AdamW, whose step is at most the learning rate.

    The source, and what each argument means, are there. Numbers are options of the groups.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: ScalarOrSchedule = 0.01,
        b1: ScalarOrSchedule = 0.9,
        b2: ScalarOrSchedule = 0.999,
        eps: ScalarOrSchedule = 1e-08,
        lower_bound: ScalarOrSchedule = 0.0,
        weight_decay: ScalarOrSchedule = 0.0,
        adapt_lower_bound: bool = False,
        *,
        compile: bool = False,
        state: str | None = None,
        capturable: bool = False,
        owners: bool = False,
    ) -> None: ...

class MuonH(Ready):
    """`functorch_opt.muonh` as a class.

    MuonH: `scale_by_muon` and `hyperball` for tensors with two dims or more, and `adamw` else.

    The source, and what each argument means, are there. Numbers are options of the groups.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: ScalarOrSchedule,
        ns_coeffs: Coefficients = (3.4445, -4.775, 2.0315),
        ns_steps: int = 5,
        beta: ScalarOrSchedule = 0.95,
        eps: float = 1e-08,
        *,
        nesterov: bool = True,
        adam_learning_rate: ScalarOrSchedule | None = None,
        adam_b1: ScalarOrSchedule = 0.9,
        adam_b2: ScalarOrSchedule = 0.95,
        adam_eps: ScalarOrSchedule = 1e-08,
        compile: bool = False,
        state: str | None = None,
        capturable: bool = False,
        owners: bool = False,
    ) -> None: ...

class MuonWithAdamW(Ready):
    """`functorch_opt.muon_with_adamw` as a class.

    Muon for the hidden matrices, and AdamW for embeddings, heads, norms, biases and the rest.

    The source, and what each argument means, are there. Numbers are options of the groups.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: ScalarOrSchedule,
        adamw_learning_rate: ScalarOrSchedule,
        labels: LabelsOrFn | None = None,
        weight_decay: ScalarOrSchedule = 0.0,
        adamw_weight_decay: ScalarOrSchedule = 0.0,
        b1: ScalarOrSchedule = 0.9,
        b2: ScalarOrSchedule = 0.95,
        eps: ScalarOrSchedule = 1e-08,
        *,
        dims: Mapping[str, MatrixDims] | None = None,
        ns_coeffs: Coefficients = (3.4445, -4.775, 2.0315),
        ns_steps: int = 5,
        beta: ScalarOrSchedule = 0.95,
        nesterov: bool = True,
        scaling: Scaling = "original",
        ns_dtype: torch.dtype | None = None,
        compile: bool = False,
        state: str | None = None,
        capturable: bool = False,
        owners: bool = False,
    ) -> None: ...

class NAdamW(Ready):
    """`functorch_opt.nadamw` as a class.

    `nadam` with decoupled weight decay: ``p -> p - learning_rate (nadam + weight_decay p)``.

    The source, and what each argument means, are there. Numbers are options of the groups.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: ScalarOrSchedule,
        b1: ScalarOrSchedule = 0.9,
        b2: ScalarOrSchedule = 0.999,
        eps: ScalarOrSchedule = 1e-08,
        eps_root: ScalarOrSchedule = 0.0,
        mu_dtype: torch.dtype | None = None,
        weight_decay: ScalarOrSchedule = 0.0001,
        mask: MaskOrFn | None = None,
        *,
        momentum_decay: ScalarOrSchedule | None = None,
        compile: bool = False,
        state: str | None = None,
        capturable: bool = False,
        owners: bool = False,
    ) -> None: ...

class NoisySGD(Ready):
    """`functorch_opt.noisy_sgd` as a class.

    Gradient descent with Gaussian noise on the gradient: `add_noise`, then the learning rate.

    The source, and what each argument means, are there. Numbers are options of the groups.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: ScalarOrSchedule,
        eta: ScalarOrSchedule = 0.01,
        gamma: ScalarOrSchedule = 0.55,
        *,
        key: Tensor | int,
        compile: bool = False,
        state: str | None = None,
        capturable: bool = False,
        owners: bool = False,
    ) -> None: ...

class NorMuon(Ready):
    """`functorch_opt.normuon` as a class.

    NorMuon for the tensors with two dims or more, and `adamw` for the rest.

    The source, and what each argument means, are there. Numbers are options of the groups.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: ScalarOrSchedule,
        ns_coeffs: Coefficients = (3.4445, -4.775, 2.0315),
        ns_steps: int = 5,
        beta: ScalarOrSchedule = 0.95,
        b2: ScalarOrSchedule = 0.95,
        eps: ScalarOrSchedule = 1e-10,
        weight_decay: ScalarOrSchedule = 0.0,
        *,
        nesterov: bool = True,
        axis: Axis = "rows",
        scaling: Scaling = "original",
        adam_learning_rate: ScalarOrSchedule | None = None,
        adam_b1: ScalarOrSchedule = 0.9,
        adam_b2: ScalarOrSchedule = 0.95,
        adam_eps: ScalarOrSchedule = 1e-10,
        compile: bool = False,
        state: str | None = None,
        capturable: bool = False,
        owners: bool = False,
    ) -> None: ...

class NovoGrad(Ready):
    """`functorch_opt.novograd` as a class.

    NovoGrad: `scale_by_novograd`, then the learning rate.

    The source, and what each argument means, are there. Numbers are options of the groups.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: ScalarOrSchedule,
        b1: ScalarOrSchedule = 0.9,
        b2: ScalarOrSchedule = 0.25,
        eps: ScalarOrSchedule = 1e-06,
        eps_root: ScalarOrSchedule = 0.0,
        weight_decay: ScalarOrSchedule = 0.0,
        *,
        compile: bool = False,
        state: str | None = None,
        capturable: bool = False,
        owners: bool = False,
    ) -> None: ...

class OptimisticAdamV2(Ready):
    """`functorch_opt.optimistic_adam_v2` as a class.

    `scale_by_adam`, `scale_by_optimistic_gradient` of what it makes, then the learning rate.

    The source, and what each argument means, are there. Numbers are options of the groups.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: ScalarOrSchedule,
        *,
        alpha: ScalarOrSchedule = 1.0,
        beta: ScalarOrSchedule = 1.0,
        b1: ScalarOrSchedule = 0.9,
        b2: ScalarOrSchedule = 0.999,
        eps: ScalarOrSchedule = 1e-08,
        eps_root: ScalarOrSchedule = 0.0,
        mu_dtype: torch.dtype | None = None,
        nesterov: bool = True,
        compile: bool = False,
        state: str | None = None,
        capturable: bool = False,
        owners: bool = False,
    ) -> None: ...

class OptimisticGradientDescent(Ready):
    """`functorch_opt.optimistic_gradient_descent` as a class.

    `scale_by_optimistic_gradient`, then the learning rate.

    The source, and what each argument means, are there. Numbers are options of the groups.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: ScalarOrSchedule,
        alpha: ScalarOrSchedule = 1.0,
        beta: ScalarOrSchedule = 1.0,
        *,
        compile: bool = False,
        state: str | None = None,
        capturable: bool = False,
        owners: bool = False,
    ) -> None: ...

class PSGDKron(Ready):
    """`functorch_opt.psgd_kron` as a class.

    PSGD Kron: `scale_by_psgd_kron`, decoupled weight decay, the learning rate.

    The source, and what each argument means, are there. Numbers are options of the groups.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: ScalarOrSchedule = 0.0003,
        b1: ScalarOrSchedule = 0.9,
        weight_decay: ScalarOrSchedule = 0.0,
        precond_lr: ScalarOrSchedule = 0.1,
        probability: ScalarOrSchedule | None = None,
        mask: MaskOrFn | None = None,
        *,
        key: Tensor | int,
        init_scale: float = 1.0,
        max_size: int = 8192,
        diagonals: Diagonals = "large",
        balance_probability: float = 0.01,
        compile: bool = False,
        state: str | None = None,
        capturable: bool = False,
        owners: bool = False,
    ) -> None: ...

class Prodigy(Ready):
    """`functorch_opt.prodigy` as a class.

    Prodigy, with one d for all parameters. ``get(state, "d") * estim_lr0`` is the d.

    The source, and what each argument means, are there. Numbers are options of the groups.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: ScalarOrSchedule = 1.0,
        betas: tuple[Scalar, Scalar] = (0.9, 0.999),
        beta3: Scalar | None = None,
        eps: ScalarOrSchedule = 1e-08,
        estim_lr0: Scalar = 1e-06,
        estim_lr_coef: ScalarOrSchedule = 1.0,
        weight_decay: ScalarOrSchedule = 0.0,
        safeguard_warmup: bool = False,
        weight_decay_mask: MaskOrFn | None = None,
        *,
        growth_rate: ScalarOrSchedule | None = None,
        use_bias_correction: bool = False,
        compile: bool = False,
        state: str | None = None,
        capturable: bool = False,
        owners: bool = False,
    ) -> None: ...

class SPlus(Ready):
    """`functorch_opt.splus` as a class.

    SPlus: `scale_by_splus`, the learning rate, an average, and decay. Evaluate with `eval_params`.

    The source, and what each argument means, are there. Numbers are options of the groups.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: ScalarOrSchedule = 0.1,
        b1: ScalarOrSchedule = 0.9,
        b2: ScalarOrSchedule = 0.999,
        eps: ScalarOrSchedule = 1e-30,
        weight_decay: ScalarOrSchedule = 0.01,
        frequency: int = 100,
        *,
        ema: ScalarOrSchedule = 0.999,
        max_size: int = 10000,
        scale: ScalarOrSchedule = 0.001,
        compile: bool = False,
        state: str | None = None,
        capturable: bool = False,
        owners: bool = False,
    ) -> None: ...

class ScheduleFreeAdamW(Ready):
    """`functorch_opt.schedule_free_adamw` as a class.

    `schedule_free` of AdamW without a mean. Evaluate with `eval_params`.

    The source, and what each argument means, are there. Numbers are options of the groups.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: ScalarOrSchedule = 0.0025,
        warmup_steps: int | None = None,
        b1: ScalarOrSchedule = 0.9,
        b2: ScalarOrSchedule = 0.999,
        eps: ScalarOrSchedule = 1e-08,
        weight_decay: ScalarOrSchedule = 0.0,
        weight_lr_power: ScalarOrSchedule = 2.0,
        state_dtype: torch.dtype | None = None,
        *,
        r: ScalarOrSchedule = 0.0,
        mask: MaskOrFn | None = None,
        compile: bool = False,
        state: str | None = None,
        capturable: bool = False,
        owners: bool = False,
    ) -> None: ...

class ScheduleFreeProdigy(Ready):
    """`functorch_opt.schedule_free_prodigy` as a class.

    `prodigy` without a mean, and Schedule-Free around it. Evaluate with `eval_params`.

    The source, and what each argument means, are there. Numbers are options of the groups.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: ScalarOrSchedule = 1.0,
        betas: tuple[Scalar, Scalar] = (0.9, 0.999),
        beta3: Scalar | None = None,
        eps: ScalarOrSchedule = 1e-08,
        estim_lr0: Scalar = 1e-06,
        estim_lr_coef: ScalarOrSchedule = 1.0,
        weight_decay: ScalarOrSchedule = 0.0,
        safeguard_warmup: bool = False,
        weight_lr_power: ScalarOrSchedule = 2.0,
        *,
        growth_rate: ScalarOrSchedule | None = None,
        compile: bool = False,
        state: str | None = None,
        capturable: bool = False,
        owners: bool = False,
    ) -> None: ...

class ScheduleFreeRAdam(Ready):
    """`functorch_opt.schedule_free_radam` as a class.

    `schedule_free` of RAdam without a mean. Evaluate with `eval_params`.

    The source, and what each argument means, are there. Numbers are options of the groups.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: ScalarOrSchedule = 0.0025,
        b1: ScalarOrSchedule = 0.9,
        b2: ScalarOrSchedule = 0.999,
        eps: ScalarOrSchedule = 1e-08,
        weight_decay: ScalarOrSchedule = 0.0,
        weight_lr_power: ScalarOrSchedule = 2.0,
        state_dtype: torch.dtype | None = None,
        *,
        silent_sgd_phase: bool = True,
        r: ScalarOrSchedule = 0.0,
        mask: MaskOrFn | None = None,
        compile: bool = False,
        state: str | None = None,
        capturable: bool = False,
        owners: bool = False,
    ) -> None: ...

class ScheduleFreeSGD(Ready):
    """`functorch_opt.schedule_free_sgd` as a class.

    `schedule_free` of gradient descent. Evaluate with `eval_params`.

    The source, and what each argument means, are there. Numbers are options of the groups.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: ScalarOrSchedule = 1.0,
        warmup_steps: int | None = None,
        b1: ScalarOrSchedule = 0.9,
        weight_decay: ScalarOrSchedule = 0.0,
        weight_lr_power: ScalarOrSchedule = 2.0,
        state_dtype: torch.dtype | None = None,
        *,
        r: ScalarOrSchedule = 0.0,
        mask: MaskOrFn | None = None,
        compile: bool = False,
        state: str | None = None,
        capturable: bool = False,
        owners: bool = False,
    ) -> None: ...

class Scion(Ready):
    """`functorch_opt.scion` as a class.

    Scion, by the role of each layer: hidden, head, or vector.

    The source, and what each argument means, are there. Numbers are options of the groups.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: ScalarOrSchedule,
        b1: ScalarOrSchedule = 0.9,
        radius: ScalarOrSchedule = 50.0,
        head_radius: ScalarOrSchedule = 3000.0,
        vector_radius: ScalarOrSchedule = 1.0,
        labels: LabelsOrFn | None = None,
        *,
        constrained: bool = True,
        head_norm: Norm = "sign",
        ns_coeffs: Coefficients = (3.4445, -4.775, 2.0315),
        ns_steps: int = 5,
        compile: bool = False,
        state: str | None = None,
        capturable: bool = False,
        owners: bool = False,
    ) -> None: ...

class Shampoo(Ready):
    """`functorch_opt.shampoo` as a class.

    Shampoo: `scale_by_shampoo`, decoupled weight decay, the learning rate.

    The source, and what each argument means, are there. Numbers are options of the groups.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: ScalarOrSchedule,
        b1: ScalarOrSchedule = 0.9,
        b2: ScalarOrSchedule = 1.0,
        eps: ScalarOrSchedule = 1e-12,
        weight_decay: ScalarOrSchedule = 0.0,
        frequency: int = 1,
        mask: MaskOrFn | None = None,
        *,
        start: int | None = None,
        grafting: Grafting = "adam",
        graft_b2: ScalarOrSchedule = 0.999,
        graft_eps: ScalarOrSchedule = 1e-08,
        max_size: int = 1024,
        merged: int = 0,
        compile: bool = False,
        state: str | None = None,
        capturable: bool = False,
        owners: bool = False,
    ) -> None: ...

class SignSGD(Ready):
    """`functorch_opt.sign_sgd` as a class.

    Descent by the sign of the gradient: `scale_by_sign`, then the learning rate.

    The source, and what each argument means, are there. Numbers are options of the groups.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: ScalarOrSchedule,
        *,
        compile: bool = False,
        state: str | None = None,
        capturable: bool = False,
        owners: bool = False,
    ) -> None: ...

class Signum(Ready):
    """`functorch_opt.signum` as a class.

    Descent by the sign of the momentum: `ema`, `scale_by_sign`, then the learning rate.

    The source, and what each argument means, are there. Numbers are options of the groups.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: ScalarOrSchedule,
        beta: ScalarOrSchedule = 0.9,
        accumulator_dtype: torch.dtype | None = None,
        *,
        compile: bool = False,
        state: str | None = None,
        capturable: bool = False,
        owners: bool = False,
    ) -> None: ...

class SimplifiedAdEMAMix(Ready):
    """`functorch_opt.simplified_ademamix` as a class.

    `scale_by_simplified_ademamix`, decoupled weight decay, the learning rate.

    The source, and what each argument means, are there. Numbers are options of the groups.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: ScalarOrSchedule,
        b1: ScalarOrSchedule = 0.99,
        b2: ScalarOrSchedule = 0.95,
        alpha: ScalarOrSchedule = 0.0,
        eps: ScalarOrSchedule = 1e-08,
        eps_root: ScalarOrSchedule = 0.0,
        weight_decay: ScalarOrSchedule = 0.0,
        mask: MaskOrFn | None = None,
        *,
        compile: bool = False,
        state: str | None = None,
        capturable: bool = False,
        owners: bool = False,
    ) -> None: ...

class StableAdamW(Ready):
    """`functorch_opt.stable_adamw` as a class.

    StableAdamW: `scale_by_stable_adamw`, then the learning rate. It takes the place of clipping.

    The source, and what each argument means, are there. Numbers are options of the groups.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: ScalarOrSchedule,
        b1: ScalarOrSchedule = 0.9,
        b2: ScalarOrSchedule = 0.99,
        eps: ScalarOrSchedule = 1e-06,
        weight_decay: ScalarOrSchedule = 0.01,
        mu_dtype: torch.dtype | None = None,
        *,
        compile: bool = False,
        state: str | None = None,
        capturable: bool = False,
        owners: bool = False,
    ) -> None: ...

class StableSPAM(Ready):
    """`functorch_opt.stable_spam` as a class.

    Stable-SPAM: `scale_by_stable_spam`, decoupled weight decay, the learning rate.

    The source, and what each argument means, are there. Numbers are options of the groups.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: ScalarOrSchedule,
        b1: ScalarOrSchedule = 0.9,
        b2: ScalarOrSchedule = 0.999,
        eps: ScalarOrSchedule = 1e-08,
        mu_dtype: torch.dtype | None = None,
        weight_decay: ScalarOrSchedule = 0.0,
        mask: MaskOrFn | None = None,
        *,
        gamma1: ScalarOrSchedule = 0.7,
        gamma2: ScalarOrSchedule = 0.9,
        theta: ScalarOrSchedule = 0.999,
        reset_period: int = 1000,
        compile: bool = False,
        state: str | None = None,
        capturable: bool = False,
        owners: bool = False,
    ) -> None: ...

class Yogi(Ready):
    """`functorch_opt.yogi` as a class.

    Yogi: `scale_by_yogi`, then the learning rate.

    The source, and what each argument means, are there. Numbers are options of the groups.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: ScalarOrSchedule,
        b1: ScalarOrSchedule = 0.9,
        b2: ScalarOrSchedule = 0.999,
        eps: ScalarOrSchedule = 0.001,
        *,
        compile: bool = False,
        state: str | None = None,
        capturable: bool = False,
        owners: bool = False,
    ) -> None: ...
