"""Parameter groups: who is chosen, what they are given, and that every optimizer takes them."""

from __future__ import annotations

import pickle
from collections import defaultdict

import pytest
import torch
from torch import Tensor, nn

import functorch_opt as fo

groups = fo.optim.groups


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)


class Transformer(nn.Module):
    """With bare parameters, an embedding that is tied to the head, and a norm after the blocks."""

    def __init__(self, width: int = 4, depth: int = 3, tied: bool = False) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.randn(1, 5, width))
        self.wte = nn.Embedding(7, width)
        self.blocks = nn.ModuleList([Block(width) for _ in range(depth)])
        self.ln_f = nn.LayerNorm(width)
        self.head = nn.Linear(width, 7, bias=False)
        if tied:
            self.head.weight = self.wte.weight


def names_in(group: dict) -> list[str]:
    return [name for name, _ in group["params"]]


def by_name(found: fo.optim.ParamGroups, option: str) -> dict[str, float]:
    return {name: group[option] for group in found for name in names_in(group)}


# ---- which parameters ----------------------------------------------------------------------------


def of_blocks(path: str, p: Tensor) -> bool:
    return path.startswith("blocks.")


ALL = [name for name, _ in Transformer().named_parameters()]


@pytest.mark.parametrize(
    ("which", "wanted"),
    [
        ("head.weight", ["head.weight"]),
        ("*.up.*", [name for name in ALL if ".up." in name]),
        (
            "blocks.1.*.bias",
            ["blocks.1.norm.bias", "blocks.1.up.bias", "blocks.1.down.bias"],
        ),
        (nn.LayerNorm, [name for name in ALL if "norm" in name or "ln_f" in name]),
        (Block, [name for name in ALL if name.startswith("blocks.")]),
        ((None, 5, 4), ["pos_embed"]),
        ((7, None), ["wte.weight", "head.weight"]),
        (of_blocks, [name for name in ALL if name.startswith("blocks.")]),
        (("head.*", nn.Embedding, (1, 5, 4)), ["pos_embed", "wte.weight", "head.weight"]),
    ],
)
def test_which_parameters(which, wanted: list[str]) -> None:
    found = groups(Transformer(), {which: {"name": "chosen", "lr": 1.0}, "*": {}}, lr=0.1)
    of = {group["name"]: group for group in found}
    assert sorted(names_in(of["chosen"])) == sorted(wanted)
    assert of["chosen"]["lr"] == 1.0
    assert sorted(names_in(of["rest"])) == sorted(set(ALL) - set(wanted))
    assert of["rest"]["lr"] == 0.1


def test_every_parameter_is_in_one_group_and_is_itself() -> None:
    model = Transformer()
    found = groups(model, fo.optim.no_decay(), fo.optim.layer_decay(0.5), lr=1.0)
    pairs = [pair for group in found for pair in group["params"]]
    assert len(pairs) == len(ALL)
    own = dict(model.named_parameters())
    assert all(own[name] is p for name, p in pairs)


def test_a_shape_of_no_dims() -> None:
    params = {"scale": torch.zeros(()), "w": torch.zeros(2)}
    found = groups(params, {(): {"lr": 1.0, "name": "numbers"}, "*": {}}, lr=0.1)
    assert by_name(found, "lr") == {"scale": 1.0, "w": 0.1}


def test_a_tree_has_paths() -> None:
    params = {"encoder": {"w": torch.zeros(2, 2)}, "head": [torch.zeros(2), None]}
    found = groups(params, {"encoder/*": {"lr": 0.1}, "head/0": {"lr": 1.0}})
    assert by_name(found, "lr") == {"encoder/w": 0.1, "head/0": 1.0}
    with pytest.raises(TypeError, match="a tree of params has none"):
        groups(params, {nn.Linear: {"lr": 0.1}, "*": {}})


def test_what_overlaps_is_an_error_or_the_first_ones() -> None:
    rules = {"*.bias": {"lr": 1.0}, "head.*": {"lr": 2.0}, "*": {"lr": 3.0}}
    model = nn.ModuleDict({"head": nn.Linear(2, 2), "body": nn.Linear(2, 2)})
    with pytest.raises(
        ValueError, match=r"'\*.bias' and 'head.\*' both choose 'head.bias'"
    ):
        groups(model, rules)
    assert by_name(groups(model, rules, overlap="first"), "lr") == {
        "head.weight": 2.0,
        "head.bias": 1.0,
        "body.weight": 3.0,
        "body.bias": 1.0,
    }


