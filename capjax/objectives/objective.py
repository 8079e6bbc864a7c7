"""What a training step minimises: a mean over rows, and what needs the whole batch at once."""

from collections.abc import Callable
from typing import Any, NamedTuple

from capjax.dims import Array, Batch, Float, Metrics, Params, PRNGKeyArray


class Loss(NamedTuple):
    """A loss in parts, so that a batch can be cut into microbatches without changing it.

    Attributes:
      rows: (params, batch, key) -> (loss, metrics, embeddings). The loss is a mean over the rows of
        the batch, and each row's part depends on that row alone. The embeddings are a tree of
        arrays [B, ...], made for `across`; () where nothing is.
      across: (params, embeddings of the whole batch) -> (loss, metrics), added to that of `rows`;
        None where rows do not meet. Of the parameters it reads few, such as a logit scale.
      prepare: (batch, key) -> batch with more arrays [B, ...], made before the batch is cut.
      rows_together: this many consecutive rows must not be parted by a cut.
    """

    rows: Callable[[Params, Batch, PRNGKeyArray], tuple[Float[Array, ""], Metrics, Any]]
    across: Callable[[Params, Any], tuple[Float[Array, ""], Metrics]] | None = None
    prepare: Callable[[Batch, PRNGKeyArray], Batch] | None = None
    rows_together: int = 1

    def on(self, change: Callable[[Params], Params]) -> "Loss":
        """This loss as a function of parameters that `change` turns into those it is made of."""

        def changed(function):
            return lambda params, *rest: function(change(params), *rest)

        across = None if self.across is None else changed(self.across)
        return self._replace(rows=changed(self.rows), across=across)

    def prepared(self, batch: Batch, key: PRNGKeyArray) -> Batch:
        """The batch as `rows` reads it."""
        return batch if self.prepare is None else self.prepare(batch, key)

    def whole(
        self, params: Params, batch: Batch, key: PRNGKeyArray
    ) -> tuple[Float[Array, ""], Metrics]:
        """(loss, metrics) of a prepared batch, uncut."""
        loss, metrics, embeddings = self.rows(params, batch, key)
        if self.across is None:
            return loss, metrics
        across, across_metrics = self.across(params, embeddings)
        return loss + across, metrics | across_metrics


def mean_over_rows(
    function: Callable[[Params, Batch, PRNGKeyArray], tuple[Float[Array, ""], Metrics]],
) -> Loss:
    """The `Loss` of a function (params, batch, key) -> (mean over rows, metrics)."""
    return Loss(lambda params, batch, key: (*function(params, batch, key), ()))
