"""DeepSeek-V3 (arXiv 2412.19437) on one device in plain PyTorch.

    model = DeepseekV3(preset_config("deepseek-v3-lite")).eval()      # random weights

helix_compile.checkpoint.model.load_deepseek_v3("folder/") gives it the weights of a checkpoint.

Parameters have the names that transformers' DeepseekV3ForCausalLM gives them, and logits equal its logits. What it computes
in float32 whatever the dtype (norms, router, rotary angles) is float32 here too.

    B sequences, T new tokens, S tokens with the new ones, H heads, E experts, K experts a token, F their width,
    R latent width (kv_lora_rank), r rope width
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DeepseekV3Config, DynamicCache

from helix_compile.models.rope import RotaryEmbedding, rotate, yarn_mscale


class Output(NamedTuple):
    """logits [B, T, vocab], and the cache that was given or made."""

    logits: Tensor
    past_key_values: Any


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dim, in float32."""

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> the same."""
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class Attention(nn.Module):
    """Multi-head latent attention. Cached: the normed latent [B, 1, S, R] and one roped key [B, 1, S, r] for all heads."""

    def __init__(self, config: DeepseekV3Config, layer: int):
        super().__init__()
        self.layer, self.heads = layer, config.num_attention_heads
        self.interleaved = config.rope_interleave
        self.nope, self.rope = config.qk_nope_head_dim, config.qk_rope_head_dim
        self.latent, self.v = config.kv_lora_rank, config.v_head_dim
        D, bias, q_width = config.hidden_size, config.attention_bias, self.nope + self.rope
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(D, self.heads * q_width, bias=False)
        else:
            self.q_a_proj = nn.Linear(D, config.q_lora_rank, bias=bias)
            # eps of the two inner norms is 1e-6 whatever config.rms_norm_eps says
            self.q_a_layernorm = RMSNorm(config.q_lora_rank)
            self.q_b_proj = nn.Linear(config.q_lora_rank, self.heads * q_width, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(D, self.latent + self.rope, bias=bias)
        self.kv_a_layernorm = RMSNorm(self.latent)
        self.kv_b_proj = nn.Linear(self.latent, self.heads * (self.nope + self.v), bias=False)
        self.o_proj = nn.Linear(self.heads * self.v, D, bias=bias)
        rope, self.scale = config.rope_parameters, q_width**-0.5
        if rope["rope_type"] == "yarn" and rope.get("mscale_all_dim"):
            self.scale *= yarn_mscale(rope["factor"], rope["mscale_all_dim"]) ** 2

    def _query(self, x: Tensor) -> Tensor:
        if hasattr(self, "q_proj"):
            return self.q_proj(x)
        return self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor, cache: Any) -> Tensor:
        """[B, T, D] -> [B, T, D]; mask [B, 1, T, S] is True where a key is seen."""
        B, T, _ = x.shape
        q = self._query(x).view(B, T, self.heads, self.nope + self.rope).transpose(1, 2)
        q_nope, q_rope = q.split([self.nope, self.rope], dim=-1)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([self.latent, self.rope], dim=-1)
        latent = self.kv_a_layernorm(latent)[:, None]
        k_rope = rotate(k_rope[:, None], *rope, self.interleaved)
        if cache is not None:
            latent, k_rope = cache.update(latent, k_rope, self.layer)
        kv = self.kv_b_proj(latent[:, 0]).view(B, -1, self.heads, self.nope + self.v)
        k_nope, v = kv.transpose(1, 2).split([self.nope, self.v], dim=-1)
        q = torch.cat([q_nope, rotate(q_rope, *rope, self.interleaved)], dim=-1)
        k = torch.cat([k_nope, k_rope.expand(-1, self.heads, -1, -1)], dim=-1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, self.heads * self.v))


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: DeepseekV3Config, width: int):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Router(nn.Module):
    """Sigmoid scores; the K best experts of the best groups. The bias decides who is chosen, never with what weight."""

    def __init__(self, config: DeepseekV3Config):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.e_score_correction_bias = nn.Buffer(torch.zeros(config.n_routed_experts, dtype=torch.float32))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[N, D] -> weights [N, K] and expert ids [N, K]."""
        c = self.config
        scores = F.linear(x.to(torch.float32), self.weight.to(torch.float32)).sigmoid()
        groups = (scores + self.e_score_correction_bias).unflatten(-1, (c.n_group, -1))
        strength = groups.topk(2, dim=-1)[0].sum(dim=-1)
        best = strength.topk(c.topk_group, dim=-1, sorted=False)[1]
        open_ = torch.zeros_like(strength).scatter(1, best, 1.0).bool()
        choice = groups.masked_fill(~open_[..., None], -math.inf).flatten(1)
        ids = choice.topk(c.num_experts_per_tok, dim=-1, sorted=False)[1]
        weights = scores.gather(1, ids)
        if c.norm_topk_prob:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return weights * c.routed_scaling_factor, ids


