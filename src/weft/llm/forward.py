"""One forward pass of whatever model transformers has: sample inputs, and whether its outputs are finite.

The inputs have the shapes that the config asks for and values from a fixed generator; they say nothing of
quality, only that the weights compute.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_TOKENS = 16


def sample_inputs(model: Any, ids: Sequence[int] = ()) -> dict[str, Tensor]:
    """Inputs for `model.forward`: token ids, pixels, audio features, as its `main_input_name` has it.

    `ids` are used where the model takes token ids. A model of image and text that cannot generate (CLIP) gets
    both; an encoder-decoder gets a start for its decoder.
    """
    config = model.config
    main = model.main_input_name
    made = {main: _sample(config, main, ids)}
    paired = hasattr(config, "text_config") and hasattr(config, "vision_config") and not model.can_generate()
    if paired:
        made |= {name: _sample(config, name, ids) for name in ("input_ids", "pixel_values")}
    if getattr(config, "is_encoder_decoder", False):
        start = getattr(config, "decoder_start_token_id", None)
        made["decoder_input_ids"] = torch.tensor([[start if isinstance(start, int) else 0]])
    device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
    return {n: v.to(device, dtype if v.is_floating_point() else v.dtype) for n, v in made.items()}


def _sample(config: Any, name: str, ids: Sequence[int]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if name == "pixel_values":
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", 224)
        height, width = size if isinstance(size, list | tuple) else (size, size)
        return torch.randn(1, getattr(vision, "num_channels", 3), height, width, generator=generator)
    if name == "input_features":
        frames = 2 * getattr(config, "max_source_positions", 1500)
        return torch.randn(1, getattr(config, "num_mel_bins", 80), frames, generator=generator)
    if name == "input_values":
        return torch.randn(1, 16_000, generator=generator)
    if ids:
        return torch.tensor([list(ids[:_TOKENS])])
    text = config.get_text_config()
    return torch.randint(0, getattr(text, "vocab_size", 2), (1, _TOKENS), generator=generator)


def finite_outputs(model: nn.Module, inputs: Mapping[str, Tensor]) -> bool:
    """True where every floating value that a forward pass returns is a number."""
    with torch.inference_mode():
        found = list(_floats(model(**inputs)))
    return bool(found) and all(bool(torch.isfinite(t).all()) for t in found)


def _floats(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _floats(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _floats(part)
