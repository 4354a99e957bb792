"""Pictures of where layer memory looks while it trains (`--router-image-interval`, paper Figure 6)."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from megatron_fsvideo.config import DiTJob, require
from megatron_fsvideo.evaluation.router_figure import router_pixels
from megatron_fsvideo.models.dit.router_weights import RouterWeights
from megatron_fsvideo.parallel.groups import ProcessGroups

IMAGE_NAMES = {"maximum": "router_weights_maximum", "mean": "router_weights_mean"}


class RouterImages:
    """Watches the routers in the iterations that are due. Every rank calls each method.

    Raises:
        ImportError: matplotlib, which draws them, is missing.
    """

    def __init__(self, job: DiTJob, pgs: ProcessGroups) -> None:
        self._job, self._pgs = job, pgs
        self._interval = job.logging.router_image_interval
        self._weights: RouterWeights | None = None
        if self._interval:
            require("matplotlib", "eval")

    @contextmanager
    def watching(self, iteration: int, chunks: nn.Module, latent_shape: tuple[int, int, int]) -> Iterator[None]:
        """Context around the forward and backward passes of an iteration, whose samples are all of one shape.

        Args:
            latent_shape: their latent frames, rows and columns.
        """
        self._weights = None
        if not self._interval or iteration % self._interval:
            yield
            return
        self._weights = RouterWeights(self._job.model, self._job.parallel, self._pgs)
        with self._weights.recording(chunks, latent_shape):
            yield

    def images(self) -> dict[str, Tensor]:
        """Name -> picture uint8 [height, width, 3] of the iteration watched, on rank zero; nothing if it is not due.

        The paper's Figure 6 shows the maximum over tokens; the mean says what a state is worth on the whole.
        """
        if self._weights is None:
            return {}
        weights = {"maximum": self._weights.maximum(), "mean": self._weights.mean()}
        if not self._pgs.is_rank_zero:
            return {}
        return {IMAGE_NAMES[name]: router_pixels(values, name) for name, values in weights.items()}