def test_what_chooses_nothing_is_an_error_or_left_out() -> None:
    model = nn.Linear(2, 2)
    rules = {"head.*": {"lr": 1.0}, "*": {"lr": 3.0}}
    with pytest.raises(
        ValueError, match=r"nothing for 'head.\*': no parameter is chosen"
    ):
        groups(model, rules)
    (only,) = groups(model, rules, empty="skip")
    assert (only["name"], only["lr"]) == ("rest", 3.0)
    taken = {nn.Linear: {"lr": 1.0}, "weight": {"lr": 2.0}}
    with pytest.raises(ValueError, match="'weight': an earlier key has all"):
        groups(model, taken, overlap="first")


def test_what_is_left_over_is_an_error_without_a_rest() -> None:
    with pytest.raises(ValueError, match=r"no key of the dict chooses 'bias'. Add '\*'"):
        groups(nn.Linear(2, 2), {"weight": {"lr": 1.0}})


@pytest.mark.parametrize("which", [3, torch.float32, Tensor, lambda p: True, ("*.w", 3)])
def test_what_cannot_choose(which) -> None:
    with pytest.raises(TypeError, match=r"chosen by a pattern|function of path and leaf"):
        groups(nn.Linear(2, 2), {which: {}, "*": {}})


def test_a_function_returns_a_bool() -> None:
    with pytest.raises(
        TypeError, match="must return True or False; for 'weight' it returned int 2"
    ):
        groups(nn.Linear(2, 2), {lambda path, p: p.ndim: {}, "*": {}})


def test_two_keys_of_one_name() -> None:
    rules = {lambda path, p: p.ndim == 1: {}, lambda path, p: p.ndim == 2: {}}
    with pytest.raises(
        ValueError, match="several keys of the dict are called '<lambda>'"
    ):
        groups(nn.Linear(2, 2), rules)
    vectors, matrices = rules
    named = groups(nn.Linear(2, 2), {vectors: {"name": "v"}, matrices: {"name": "m"}})
    assert [group["name"] for group in named] == ["v", "m"]


@pytest.mark.parametrize("choice", ["overlap", "empty", "frozen"])
def test_a_wrong_choice(choice: str) -> None:
    with pytest.raises(ValueError, match=f"{choice} must be"):
        groups(nn.Linear(2, 2), **{choice: "maybe"})


def test_what_is_no_rule() -> None:
    with pytest.raises(TypeError, match="a rule is a dict"):
        groups(nn.Linear(2, 2), "*.bias")


def test_nothing_to_group() -> None:
    with pytest.raises(ValueError, match="there is no parameter"):
        groups(nn.Tanh())


# ---- tied, frozen, lazy ----------------------------------------------------------------------------


def test_a_tied_weight_has_all_its_names() -> None:
    model = Transformer(tied=True)
    found = groups(model, {"head.weight": {"lr": 1.0}, "*": {}}, lr=0.1)
    assert by_name(found, "lr")["wte.weight"] == 1.0
    assert "wte.weight is also head.weight" in str(found)
    assert sum(len(group["params"]) for group in found) == len(ALL) - 1
    assert found.labels("head.weight", model.head.weight) == "head.weight"
    with pytest.raises(ValueError, match=r"both choose 'wte\.weight'"):
        groups(model, {"head.*": {}, "wte.*": {}, "*": {}})
    decays = by_name(groups(model, fo.optim.no_decay(), weight_decay=0.1), "weight_decay")
    assert decays["wte.weight"] == 0.0


def test_a_shared_module_is_in_one_group() -> None:
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": shared, "b": shared})
    found = groups(model, {"b.*": {"lr": 1.0}})
    assert by_name(found, "lr") == {"a.weight": 1.0, "a.bias": 1.0}


