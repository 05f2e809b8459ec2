"""Stage 1: search a vision transformer for a smaller one that shares its weights. Writes arch.json."""

from nas.commands import search

if __name__ == "__main__":
    search()
