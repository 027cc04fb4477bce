"""Data sets: MovingMNIST, rendered while training; CLEVRER, CATER and any folder of videos, read from files.

video/ reads video files. simulated/ makes videos in the formats of CLEVRER and CATER.
"""

from vjvcr_fast.data.digits import Digits, DigitsError, load_digits, split_digits
from vjvcr_fast.data.folder import ClipFolder, FolderError
from vjvcr_fast.data.moving_mnist import MovingMNIST, Videos
from vjvcr_fast.data.video.clips import ClipLoader, Clips, Source, VideoClips, WindowSampler
from vjvcr_fast.data.video.decode import VideoError, open_video

__all__ = [
    "ClipFolder",
    "ClipLoader",
    "Clips",
    "Digits",
    "DigitsError",
    "FolderError",
    "MovingMNIST",
    "Source",
    "VideoClips",
    "VideoError",
    "Videos",
    "WindowSampler",
    "load_digits",
    "open_video",
    "split_digits",
]
