"""Configuration of a Nemotron-NAS model. A copy lies beside such a checkpoint; it needs
transformers alone and is run with `trust_remote_code=True`.

`block_configs` says of each layer how many query heads read one key-value head, and how wide its
FFN is. Engines read these as attributes, and JSON as objects, so they are both.
"""

from typing import Any

from transformers import LlamaConfig


class Block(dict[str, Any]):
    """A dictionary whose entries are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class NemotronNasConfig(LlamaConfig):  # type: ignore[no-untyped-call]
    """A Llama's configuration, and `block_configs`."""

    model_type = "nemotron-nas"

    def __post_init__(self, block_configs: Any = (), **kwargs: Any) -> None:
        self.block_configs = [
            Block({part: Block(fields) for part, fields in block.items()})
            for block in block_configs
        ]
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
