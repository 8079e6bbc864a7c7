"""Writes a profiler trace of chosen training steps (view it with XProf or Perfetto)."""

import dataclasses

import jax
from etils import epath


@dataclasses.dataclass
class Tracer:
    """Traces `num_steps` steps, the first being the one that follows update `start_step`.

    Every process traces its own devices into `directory`. With `num_steps` 0 nothing is traced.
    """

    directory: epath.PathLike = ""
    start_step: int = 0
    num_steps: int = 0
    _is_tracing: bool = False

    def before(self, step: int, state) -> None:
        """Starts or stops the trace; `step` updates are in `state`, the next comes after this."""
        wanted = self.start_step <= step < self.start_step + self.num_steps
        if wanted and not self._is_tracing:
            jax.block_until_ready(state)  # keeps the step before out of the trace
            jax.profiler.start_trace(str(self.directory))
            self._is_tracing = True
        elif self._is_tracing and not wanted:
            jax.block_until_ready(state)  # steps run on after their launch
            self.close()

    def close(self) -> None:
        """Writes the trace, if one is being taken."""
        if self._is_tracing:
            self._is_tracing = False
            jax.profiler.stop_trace()
