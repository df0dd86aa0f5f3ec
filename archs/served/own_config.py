"""The config class for a model type of the user's own. It lies in a module since vLLM sends it from process to process,
by its name."""

from __future__ import annotations

import json
import os

from transformers import PretrainedConfig

from .own import VARIABLE


class OwnConfig(PretrainedConfig):
    """Every field of config.json as an attribute; the model type is the one that the environment names."""

    model_type = str(json.loads(os.environ.get(VARIABLE, "{}")).get("model_type", ""))
