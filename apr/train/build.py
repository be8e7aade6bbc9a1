"""Trainers by name of device, for runs and for those who build their own loop."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from apr.config import TransformerConfig, TransformerTrainConfig
from apr.device import Device
from apr.driver import cupy_distributions, probe
from apr.errors import ConfigError
from apr.formats.model_file import load_model
from apr.presets import preset
from apr.train.base import Trainer
from apr.train.cuda_trainer import CudaTransformerTrainer
from apr.train.trainer import TransformerTrainer


def make_trainer(model: TransformerConfig, config: TransformerTrainConfig, device: str, init: str | None = None,
                 params: dict[str, np.ndarray] | None = None, record: Mapping[str, Any] | None = None) -> Trainer:
    """A trainer on `device` ("cpu" or "cuda:N") with the given params, or those of the file `init`, or random ones.

    The optimizer is fresh (FALSIFY-APR-PRETRAIN-INIT-009). `record`: what a checkpoint of the same device kept of its
    trainer. Raises FormatError unless the weights are exactly the model's, and what the trainers raise.
    """
    if init is not None:
        _, params, _ = load_model(Path(init))
    if device == "cpu":
        return (TransformerTrainer.new(model, config) if params is None
                else TransformerTrainer.with_model(model, params, config))
    gpu, chosen = Device(int(device.removeprefix("cuda:"))), (record or {}).get("gemm")
    return (CudaTransformerTrainer.new(model, config, gpu, chosen=chosen) if params is None
            else CudaTransformerTrainer.with_model(model, params, config, gpu, chosen=chosen))


def build_trainer(lr: float, seq_length: int, seed: int, init_arch: TransformerConfig | None = None,
                  init_path: Path | None = None) -> TransformerTrainer:
    """A CPU trainer, in upstream's way: llama_370m with random weights, or the architecture and weights of a file.

    Raises ConfigError unless init_arch and init_path come together and agree.
    """
    model, init = _model(init_arch, init_path)
    config = TransformerTrainConfig(lr=lr, max_seq_len=seq_length, seed=seed)
    trainer = make_trainer(model, config, "cpu", init)
    assert isinstance(trainer, TransformerTrainer)
    return trainer


def build_cuda_trainer_with_init(lr: float, seq_length: int, seed: int, init_arch: TransformerConfig | None = None,
                                 init_path: Path | None = None, device: str = "cuda:0",
                                 **settings: Any) -> CudaTransformerTrainer:
    """The same on a GPU, in bf16; `settings` are further fields of TransformerTrainConfig.

    Arguments are checked before any device is touched. Raises ConfigError as build_trainer.
    """
    model, init = _model(init_arch, init_path)
    config = TransformerTrainConfig(**{"precision": "bf16", **settings}, lr=lr, max_seq_len=seq_length, seed=seed)
    trainer = make_trainer(model, config, device, init)
    assert isinstance(trainer, CudaTransformerTrainer)
    return trainer


def _model(init_arch: TransformerConfig | None, init_path: Path | None) -> tuple[TransformerConfig, str | None]:
    if (init_arch is None) != (init_path is None):
        raise ConfigError("FALSIFY-APR-PRETRAIN-INIT-CUDA-002", "init_arch and init_path together, or neither",
                          "init_arch alone" if init_path is None else "init_path alone", "give both, or none")
    if init_arch is None or init_path is None:
        return preset("llama_370m"), None
    found, _, _ = load_model(init_path)  # refuses encoders (FALSIFY-APR-PRETRAIN-INIT-CUDA-003)
    if found != init_arch:
        raise ConfigError(f"INIT-ARCH-MATCH-001 {init_path}", "the architecture init_arch", "another",
                          "give the file's own architecture")
    return init_arch, str(init_path)


def device_versions(device: str) -> dict[str, str]:
    """What a run on this device should record: GPU, driver, CuPy; nothing on the CPU."""
    if device == "cpu":
        return {}
    info = probe()
    cupy = " ".join(f"{name} {version}" for name, version in cupy_distributions().items())
    return {"gpu": info.devices[int(device.removeprefix("cuda:"))].name, "driver": info.driver_version, "cupy": cupy}
