"""Stand-ins for the trainer and the validation, for exercising the loop: no model, no data, no checkpoint.

The curves are upstream's: training loss falls by a hundredth of the target per step, validation loss linearly per
epoch. Every event of such a run says so: its `start` has `synthetic: true`.
"""

from apr.train.base import StartedStep, StepStats
from apr.train.pretrain import EpochArtifact, LoopState


class SyntheticRun:
    """StepFn, ValFn and CheckpointFn in one; a pure function of its arguments."""

    def __init__(self, target: float, epochs: int, tokens_per_step: int) -> None:
        self.target, self.epochs, self.tokens = target, epochs, tokens_per_step

    def ahead(self, step: int) -> int:
        """None: a step is finished when it is started."""
        return 0

    def start(self, step: int, lr: float) -> StartedStep:
        """Loss max(2 target, 1.5) falling by target / 100 a step (at least 1e-4), never below half of the target."""
        loss = max(2 * self.target, 1.5) - step * max(0.01 * self.target, 1e-4)
        return StartedStep(stats=StepStats(max(loss, 0.5 * self.target), 0.8, lr, self.tokens, True))

    def validate(self, epoch: int) -> float:
        """max(1.8 target, 3) before the first epoch, falling linearly to the target at the last."""
        start = max(1.8 * self.target, 3.0)
        return start + (self.target - start) * min(epoch + 1, self.epochs) / self.epochs

    def save(self, artifact: EpochArtifact | None, state: LoopState) -> None:
        """Nothing to keep."""

    def finish(self) -> None:
        """Nothing to wait for."""

    def optimizer_state_sha256(self) -> None:
        """There is no optimizer."""
