"""What transformers' AutoConfig makes of a composable decoder's config.json: the same fields, as attributes."""

from __future__ import annotations

from transformers import AutoConfig, PretrainedConfig

from ..decoder.reading import MODEL_TYPE


class MdlDecoderConfig(PretrainedConfig):
    """Nothing is filled in and nothing is checked here: archs/decoder/schema.py does, in the model itself."""

    model_type = MODEL_TYPE


def register_config() -> None:
    """Make the model type known; may be called twice."""
    AutoConfig.register(MODEL_TYPE, MdlDecoderConfig, exist_ok=True)
