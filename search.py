"""Stage 1: search a vision transformer for a smaller one that shares its weights. Writes arch.json."""

from nas.cli import main
from nas.config import SearchConfig


def run(config: SearchConfig) -> None:
    """Import torch only once the command line is known to be good."""
    if config.list_spaces:
        from nas.spaces import list_spaces

        list_spaces()
        return
    from nas.search import run_search

    run_search(config)


if __name__ == "__main__":
    main(SearchConfig, run, "search.py")
