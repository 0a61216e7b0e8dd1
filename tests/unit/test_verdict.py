from __future__ import annotations

import pytest

from ftcore.data.pack import WINDOW
from ftcore.data.verdict import Segment, _gathered


@pytest.mark.parametrize("sizes", [[5], [WINDOW, 5], [WINDOW, WINDOW, 5], [WINDOW // 2] * 5, [3 * WINDOW, 1, 1]])
def test_windows_hold_every_segment_once_in_order_and_none_is_small_beside_others(sizes: list[int]) -> None:
    segments = {Segment(part, 0): size for part, size in enumerate(sizes)}
    windows = list(_gathered(segments))
    assert [segment for window in windows for segment in window] == list(segments)
    assert len(windows) == 1 or all(sum(segments[s] for s in window) >= WINDOW for window in windows)
