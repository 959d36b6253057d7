"""Writes a checkpoint in the form of Nemotron-NAS (`DeciLMForCausalLM`), which vLLM, SGLang and
mlx-lm read with code of their own.

Its FFNs may differ in width; heads may not. vLLM takes any width. Older readers, mlx-lm and
llama.cpp's converter compute it from `ffn_mult`, in steps of 256: that field is written where every
width is one.

Source: docs/methods.md, section 20; vLLM's nemotron_nas.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prunenet.checkpoints.companions import write_companions
from prunenet.checkpoints.contents import CONFIG
from prunenet.checkpoints.exports import configuration_nemotron_nas as configuration
from prunenet.checkpoints.load import load_model
from prunenet.checkpoints.save import bytes_to_write
from prunenet.models import modeling
from prunenet.models.anatomy import Anatomy
from prunenet.models.heads import GROUPS, QUERY_HEADS
from prunenet.runtime.files import CheckpointError, new_folder

_TYPES = ("llama", "mistral")
STEP = 256
"""Of the widths that every reader computes exactly."""


def export_nemotron(source: str | Path, out: str | Path) -> bool:
    """Writes a checkpoint, dense or pruned, in the form of Nemotron-NAS.

    Weights and tokenizer are those of the source; only the configuration says it in other words.

    Args:
        source: folder or hub id.
        out: folder to create; it may exist if it is empty.

    Returns:
        Whether every reader takes it: all widths are multiples of 256. Else vLLM and SGLang do.

    Raises:
        CheckpointError: as `load_model`; or the form cannot state the model, with the reason.
    """
    model = load_model(source)
    config: Any = model.config
    if config.model_type not in _TYPES or hasattr(config, "residual_widths"):
        raise CheckpointError(
            f"Nemotron-NAS is a Llama with uneven layers, and {source} a {type(model).__name__};"
            f" only {' and '.join(_TYPES)} can be stated so"
        )
    if hasattr(config, modeling.HEADS):
        raise CheckpointError(
            "Nemotron-NAS has as many query heads in every layer, and this model has not; cut FFN"
            " channels alone, or export with --gguf"
        )
    if getattr(config, "sliding_window", None):
        raise CheckpointError(
            f"Nemotron-NAS has no sliding window, and this model one of {config.sliding_window}"
        )
    widths = Anatomy.of(model).widths
    with new_folder(Path(out), bytes_to_write(model)) as folder:
        model.save_pretrained(folder)
        write_companions(folder, model)
        for code in folder.glob("*.py"):
            code.unlink()
        fields = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        stated = _stated(fields, widths, getattr(config, QUERY_HEADS) // getattr(config, GROUPS))
        (folder / CONFIG).write_text(json.dumps(stated, indent=2) + "\n", encoding="utf-8")
        code = Path(configuration.__file__)
        (folder / code.name).write_bytes(code.read_bytes())
    return all(width % STEP == 0 for width in widths)


def _stated(fields: dict[str, Any], widths: list[int], heads_in_group: int) -> dict[str, Any]:
    """The fields of config.json in the words of Nemotron-NAS."""
    dropped = (modeling.FFN, "per_layer_config", "attn_implementation", "auto_map")
    kept = {name: value for name, value in fields.items() if name not in dropped}
    exact = all(width % STEP == 0 for width in widths)
    blocks = []
    for width in widths:
        ffn: dict[str, Any] = {"intermediate_size": width}
        if exact:  # readers round this up to the next multiple
            ffn["ffn_mult"] = 1.5 * (width - STEP / 2) / fields["hidden_size"]
        plain = {"no_op": False, "replace_with_linear": False, "sparsify": None}
        attention = {"n_heads_in_group": heads_in_group}
        blocks.append({"attention": attention | plain, "ffn": ffn | plain})
    name = configuration.NemotronNasConfig.__name__
    return kept | {
        "architectures": ["DeciLMForCausalLM"],
        "model_type": configuration.NemotronNasConfig.model_type,
        "auto_map": {"AutoConfig": f"{Path(configuration.__file__).stem}.{name}"},
        "block_configs": blocks,
    }