def test_frozen_parameters_stay_in_their_group_or_are_left_out() -> None:
    model = Transformer()
    model.wte.requires_grad_(False)
    kept = groups(model, fo.optim.no_decay(), weight_decay=0.1, lr=0.1)
    assert "wte.weight" in by_name(kept, "lr")
    assert "frozen, and among these: 1 tensors, 28 parameters ('wte.weight')" in str(kept)
    out = groups(model, {"wte.*": {"lr": 1.0}, "*": {}}, lr=0.1, frozen="leave out")
    assert [group["name"] for group in out] == ["rest"]
    assert "frozen, and left out: 1 tensors" in str(out)

    optimizer = fo.optim.SGD(kept, lr=0.1)
    model.wte.requires_grad_(True)
    before = model.wte.weight.detach().clone()
    model.wte(torch.tensor([1])).sum().backward()
    optimizer.step()
    assert not torch.equal(model.wte.weight[1], before[1])


def test_a_lazy_parameter_is_an_error() -> None:
    model = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 1))
    with pytest.raises(
        ValueError, match=r"no shape yet: '0\.weight', '0\.bias'\. Their modules are lazy"
    ):
        groups(model)
    model(torch.zeros(2, 5))
    assert len(groups(model)[0]["params"]) == 4


# ---- options ---------------------------------------------------------------------------------------


def test_the_first_rule_that_gives_an_option_holds() -> None:
    model = nn.Linear(2, 2)
    rules = [fo.optim.no_decay(), {"*": {"weight_decay": 0.5, "lr": 0.1}}]
    assert by_name(groups(model, *rules, lr=9.0), "weight_decay") == {
        "weight": 0.5,
        "bias": 0.0,
    }
    assert by_name(groups(model, *rules, lr=9.0), "lr") == {"weight": 0.1, "bias": 0.1}
    back = groups(model, *rules[::-1])
    assert by_name(back, "weight_decay") == {"weight": 0.5, "bias": 0.5}


def test_factors_multiply_and_stay() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    twice = {"*.bias": {"lr_scale": 3.0}, "*": {}}
    found = groups(model, fo.optim.layer_decay(0.5), twice, lr=0.8)
    assert by_name(found, "lr") == pytest.approx(
        {"0.weight": 0.2, "0.bias": 0.6, "1.weight": 0.4, "1.bias": 1.2}
    )
    assert by_name(found, "lr_scale") == pytest.approx(
        {"0.weight": 0.25, "0.bias": 0.75, "1.weight": 0.5, "1.bias": 1.5}
    )


def test_a_factor_of_some_is_a_factor_of_all() -> None:
    found = groups(nn.Linear(2, 2), {"bias": {"lr_scale": 3.0}, "*": {}}, lr=1.0)
    assert by_name(found, "lr_scale") == {"weight": 1.0, "bias": 3.0}


def test_a_factor_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="a rule multiplies lr, which is not given"):
        groups(Transformer(), fo.optim.layer_decay(0.5))


def test_schedulers_keep_the_factors() -> None:
    model = Transformer()
    optimizer = torch.optim.SGD(groups(model, fo.optim.layer_decay(0.5), lr=1.0))
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.1)
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(0.1 * group["lr_scale"])
    rates = [0.3 * group["lr_scale"] for group in optimizer.param_groups]
    torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, 100, cycle_momentum=False)
    assert len({group["lr"] for group in optimizer.param_groups}) == 5


# ---- the rules -------------------------------------------------------------------------------------


def test_no_decay() -> None:
    found = groups(Transformer(), fo.optim.no_decay(), weight_decay=0.1)
    decaying = [name for name, decay in by_name(found, "weight_decay").items() if decay]
    matrices = [f"blocks.{i}.{of}.weight" for i in range(3) for of in ("up", "down")]
    assert decaying == [*matrices, "head.weight"]
    also = groups(Transformer(), fo.optim.no_decay("head.*", Block), weight_decay=0.1)
    assert {*by_name(also, "weight_decay").values()} == {0.0}
    with_embeddings = groups(
        Transformer(), fo.optim.no_decay(embeddings=False), weight_decay=0.1
    )
    of = by_name(with_embeddings, "weight_decay")
    assert of["wte.weight"] == of["pos_embed"] == 0.1
    assert of["ln_f.weight"] == 0.0
    with pytest.raises(ValueError, match="no parameter for 'tail"):
        groups(Transformer(), fo.optim.no_decay("tail.*"))


