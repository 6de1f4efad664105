"""Groups of parameters of the models of transformers, beside what its Trainer decays."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

import functorch_opt as fo

SMALL = {"num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
WORDS = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 0}
MODELS: dict[str, tuple[str, Any, dict[str, Any], str, str]] = {
    "gpt2": (
        "GPT2LMHeadModel",
        transformers.GPT2Config,
        {"n_positions": 16, "n_embd": 8, "n_layer": 3, "n_head": 2, **WORDS},
        "transformer.h",
        "transformer.ln_f.weight",
    ),
    "bert": (
        "BertForSequenceClassification",
        transformers.BertConfig,
        {"vocab_size": 64, "hidden_size": 8, **SMALL},
        "bert.encoder.layer",
        "classifier.weight",
    ),
    "llama": (
        "LlamaForCausalLM",
        transformers.LlamaConfig,
        {"hidden_size": 8, **SMALL, **WORDS},
        "model.layers",
        "lm_head.weight",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_groups_of_models(name: str) -> None:
    kind, config, options, blocks, head = MODELS[name]
    model = getattr(transformers, kind)(config(**options))
    groups = fo.optim.groups(model, fo.optim.no_decay(embeddings=False), weight_decay=0.1)
    decaying = {
        path for group in groups if group["weight_decay"] for path, _ in group["params"]
    }
    # The Trainer gives a tied weight by both of its names.
    theirs = {*transformers.Trainer.get_decay_parameter_names(None, model)}
    assert decaying == theirs & dict(model.named_parameters()).keys()

    layers = fo.optim.groups(model, fo.optim.layer_decay(0.5), lr=1.0)
    names = [group["name"].partition(": ")[2] for group in layers]
    own = [f"{blocks}.{i}" for i in range(3)]
    assert names == ["before the blocks", *own, "after the blocks"]
    assert head in dict(layers[-1]["params"])
    assert [group["lr"] for group in layers] == [1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0]
