"""Trainers by name of device, for runs and for those who build their own loop."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from apr.config import TransformerConfig, TransformerTrainConfig
from apr.device import Device
from apr.driver import cupy_distributions, probe
from apr.errors import ConfigError
from apr.formats.source import ARCH_MATCH
from apr.presets import preset
from apr.train.base import Trainer
from apr.train.cuda_trainer import CudaTransformerTrainer
from apr.train.init import open_init
from apr.train.trainer import TransformerTrainer


def make_trainer(model: TransformerConfig, config: TransformerTrainConfig, device: str,
                 params: dict[str, np.ndarray] | None = None, record: Mapping[str, Any] | None = None,
                 warn: Callable[[str], None] | None = None) -> Trainer:
    """A trainer on `device` ("cpu" or "cuda:N") with the given params, or random ones.

    The optimizer is fresh (FALSIFY-APR-PRETRAIN-INIT-009). `record`: what a checkpoint of the same device kept of its
    trainer; `warn` is told what a GPU's kernel cache complains of. Raises FormatError unless the weights are exactly
    the model's, and what the trainers raise.
    """
    if device == "cpu":
        return (TransformerTrainer.new(model, config) if params is None
                else TransformerTrainer.with_model(model, params, config))
    gpu = Device(int(device.removeprefix("cuda:")), warn=warn)
    chosen = (record or {}).get("gemm")
    return (CudaTransformerTrainer.new(model, config, gpu, chosen=chosen) if params is None
            else CudaTransformerTrainer.with_model(model, params, config, gpu, chosen=chosen))


def build_trainer(lr: float, seq_length: int, seed: int, init_arch: TransformerConfig | None = None,
                  init_path: Path | None = None) -> TransformerTrainer:
    """A CPU trainer, in upstream's way: llama_370m with random weights, or the architecture and weights of a model.

    `init_path` is whatever --init takes. Raises ConfigError unless init_arch and init_path come together and agree,
    and what open_init raises.
    """
    model, params = _model(init_arch, init_path)
    config = TransformerTrainConfig(lr=lr, max_seq_len=seq_length, seed=seed)
    trainer = make_trainer(model, config, "cpu", params)
    assert isinstance(trainer, TransformerTrainer)
    return trainer


def build_cuda_trainer_with_init(lr: float, seq_length: int, seed: int, init_arch: TransformerConfig | None = None,
                                 init_path: Path | None = None, device: str = "cuda:0",
                                 **settings: Any) -> CudaTransformerTrainer:
    """The same on a GPU, in bf16; `settings` are further fields of TransformerTrainConfig.

    Arguments are checked before any device is touched. Raises as build_trainer.
    """
    if device == "cpu":
        raise ConfigError("build_cuda_trainer_with_init", "a GPU, cuda:N", "cpu", "use build_trainer")
    model, params = _model(init_arch, init_path)
    config = TransformerTrainConfig(**{"precision": "bf16", **settings}, lr=lr, max_seq_len=seq_length, seed=seed)
    trainer = make_trainer(model, config, device, params)
    assert isinstance(trainer, CudaTransformerTrainer)
    return trainer


def _model(init_arch: TransformerConfig | None,
           init_path: Path | None) -> tuple[TransformerConfig, dict[str, np.ndarray] | None]:
    if (init_arch is None) != (init_path is None):
        raise ConfigError("FALSIFY-APR-PRETRAIN-INIT-CUDA-002", "init_arch and init_path together, or neither",
                          "init_arch alone" if init_path is None else "init_path alone", "give both, or none")
    if init_arch is None or init_path is None:
        return preset("llama_370m"), None
    with open_init(init_path) as init:
        if init.config != init_arch:
            raise ConfigError(f"{ARCH_MATCH} {init_path}", "the architecture init_arch", "another",
                              "give the model's own architecture")
        return init_arch, init.params()


def device_versions(device: str) -> dict[str, str]:
    """What a run on this device should record: GPU, driver, CuPy; nothing on the CPU."""
    if device == "cpu":
        return {}
    info = probe()
    cupy = " ".join(f"{name} {version}" for name, version in cupy_distributions().items())
    return {"gpu": info.devices[int(device.removeprefix("cuda:"))].name, "driver": info.driver_version, "cupy": cupy}