def test_no_decay_of_torch_layers() -> None:
    """The biases of attention have other names, and a table of biases has two dims."""
    model = nn.TransformerEncoderLayer(4, 2, 8)
    model.relative_position_bias_table = nn.Parameter(torch.zeros(9, 2))
    model.bn = nn.Sequential(nn.Conv1d(2, 2, 3), nn.BatchNorm1d(2), nn.GroupNorm(1, 2))
    decays = by_name(groups(model, fo.optim.no_decay(), weight_decay=0.1), "weight_decay")
    assert [name for name, decay in decays.items() if decay] == [
        "self_attn.in_proj_weight",
        "self_attn.out_proj.weight",
        "linear1.weight",
        "linear2.weight",
        "bn.0.weight",
    ]


def test_no_decay_in_a_tree() -> None:
    params = {
        "wte": {"table": torch.zeros(4, 2)},
        "l1": {"w": torch.zeros(2, 2), "b": torch.zeros(2)},
    }
    decays = by_name(
        groups(params, fo.optim.no_decay(), weight_decay=0.1), "weight_decay"
    )
    assert decays == {"l1/w": 0.1, "l1/b": 0.0, "wte/table": 0.0}


def beit_layer(name: str, depth: int) -> int:
    """``get_num_layer_for_vit`` of BEiT's optim_factory.py, with the names used here."""
    if name in ("cls_token", "mask_token", "pos_embed") or name.startswith("wte"):
        return 0
    if name.startswith("blocks"):
        return int(name.split(".")[1]) + 1
    return depth + 1


def test_layer_decay_is_that_of_beit() -> None:
    found = groups(Transformer(depth=12), fo.optim.layer_decay(0.75), lr=1e-3)
    rates = by_name(found, "lr")
    values = [0.75 ** (13 - i) for i in range(14)]
    wanted = {name: 1e-3 * values[beit_layer(name, 12)] for name in rates}
    assert rates == pytest.approx(wanted, rel=1e-12)
    assert [group["name"] for group in found][::13] == [
        "layer 0: before the blocks",
        "layer 13: after the blocks",
    ]
    assert "layer 12: blocks.11" in str(found)


