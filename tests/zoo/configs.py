"""A tiny model for every file of mlx-lm's models, with random parameters.

A file's own argument class takes the names it knows from one table of sizes, and `OVERRIDES` has what it
needs beyond that.
"""

import importlib
import pkgutil
from dataclasses import fields

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models
from mlx.utils import tree_flatten, tree_map
from mlx_lm.tuner.utils import linear_to_lora_layers

LAYERS, VOCABULARY = 4, 128
LARGEST = 3_000_000  # parameters; with more, an argument kept the size of a real model
GROUP, RANK = 32, 4  # of quantization and adapters

_EPSILON, _INTERMEDIATE, _WINDOW = 1e-5, 96, 4


def _all(value, names):
    return dict.fromkeys(names.split(), value)


SIZES = {
    **_all(64, "hidden_size n_embd d_model model_dim hidden_dim block_dim"),
    **_all(LAYERS, "num_hidden_layers n_layer n_layers num_layers num_transformer_layers"),
    **_all(4, "num_attention_heads n_head n_heads num_heads swa_num_attention_heads"),
    **_all(2, "num_key_value_heads num_kv_heads n_kv_heads swa_num_key_value_heads num_attention_groups"),
    **_all(16, "head_dim kv_channels v_head_dim swa_head_dim swa_v_head_dim hidden_size_per_head"),
    **_all(32, "global_head_dim hidden_size_per_layer_input"),
    **_all(VOCABULARY, "vocab_size num_vocab vocab_size_per_layer_input"),
    **_all(
        _INTERMEDIATE,
        "intermediate_size intermediate_size_mlp dense_intermediate_size shared_intermediate_size n_inner "
        "moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size "
        "ffn_hidden_size expert_ffn_hidden_size ff_intermediate_size moe_hidden_size share_expert_dim "
        "block_ff_dim",
    ),
    # Every expert for every token: a choice among them could turn on the last bit.
    **_all(4, "num_experts num_local_experts n_routed_experts moe_num_experts"),
    **_all(4, "num_experts_per_tok num_experts_per_token moe_topk moe_k moe_top_k top_k_experts"),
    **_all(1, "n_shared_experts num_shared_experts num_shared_expert moe_num_shared_experts"),
    **_all(1, "n_group topk_group num_expert_group moe_layer_freq decoder_sparse_step routed_scaling_factor"),
    **_all(1, "first_k_dense_replace num_dense_layers"),
    "mlp_only_layers": [0],
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    # Attention by latents, and with an index of its own
    **_all(32, "kv_lora_rank q_lora_rank"),
    **_all(16, "qk_nope_head_dim index_head_dim"),
    **_all(8, "qk_rope_head_dim rotary_dim"),
    **_all(2, "index_n_heads"),
    # Positions
    **_all(10000.0, "rope_theta rotary_emb_base"),
    **_all(1000.0, "rope_local_base_freq swa_rope_theta"),
    **_all(0.5, "rotary_pct partial_rotary_factor"),
    "rope_scaling": None,
    "rope_parameters": {
        "rope_theta": 10000.0,
        "rope_type": "default",
        "llama_4_scaling_beta": 0.1,
        "original_max_position_embeddings": 4,
        "full_attention": {"rope_theta": 10000.0},
        "sliding_attention": {"rope_theta": 1000.0},
    },
    **_all(128, "max_position_embeddings n_positions n_ctx model_max_length block_size"),
    "original_max_position_embeddings": 64,
    # Windows and kinds of layers
    **_all(_WINDOW, "sliding_window sliding_window_size attention_window_size index_topk"),
    **_all(2, "sliding_window_pattern full_attention_interval layer_group_size"),
    "layer_types": ["full_attention", "sliding_attention"] * 2,
    # Recurrent layers
    **_all(4, "mamba_d_conv conv_kernel conv1d_width linear_conv_kernel_dim mamba_n_heads mamba_num_heads"),
    **_all(16, "mamba_d_state state_size ssm_state_size mamba_head_dim linear_value_head_dim"),
    **_all(32, "mamba_d_head linear_key_head_dim"),
    **_all(1, "mamba_n_groups n_groups group_norm_size"),
    **_all(2, "mamba_expand conv_window linear_num_key_heads"),
    **_all(4, "linear_num_value_heads mamba_chunk_size time_step_rank"),
    **_all(128, "mamba_d_ssm"),
    "conv_L_cache": 3,
    "time_step_limit": (0.001, 100.0),
    # The rest
    **_all(True, "attention_bias use_qkv_bias conv_bias use_conv_bias mamba_proj_bias mamba_conv_bias"),
    **_all(True, "use_qk_norm qk_norm norm_topk_prob"),
    **_all(False, "mlp_bias use_bias tie_word_embeddings"),
    **_all(_EPSILON, "rms_norm_eps layer_norm_epsilon layer_norm_eps norm_eps norm_epsilon post_norm_eps"),
    **_all(_EPSILON, "layernorm_epsilon mixer_rms_eps"),
    **_all(2.0, "logits_scaling scale_emb"),
    **_all(1.0, "embedding_multiplier logit_scale"),
    **_all(0.5, "residual_multiplier output_multiplier"),
    **_all(30.0, "final_logit_softcapping logits_soft_cap"),
    "attention_multiplier": 0.25,
    "query_pre_attn_scalar": 16,
    "scale_depth": 1.4,
    "dim_model_base": 32,
    "hidden_act": "silu",
}

