"""The progress bar, previews and messages on the running node."""

import time

import comfy.utils
import torch
from comfy_execution.utils import get_executing_context
from PIL import Image
from torch import Tensor

from .groups import running_server

PREVIEW_SECONDS = 1.0
PREVIEW_FRAMES = 8
PREVIEW_SIZE = 512
"""Length of a preview's longer side in pixels."""


class Progress:
    """Progress bar of the running node, with a finished frame as preview about once a second.

    Ranks write to a buffer that may contain an earlier video, perhaps another user's. Previews are therefore limited to
    a few frames, which are filled with NaN before the ranks begin: each finite pixel was written in this decode.
    """

    def __init__(self) -> None:
        context = get_executing_context()
        self.node_id = context.node_id if context else None
        self.bar = comfy.utils.ProgressBar(100, node_id=self.node_id)
        self.candidates: Tensor | None = None
        """Frames for previews, [count, height, width, 3]: a view of the buffer."""
        self.shown = time.monotonic()

    def watch(self, frames: Tensor) -> None:
        """Use frames of this buffer, [B, T, H, W, 3], for previews. Must be called before ranks write to it."""
        frames = frames.flatten(0, 1)
        every = -(-len(frames) // PREVIEW_FRAMES)
        step = max(1, max(frames.shape[1:3]) // PREVIEW_SIZE)
        self.candidates = frames[every - 1 :: every, ::step, ::step].fill_(torch.nan)

    def tell(self, message: str) -> None:
        """Show a message on the node until the next prompt."""
        server = running_server()
        if server and self.node_id:
            server.send_progress_text(message, self.node_id)
            server.send_sync("hv15.notice", {"node": self.node_id})

    def update(self, done: int, total: int) -> None:
        """Move the progress bar to `done` of `total`, with a preview if one is due."""
        if not total:
            return
        preview = None
        if done > 0 and time.monotonic() - self.shown > PREVIEW_SECONDS and (picture := self.picture()):
            self.shown = time.monotonic()
            preview = ("JPEG", picture, PREVIEW_SIZE)
        self.bar.update_absolute(100 * done // total, 100, preview)

    def picture(self) -> Image.Image | None:
        """Return the latest of the most complete frames, black where it is not written yet; None if all are empty."""
        if self.candidates is None:
            return None
        pixels = self.candidates.clone()  # ranks may write at the same time
        written = pixels.isfinite().flatten(1).float().mean(1)
        if not written.any():
            return None
        newest = max(range(len(written)), key=lambda frame: (float(written[frame]), frame))
        return Image.fromarray((pixels[newest].nan_to_num(0).clamp(0, 1) * 255).to(torch.uint8).numpy())
