"""Tiny models of every architecture in transformers' causal-LM mapping, built from shrunken default configurations."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from safedelta_hf import SafetyProfile

KEYS = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

VOCABULARY = 64

SIZES = {
    32: "hidden_size d_model n_embd dim_model embedding_size hidden_dim attention_hidden_size word_embed_proj_dim dim "
    "input_embedding_size output_embedding_size emb_dim backbone_hidden_size lru_width embed_dim width "
    "output_hidden_size out_hidden_size kv_lora_rank q_lora_rank o_lora_rank embedding_dim index_hidden_size",
    48: "intermediate_size moe_intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner d_inner dim_ff dff "
    "ffn_hidden_size shared_expert_intermediate_size shared_intermediate_size expert_ffn_hidden_size mlp_dim "
    "intermediate_size_mlp feed_forward_size moe_shared_expert_intermediate_size shared_experts_intermediate_size "
    "dense_intermediate_size block_ff_dim",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads attention_heads "
    "num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads index_n_heads "
    "num_experts num_local_experts n_routed_experts moe_num_experts conv_kernel mamba_d_conv d_conv linear_num_heads "
    "linear_conv_kernel_dim linear_num_value_heads image_size_unused mamba_num_heads mamba_n_heads n_mamba_heads "
    "ssm_state_size state_size mamba_d_state hc_mult_unused num_attention_heads_per_layer_unused router_hidden_size",
    2: "num_key_value_heads num_kv_heads swa_num_key_value_heads num_experts_per_tok num_experts_per_token moe_topk "
    "moe_k linear_num_key_heads num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers "
    "num_encoder_layers num_decoder_layers patch_size_unused num_blocks_unused num_query_groups top_k_experts "
    "num_global_key_value_heads",
    8: "head_dim v_head_dim qk_nope_head_dim qk_rope_head_dim swa_head_dim linear_key_head_dim linear_value_head_dim "
    "index_head_dim mamba_d_head mamba_head_dim linear_head_dim kv_channels d_kv d_head dim_head attention_head_size "
    "attention_head_dim rotary_dim hidden_size_per_layer_input mamba_headdim global_head_dim",
    1: "n_group topk_group num_expert_group n_shared_experts num_shared_experts moe_num_shared_experts "
    "num_nextn_predict_layers_unused n_groups_unused first_k_dense_replace num_dense_layers moe_layer_start_index",
    16: "qk_head_dim chunk_size mamba_chunk_size d_rel mamba_dt_rank time_step_rank",
}
BY_NAME = {name: size for size, names in SIZES.items() for name in names.split()}


SPECIAL: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_method": "greedy"},
    "dots1": {
        "num_experts": 4,
        "n_routed_experts": 4,
        "moe_intermediate_size": 48,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
    },
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "intermediate_size": [48] * 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"n_groups": 2},
    "nemotron_h": {"n_groups": 2},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "reformer": {"is_decoder": True, "axial_pos_shape": [8, 8], "axial_pos_embds_dim": [16, 16], "num_buckets": 4},
    "longcat_flash": {"zero_expert_num": 2},
    "qwen4_exp_text": {
        "indexer_compress_ratio": 2,
        "indexer_budget": 4,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
    },
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_hidden_layers": 4,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "zamba2": {"mamba_headdim": 16, "n_mamba_heads": 4, "attention_hidden_size": 64, "attention_head_dim": 16},
    "musicgen_decoder": {"num_codebooks": 1},
    "musicgen_melody_decoder": {"num_codebooks": 1},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    },
    "blt_local_encoder": {"hidden_size_global": 64},
    "blt_local_decoder": {"hidden_size_global": 64},
    "blt_global_transformer": {"hidden_size": 64, "head_dim": 16},
    "blt": {"encoder_hash_byte_group_vocab": 64, "encoder_hash_byte_group_size": [3, 4]},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("sliding_attention", "full_attention")
        },
    },
    "dots3_note_audio_encoder": {"adapter_input_size": 32, "adapter_output_size": 32},
    "dots3_note_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 32,
        "swa_kv_lora_rank": 32,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "dots3_note_vision_encoder": {"pyramid_num_routed": [-1, 4], "adapter_in_dim": 32, "adapter_out_dim": 32},
    "gemma4_text": {"global_head_dim": 8},
    "gemma4_unified_text": {"global_head_dim": 8},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}
"""What the default configuration leaves out, or what would make it inconsistent."""


def shrunk(config: PretrainedConfig) -> dict[str, Any]:
    """Arguments that make a tiny configuration of the same class."""
    fields = config.to_dict()
    values: dict[str, Any] = {}
    for name, value in fields.items():
        sub = vars(config).get(name)
        if isinstance(sub, PretrainedConfig):
            values[name] = type(sub)(**shrunk(sub))
        elif isinstance(value, int) and not isinstance(value, bool) and (size := _size(name)) is not None:
            values[name] = size
    values |= {"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
    if isinstance(fields.get("decoder_start_token_id"), int):
        values["decoder_start_token_id"] = 2
    if "kv_lora_rank" in fields and "num_key_value_heads" in values:
        values["num_key_value_heads"] = 4  # latent attention has no groups
    if "mamba_expand" in fields or "expand" in fields:
        values |= {name: 16 for name in ("mamba_d_head", "mamba_head_dim", "head_dim") if name in values}
    return values | _layers(fields) | SPECIAL.get(config.model_type, {})


def _size(name: str) -> int | None:
    if name.endswith(("vocab_size", "vocab_size_per_layer_input")):
        return VOCABULARY
    if name.endswith(("token_id", "token_index")):
        return VOCABULARY - 3
    return 64 if name in ("max_position_embeddings", "n_positions") else BY_NAME.get(name)


def _layers(fields: dict[str, Any]) -> dict[str, Any]:
    """One layer of each kind, and two at least."""
    for name in ("layer_types", "layers_block_type"):
        kinds = fields.get(name)
        if isinstance(kinds, list) and kinds:
            chosen = list(dict.fromkeys(kinds))
            chosen = chosen * 2 if len(chosen) == 1 else chosen
            return {name: chosen, "num_hidden_layers": len(chosen)}
    return {}


def tiny_config(key: str) -> PretrainedConfig:
    """A configuration that the key's model can be built from.

    Args:
        key: One of `KEYS`.

    Returns:
        A small one, with every kind of layer.
    """
    kind = CONFIG_MAPPING[key]
    config = kind(**shrunk(kind()))
    return config.decoder if key.startswith("musicgen") else config


def tiny_model(key: str) -> torch.nn.Module:
    """A model with random weights, in evaluation mode.

    Args:
        key: One of `KEYS`.

    Returns:
        The model.
    """
    torch.manual_seed(0)
    if key.startswith("musicgen"):  # the mapping's configuration is that of the whole, not of the language model
        return getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[key])(tiny_config(key)).eval()
    return AutoModelForCausalLM.from_config(tiny_config(key)).eval()


NOT_BUILT = {
    "gemma3n": "needs the package timm",
    "gemma4_assistant": "reads keys and values of another model",
    "gemma4_unified_assistant": "reads keys and values of another model",
}
"""Architectures that no test builds, and why."""


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """Shares of a model's parameters, by number of entries.

    Attributes:
        adjusted: Under a rule.
        read: Under a rule, of those that the safety data reaches.
        reasons: What is not under a rule, by reason.
    """

    adjusted: float
    read: float
    reasons: Mapping[str, float]


def coverage(model: torch.nn.Module, profile: SafetyProfile) -> Coverage:
    """Sum up what a profile covers.

    Args:
        model: Any model.
        profile: Its profile.

    Returns:
        The shares.
    """
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    reasons: Counter[str] = Counter()
    for name, reason in profile.header.skipped.items():
        reasons[reason] += sizes[name] / sum(sizes.values())
    unreached = sum(share for reason, share in reasons.items() if "never reached" in reason)
    left = sum(reasons.values())
    return Coverage(adjusted=1 - left, read=1 - (left - unreached) / (1 - unreached), reasons=reasons)
