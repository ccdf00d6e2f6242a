"""Batches on the training device; on a GPU the next one is made ready while the current one trains.

Shapes: B batch, S image side in pixels, T tokens, h = w = S / patch.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.pipeline import LoadedBatch
from ..data.pseudo_labels import PatchLabels
from ..data.transforms import pixel_statistics, standardise


@dataclass(frozen=True)
class Batch:
    """B pairs as the model takes them.

    Attributes:
        images: (B, 3, S, S) float32 on the device, normalised.
        tokens: (B, T) int64 on the host, where the model packs them.
        superpixels: (B, h, w) int64 patch labels on the device.
        loaded: the same batch as it came, with what is known of it.
    """

    images: Tensor
    tokens: Tensor
    superpixels: Tensor
    loaded: LoadedBatch


class Prefetcher:
    """Iterates over batches on `device`, where pixels are normalised and missing patch labels made.

    On a GPU that work runs in a stream of its own, one batch ahead, and the host never waits for it; give the
    loader pinned memory. Elsewhere a batch is made when it is asked for.

    Args:
        loader: batches in host memory.
        device: where the model trains.
        labels: makes the patch labels of batches that come without.

    Attributes:
        seconds: time that this has held training up so far, mostly waiting for the loader; what a busy GPU
            hides does not count.
    """

    def __init__(self, loader: Iterator[LoadedBatch], device: torch.device, labels: PatchLabels) -> None:
        self.loader, self.device, self.labels = loader, device, labels
        self.statistics = pixel_statistics(device)
        self.seconds = 0.0
        self.ahead: Batch | None = None
        self.side = None
        if device.type == "cuda":
            self.side = torch.cuda.Stream(device)
            self.side.wait_stream(torch.cuda.current_stream(device))  # for the statistics

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next batch, ready for work queued on the current stream; StopIteration after the last."""
        start = time.perf_counter()
        batch = self.ahead or self._start()
        self.ahead = None
        if self.side is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self.side)
            for tensor in (batch.images, batch.superpixels):
                tensor.record_stream(current)  # memory of the side stream, kept until this use is over
        self.seconds += time.perf_counter() - start
        return batch

    def prefetch(self) -> None:
        """Start on the batch after the current one; call it when the GPU has been given work to hide it."""
        if self.side is None or self.ahead is not None:
            return
        start = time.perf_counter()
        busy = torch.cuda.Event()
        busy.record(torch.cuda.current_stream(self.device))
        with contextlib.suppress(StopIteration):  # the current batch is the last
            self.ahead = self._start()
        if busy.query():  # all of its work is done: it waits
            self.seconds += time.perf_counter() - start

    def _start(self) -> Batch:
        loaded = next(self.loader)
        if self.side is None:
            return self._on_device(loaded)
        with torch.cuda.stream(self.side):
            return self._on_device(loaded)

    @torch.no_grad()
    def _on_device(self, loaded: LoadedBatch) -> Batch:
        pixels = loaded.pixels.to(self.device, non_blocking=True)  # (B, 3, S, S) uint8
        if loaded.superpixels is None:
            superpixels = self.labels.of_batch(pixels)
        else:
            superpixels = loaded.superpixels.to(self.device, non_blocking=True)
        return Batch(standardise(pixels, *self.statistics), loaded.tokens, superpixels, loaded)
