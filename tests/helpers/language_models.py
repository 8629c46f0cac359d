"""transformers' configurations of the language models that BLIP-2 speaks through."""

from typing import Any

from papers.blip2.config import LanguageConfig


def text_config(language: LanguageConfig) -> dict[str, Any]:
    """As a text_config of transformers' BLIP-2 has it."""
    if language.family == "opt":
        return {
            "model_type": "opt", "vocab_size": language.vocabulary, "hidden_size": language.width,
            "word_embed_proj_dim": language.width, "ffn_dim": language.mlp_width, "num_hidden_layers": language.layers,
            "num_attention_heads": language.heads, "max_position_embeddings": language.context, "dropout": 0.0,
            "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2,
        }  # fmt: skip
    if language.family == "t5":
        return {
            "model_type": "t5", "vocab_size": language.vocabulary, "d_model": language.width,
            "d_kv": language.head_width or language.width // language.heads, "d_ff": language.mlp_width,
            "num_layers": language.layers, "num_decoder_layers": language.layers, "num_heads": language.heads,
            "dropout_rate": 0.0, "feed_forward_proj": "gated-gelu", "initializer_factor": 0.3,
            "tie_word_embeddings": False, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0,
        }  # fmt: skip
    return {
        "model_type": "llama", "vocab_size": language.vocabulary, "hidden_size": language.width,
        "intermediate_size": language.mlp_width, "num_hidden_layers": language.layers,
        "num_attention_heads": language.heads, "num_key_value_heads": language.kv_heads, "tie_word_embeddings": True,
    }  # fmt: skip
