"""Whether two models can be compared at all: the numbers that give their arrays shapes."""

from collections.abc import Sequence

from apr.config import TransformerConfig
from apr.errors import ConfigError

POINTS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
          "num_key_value_heads", "head_dim", "qk_norm")  # every capture point of one has a partner in the other
PARAMS = (*POINTS, "use_bias", "tie_word_embeddings")  # every parameter, too


def check_shapes(expected: TransformerConfig, found: TransformerConfig, where: str, fields: Sequence[str]) -> None:
    """Raise ConfigError naming all of these fields in which two models differ; `where` names both."""
    differing = [f"{name} {getattr(expected, name)} and {getattr(found, name)}" for name in fields
                 if getattr(expected, name) != getattr(found, name)]
    if differing:
        raise ConfigError(where, "two models of one shape", ", ".join(differing), "compare two files of the same model")