class Experts(nn.Module):
    """E MLPs as two stacks. Each token's K experts are gathered, so a graph holds no loop over data; memory N * K * F * D."""

    def __init__(self, config: DeepseekV3Config):
        super().__init__()
        E, width, D = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * width, D))
        self.down_proj = nn.Parameter(torch.empty(E, D, width))

    def forward(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """Tokens [N, D], weights and ids [N, K] -> [N, D]."""
        N, K = ids.shape
        chosen, each = ids.reshape(-1), x.repeat_interleave(K, dim=0)
        gate_up = torch.bmm(self.gate_up_proj[chosen], each.unsqueeze(-1)).squeeze(-1)
        gate, up = gate_up.chunk(2, dim=-1)
        hidden = F.silu(gate) * up
        out = torch.bmm(self.down_proj[chosen], hidden.unsqueeze(-1)).squeeze(-1)
        out = out * weights.reshape(-1).unsqueeze(-1)
        return out.view(N, K, -1).sum(dim=1).to(x.dtype)


class MoE(nn.Module):
    """Routed experts plus the shared ones, which every token passes."""

    def __init__(self, config: DeepseekV3Config):
        super().__init__()
        self.gate, self.experts = Router(config), Experts(config)
        self.shared_experts = MLP(config, config.moe_intermediate_size * config.n_shared_experts)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        tokens = x.view(-1, x.shape[-1])
        return self.experts(tokens, *self.gate(tokens)).view(x.shape) + self.shared_experts(x)


class Layer(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x)); the first layers' FFN is dense."""

    def __init__(self, config: DeepseekV3Config, layer: int):
        super().__init__()
        dense = layer < config.first_k_dense_replace
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config, config.intermediate_size) if dense else MoE(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, position_embeddings: Any, attention_mask: Tensor, past_key_values: Any) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        normed = self.input_layernorm(x)
        x = x + self.self_attn(normed, position_embeddings, attention_mask, past_key_values)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, layers, last norm."""

    def __init__(self, config: DeepseekV3Config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config)


class DeepseekV3(nn.Module):
    """The language model, weights random, normal with config.initializer_range."""

    _keep_in_fp32_modules_strict = ("e_score_correction_bias",)  # what a change of dtype leaves alone

    def __init__(self, config: DeepseekV3Config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        for weight in self.parameters():
            if weight.dim() > 1:
                nn.init.normal_(weight, std=config.initializer_range)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.lm_head.weight.dtype

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding, under the name that transformers gives this method."""
        return self.model.embed_tokens

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
    ) -> Output:
        """New tokens [B, T] after what the cache holds.

        Args:
            input_ids: [B, T].
            attention_mask: [B, S], 0 where a column is padding; None: there is none.
            position_ids: [B, T]; None: columns count.
            past_key_values: what update() and get_seq_length() of transformers' DynamicCache do; it is added to.
            use_cache: make one if none is given.
        """
        B, T = input_ids.shape
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        columns = torch.arange(past + T, device=input_ids.device)
        mask = (columns <= columns[past:, None])[None, None].expand(B, 1, -1, -1)
        if attention_mask is not None:
            mask = mask & attention_mask[:, None, None, :].bool()
        if position_ids is None:
            position_ids = columns[past:].expand(B, -1)
        x = self.model.embed_tokens(input_ids)
        rope = self.model.rotary_emb(position_ids, x.dtype)
        for layer in self.model.layers:
            x = layer(x, position_embeddings=rope, attention_mask=mask, past_key_values=past_key_values)
        return Output(self.lm_head(self.model.norm(x)), past_key_values)
