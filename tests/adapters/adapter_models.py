"""Tiny models and adapters for the tests of this room."""

import copy

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import weft


def llama(seed=0, **changes):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False, **changes,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def gpt2(seed=0):
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2)).eval()


def adapted(model, config, seed=1, spread=0.3):
    """A PEFT model whose every trainable parameter is random."""
    made = get_peft_model(copy.deepcopy(model), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                # scales and lengths start at 1 or above and stay about there; factors start at 0
                start = parameter if parameter.mean() > 0.5 else 0
                parameter.copy_(start + spread * torch.randn(parameter.shape, generator=generator))
    return made.eval()


def lora(model, seed=1, **settings):
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], **settings}
    return adapted(model, LoraConfig(**settings), seed)


def written(model, folder):
    model.save_pretrained(folder)
    return folder


def merged(peft_model):
    """PEFT's own merge, in float64."""
    return copy.deepcopy(peft_model).double().merge_and_unload(safe_merge=True).state_dict()


def distance(state, expected):
    """The largest difference of two state dicts, relative to the largest value."""
    assert not set(expected) - set(state), set(expected) - set(state)
    return max(float((state[n].double() - t.double()).abs().max()) for n, t in expected.items())


def loaded_by_peft(model, folder):
    return PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()


def state_of(checkpoint):
    state = {n: checkpoint.tensor(n).double() for n in checkpoint}
    return state | {a: state[n] for a, n in checkpoint.aliases.items()}


def save(checkpoint, folder, **settings):
    return weft.save(checkpoint, folder, threads=2, **settings)
