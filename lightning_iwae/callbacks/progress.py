"""A progress bar that costs a short step nothing."""

import time
from typing import Any

from lightning.pytorch.callbacks import TQDMProgressBar


class Progress(TQDMProgressBar):
    """Lightning's, drawn twice a second at most: ten times would cost every small step a per cent."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._drawn_at = 0.0

    def _should_update(self, current: int, total: Any) -> bool:
        now = time.monotonic()
        if not super()._should_update(current, total) or (current < total and now < self._drawn_at + 0.5):
            return False
        self._drawn_at = now
        return True
