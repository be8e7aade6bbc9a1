"""The state of a trainer on the host, fetched once: hashes, the saved model and the checkpoint all come from one copy.

On a GPU each part is a download of gigabytes; on the CPU they are views, true until the next step.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np


def sha256_of(arrays: Mapping[str, np.ndarray], step: int = 0) -> str:
    """SHA-256 of a step count, then of every array's name and bytes, in their order."""
    digest = hashlib.sha256(step.to_bytes(8, "little"))
    for name, array in arrays.items():
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


@dataclass(frozen=True)
class Snapshot:
    """Parameters by name, and m and v (`m.<name>`, `v.<name>`), float32, in the layout's order, after `step` updates.
    """

    step: int
    params: Mapping[str, np.ndarray]
    optimizer: Mapping[str, np.ndarray]

    @cached_property
    def parameters_sha256(self) -> str:
        """As Trainer.parameters_sha256."""
        return sha256_of(self.params)

    @cached_property
    def optimizer_state_sha256(self) -> str:
        """As Trainer.optimizer_state_sha256."""
        return sha256_of(self.optimizer, self.step)
