"""vLLM model classes for what vLLM itself lacks, and the plugin that makes every vLLM process know them."""

from __future__ import annotations

SERVED: dict[str, str] = {
    "MdlBloomForCausalLM": "mdl.archs.served.bloom:MdlBloomForCausalLM",
    "MdlDbrxForCausalLM": "mdl.archs.served.dbrx:MdlDbrxForCausalLM",
    "MdlDecoderForCausalLM": "mdl.archs.served.decoder:MdlDecoderForCausalLM",
    "MdlHybridForCausalLM": "mdl.archs.served.hybrid:MdlHybridForCausalLM",
}
"""Architecture as written in ``config.json`` → ``"module:Class"`` of the model that serves it.

Strings, so that naming a class here imports neither torch nor vllm: vLLM imports it when a layout asks for it.
"""

COMPUTES: dict[str, str] = {"MdlBloomForCausalLM": "BloomForCausalLM", "MdlDbrxForCausalLM": "DbrxForCausalLM"}
"""Architecture → transformers' class that computes the same, from the same tensors and fields of ``config.json``.

vLLM's own class of that name computes something else or can't be loaded, which is why there is one here.
"""


def register() -> None:
    """Tell vLLM about every class of :data:`SERVED`; the ``vllm.general_plugins`` entry point of this package.

    vLLM calls this in each of its processes and may call it twice in one, so it is cheap and re-entrant. An
    architecture that vLLM already knows, under whatever class, is left as it is.
    """
    from vllm import ModelRegistry  # only where a vLLM process called us: nobody else pays for the import

    from .config import register_config
    from .own import register_own

    register_config()
    register_own()
    known = ModelRegistry.get_supported_archs()
    for architecture, model in SERVED.items():
        if architecture not in known:
            ModelRegistry.register_model(architecture, model)
