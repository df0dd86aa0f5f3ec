"""Where vLLM itself is known to differ from eager PyTorch although the weights are right.

Measured on vLLM 0.32, CPU, float32, with random weights against transformers' eager classes. A failed check of such a
model is still a failed check: what is served is not the reference. But the user should not look for the mistake in
the conversion.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any

from msgspec import Struct

from ..errors import Kind, MdlError, Problem

Config = Mapping[str, Any]


class Fault(Struct, frozen=True):
    """One known difference: for models of this type, where the config says so, and what helps.

    ``inside`` is a part of the served class's full name, where only one of vLLM's implementations has the fault.
    ``evaded`` is a fault that mdl keeps vLLM from when it verifies and serves on a CPU, and others have to.
    """

    model_type: str
    what: str
    remedy: str = ""
    when: Callable[[Config], bool] = lambda _: True
    inside: str = ""
    evaded: bool = False


_TRANSFORMERS = "serve it with vLLM's Transformers backend: `-- --model-impl transformers`"

FAULTS = (
    Fault(
        "bloom",
        "computes the exact GELU where BLOOM has the tanh form (NMSE about 2e-8)",
        "convert the checkpoint: mdl has a class of its own for it",
        lambda c: c.get("architectures") == ["BloomForCausalLM"],
    ),
    Fault(
        "falcon", "computes ALiBi otherwise than the original (NMSE about 7e-3)", when=lambda c: bool(c.get("alibi"))
    ),
    Fault(
        "phi3",
        "chooses LongRoPE's long or short factors once, by max_model_len; the original by each sequence's length",
        "serve with --max-model-len up to the original context, or expect the long factors everywhere",
        lambda c: "longrope" in str(c.get("rope_parameters") or c.get("rope_scaling") or ""),
    ),
    Fault("cohere2", "attends to one token more than the sliding window says", _TRANSFORMERS),
    Fault(
        "mamba",
        "has Mamba 1's selective scan for GPUs only, so that on a CPU it loads this model and can't run it",
        "verify and serve it on a GPU; the conversion needs none, and on a CPU mdl's eager forward alone stands for it",
    ),
    Fault(
        "mamba2",
        "normalises each group by itself, which the original does too; transformers' class does not",
        "compare with the original code: --reference",
        lambda c: int(c.get("n_groups") or 1) > 1,
    ),
    Fault(
        "dbrx",
        "can't load it: its own loader looks for the experts' stacks where its class no longer keeps them",
        "convert the checkpoint: mdl has a class of its own for it",
        lambda c: c.get("architectures") == ["DbrxForCausalLM"],
    ),
    Fault("zamba2", "differs; the cause is not known"),
    Fault("apertus", "computes xIELU slightly otherwise (NMSE about 2e-6)", _TRANSFORMERS),
    Fault("ernie4_5_moe", "differs in its native class; the cause is not known", _TRANSFORMERS),
    Fault("doge", "differs in the Transformers MoE backend; the cause is not known"),
    Fault("jetmoe", "differs in the Transformers MoE backend; the cause is not known"),
    Fault("lfm2", "differs; the cause is not known"),
    Fault("lfm2_moe", "differs; the cause is not known"),
    Fault(
        "granite",
        "drops logits_scaling in the Transformers backend, so that every logit is too large",
        "serve it with the native class: `-- --model-impl vllm`",
        lambda c: float(c.get("logits_scaling") or 1) != 1,
        ".transformers.",
    ),
    *(
        Fault(
            name,
            "rotates q and k wrongly in the CPU's own rotary operator when MLA hands them over in three dimensions",
            "mdl switches that operator off; a plain vLLM needs --compilation-config "
            '\'{"custom_ops": ["all", "-rotary_embedding"]}\'',
            evaded=True,
        )
        for name in ("deepseek_v2", "deepseek_v3")
    ),
)


def known_faults(config: Config, served: str = "", *, evaded: bool = False) -> tuple[str, ...]:
    """What is known against vLLM for a model of this config, in sentences; empty for most.

    ``served`` is the full name of vLLM's class, if it got as far as having one. With ``evaded``, what mdl keeps vLLM
    from, and nothing else.
    """
    return tuple(
        f"vLLM itself is known to differ here: it {fault.what}" + (f"; {fault.remedy}" if fault.remedy else "")
        for fault in FAULTS
        if fault.model_type == config.get("model_type")
        and fault.when(config)
        and (not served or fault.inside in served)
        and fault.evaded >= evaded
    )


_LARGEST = 88.7
"""ln of the largest float32: beyond it, tanh by way of exp is inf / inf."""


def of_no_numbers(config: Config, capability: str) -> str:
    """What is known of modules whose answers are not numbers, on a CPU that torch says is so capable.

    Measured with scores of known size in vLLM 0.32's attention of float32: its AVX2 kernel has no such bound.
    """
    cap = config.get("attn_logit_softcapping") or (config.get("attention") or {}).get("softcap")
    if not isinstance(cap, int | float) or not cap or "AVX512" not in capability:
        return ""
    return f"vLLM's kernel for CPUs with AVX-512 makes NaN of scores beyond {_LARGEST} times their cap of {cap:g}"


@contextmanager
def naming_faults(config: Config) -> Generator[None]:
    """Where vLLM's process dies over a model that it is known to have trouble with, the error says so."""
    try:
        yield
    except MdlError as error:
        known = known_faults(config) if error.kind is Kind.MACHINE else ()
        raise (
            MdlError(error.kind, [*error.problems, *(Problem(what) for what in known)]) if known else error
        ) from None
