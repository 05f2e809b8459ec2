"""A data folder that is gone for a while: a network file system that is being mounted again."""

import logging
import time
from pathlib import Path

from PIL import Image

from nas.data.images import Images

logger = logging.getLogger(__name__)


class Patience:
    """Reads images, and waits for their folder where that is gone: so many seconds in a row, of all images together.

    exif: turn images as their EXIF data says.
    """

    def __init__(self, exif: bool = True, seconds: float = 600.0, poll: float = 1.0) -> None:
        self.exif, self.seconds, self.poll, self.left = exif, seconds, poll, seconds

    def read(self, images: Images, position: int) -> Image.Image:
        """Raises what reading raises: at once where the folder is there, or has stayed away for too long."""
        while True:
            try:
                image = images.read(position, self.exif)
            except OSError:
                path = Path(images.name(position))
                if self.left <= 0 or not path.is_absolute() or there(path.parent):
                    raise
                if self.left == self.seconds:
                    logger.warning("%s is gone; waiting up to %.0f s for it", path.parent, self.seconds)
                time.sleep(self.poll)
                self.left -= self.poll
            else:
                self.left = self.seconds
                return image


def there(folder: Path) -> bool:
    """Whether it is a folder, or lies in a file: a tar."""
    try:
        return folder.is_dir() or any(place.is_file() for place in (folder, *folder.parents))
    except OSError:  # of a file system that has lost its server
        return False
