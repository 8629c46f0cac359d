"""Ours with the weights of transformers' BERT and BLIP text models: for the parity of blocks and of generation."""

import torch

from shared.nn.bert import BertEmbeddings, BertLayers, TokenHead

# theirs (prefix of a weight and a bias) -> ours; attention's three projections are fused in ours and follow apart
LAYER = {
    "attention.output.dense": "attention.out",
    "attention.output.LayerNorm": "attention_norm",
    "crossattention.output.dense": "cross_attention.out",
    "crossattention.output.LayerNorm": "cross_norm",
    "intermediate.dense": "mlp.up",
    "output.dense": "mlp.down",
    "output.LayerNorm": "mlp_norm",
}
FUSED = {
    "attention.qkv": [f"attention.self.{name}" for name in ("query", "key", "value")],
    "cross_attention.q": ["crossattention.self.query"],
    "cross_attention.kv": [f"crossattention.self.{name}" for name in ("key", "value")],
}


class Ours(torch.nn.Module):
    """Embeddings, layers and head under one roof, so that gradients have names."""

    def __init__(self, *, vocabulary, width, heads, mlp_width, layers, positions=40, token_types=0, context_width=None):
        super().__init__()
        self.embeddings = BertEmbeddings(vocabulary, width, positions, token_types=token_types, dropout=0.0)
        self.layers = BertLayers.make(layers, width, heads, mlp_width, context_width=context_width, dropout=0.0)
        self.head = TokenHead(width, vocabulary)


def from_theirs(theirs: dict[str, torch.Tensor], layers: int) -> dict[str, torch.Tensor]:
    """A state dict (or gradients) with transformers' names, after "bert." and "cls.", as one for `Ours`.

    What ours has no counterpart for fails at the strict load; what theirs has beyond it is listed by `leftover`.
    """
    theirs, ours = dict(theirs), {}

    def move(name, *sources):
        for kind in ("weight", "bias"):
            found = [theirs.pop(f"{source}.{kind}") for source in sources if f"{source}.{kind}" in theirs]
            if found:
                ours[f"{name}.{kind}"] = torch.cat(found)

    for part in ("word", "position", "token_type"):
        move(f"embeddings.{part}", f"bert.embeddings.{part}_embeddings")
    move("embeddings.norm", "bert.embeddings.LayerNorm")
    for index in range(layers):
        for their_name, name in LAYER.items():
            move(f"layers.{index}.{name}", f"bert.encoder.layer.{index}.{their_name}")
        for name, parts in FUSED.items():
            move(f"layers.{index}.{name}", *(f"bert.encoder.layer.{index}.{part}" for part in parts))
    move("head.dense", "cls.predictions.transform.dense")
    move("head.norm", "cls.predictions.transform.LayerNorm")
    ours["head.bias"] = theirs.pop("cls.predictions.bias")
    for tied in ("cls.predictions.decoder.weight", "cls.predictions.decoder.bias", "bert.embeddings.position_ids"):
        theirs.pop(tied, None)
    assert not theirs, f"not carried over: {sorted(theirs)}"
    return ours
