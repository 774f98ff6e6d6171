"""Every `config.json` of models that people align, as published: each is read, and has the published parameters."""

import pytest

from daajax.errors import UserError
from daajax.models.families import architecture_of
from daajax.models.parameters import parameter_count

COMMON = dict(bos_token_id=1, eos_token_id=2, initializer_range=0.02, use_cache=True, torch_dtype="bfloat16")
COMMON |= dict(transformers_version="4.46.0", architectures=["ForCausalLM"], attention_dropout=0.0)

SMOLLM2 = COMMON | dict(model_type="llama", vocab_size=49152, hidden_size=576, intermediate_size=1536)
SMOLLM2 |= dict(num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, hidden_act="silu", mlp_bias=False)
SMOLLM2 |= dict(max_position_embeddings=8192, rms_norm_eps=1e-5, rope_theta=100000, rope_scaling=None, pretraining_tp=1)
SMOLLM2 |= dict(tie_word_embeddings=True, attention_bias=False, is_llama_config=True, rope_interleaved=False)

QWEN25 = COMMON | dict(model_type="qwen2", vocab_size=151936, hidden_size=896, intermediate_size=4864)
QWEN25 |= dict(
    num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2, hidden_act="silu", rms_norm_eps=1e-6
)
QWEN25 |= dict(rope_theta=1e6, tie_word_embeddings=True, max_position_embeddings=32768, max_window_layers=24)
QWEN25 |= dict(sliding_window=32768, use_sliding_window=False, use_mrope=False)

QWEN3_MOE = COMMON | dict(model_type="qwen3_moe", vocab_size=151936, hidden_size=2048, intermediate_size=6144)
QWEN3_MOE |= dict(num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4, head_dim=128, hidden_act="silu")
QWEN3_MOE |= dict(moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8, norm_topk_prob=True)
QWEN3_MOE |= dict(decoder_sparse_step=1, mlp_only_layers=[], max_position_embeddings=40960, max_window_layers=48)
QWEN3_MOE |= dict(rms_norm_eps=1e-6, rope_scaling=None, rope_theta=1000000.0, router_aux_loss_coef=0.001)
QWEN3_MOE |= dict(output_router_logits=False, sliding_window=None, use_sliding_window=False, attention_bias=False)
QWEN3_MOE |= dict(tie_word_embeddings=False)

GEMMA2 = COMMON | dict(model_type="gemma2", vocab_size=256000, hidden_size=3584, intermediate_size=14336, head_dim=256)
GEMMA2 |= dict(num_hidden_layers=42, num_attention_heads=16, num_key_value_heads=8, attention_bias=False)
GEMMA2 |= dict(attn_logit_softcapping=50.0, final_logit_softcapping=30.0, cache_implementation="hybrid")
GEMMA2 |= dict(hidden_act="gelu_pytorch_tanh", hidden_activation="gelu_pytorch_tanh", max_position_embeddings=8192)
GEMMA2 |= dict(query_pre_attn_scalar=256, rms_norm_eps=1e-6, rope_theta=10000.0, sliding_window=4096)
GEMMA2 |= dict(sliding_window_size=4096, pad_token_id=0)

GEMMA3 = COMMON | dict(model_type="gemma3_text", vocab_size=262144, hidden_size=1152, intermediate_size=6912)
GEMMA3 |= dict(num_hidden_layers=26, num_attention_heads=4, num_key_value_heads=1, head_dim=256, attention_bias=False)
GEMMA3 |= dict(attn_logit_softcapping=None, final_logit_softcapping=None, cache_implementation="hybrid")
GEMMA3 |= dict(hidden_activation="gelu_pytorch_tanh", max_position_embeddings=32768, query_pre_attn_scalar=256)
GEMMA3 |= dict(rms_norm_eps=1e-6, rope_local_base_freq=10000, rope_scaling=None, rope_theta=1000000)
GEMMA3 |= dict(sliding_window=512, sliding_window_pattern=6, pad_token_id=0)
GEMMA3_SMALL = {key: value for key, value in GEMMA3.items() if key != "sliding_window_pattern"}
GEMMA3_SMALL |= dict(hidden_size=640, intermediate_size=2048, num_hidden_layers=18, _sliding_window_pattern=6)
GEMMA3_SMALL |= dict(layer_types=["sliding_attention"] * 5 + ["full_attention"], use_bidirectional_attention=False)
GEMMA3_SMALL["layer_types"] = GEMMA3_SMALL["layer_types"] * 3

