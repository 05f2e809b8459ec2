from pathlib import Path


def write_page(sweep: Path) -> Path:
    return sweep