_GEMMA4 = {"num_kv_shared_layers": 2}
_KIMI = {"num_heads": 4, "head_dim": 16, "short_conv_kernel_size": 4, "kda_layers": [1, 3]}
_LFM2 = {
    "block_multiple_of": 32,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": False,
    "layer_types": ["conv", "full_attention"] * 2,
}
_LONGCAT = {"zero_expert_num": 2, "moe_topk": 6, "mla_scale_q_lora": True, "mla_scale_kv_lora": True}

OVERRIDES = {
    "afm7": {"num_kv_reuse_layers": 1},
    "apertus": {"post_norm": False},
    "baichuan_m1": {"sliding_window_layers": [1, 3]},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": _INTERMEDIATE, "moe_num_experts": 4, "moe_top_k": 4},
    },
    "deepseek_v2": {
        "topk_method": "greedy",
        "rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 4},
    },
    "exaone4": {"sliding_window_pattern": "LG"},
    "exaone_moe": {"is_moe_layer": [False, True, True, True]},
    "gemma3n": {
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.0] * LAYERS,
        "altup_num_inputs": 2,
        "altup_coef_clip": 120.0,
        "altup_correct_scale": True,
        "altup_active_idx": 0,
        "laurel_rank": 32,
    },
    "gemma4": _GEMMA4,
    "gemma4_text": _GEMMA4,
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "hunyuan": {
        "use_mixed_mlp_moe": True,
        "use_cla": True,
        "cla_share_factor": 2,
        "rope_scaling": {"type": "dynamic", "factor": 1.0, "alpha": 2.0},
    },
    "jamba": {
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
    },
    "kimi_k3": {"hidden_act": "situ", "linear_attn_config": _KIMI},
    "kimi_linear": {"linear_attn_config": _KIMI},
    "lfm2": _LFM2,
    "lfm2-vl": _LFM2,
    "lfm2_moe": {"use_expert_bias": True, "layer_types": ["conv", "full_attention"] * 2},
    "llama4": {"attention_chunk_size": 4, "interleave_moe_layer_step": 2, "num_experts_per_tok": 1},
    "llama4_text": {"no_rope_layers": [1, 0] * 2},
    "longcat_flash": {**_LONGCAT, "attention_method": "MLA", "zero_expert_type": "identity"},
    "longcat_flash_ngram": _LONGCAT,
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [0, 1] * 2,
        "moe_layer_freq": [0, 1, 1, 1],
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "swa_v_head_dim": 8,
    },
    "minicpm3": {
        "rope_scaling": {"original_max_position_embeddings": 4, "short_factor": 1.0, "long_factor": 1.0}
    },
    "minimax_m3_vl": {"moe_layer_freq": [0, 1, 1, 1], "index_block_size": 4, "index_topk_blocks": 2},
    "muse_spark": {"layer_rope_theta": [10000.0, 0.0] * 2, "num_shared_experts": 0},
    "nemotron": {"hidden_act": "relu2"},
    "nemotron-nas": {
        "block_configs": [
            {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.0}},
            {"attention": {"replace_with_linear": True}, "ffn": {"ffn_mult": 1.0}},
            {"attention": {"no_op": True}, "ffn": {"ffn_mult": 1.0}},
            {"attention": {"n_heads_in_group": 4}, "ffn": {"no_op": True}},
        ]
    },
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "mlp", "moe"]},
    "olmo_hybrid": {
        "linear_allow_neg_eigval": True,
        "layer_types": ["linear_attention", "full_attention"] * 2,
    },
    "openelm": {
        "num_query_heads": [4] * LAYERS,
        "num_kv_heads": [2] * LAYERS,
        "ffn_multipliers": [1.5] * LAYERS,
        "ffn_dim_divisor": 32,
    },
    "phi3small": {"dense_attention_every_n_layers": 2, "gegelu_limit": 20.0},
    "phimoe": {
        "rope_scaling": {
            "short_factor": [1.0] * 8,
            "long_factor": [2.0] * 8,
            "short_mscale": 1.1,
            "long_mscale": 1.2,
        }
    },
    "plamo": {"n_shared_head": 2},
    "prism_hadamard_qwen35": {
        "hidden_size": 128,
        "tensor_namespace": "mlx-vlm-qwen3_5",
        "quantization": {"bits": 2, "group_size": 128, "mode": "affine"},
        "modules": [{"path": "lm_head", "embedding": False, "dtype": "float16", "block": 0}],
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "rwkv7": _all(8, "a_low_rank_dim v_low_rank_dim gate_low_rank_dim decay_low_rank_dim"),
    "spark2_5": {"hidden_act": "gelu"},
}