PHI3 = COMMON | dict(model_type="phi3", vocab_size=32064, hidden_size=3072, intermediate_size=8192, pad_token_id=32000)
PHI3 |= dict(num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32, hidden_act="silu", embd_pdrop=0.0)
PHI3 |= dict(max_position_embeddings=131072, original_max_position_embeddings=4096, resid_pdrop=0.0, rope_theta=10000.0)
PHI3 |= dict(attention_bias=False, rms_norm_eps=1e-5, sliding_window=262144, tie_word_embeddings=False)
PHI3 |= dict(auto_map={"AutoConfig": "configuration_phi3.Phi3Config"})
PHI3 |= dict(rope_scaling=dict(type="longrope", short_factor=[1.05] * 48, long_factor=[1.08] * 48))
PHI4_MINI = PHI3 | dict(vocab_size=200064, num_attention_heads=24, num_key_value_heads=8, partial_rotary_factor=0.75)
PHI4_MINI |= dict(tie_word_embeddings=True, full_attn_mod=1, interpolate_factor=1, lm_head_bias=False, mlp_bias=False)

PYTHIA = COMMON | dict(model_type="gpt_neox", vocab_size=50304, hidden_size=512, intermediate_size=2048)
PYTHIA |= dict(num_hidden_layers=6, num_attention_heads=8, hidden_act="gelu", layer_norm_eps=1e-5)
PYTHIA |= dict(max_position_embeddings=2048, rotary_emb_base=10000, rotary_pct=0.25, tie_word_embeddings=False)
PYTHIA |= dict(use_parallel_residual=True)

GPT2 = dict(model_type="gpt2", activation_function="gelu_new", attn_pdrop=0.1, embd_pdrop=0.1, resid_pdrop=0.1)
GPT2 |= dict(bos_token_id=50256, eos_token_id=50256, initializer_range=0.02, layer_norm_epsilon=1e-5, n_ctx=1024)
GPT2 |= dict(n_embd=1024, n_head=16, n_layer=24, n_positions=1024, n_special=0, predict_special_tokens=True)
GPT2 |= dict(summary_activation=None, summary_first_dropout=0.1, summary_proj_to_labels=True, vocab_size=50257)
GPT2 |= dict(summary_type="cls_index", summary_use_proj=True, task_specific_params={"text-generation": {}})

