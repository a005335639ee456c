"""The settings of SparseGrow."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """What the abstracts leave open.

    Args:
        grow: ``always``: once in every task, wherever anything is no longer free; ``short``: where what is free runs
            short; ``never``: not.
        late: The last share of a task's epochs, at the start of which it grows.
        short: An axis grows if a smaller share of the weights that make it (``kronecker``: and read it) is free.
        width: How much it grows by, as a share of its first size.
        multiple: Numbers of newborn units are multiples of this.
        cap: How many times its first parameters the network may have.
        density: The share of their inputs that newborn units read at birth.
        fit: Whether newborn units are scaled to the spread of the old ones, on data.
        threshold: ``dst``: one per unit, learning from the loss; ``adaptcl``: one per layer, moved by the penalty
            alone; ``none``: nothing is left out.
        alpha: Strength of the penalty Σ exp(−t).
        young: How many times as strong it is for newborn units, where they have thresholds of their own.
        gate: ``kronecker``: a layer moves little in directions that old tasks read and used; ``hard``: owned entries
            do not move; ``block``: nor do free ones that old hidden units read; ``soft``: all move, less the more they
            mattered; ``none``.
        strength: Of the gate ``kronecker``.
        damping: How much a hidden unit counts under it that old tasks did not use, as a share of the mean: moved freely
            it would wake on what they read.
        loud: Behind a norm that rescales each group of units (GroupNorm) newborn ones are heard on old inputs, and what
            reads them counts under it: this share of the mean.
        samples: Examples of each task that it looks at.
        every: The gate works on what so many steps changed together, which costs a fraction of its time.
        silent: Under that gate, newborn units are turned away from what old tasks fed their layer.
        norms: Running statistics of BatchNorm in later tasks: ``update`` or ``freeze``.
        memory: How many examples of earlier tasks are kept and learned along; the paper's abstracts name none.
        relief: With a memory, where classes come one after the other, the gate is this much as strong and leaves the
            output layer alone: old classes must give way to new ones, and the memory says how far. 1: no relief.
        own: There, examples at hand are told apart among the classes of their task only (ER-ACE, arXiv 2104.05025).
        lr: Learning rate of the thresholds.
        seed: Of newborn units.
    """

    grow: str = "always"
    late: float = 0.3
    short: float = 0.3
    width: float = 0.125
    multiple: int = 8
    cap: float = 1.5
    density: float = 0.5
    fit: bool = True
    threshold: str = "dst"
    alpha: float = 1e-4
    young: float = 10.0
    gate: str = "kronecker"
    strength: float = 15.0
    damping: float = 0.1
    loud: float = 0.1
    samples: int = 2000
    every: int = 4
    silent: bool = True
    norms: str = "update"
    memory: int = 0
    relief: float = 0.01
    own: bool = True
    lr: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is one of {', '.join(known)}; got {getattr(self, name)!r}")
        for name in ("late", "short", "width", "density", "relief"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share, from 0 to 1; got {getattr(self, name):g}")
        if self.cap < 1:
            raise ValueError(f"cap is a factor on the first parameters, at least 1; got {self.cap:g}")
        at_least = {"multiple": 1, "samples": 1, "every": 1, "memory": 0, "strength": 0, "damping": 0, "loud": 0}
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is at least {least}; got {getattr(self, name):g}")


_CHOICES = {
    "grow": ("short", "always", "never"),
    "threshold": ("dst", "adaptcl", "none"),
    "gate": ("kronecker", "hard", "block", "soft", "none"),
    "norms": ("update", "freeze"),
}
