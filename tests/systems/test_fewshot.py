"""Section 2.4.5: a tiny analogue of chat vectors; the languages are described in language.py."""

from __future__ import annotations

import torch
from language import TOKENS, CharacterLM, Language, follows_format, loss

import weft
from weft.systems.fewshot import chat_vector


def test_a_chat_vector_carries_the_format_into_another_language(languages: list[Language]) -> None:
    for made in languages:
        text, plain = made.held_out.formatted_upper, made.held_out.upper
        merged = chat_vector(made.upper, made.chat, made.base)
        assert follows_format(made.upper, text) < 0.05
        assert follows_format(merged, text) > 0.2
        assert loss(merged, text) < loss(made.upper, text) - 0.4
        assert loss(merged, text) < loss(made.chat, text) - 0.1
        # of the language itself it loses a small part of what the chat model lost
        known = loss(made.upper, plain, letters=True)
        cost = loss(merged, plain, letters=True) - known
        assert cost < 0.4 * (loss(made.chat, plain, letters=True) - known)


def test_tensors_of_an_extended_vocabulary_stay_those_of_the_continued_model(
    languages: list[Language],
) -> None:
    made = languages[0]
    wider = CharacterLM(5, tokens=len(TOKENS) + 4)
    merged = chat_vector(wider, made.chat, made.base)
    for name in ("embed_tokens.weight", "lm_head.weight", "lm_head.bias"):
        assert torch.equal(merged.tensor(name), wider.state_dict()[name])
    expected = (
        wider.state_dict()["layers.0.weight"].double()
        + made.chat.state_dict()["layers.0.weight"].double()
        - made.base.state_dict()["layers.0.weight"].double()
    )
    torch.testing.assert_close(weft.load(merged).tensor("layers.0.weight").double(), expected)
