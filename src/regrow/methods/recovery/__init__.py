"""Recovery of what pruning lost: bias compensation, least squares, LoRA, distillation; each has a budget of tokens."""

from regrow.methods.recovery.task import Recovery, RecoveryTask

__all__ = ["Recovery", "RecoveryTask"]
