"""MdlDecoderForCausalLM: most home-made decoders under vLLM by config.json alone.

What config.json may say, and the source of each formula, stands in archs/decoder/schema.py; archs/eager/decoder.py is
the same model in plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.distributed import get_pp_group
from vllm.distributed.utils import get_pp_indices
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import SupportsPP
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    PPMissingLayer,
    WeightsMapper,
    make_layers,
    maybe_prefix,
)
from vllm.sequence import IntermediateTensors

from ..decoder.schema import Decoder, decoder_of
from ..decoder.split import refuse_stages
from ..decoder.tensors import norms_of
from .decoder_layers import DecoderAttention, DecoderExperts, DecoderMlp, norm_layer
from .decoder_recurrent import mixer_layer

if TYPE_CHECKING:
    from vllm.config import CacheConfig, VllmConfig


class LookBack(nn.Module):
    """x_t + scale · sigmoid(gate · the first channels of x_t) · x_(t-1); the first position stays as it is.

    x_(t-1) comes from the KV cache: an attention layer that sees two positions, whose keys are +1 and -1 by turns, so
    that all weight (1 to the last bit) is on the one before. So it survives chunks, batches, prefixes and preemption as
    any key does.
    """

    _SHARP = 128.0
    """The difference of the two scores is twice this, beyond what exp leaves of the other in any float type."""

    def __init__(self, d: Decoder, channels: int, cache: CacheConfig | None, prefix: str) -> None:
        super().__init__()
        self.channels, self.size, self.heads = channels, d.head_dim, d.hidden_size // d.head_dim
        self.gate = ReplicatedLinear(channels, 1, bias=False, prefix=f"{prefix}.gate")
        self.scale = nn.Parameter(torch.empty(1))
        name = f"{prefix}.{d.num_hidden_layers}.attn"  # vLLM wants one number in it, and numbers its caches by it
        self.attn = Attention(self.heads, self.size, 1.0, cache_config=cache, per_layer_sliding_window=2, prefix=name)

    def forward(self, positions: Tensor, x: Tensor) -> Tensor:
        """Hidden states [T, C] to the same shape."""
        sign = (1 - 2 * (positions % 2)).to(x.dtype)
        keys = x.new_zeros(x.shape[0], self.heads, self.size)
        keys[..., 0] = sign[:, None]
        before = self.attn((keys * -self._SHARP).flatten(1), keys.flatten(1), x)
        gates = self.scale * torch.sigmoid(self.gate(x[:, : self.channels].contiguous())[0])
        return x + torch.where(positions[:, None] > 0, gates * before, torch.zeros_like(x))


class DecoderLayer(nn.Module):
    """Attention, or a recurrence in its place, and MLP, joined to the stream as the config says."""

    mdl_alone = True  # the values beside hidden states are no residual, and validate/probe.py is not to add them up

    def __init__(self, d: Decoder, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        layer, quant = int(prefix.rpartition(".")[2]), vllm_config.quant_config
        self.parallel, self.one_norm, self.multiplier = d.residual.parallel, d.residual.one_norm, d.residual.multiplier
        self.post = d.norm.place == "post"
        self.norms = norms_of(d)
        for name in self.norms:
            self.add_module(name, norm_layer(d.norm, d.hidden_size))
        self.recurrent = d.recurrent(layer)
        if self.recurrent:
            self.mixer = mixer_layer(d, vllm_config, f"{prefix}.mixer")
        else:
            self.self_attn = DecoderAttention(d, layer, vllm_config.cache_config, quant, f"{prefix}.self_attn")
        self.mlp = (
            DecoderExperts(d, d.moe, quant, f"{prefix}.mlp")
            if d.moe and d.routed(layer)
            else DecoderMlp(d.hidden_size, d.intermediate_size, d.mlp, quant, f"{prefix}.mlp")
        )

    def forward(
        self, positions: Tensor, x: Tensor, embedded: Tensor | None, first: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Hidden states [T, C] to the same shape, and this layer's values; see :class:`DecoderAttention`."""
        if self.parallel:
            attended, v = self._attended(positions, self._norm("attn_norm", x), embedded, first)
            beside = self._norm("attn_norm" if self.one_norm else "mlp_norm", x)
            return x + self._times(attended + self.mlp(beside)), v
        if self.post:
            attended, v = self._attended(positions, x, embedded, first)
            x = self._norm("attn_norm", x + attended)
            return self._norm("mlp_norm", x + self.mlp(x)), v
        attended, v = self._attended(positions, self._norm("attn_norm", x), embedded, first)
        x = x + self._times(self._norm("attn_out_norm", attended))
        return x + self._times(self._norm("mlp_out_norm", self.mlp(self._norm("mlp_norm", x)))), v

    def _attended(
        self, positions: Tensor, x: Tensor, embedded: Tensor | None, first: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """What attention puts out, or the recurrence in its place, which has no values to hand on."""
        if self.recurrent:
            return self.mixer(positions, x), x
        return self.self_attn(positions, x, embedded, first)

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return self.get_submodule(name)(x) if name in self.norms else x

    def _times(self, x: Tensor) -> Tensor:
        return x if self.multiplier == 1.0 else x * self.multiplier


@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": 0, "intermediate_tensors": 0, "inputs_embeds": 0})
class MdlDecoderModel(nn.Module):
    """Everything between token ids and the head; this rank's share and this stage's layers of it."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        d = self.d = decoder_of(vllm_config.model_config.hf_config.to_dict())
        cache, stage = vllm_config.cache_config, get_pp_group()
        refuse_stages(d, [get_pp_indices(d.num_hidden_layers, i, stage.world_size) for i in range(stage.world_size)])
        self._plain(d)
        self.embed_tokens: nn.Module = PPMissingLayer()
        if stage.is_first_rank or (d.tie_word_embeddings and stage.is_last_rank):
            self.embed_tokens = VocabParallelEmbedding(
                d.rows, d.hidden_size, prefix=maybe_prefix(prefix, "embed_tokens")
            )
        self._beginning(d, cache, prefix, first=stage.is_first_rank)
        self.start_layer, self.end_layer, self.layers = make_layers(
            d.num_hidden_layers,
            lambda prefix: DecoderLayer(d, vllm_config, prefix),
            prefix=maybe_prefix(prefix, "layers"),
        )
        self._numbers(prefix)
        self.norm = norm_layer(d.norm, d.hidden_size) if d.norm.final and stage.is_last_rank else PPMissingLayer()

    def _plain(self, d: Decoder) -> None:
        """What the forward asks of the config, as plain values: torch.compile can't look into pydantic's records."""
        self.multiplier, self.learned = d.embedding_multiplier, d.positions.kind == "learned"
        self.norms_embedding, self.norms_end = d.norm.embedding, d.norm.final
        self.lambdas, self.looks_back = d.residual.lambdas, d.residual.look_back is not None
        self.taken = -1 if d.residual.take_back is None else d.residual.take_back
        self.tables = frozenset(d.attention.value_embedding.layers if d.attention.value_embedding else ())
        begin, middle = (["begin"] if self.lambdas else []), (["middle"] if self.taken >= 0 else [])
        ids = ["ids"] if self.tables else []  # vLLM's second model runner gives them to the first stage alone
        self.carried = ["hidden_states", *begin, *middle, *ids]  # what one pipeline stage hands to the next

    def _beginning(self, d: Decoder, cache: CacheConfig | None, prefix: str, *, first: bool) -> None:
        """What stands between the embedding and the first layer: the other stages skip its weights."""
        if d.positions.kind == "learned":
            table = nn.Embedding(d.max_position_embeddings, d.hidden_size) if first else PPMissingLayer()
            self.embed_positions: nn.Module = table
        if d.norm.embedding:
            self.embed_norm: nn.Module = norm_layer(d.norm, d.hidden_size) if first else PPMissingLayer()
        if d.residual.look_back:
            at, channels = maybe_prefix(prefix, "look_back"), d.residual.look_back
            self.look_back: nn.Module = LookBack(d, channels, cache, at) if first else PPMissingLayer()

    def _numbers(self, prefix: str) -> None:
        """What is learned besides matrices and norms, and the value tables of this stage's layers."""
        d = self.d
        if d.residual.lambdas:
            self.residual_lambdas = nn.Parameter(torch.empty(d.num_hidden_layers))
            self.embed_lambdas = nn.Parameter(torch.empty(d.num_hidden_layers))
        if d.residual.take_back is not None:
            self.take_back_lambda = nn.Parameter(torch.empty(1))
        tables = d.attention.value_embedding.layers if d.attention.value_embedding else []
        self.value_embeds = nn.ModuleDict()
        for i in tables:
            at, size = maybe_prefix(prefix, f"value_embeds.{i}"), d.num_key_value_heads * d.head_dim
            mine = self.start_layer <= i < self.end_layer
            self.value_embeds[str(i)] = VocabParallelEmbedding(d.rows, size, prefix=at) if mine else PPMissingLayer()

    def make_empty_intermediate_tensors(
        self, batch_size: int, dtype: torch.dtype, device: torch.device
    ) -> IntermediateTensors:
        """Room for what the stage before hands over: hidden states [T, C] of ``dtype``, and token ids [T]."""
        return IntermediateTensors(
            {
                name: torch.zeros(batch_size, dtype=torch.int32, device=device)
                if name == "ids"
                else torch.zeros(batch_size, self.d.hidden_size, dtype=dtype, device=device)
                for name in self.carried
            }
        )

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Token ids [T] to their rows of the table [T, C], before anything is added or multiplied."""
        return self.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        """Token ids [T] at positions [T] to hidden states [T, C], or to what the next stage needs."""
        if get_pp_group().is_first_rank:
            x = begin = middle = self._begun(input_ids, positions, inputs_embeds)
            ids = input_ids
        else:
            x, begin, middle, ids = self._received(intermediate_tensors)
        first: Tensor | None = None
        for i, layer in enumerate(islice(self.layers, self.start_layer, self.end_layer), self.start_layer):
            if self.lambdas:
                x = self.residual_lambdas[i] * x + self.embed_lambdas[i] * begin
            embedded = self.value_embeds[str(i)](ids) if i in self.tables else None
            x, v = layer(positions, x, embedded, first)
            first = v if first is None else first
            middle = x if i == self.taken else middle
        if not get_pp_group().is_last_rank:
            carried = {"hidden_states": x, "begin": begin, "middle": middle}
            if ids is not None and self.tables:
                carried["ids"] = ids.to(torch.int32)
            return IntermediateTensors({name: carried[name] for name in self.carried})
        if self.taken >= 0:
            x = x - self.take_back_lambda * middle
        return self.norm(x) if self.norms_end else x

    def _received(self, carried: IntermediateTensors | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The stream, its beginning, its middle, and the token ids from the stage before."""
        held: dict[str, Tensor] = carried.tensors if carried is not None else {}
        x = held["hidden_states"]
        return x, held.get("begin", x), held.get("middle", x), held.get("ids")

    def _begun(self, ids: Tensor | None, positions: Tensor, embedded: Tensor | None) -> Tensor:
        """The stream as the first layer finds it."""
        x = cast("Tensor", embedded if ids is None else self.embed_input_ids(ids) if embedded is None else embedded)
        if self.multiplier != 1.0:
            x = x * self.multiplier
        if self.learned:
            x = x + self.embed_positions(positions)
        if self.norms_embedding:
            x = self.embed_norm(x)
        return self.look_back(positions, x) if self.looks_back else x


class MdlDecoderForCausalLM(nn.Module, SupportsPP):
    """The composable decoder. Weights have the names of archs/decoder/tensors.py."""

    packed_modules_mapping: ClassVar[dict[str, list[str]]] = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.model = MdlDecoderModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        d = self.d = self.model.d
        self.lm_head: nn.Module = PPMissingLayer()
        if get_pp_group().is_last_rank:
            self.lm_head = ParallelLMHead(
                d.rows,
                d.hidden_size,
                bias=d.head_bias,
                quant_config=vllm_config.quant_config,
                prefix=maybe_prefix(prefix, "lm_head"),
            )
            if d.tie_word_embeddings:
                self.lm_head = self.lm_head.tie_weights(cast("VocabParallelEmbedding", self.model.embed_tokens))
        self.logits_processor = LogitsProcessor(
            d.rows, d.vocab_size, scale=d.logit_multiplier, soft_cap=d.logit_softcap
        )
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Token ids [T] to their rows of the table [T, C]."""
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | IntermediateTensors:
        """Token ids [T] at positions [T] to hidden states [T, C], or to what the next stage needs."""
        del kwargs  # what vLLM may hand to classes that take more
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Hidden states [T, C] to logits [T, V]."""
        bias = self.lm_head.bias if self.d.head_bias else None
        return self.logits_processor(self.lm_head, hidden_states, bias)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load tensors by their names in the files; q, k, v and gate, up are joined on the way."""
        return AutoWeightsLoader(self).load_weights(weights, mapper=self._mapper())

    def _mapper(self) -> WeightsMapper:
        gated = {".mlp.gate_proj.": (".mlp.gate_up_proj.", 0), ".mlp.up_proj.": (".mlp.gate_up_proj.", 1)}
        shared = {
            f".shared_expert.{name}_proj.": (".shared_expert.gate_up_proj.", i) for i, name in enumerate(("gate", "up"))
        }
        # vLLM's Mamba 2 makes A = -exp(A_log) of what it loads
        renamed = {".mixer.A_log": ".mixer.A"} if self.d.recurrence else {}
        fused = {f".self_attn.{name}_proj.": (".self_attn.qkv_proj.", name) for name in "qkv"}
        stacked = {**fused, **(gated if self.d.mlp.gated else {}), **shared}
        return WeightsMapper(orig_to_new_substr=renamed, orig_to_new_stacked=stacked)
