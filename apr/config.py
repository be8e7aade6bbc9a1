"""What a model is, how it is trained and how tokens are chosen: the single home of every number that shapes these.

Names are Hugging Face's; the symbols of docs/glossary.md (C, L, NH, …) are properties. A number that changes what a
model computes (eps, theta, head size, tying, bias) has no default anywhere: it is given or the call fails.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, TypeVar, get_args, get_type_hints

import msgspec

from apr.errors import ConfigError, did_you_mean

END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<|im_end|>")  # the first that exists ends a document
IGNORE = -100  # the target id that means "no target here"; Hugging Face's label for it
MAX_LAYERS = 10_000  # each is a few entries in tables that are made before anything is compared with a file
VOCAB_MULTIPLE = 128  # logits are padded to this inside; 50257 unpadded costs 7x on the head

# Hugging Face's model_type and class of the decoder families that apr computes.
FAMILIES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM",
            "qwen3": "Qwen3ForCausalLM"}

# Upstream's (aprender's) names for fields that Hugging Face names otherwise.
UPSTREAM_NAMES = {"num_kv_heads": "num_key_value_heads", "head_dim_override": "head_dim",
                  "rms_norm_epsilon": "rms_norm_eps"}


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3's stretching of the rotation's low frequencies (transformers `rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        require("rope_scaling.factor", self.factor, "at least 1", self.factor >= 1)
        require("rope_scaling.low_freq_factor", self.low_freq_factor, "positive and below high_freq_factor",
                0 < self.low_freq_factor < self.high_freq_factor)
        require("rope_scaling.original_max_position_embeddings", self.original_max_position_embeddings, "positive",
                self.original_max_position_embeddings > 0)


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """A decoder: RMSNorm, rotary positions (split-half), grouped-query causal attention, SwiGLU.

    Every field is required. `use_bias` is the bias of the Q, K and V projections (Qwen2); `qk_norm` the RMSNorm of each
    query and key head (Qwen3). Raises ConfigError for a value that no model can have, and for encoder families.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    use_bias: bool
    qk_norm: bool
    tie_word_embeddings: bool
    architecture: str
    hf_architecture: str
    hf_model_type: str

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                     "num_key_value_heads", "head_dim", "max_position_embeddings"):
            value = getattr(self, name)
            require(name, value, "a whole number from 1 to 2^31-1", type(value) is int and 1 <= value < 2**31)
        require("num_hidden_layers", self.num_hidden_layers, f"at most {MAX_LAYERS}",
                self.num_hidden_layers <= MAX_LAYERS)
        require("num_key_value_heads", self.num_key_value_heads, f"a divisor of num_attention_heads "
                f"({self.num_attention_heads})", self.num_attention_heads % self.num_key_value_heads == 0)
        require("head_dim", self.head_dim, "even, since rotation pairs its halves", self.head_dim % 2 == 0)
        require("rms_norm_eps", self.rms_norm_eps, "between 0 and 1e-2", 0 < self.rms_norm_eps <= 1e-2)
        require("rope_theta", self.rope_theta, "finite and above 1", 1 < self.rope_theta < math.inf)
        require("architecture", self.architecture,
                "'decoder' (ARCH-007: encoder families cannot be trained as decoders)",
                self.architecture == "decoder")
        family = self.hf_model_type  # a file says which model it is by this alone, so the rest must agree with it
        require("hf_model_type", family, "one of " + ", ".join(FAMILIES), family in FAMILIES)
        require("hf_architecture", self.hf_architecture, f"'{FAMILIES[family]}'",
                self.hf_architecture == FAMILIES[family])
        require("use_bias", self.use_bias, f"{family == 'qwen2'} for {family}", self.use_bias is (family == "qwen2"))
        require("qk_norm", self.qk_norm, f"{family == 'qwen3'} for {family}", self.qk_norm is (family == "qwen3"))

    # The symbols of the glossary.
    V = property(lambda self: self.vocab_size)
    C = property(lambda self: self.hidden_size)
    F = property(lambda self: self.intermediate_size)
    L = property(lambda self: self.num_hidden_layers)
    NH = property(lambda self: self.num_attention_heads)
    NKV = property(lambda self: self.num_key_value_heads)
    HS = property(lambda self: self.head_dim)
    G = property(lambda self: self.num_attention_heads // self.num_key_value_heads)
    QKV = property(lambda self: (self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_dim)
    Vp = property(lambda self: -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE)


@dataclass(frozen=True, kw_only=True)
class TransformerTrainConfig:
    """How a model is trained. The defaults are upstream's, or AdamW's usual ones; each is a flag of `apr pretrain`.

    One step is `accumulation_steps` micro-batches of `batch_size` sequences of `max_seq_len` tokens.
    """

    lr: float = field(default=1e-3, metadata={"help": "peak learning rate"})
    lr_min: float = field(default=0.0, metadata={"help": "learning rate at the end of the cosine"})
    warmup_steps: int = field(default=0, metadata={"help": "steps of linear warm-up"})
    max_steps: int = field(default=1000, metadata={"help": "optimizer steps in all; the cosine ends here"})
    batch_size: int = field(default=16, metadata={"help": "sequences per micro-batch"})
    max_seq_len: int = field(default=512, metadata={"help": "tokens per sequence"})
    accumulation_steps: int = field(default=1, metadata={"help": "micro-batches per step"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "clip the global gradient norm to this"})
    weight_decay: float = field(default=0.01, metadata={"help": "decoupled decay, on matrices only"})
    beta1: float = field(default=0.9, metadata={"help": "AdamW first moment"})
    beta2: float = field(default=0.999, metadata={"help": "AdamW second moment"})
    adam_eps: float = field(default=1e-8, metadata={"help": "AdamW epsilon"})
    precision: str = field(default="fp32", metadata={"help": "fp32, or on a GPU bf16 with float32 master weights"})
    seed: int = field(default=42, metadata={"help": "weights and order of the data"})

    def __post_init__(self) -> None:
        for name in ("max_steps", "batch_size", "max_seq_len", "accumulation_steps"):
            require(name, getattr(self, name), "at least 1",
                    type(getattr(self, name)) is int and getattr(self, name) >= 1)
        for name in ("lr", "max_grad_norm", "adam_eps"):
            require(name, getattr(self, name), "positive and finite", 0 < getattr(self, name) < math.inf)
        require("lr_min", self.lr_min, "from 0 to lr", 0 <= self.lr_min <= self.lr)
        require("warmup_steps", self.warmup_steps, "0 or more",
                type(self.warmup_steps) is int and self.warmup_steps >= 0)
        require("weight_decay", self.weight_decay, "0 or more, finite", 0 <= self.weight_decay < math.inf)
        for name in ("beta1", "beta2"):
            require(name, getattr(self, name), "from 0 to below 1", 0 <= getattr(self, name) < 1)
        require("precision", self.precision, "fp32 or bf16", self.precision in ("fp32", "bf16"))
        require("seed", self.seed, "from 0 to 2^63-1", type(self.seed) is int and 0 <= self.seed < 2**63)

    @property
    def tokens_per_step(self) -> int:
        """Positions of one step: B * T * A."""
        return self.batch_size * self.max_seq_len * self.accumulation_steps


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from scores.

    temperature 0 takes the largest (the first of equals); else scores / temperature, of which the `top_k` largest are
    kept (0: all), then the fewest that hold `top_p` of the probability (1: all), and one is drawn. `vocab` is the
    tokenizer's size: ids from there on are padding of the model's head and are never chosen. Draws are a pure function
    of seed, number of the sequence (`first` is that of the first prompt) and position, the same on CPU and GPU:
    apr/reference/sampling.py. Raises ConfigError for a value out of range.
    """

    vocab: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    first: int = 0

    def __post_init__(self) -> None:
        require("--temperature", self.temperature, "from 0 to 100", 0 <= self.temperature <= 100, "sampling")
        require("--top-k", self.top_k, "0 or more", type(self.top_k) is int and 0 <= self.top_k < 2**31, "sampling")
        require("--top-p", self.top_p, "above 0, at most 1", 0 < self.top_p <= 1, "sampling")
        require("--seed", self.seed, "from 0 to 2^63-1", type(self.seed) is int and 0 <= self.seed < 2**63, "sampling")


def require(name: str, value: Any, rule: str, ok: bool, where: str = "config") -> None:
    """Raise ConfigError unless `ok`; NaN makes any comparison false and so is refused."""
    if not ok:
        raise ConfigError(f"{where}: {name}", rule, repr(value), f"correct {name}")


T = TypeVar("T")


def decode(kind: type[T], values: Any, where: str) -> T:
    """A config (any dataclass) from plain data (YAML, JSON, .apr metadata), strictly, nested ones too.

    Raises ConfigError naming `where` and the key: not a mapping, unknown key (with a suggestion), missing key, wrong
    type (a bool is no number, a string is no float), value out of range.
    """
    _check_names(kind, values, where)
    try:
        return msgspec.convert(values, kind, strict=True)
    except msgspec.ValidationError as e:
        raise ConfigError(where, "values of the declared types", str(e), "correct the value") from None
    except ConfigError as e:
        raise ConfigError(f"{where}: {e.where.removeprefix('config: ')}", e.expected, e.found, e.fix) from None


def _check_names(kind: Any, values: Any, where: str) -> None:
    """Demand exactly the keys of a dataclass, and of those within it; msgspec would drop an unknown one silently."""
    if not isinstance(values, dict):
        raise ConfigError(where, "a mapping of keys to values", type(values).__name__, "write one key per line")
    fields, types = {f.name: f for f in dataclasses.fields(kind)}, get_type_hints(kind)
    for key, value in values.items():
        if key not in fields:
            fix = f"use '{UPSTREAM_NAMES[key]}'" if key in UPSTREAM_NAMES else did_you_mean(str(key), fields)
            raise ConfigError(f"{where}: key '{key}'", f"a field of {kind.__name__}", "an unknown key", fix)
        nested = [t for t in (types[key], *get_args(types[key])) if dataclasses.is_dataclass(t)]
        if nested and isinstance(value, dict):
            _check_names(nested[0], value, f"{where}: {key}")
    for name, f in fields.items():
        if f.default is f.default_factory is dataclasses.MISSING and name not in values:
            raise ConfigError(f"{where}: {name}", "a value (it has no default)", "nothing", f"add '{name}'")


def encode(config: TransformerConfig | TransformerTrainConfig) -> dict[str, Any]:
    """The plain data that `decode` reads back to an equal config."""
    return dataclasses.asdict(config)