# Where mlx-lm's own choice, every linear layer, meets one whose weight the model's code reads.
LORA_KEYS = {"gemma3n": [f"self_attn.{projection}_proj" for projection in "qkvo"]}


def names():
    return sorted(module.name for module in pkgutil.iter_modules(mlx_lm.models.__path__))


def make(name):
    """The model of this file; None if the file has none."""
    file = importlib.import_module(f"mlx_lm.models.{name}")
    if not hasattr(file, "Model"):
        return None
    mx.random.seed(1)
    config = {**SIZES, "model_type": name, **OVERRIDES.get(name, {})}
    if any(field.name == "text_config" for field in fields(file.ModelArgs)):
        config["text_config"] = dict(config)
    model = file.Model(file.ModelArgs.from_dict(config))
    assert sum(p.size for _, p in tree_flatten(model.parameters())) < LARGEST
    if name == "phi3small":  # it masks token numbers far beyond our vocabulary
        model._dummy_tokenizer_ids = mx.array([], mx.int32)
    # Many parameters start as zeros or ones, which hide what they multiply.
    model.update(_shaken(model.parameters()))
    model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    return model


def make_qlora(name):
    """The same model in 4 bits, with adapters that do something."""
    model = make(name)
    nn.quantize(model, GROUP, 4, class_predicate=_can_be_quantized)
    model.freeze()
    config = {"rank": RANK, "scale": 2.0, "dropout": 0.0, "keys": LORA_KEYS.get(name)}
    linear_to_lora_layers(model, LAYERS, config)
    model.update(_shaken(model.trainable_parameters()))
    mx.eval(model.parameters())
    return model


def _shaken(parameters):
    def shake(p):
        return p + 0.1 * mx.random.normal(p.shape) if mx.issubdtype(p.dtype, mx.floating) else p

    return tree_map(shake, parameters)


def _can_be_quantized(_, module):
    return hasattr(module, "to_quantized") and module.weight.shape[-1] % GROUP == 0
