"""A routed language model written as a mixture of transformers computes what it computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import weft
from weft.errors import Problems, UsageError
from weft.routing import Gating, mixture
from weft.routing.learning import start_routers

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 2, "vocab_size": 32, "max_position_embeddings": 32}  # fmt: skip
IDS = torch.randint(0, 32, (3, 7), generator=torch.Generator().manual_seed(0))
DATA = {
    f"task{t}": torch.randint(0, 32, (4, 6), generator=torch.Generator().manual_seed(t)) for t in range(3)
}


def family(kind: str = "MistralForCausalLM") -> tuple[Any, list[Any]]:
    made = getattr(transformers, kind)

    def one(seed: int) -> Any:
        torch.manual_seed(seed)
        net = made(made.config_class(**SIZES)).eval()
        with torch.no_grad():
            for p in net.parameters():
                p.add_(torch.randn_like(p) * 0.1)
        return net

    base, experts = one(0), [one(s) for s in (1, 2, 3)]
    with torch.no_grad():
        for e in experts:
            for n, p in e.named_parameters():
                p.copy_(dict(base.named_parameters())[n] + 0.3 * p)
    return base, experts


@pytest.mark.parametrize("residual", ["full", "lowrank:4"])
def test_one_expert_a_token_is_the_mixture_of_that_choice(residual: str, tmp_path: Path) -> None:
    base, experts = family()
    gating = Gating.of("prototype", scope="layer", per="token", top=1)
    routed = weft.route(base, base, experts, gate=gating, where="mlp", residual=residual, data=DATA)
    with torch.no_grad():
        expected = routed(input_ids=IDS, use_cache=False).logits
    chosen = routed.weights_for(input_ids=IDS, use_cache=False)
    assert all(len(w.reshape(-1, 3).unique(dim=0)) > 1 for w in chosen.values())  # type: ignore[union-attr]
    weft.save(mixture(routed), tmp_path / "moe")
    made = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "moe", dtype=torch.float32).eval()
    assert type(made).__name__ == "MixtralForCausalLM"
    with torch.no_grad():
        torch.testing.assert_close(
            made(input_ids=IDS, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4
        )


def test_a_router_without_a_bias_is_the_mixtures_own(tmp_path: Path) -> None:
    base, experts = family("Qwen3ForCausalLM")
    gating = Gating.of("router", scope="layer", per="token", top=1, bias=False, spread=1.0)
    routed = weft.route(base, base, experts, gate=gating, where="mlp")
    start_routers(routed, DATA, standardise=True)
    weft.save(mixture(routed), tmp_path / "moe")
    made = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "moe", dtype=torch.float32).eval()
    with torch.no_grad():
        expected = routed(input_ids=IDS, use_cache=False).logits
        torch.testing.assert_close(
            made(input_ids=IDS, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4
        )


def test_what_fits_no_mixture_is_told_with_all_reasons() -> None:
    base, experts = family()
    routed = weft.route(base, base, experts, gate=Gating.of("prototype"), where="mlp", data=DATA)
    with pytest.raises(Problems) as error:
        mixture(routed)
    assert len(error.value.problems) == 2
    smile = weft.route(base, base, experts, gate="energy", where="linear")
    with pytest.raises(Problems, match=r"is no MLP of a layer|no matrix without a bias"):
        mixture(smile)
    from routed_nets import Perceptron
    from routed_nets import family as plain

    small, models = plain(Perceptron)
    with pytest.raises(UsageError, match="no model of transformers"):
        mixture(weft.route(small, small, models))