class Stages(nn.Module):
    """Blocks within stages, with a layer between."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(2, 2)
        self.layers = nn.ModuleList()
        for _ in range(2):
            stage = nn.Module()
            stage.blocks = nn.ModuleList([nn.Linear(2, 2) for _ in range(2)])
            stage.downsample = nn.Linear(2, 2)
            self.layers.append(stage)


def test_blocks_may_be_named() -> None:
    model = Stages()
    found = groups(model, fo.optim.layer_decay(0.5, "layers.*.blocks.*"), lr=32.0)
    weights = {n: lr for n, lr in by_name(found, "lr").items() if n.endswith("weight")}
    assert weights == {
        "stem.weight": 1.0,
        "layers.0.blocks.0.weight": 2.0,
        "layers.0.blocks.1.weight": 4.0,
        "layers.0.downsample.weight": 4.0,
        "layers.1.blocks.0.weight": 8.0,
        "layers.1.blocks.1.weight": 16.0,
        "layers.1.downsample.weight": 32.0,
    }
    found = groups(model, fo.optim.layer_decay(0.5), lr=8.0)
    assert by_name(found, "lr")["layers.0.downsample.weight"] == 2.0
    with pytest.raises(
        ValueError, match=r"in a block 'stages.\*'.*There are 'layers.\*'"
    ):
        groups(model, fo.optim.layer_decay(0.5, "stages.*"), lr=1.0)


def test_two_lists_of_blocks_are_ambiguous() -> None:
    sides = {
        side: nn.ModuleList([nn.Linear(2, 2) for _ in range(2)])
        for side in ("enc", "dec")
    }
    model = nn.ModuleDict(sides)
    with pytest.raises(ValueError, match=r"could be those of 'enc.\*', 'dec.\*'"):
        groups(model, fo.optim.layer_decay(0.5), lr=1.0)
    found = groups(model, fo.optim.layer_decay(0.5, ("enc.*", "dec.*")), lr=16.0)
    assert [group["lr"] for group in found] == [1.0, 2.0, 4.0, 8.0]
    assert by_name(found, "lr")["dec.1.weight"] == 8.0
    assert by_name(found, "lr")["enc.0.weight"] == 1.0


def test_lists_within_a_list_are_no_choice() -> None:
    """The layers of a block are not named beside the blocks."""
    sides = {}
    for side in ("enc", "dec"):
        blocks = [nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]) for _ in range(2)]
        sides[side] = nn.ModuleList(blocks)
    with pytest.raises(ValueError, match=r"could be those of 'enc\.\*', 'dec\.\*'\. Say"):
        groups(nn.ModuleDict(sides), fo.optim.layer_decay(0.5), lr=1.0)
    found = groups(
        nn.ModuleDict({"enc": sides["enc"]}), fo.optim.layer_decay(0.5), lr=1.0
    )
    assert [group["name"] for group in found] == ["layer 1: enc.0", "layer 2: enc.1"]


def test_layer_decay_needs_blocks_a_model_and_a_factor() -> None:
    with pytest.raises(ValueError, match="no list of modules with at least two"):
        groups(nn.Linear(2, 2), fo.optim.layer_decay(0.5), lr=1.0)
    with pytest.raises(TypeError, match="layer_decay needs the model"):
        groups(dict(Transformer().named_parameters()), fo.optim.layer_decay(0.5), lr=1.0)
    for decay in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="decay must be in"):
            fo.optim.layer_decay(decay)


def test_a_number_in_a_name_is_no_block() -> None:
    """``fc1`` is a name, and a convolution has no blocks."""
    model = nn.ModuleDict({"fc1": nn.Linear(2, 2), "fc2": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match="no list of modules"):
        groups(model, fo.optim.layer_decay(0.5), lr=1.0)
    found = groups(model, fo.optim.layer_decay(0.5, "fc*"), lr=4.0)
    assert by_name(found, "lr") == {
        "fc1.weight": 1.0,
        "fc1.bias": 1.0,
        "fc2.weight": 2.0,
        "fc2.bias": 2.0,
    }


def test_lora_plus() -> None:
    model = nn.ModuleDict(
        {"lora_A": nn.Linear(4, 2, bias=False), "lora_B": nn.Linear(2, 4, bias=False)}
    )
    model.register_parameter("lora_embedding_B", nn.Parameter(torch.zeros(2, 2)))
    model.register_parameter("lora_embedding_A", nn.Parameter(torch.zeros(2, 2)))
    assert by_name(groups(model, fo.optim.lora_plus(16), lr=1e-4), "lr") == pytest.approx(
        {
            "lora_A.weight": 1e-4,
            "lora_B.weight": 16e-4,
            "lora_embedding_A": 1e-4,
            "lora_embedding_B": 16e-4,
        }
    )
    with pytest.raises(ValueError, match="no parameter has lora_B"):
        groups(nn.Linear(2, 2), fo.optim.lora_plus(), lr=1.0)
    with pytest.raises(ValueError, match="ratio must be greater than 0"):
        fo.optim.lora_plus(0.0)


def of_the_mup_package(shape, base, optimizer: str) -> tuple[float, float]:
    """The factors of lr and decay in ``mup/optim.py`` with the dims of ``mup/infshape.py``."""
    ratios = [n / m for n, m in zip(shape, base, strict=True)]
    infinite = [n != m for n, m in zip(shape, base, strict=True)]
    width_mult = 1.0
    for i in reversed(range(len(shape))):
        if infinite[i]:
            width_mult = ratios[i]
            break
    if optimizer == "adam":
        return (1 / width_mult, width_mult) if sum(infinite) == 2 else (1.0, 1.0)
    if sum(infinite) == 1:
        return width_mult, 1 / width_mult
    if sum(infinite) == 2:
        ratio = ratios[1] / ratios[0]
        return 1 / ratio, ratio
    return 1.0, 1.0


class Wide(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.up = nn.Linear(width, heads * 8)
        self.conv = nn.Conv2d(width, heads, 3)
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, 11)
        self.temperature = nn.Parameter(torch.zeros(()))


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_mup_is_that_of_the_package(optimizer: str) -> None:
    model, base = Wide(24, 6), Wide(8, 3)
    found = groups(model, fo.optim.mup(base, optimizer), lr=0.3, weight_decay=0.2)
    rates, decays = by_name(found, "lr"), by_name(found, "weight_decay")
    bases = dict(base.named_parameters())
    for name, p in model.named_parameters():
        rate, decay = of_the_mup_package(p.shape, bases[name].shape, optimizer)
        assert rates[name] == pytest.approx(0.3 * rate, rel=1e-12), name
        assert decays[name] == pytest.approx(0.2 * decay, rel=1e-12), name
    assert len({*rates.values()}) >= 2
    without = groups(model, fo.optim.mup(base, optimizer, scale_decay=False), lr=0.3)
    assert by_name(without, "lr") == rates
    with torch.device("meta"):
        on_meta = Wide(8, 3)
    assert (
        by_name(groups(model, fo.optim.mup(on_meta, optimizer, False), lr=0.3), "lr")
        == rates
    )


def test_mup_of_stacked_matrices() -> None:
    """[experts, out, in]: the fan-in is the last dim."""
    rule = fo.optim.mup({"w": torch.zeros(4, 2, 3)}, "sgd", scale_decay=False)
    (group,) = groups({"w": torch.zeros(4, 8, 6)}, rule, lr=1.0)
    assert group["lr"] == 2.0


def test_mup_refuses() -> None:
    with pytest.raises(ValueError, match="multiplies weight_decay, which is not given"):
        groups(Wide(16, 6), fo.optim.mup(Wide(8, 3)), lr=1.0)
    with pytest.raises(ValueError, match="other parameters: 'bias'"):
        groups(
            nn.Linear(2, 2),
            fo.optim.mup(nn.Linear(2, 2, bias=False), scale_decay=False),
            lr=1.0,
        )
    base = {"w": torch.zeros(2, 2, 2)}
    with pytest.raises(ValueError, match="more than two widths"):
        groups({"w": torch.zeros(4, 4, 4)}, fo.optim.mup(base, "adam", False), lr=1.0)
    with pytest.raises(ValueError, match="dims may not"):
        groups({"w": torch.zeros(4, 4)}, fo.optim.mup(base, "adam", False), lr=1.0)
    with pytest.raises(ValueError, match="optimizer must be"):
        fo.optim.mup(base, "lion")


# ---- every optimizer, labels and masks -------------------------------------------------------------


def by_hand(model: Transformer) -> list[dict]:
    """The same groups as a loop would make them."""
    found = defaultdict(list)
    for name, p in model.named_parameters():
        small = p.ndim < 2 or name in ("pos_embed", "wte.weight")
        found[beit_layer(name, 3), 0.0 if small else 0.1].append(p)
    return [
        {"params": params, "lr": 1e-2 * 0.5 ** (4 - layer), "weight_decay": decay}
        for (layer, decay), params in found.items()
    ]


def trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    for step in range(5):
        for i, p in enumerate(model.parameters()):
            p.grad = torch.sin(torch.arange(p.numel()) * 1.0 + i + step).reshape(p.shape)
        optimizer.step()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("cls", [torch.optim.AdamW, fo.optim.AdamW, fo.optim.Lion])
def test_the_numbers_are_those_of_groups_by_hand(cls) -> None:
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(Transformer())
    rules = fo.optim.layer_decay(0.5), fo.optim.no_decay()
    ours = cls(groups(models[0], *rules, lr=1e-2, weight_decay=0.1), lr=1.0)
    a = trained(models[0], ours)
    b = trained(models[1], cls(by_hand(models[1]), lr=1.0))
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("how", ["in place", "traced", "whole"])
def test_names_in_another_order_than_the_alphabets(how: str) -> None:
    """Each parameter has the options of its own group and its own count, whatever it is called."""

    def train(names: tuple[str, ...]) -> list[Tensor]:
        params = [nn.Parameter(torch.ones(2)) for _ in range(3)]
        if how == "whole":  # two parameters with elements in common go another way
            both = torch.ones(4)
            params[:2] = [nn.Parameter(both[:2]), nn.Parameter(both[1:3])]
        given = [
            {"params": [(name, p)] if names else [p], "lr": lr, "weight_decay": decay}
            for name, p, lr, decay in zip(
                names or "   ", params, (1.0, 0.1, 0.01), (0.0, 0.5, 0.1), strict=True
            )
        ]
        optimizer = fo.optim.AdamW(given)
        optimizer.init_state()
        step = optimizer.step
        if how == "traced":
            step = torch.compile(optimizer.step, backend="eager")
        for i in range(6):
            for j, p in enumerate(params):
                missing = i in ((0, 1, 2), (3,), ())[j]
                p.grad = None if missing else torch.tensor([i + 1.0, -j])
            with torch.no_grad():
                step()
        return [p.detach() for p in params]

    assert all(map(torch.equal, train(()), train(("z", "m", "a"))))


def test_labels_are_for_partition() -> None:
    model = Transformer()
    found = groups(model, {nn.LayerNorm: {"name": "norms"}, "*": {"name": "others"}})
    tx = fo.partition({"norms": fo.sgd(1.0), "others": fo.sgd(0.1)}, found.labels)
    params = {name: p.detach() for name, p in model.named_parameters()}
    ones = {name: torch.ones_like(p) for name, p in params.items()}
    updates = tx.update(ones, tx.init(params), params)[0]
    for name, u in updates.items():
        assert bool((u == (-1.0 if "norm" in name or "ln_f" in name else -0.1)).all())
    optimizer = fo.optim.Optimizer(model.named_parameters(), tx)
    trained(model, optimizer)
    with pytest.raises(ValueError, match="no parameter at 'w'"):
        tx.init({"w": torch.zeros(1)})
    copied = pickle.loads(pickle.dumps(tx))
    assert [*copied.init(params)] == ["norms", "others"]


def test_masks_are_for_masked_and_mask() -> None:
    model = Transformer()
    params = {name: p.detach() for name, p in model.named_parameters()}
    found = groups(model, fo.optim.layer_decay(0.5), fo.optim.no_decay(), lr=1.0)
    tx = fo.masked(fo.scale(0.0), found.mask("no decay", "layer 4: after the blocks"))
    out = tx.update(params, tx.init(params), params)[0]
    moved = [name for name, u in out.items() if bool((u != 0).any())]
    assert sorted(moved) == sorted(
        n for n in ALL if "up.weight" in n or "down.weight" in n
    )
    decayed = fo.add_decayed_weights(1.0, found.mask("decay"))
    zeros = {name: torch.zeros_like(p) for name, p in params.items()}
    out = decayed.update(zeros, decayed.init(params), params)[0]
    assert {n for n, u in out.items() if bool((u != 0).any())} == {*moved, "head.weight"}
    with pytest.raises(
        ValueError, match="no rule has the label 'norms'; there are 'decay'"
    ):
        found.mask("norms")


def test_the_table() -> None:
    model = nn.ModuleDict({"body": nn.Linear(1000, 10), "head": nn.Linear(10, 2)})
    model.body.bias.requires_grad_(False)
    found = groups(model, {"head.*": {"lr": 0.5}, "*": {}}, lr=0.1, weight_decay=1e-4)
    assert str(found) == (
        "group   options                     tensors  parameters  share\n"
        "head.*  lr=0.5 weight_decay=0.0001        2          22   0.2%\n"
        "rest    lr=0.1 weight_decay=0.0001        2      10,010  99.8%\n"
        "total                                     4      10,032\n"
        "frozen, and among these: 1 tensors, 10 parameters ('body.bias')"
    )


def test_the_table_of_groups_in_an_optimizer() -> None:
    """An optimizer adds options and takes the names apart, and schedulers change the rates."""
    found = groups(nn.Linear(3, 2), fo.optim.no_decay(), lr=0.1, weight_decay=0.5)
    torch.optim.AdamW(found)
    found[0]["lr"] = 0.05
    assert str(found) == (
        "group     options                   tensors  parameters  share\n"
        "decay     lr=0.05 weight_decay=0.5        1           6  75.0%\n"
        "no decay  lr=0.1 weight_decay=0           1           2  25.0%\n"
        "total                                     2           8"
    )


def test_an_option_may_be_a_tensor() -> None:
    """A rate that is a tensor can change in compiled code."""
    found = groups(Transformer(), fo.optim.layer_decay(0.5), lr=torch.tensor(0.8))
    assert [group["lr"].item() for group in found] == pytest.approx(
        [0.05, 0.1, 0.2, 0.4, 0.8]
    )


def test_what_a_rule_prints() -> None:
    rules = [
        fo.optim.no_decay("head.*", embeddings=False),
        fo.optim.layer_decay(0.5),
        fo.optim.layer_decay(0.5, "blocks.*"),
        fo.optim.lora_plus(8),
    ]
    assert [*map(repr, rules)] == [
        "no_decay('head.*', embeddings=False)",
        "layer_decay(0.5)",
        "layer_decay(0.5, 'blocks.*')",
        "lora_plus(8)",
    ]
