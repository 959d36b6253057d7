"""The part of a composite configuration that a class is built from."""

from __future__ import annotations

from transformers import PretrainedConfig


def config_for(kind: type, config: PretrainedConfig) -> PretrainedConfig:
    """Returns the configuration that a class is built from: a part of a composite one where the
    class is that part's.
    """
    wanted = getattr(kind, "config_class", None)
    if wanted is None or isinstance(config, wanted):
        return config
    parts = (getattr(config, name, None) for name in type(config).sub_configs)
    return next((part for part in parts if isinstance(part, wanted)), config)
