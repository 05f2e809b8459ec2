"""Stage 2: train an architecture adjoined with its backbone and cut the compact network out of it."""

from nas.commands import retrain

if __name__ == "__main__":
    retrain()
