"""What any tracker has to beat: points that never move, and pyramidal Lucas-Kanade (Bouguet 2001) from OpenCV."""

from itertools import pairwise

import cv2
import numpy as np


def still(video: np.ndarray, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every point stays where its query is and is always visible. Arguments and result as of `lucas_kanade`."""
    tracks = np.repeat(np.float32(queries[None, :, 1:]), len(video), axis=0)
    return tracks, np.ones(tracks.shape[:2], bool)


def lucas_kanade(video: np.ndarray, queries: np.ndarray, window: int = 21, levels: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Follow each point from frame to frame, both ways from its query, until the way back misses by over a pixel.

    video: (T, H, W, 3) uint8 RGB. queries: (N, 3) as (t, x, y), pixels. Returns tracks (T, N, 2) float32 and visible (T, N) bool;
    a lost point stays where it was lost, invisible.
    """
    height, width = video.shape[1:3]
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in video]
    tracks, visible = still(video, queries)
    born = np.rint(queries[:, 0])
    for order in (range(len(video)), range(len(video) - 1, -1, -1)):
        for here, there in pairwise(order):
            live = born <= here if here < there else born >= here
            tracks[there, live], visible[there, live] = tracks[here, live], visible[here, live]
            ids = np.flatnonzero(live & visible[here])
            if not len(ids):
                continue
            start = tracks[here, ids, None] - 0.5  # OpenCV puts pixel centres at whole numbers
            options = {"winSize": (window, window), "maxLevel": levels - 1}
            end, found, _ = cv2.calcOpticalFlowPyrLK(grey[here], grey[there], start, None, **options)
            back, found_back, _ = cv2.calcOpticalFlowPyrLK(grey[there], grey[here], end, None, **options)
            end, x, y = end[:, 0] + 0.5, end[:, 0, 0] + 0.5, end[:, 0, 1] + 0.5
            kept = (found & found_back)[:, 0].astype(bool) & (np.abs(back - start).max(axis=(1, 2)) < 1)
            kept &= (x >= 0) & (x < width) & (y >= 0) & (y < height)
            tracks[there, ids[kept]] = end[kept]
            visible[there, ids[~kept]] = False
    return tracks, visible
