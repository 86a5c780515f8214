"""Step sizes of the papers, as Keras' learning-rate schedules."""

from __future__ import annotations

from typing import Any

import keras


@keras.saving.register_keras_serializable("hvd_localsgd")
class InverseTimeDecay(keras.optimizers.schedules.LearningRateSchedule):
    """Step sizes of Theorem 2.2 in Stich (2018): eta_t = 4 / (mu (a + t)).

    Args:
        mu: strong convexity of the objective (for a loss with L2 penalty lambda/2 |x|^2 at least lambda), > 0.
        a: shift, > max(16 L/mu, H) for the theorem to hold, > 0. In practice far smaller shifts often work.

    Raises:
        ValueError: mu or a is not positive.
    """

    def __init__(self, mu: float, a: float) -> None:
        super().__init__()
        if not mu > 0 or not a > 0:
            raise ValueError(f"mu and a must be > 0. Received: mu={mu!r}, a={a!r}")
        self.mu, self.a = float(mu), float(a)

    def __call__(self, step: Any) -> Any:
        """The step size of local step ``step`` (0, 1, ...), float32."""
        return 4.0 / (self.mu * (self.a + keras.ops.cast(step, "float32")))

    def get_config(self) -> dict[str, Any]:
        """``{"mu": mu, "a": a}``."""
        return {"mu": self.mu, "a": self.a}
