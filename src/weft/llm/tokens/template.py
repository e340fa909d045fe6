"""Chat templates: the one most models have, a published format by its name, or a Jinja text.

The result has it as chat_template.jinja, where transformers looks first; tokenizer_config.json loses its own, so
that no reader finds another.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from weft.checkpoints.base import Asset, Checkpoint
from weft.checkpoints.company import InCompany, asset
from weft.checkpoints.limits import shown
from weft.checkpoints.strictjson import parse_json
from weft.errors import DataError, UsageError, did_you_mean

FILE, CONFIG = "chat_template.jinja", "tokenizer_config.json"

_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
_MISTRAL = (
    "{{ bos_token }}{% set ns = namespace(system='') %}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{% set ns.system = m['content'] + '\n\n' %}"
    "{% elif m['role'] == 'user' %}[INST] {{ ns.system + m['content'] }} [/INST]{% set ns.system = '' %}"
    "{% else %} {{ m['content'] | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)
_ALPACA = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}\n\n"
    "{% elif m['role'] == 'user' %}### Instruction:\n{{ m['content'] }}\n\n"
    "{% else %}### Response:\n{{ m['content'] }}{{ eos_token }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### Response:\n{% endif %}"
)
_EXAONE = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}[|system|][|endofturn|]\n{% endif %}"
    "[|{{ m['role'] }}|]{{ m['content'] }}{% if m['role'] != 'user' %}[|endofturn|]{% endif %}{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}[|assistant|]{% endif %}"
)
NAMED = {"alpaca": _ALPACA, "chatml": _CHATML, "exaone": _EXAONE, "llama3": _LLAMA3, "mistral": _MISTRAL}
"""The published formats, written for messages of the roles system, user and assistant."""


def templated(made: Checkpoint, asked: str, models: Sequence[Checkpoint]) -> Checkpoint:
    """`made` with the chat template `asked`: "auto" (of `models`), a name in `NAMED`, or a Jinja text.

    Raises UsageError for an unknown name and for a text that is no template.
    """
    text = _most_common(models) if asked == "auto" else NAMED.get(asked, asked)
    if text is None:
        return made  # no model has one
    if asked not in ("auto", *NAMED) and "{" not in asked:
        raise UsageError(
            f"chat_template: there is none named {shown(asked)}{did_you_mean(asked, ['auto', *NAMED])}; give auto, "
            f"{', '.join(NAMED)} or a Jinja template"
        )
    check(text)
    files = []
    for file in made.assets:
        if file.name == CONFIG:
            config = _config(file)
            if "chat_template" in config:
                del config["chat_template"]
                file = asset(CONFIG, (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode())
        if file.name not in (FILE, "chat_template.json"):
            files.append(file)
    return InCompany(made, assets=(*files, asset(FILE, text.encode())))


def template_of(model: Checkpoint) -> str | None:
    """The chat template that loading the model's tokenizer would give, or None."""
    files = {a.name: a for a in model.assets}
    if FILE in files:
        try:
            return files[FILE].read().decode()
        except UnicodeDecodeError:
            raise DataError(f"{model.origin}/{FILE} is not UTF-8 text; fetch the file again") from None
    found = _config(files[CONFIG]).get("chat_template") if CONFIG in files else None
    if isinstance(found, list):  # several, by name
        named = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def check(text: str) -> None:
    """UsageError if the text is no Jinja template; where jinja2 is not there nothing is said."""
    try:
        from jinja2 import TemplateError, TemplateSyntaxError
    except ImportError:
        return
    try:
        render(text, [{"role": "user", "content": "hello"}])
    except TemplateSyntaxError as error:
        raise UsageError(f"chat_template is no Jinja template: {error}") from None
    except TemplateError:
        return  # a template may refuse a conversation, or need what only its own tokenizer gives it


def render(text: str, messages: Sequence[dict[str, str]], **values: Any) -> str:
    """A conversation in a template's format, in Jinja's sandbox, as transformers renders it."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    made.globals["raise_exception"] = refuse
    defaults = {"bos_token": "", "eos_token": "", "add_generation_prompt": False}
    told: str = made.from_string(text).render(messages=list(messages), **{**defaults, **values})
    return told


def _most_common(models: Sequence[Checkpoint]) -> str | None:
    """The template that most models have; of several such the first in the models' order."""
    votes: dict[str, int] = {}
    for model in models:
        text = template_of(model)
        if text is not None:
            votes[text] = votes.get(text, 0) + 1
    return max(votes, key=lambda t: votes[t], default=None)


def _config(file: Asset) -> dict[str, Any]:
    return parse_json(file.read(), file.name, "config-json", depth=32)