PUBLISHED = {
    "SmolLM2-135M": (SMOLLM2, 134_515_008),
    "SmolLM2-135M-Instruct": (SMOLLM2 | {"transformers.js_config": {"dtype": "q4"}}, 134_515_008),
    "Qwen2.5-0.5B": (QWEN25, 494_032_768),
    "Qwen3-30B-A3B": (QWEN3_MOE, 30_532_122_624),
    "Qwen3-Coder-30B-A3B": (
        QWEN3_MOE | dict(qkv_bias=False, use_qk_norm=True, shared_expert_intermediate_size=0),
        30_532_122_624,
    ),
    "gemma-2-9b": (GEMMA2, 9_241_705_984),
    "gemma-3-1b": (GEMMA3, 999_885_952),
    "gemma-3-270m": (GEMMA3_SMALL, 268_098_176),
    "Phi-3-mini-128k": (PHI3, 3_821_079_552),
    "Phi-4-mini": (PHI4_MINI, 3_836_021_760),
    "pythia-70m": (PYTHIA, 70_426_624),
    "pythia-70m, saved by transformers 4.45 and later": (
        PYTHIA | dict(partial_rotary_factor=0.25, rope_theta=10000, rope_scaling=None, hidden_dropout=0.0),
        70_426_624,
    ),
    "gpt2-medium": (GPT2, 354_823_168),
    "gpt2-xl": (GPT2 | dict(n_embd=1600, n_head=25, n_layer=48, output_past=True), 1_557_611_200),
    "distilgpt2": (GPT2 | dict(n_embd=768, n_head=12, n_layer=6, _num_labels=1, id2label={}), 81_912_576),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_read_and_has_the_published_parameters(name):
    config, count = PUBLISHED[name]
    assert parameter_count(architecture_of(config)) == count


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (QWEN25 | dict(use_mrope=True), ["use_mrope=True", "only False"]),
        (QWEN25 | dict(max_window_layers="x"), ["max_window_layers is 'x'"]),
        (QWEN25 | dict(layer_types=["full_attention"]), ["layer_types has 1 entries", "24"]),
        (QWEN25 | dict(layer_types=[["full_attention"]] * 24), ["layer_types has ['full_attention']"]),
        (QWEN3_MOE | dict(num_local_experts=64), ["num_local_experts=64 and num_experts=128 disagree"]),
        (QWEN3_MOE | dict(num_experts_per_tok=129), ["num_experts_per_tok=129", "128 experts"]),
        (QWEN3_MOE | dict(mlp_only_layers=[0]), ["mlp_only_layers=[0] is not supported"]),
        (SMOLLM2 | dict(rope_interleaved=True), ["rope_interleaved=True"]),
        (SMOLLM2 | dict(num_attention_heads=7, num_key_value_heads=7), ["hidden_size=576", "num_attention_heads=7"]),
        (SMOLLM2 | dict(pruned_heads={"0": [1]}), ["pruned_heads"]),
        (
            SMOLLM2 | dict(rope_scaling=dict(type="linear", factor=2.0), rope_parameters=dict(factor=3.0)),
            ["factor is 2.0 in rope_scaling, 3.0 in rope_parameters"],
        ),
        (
            SMOLLM2 | dict(rope_scaling=dict(type="linear", rope_type="yarn", factor=2.0)),
            ["rope_type 'yarn' and type 'linear' disagree"],
        ),
        (GEMMA2 | dict(sliding_window_size=512), ["sliding_window_size=512 and sliding_window=4096 disagree"]),
        (GEMMA3 | dict(attn_logit_softcapping=50.0), ["attn_logit_softcapping=50.0"]),
        (GEMMA3 | dict(use_bidirectional_attention=True), ["use_bidirectional_attention=True"]),
        (PHI4_MINI | dict(partial_rotary_factor=0.5), ["short_factor has 48 numbers; 32 are needed"]),
        (PHI4_MINI | dict(lm_head_bias=True), ["lm_head_bias=True"]),
        (PYTHIA | dict(rotary_pct=1.5), ["partial_rotary_factor=1.5 rotates 96 features", "up to 64"]),
        (PYTHIA | dict(rope_theta=500), ["rope_theta=500 and rotary_emb_base=10000 disagree"]),
        (GPT2 | dict(scale_attn_by_inverse_layer_idx=True), ["scale_attn_by_inverse_layer_idx=True"]),
        (GPT2 | dict(max_position_embeddings=2048), ["max_position_embeddings=2048 and n_positions=1024 disagree"]),
        (GPT2 | dict(n_head=17), ["n_embd=1024 is not a multiple of n_head=17"]),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[0],
)
def test_what_a_published_config_does_not_say_is_refused_in_one_line(config, words):
    with pytest.raises(UserError) as error:
        architecture_of(config)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300
    for word in words:
        assert word in str(error.value)
