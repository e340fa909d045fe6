"""Chat templates: the formats as published, the vote, and what the output's tokenizer renders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from token_models import byte_level, llama, write

import weft
from weft.checkpoints.base import Checkpoint
from weft.checkpoints.company import InCompany, asset
from weft.checkpoints.memory import StateDict
from weft.errors import UsageError
from weft.llm.tokens.template import NAMED, render, template_of, templated

TALK = [
    {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "Bye"},
]  # fmt: skip

EXPECTED = {
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    "<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
    "llama3": "B<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHello."
    "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "B[INST] Be brief.\n\nHi [/INST] Hello.E[INST] Bye [/INST]",
    "alpaca": "Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHello.E\n\n"
    "### Instruction:\nBye\n\n### Response:\n",
    "exaone": "[|system|]Be brief.[|endofturn|]\n[|user|]Hi\n[|assistant|]Hello.[|endofturn|]\n"
    "[|user|]Bye\n[|assistant|]",
}  # fmt: skip


@pytest.mark.parametrize("name", NAMED)
def test_named_formats(name: str) -> None:
    text = render(NAMED[name], TALK, bos_token="B", eos_token="E", add_generation_prompt=True)
    assert text == EXPECTED[name]


def test_exaone_without_a_system_message_has_an_empty_one() -> None:
    assert render(NAMED["exaone"], TALK[1:2]) == "[|system|][|endofturn|]\n[|user|]Hi\n"


def model(name: str, **files: str) -> Checkpoint:
    made = tuple(asset(n.replace("__", "."), text.encode()) for n, text in files.items())
    return InCompany(StateDict({"w": torch.zeros(2)}, name), {}, made)


def config(template: Any) -> str:
    return json.dumps({"chat_template": template, "bos_token": "<s>"})


def test_where_a_template_is_found() -> None:
    assert template_of(model("a", chat_template__jinja="J", tokenizer_config__json=config("C"))) == "J"
    assert template_of(model("a", tokenizer_config__json=config("C"))) == "C"
    several = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    assert template_of(model("a", tokenizer_config__json=config(several))) == "D"
    assert template_of(model("a")) is None


def files_of(made: Checkpoint) -> dict[str, str]:
    return {a.name: a.read().decode() for a in made.assets}


def test_auto_is_a_vote_and_ties_go_by_order() -> None:
    x, y = "{{ messages }} x", "{{ messages }} y"
    models = [model("a", chat_template__jinja=x), model("b", tokenizer_config__json=config(y))]
    made = templated(models[1], "auto", models)
    assert files_of(made) == {
        "chat_template.jinja": x,
        "tokenizer_config.json": files_of(made)["tokenizer_config.json"],
    }
    assert json.loads(files_of(made)["tokenizer_config.json"]) == {"bos_token": "<s>"}
    models.append(model("c", chat_template__jinja=y))
    assert files_of(templated(models[0], "auto", models))["chat_template.jinja"] == y
    plain = model("d")
    assert templated(plain, "auto", [plain]) is plain


def test_what_is_no_template() -> None:
    a = model("a")
    with pytest.raises(UsageError, match="there is none named 'chatlm'; did you mean 'chatml'"):
        templated(a, "chatlm", [a])
    with pytest.raises(UsageError, match="no Jinja template"):
        templated(a, "{% for m in messages %}", [a])
    assert "chat_template.jinja" in files_of(templated(a, "{{ raise_exception('no system role') }}", [a]))


def test_the_output_renders_it(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tok, base = byte_level(300), llama(300)
    paths = [
        write(tmp_path / "a", tok, base, chat_template__jinja="{{ messages[0]['content'] }} of a"),
        write(tmp_path / "b", tok, base),
    ]
    for asked, want in (("auto", "Be brief. of a"), ("chatml", EXPECTED["chatml"]), ("{{ 6 * 7 }}", "42")):
        recipe = {"merge_method": "linear", "models": paths, "chat_template": asked}
        out = tmp_path / "out"
        weft.save(weft.build(recipe), out, overwrite=True)
        loaded = AutoTokenizer.from_pretrained(out)
        assert loaded.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True) == want
