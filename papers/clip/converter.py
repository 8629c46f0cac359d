"""Published CLIP weights <-> ours. Keys on the left are the publishers', on the right ours; total and strict."""

from __future__ import annotations

from pathlib import Path

from shared.core.errors import UserError
from shared.weights.weight_map import Rule, to_published


def _text_and_scale() -> dict:
    block, ours = "transformer.resblocks.{}.", "text_encoder.blocks.{}."
    return {
        **_openai_block(block, ours),
        "token_embedding.weight": "text_encoder.token_embedding.weight",
        "positional_embedding": "text_encoder.position",
        "ln_final.weight": "text_encoder.output_norm.weight",
        "ln_final.bias": "text_encoder.output_norm.bias",
        "text_projection": Rule("text_proj.weight", transpose=True),
        "logit_scale": "logit_scale",
        "input_resolution": None,  # integers that the TorchScript archives carry beside the weights
        "context_length": None,
        "vocab_size": None,
    }


def _openai_block(theirs: str, ours: str) -> dict:
    names = {
        "ln_1": "attention_norm",
        "attn.out_proj": "attention.out",
        "ln_2": "mlp_norm",
        "mlp.c_fc": "mlp.up",
        "mlp.c_proj": "mlp.down",
    }
    table = {f"{theirs}attn.in_proj_{part}": f"{ours}attention.qkv.{part}" for part in ("weight", "bias")}
    for name, our_name in names.items():
        for part in ("weight", "bias"):
            table[f"{theirs}{name}.{part}"] = f"{ours}{our_name}.{part}"
    return table


OPENAI_VIT = {
    **_text_and_scale(),
    **_openai_block("visual.transformer.resblocks.{}.", "vision_encoder.blocks.{}."),
    "visual.conv1.weight": "vision_encoder.patch_embedding.weight",
    "visual.class_embedding": "vision_encoder.positions.class_token",
    "visual.positional_embedding": "vision_encoder.positions.position",
    "visual.ln_pre.weight": "vision_encoder.input_norm.weight",
    "visual.ln_pre.bias": "vision_encoder.input_norm.bias",
    "visual.ln_post.weight": "vision_encoder.output_norm.weight",
    "visual.ln_post.bias": "vision_encoder.output_norm.bias",
    "visual.proj": Rule("vision_proj.weight", transpose=True),
}


def _resnet() -> dict:
    statistics = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    table = {}
    for index in (1, 2, 3):
        table[f"visual.conv{index}.weight"] = f"vision_encoder.conv{index}.weight"
        for part in statistics:
            table[f"visual.bn{index}.{part}"] = f"vision_encoder.bn{index}.{part}"
    for stage in range(4):
        theirs, ours = f"visual.layer{stage + 1}.{{}}.", f"vision_encoder.stages.{stage}.{{}}."
        for index in (1, 2, 3):
            table[f"{theirs}conv{index}.weight"] = f"{ours}conv{index}.weight"
            for part in statistics:
                table[f"{theirs}bn{index}.{part}"] = f"{ours}bn{index}.{part}"
        table[f"{theirs}downsample.0.weight"] = f"{ours}shortcut_conv.weight"
        for part in statistics:
            table[f"{theirs}downsample.1.{part}"] = f"{ours}shortcut_bn.{part}"
    pool = "vision_encoder.pool."
    table["visual.attnpool.positional_embedding"] = f"{pool}position"
    for part in ("weight", "bias"):
        table[f"visual.attnpool.q_proj.{part}"] = f"{pool}attention.q.{part}"
        table[(f"visual.attnpool.k_proj.{part}", f"visual.attnpool.v_proj.{part}")] = f"{pool}attention.kv.{part}"
        table[f"visual.attnpool.c_proj.{part}"] = f"{pool}attention.out.{part}"
    return table


OPENAI_RESNET = {**_text_and_scale(), **_resnet()}


def _transformers_tower(tower: str, ours: str) -> dict:
    layer, block = f"{tower}.encoder.layers.{{}}.", f"{ours}.blocks.{{}}."
    names = {
        "layer_norm1": "attention_norm",
        "self_attn.out_proj": "attention.out",
        "layer_norm2": "mlp_norm",
        "mlp.fc1": "mlp.up",
        "mlp.fc2": "mlp.down",
    }
    table = {}
    for part in ("weight", "bias"):
        heads = tuple(f"{layer}self_attn.{name}_proj.{part}" for name in "qkv")
        table[heads] = f"{block}attention.qkv.{part}"
        for name, our_name in names.items():
            table[f"{layer}{name}.{part}"] = f"{block}{our_name}.{part}"
    return table


TRANSFORMERS = {
    **_transformers_tower("vision_model", "vision_encoder"),
    **_transformers_tower("text_model", "text_encoder"),
    "vision_model.embeddings.patch_embedding.weight": "vision_encoder.patch_embedding.weight",
    "vision_model.embeddings.class_embedding": "vision_encoder.positions.class_token",
    "vision_model.embeddings.position_embedding.weight": "vision_encoder.positions.position",
    "vision_model.embeddings.position_ids": None,
    "vision_model.pre_layrnorm.weight": "vision_encoder.input_norm.weight",
    "vision_model.pre_layrnorm.bias": "vision_encoder.input_norm.bias",
    "vision_model.post_layernorm.weight": "vision_encoder.output_norm.weight",
    "vision_model.post_layernorm.bias": "vision_encoder.output_norm.bias",
    "visual_projection.weight": "vision_proj.weight",
    "text_model.embeddings.token_embedding.weight": "text_encoder.token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "text_encoder.position",
    "text_model.embeddings.position_ids": None,
    "text_model.final_layer_norm.weight": "text_encoder.output_norm.weight",
    "text_model.final_layer_norm.bias": "text_encoder.output_norm.bias",
    "text_projection.weight": "text_proj.weight",
    "logit_scale": "logit_scale",
}

WEIGHT_MAPS = {"openai-vit": OPENAI_VIT, "openai-resnet": OPENAI_RESNET, "transformers": TRANSFORMERS}


def detect(keys: set[str]) -> str:
    """Which of WEIGHT_MAPS published keys belong to, or 'ours'; ValueError for a stranger."""
    if "vision_model.embeddings.class_embedding" in keys:
        return "transformers"
    if "visual.class_embedding" in keys:
        return "openai-vit"
    if "visual.attnpool.positional_embedding" in keys:
        return "openai-resnet"
    if "text_encoder.position" in keys:
        return "ours"
    raise ValueError("these are not CLIP weights: none of the known names is among their keys")


def convert(source: Path, target: Path, variant: str, to: str) -> None:
    """Write `source` (any known names) as safetensors under our names, or a published format's; strict both ways."""
    from papers.clip.config import VARIANTS
    from papers.clip.pretrained import load_file
    from shared.weights.load import save_weights

    known = {"ours": None, **WEIGHT_MAPS}
    if to not in known:
        raise UserError(f"--to {to}: choose {', '.join(known)}")
    if not source.is_file():
        raise UserError(f"{source}: no such file")
    state = load_file(source, VARIANTS[variant]()).state_dict()
    save_weights(state if to == "ours" else to_published(state, known[to]), target, {"variant": variant})
