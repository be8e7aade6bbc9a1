"""Two models' configurations: the fields in which they differ, and whether the models can be compared at all."""

from collections.abc import Collection

from apr.config import TransformerConfig, encode
from apr.errors import ConfigError

POINTS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
          "num_key_value_heads", "head_dim", "qk_norm")  # where these agree, every capture point has its partner
PARAMS = (*POINTS, "use_bias", "tie_word_embeddings")  # and every parameter


def differing_fields(expected: TransformerConfig, found: TransformerConfig) -> dict[str, tuple[object, object]]:
    """The fields that differ, with both values as plain data."""
    theirs = encode(found)
    return {name: (value, theirs[name]) for name, value in encode(expected).items() if value != theirs[name]}


def check_shapes(expected: TransformerConfig, found: TransformerConfig, where: str, fields: Collection[str]) -> None:
    """Raise ConfigError naming all of `fields` (POINTS or PARAMS) in which two models differ; `where` names both."""
    other = [f"{name} {a} and {b}" for name, (a, b) in differing_fields(expected, found).items() if name in fields]
    if other:
        raise ConfigError(where, "two models of one shape", ", ".join(other), "compare two files of the same model")
