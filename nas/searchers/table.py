"""The searchers, by their names on the command line."""

from nas.searchers.evolution import Evolution
from nas.searchers.importance import Importance
from nas.searchers.minimax_search import MinimaxSearch
from nas.searchers.random import Random
from nas.searchers.searcher import Searcher
from nas.searchers.trained import Trained
from nas.searchers.uniform import Uniform

SEARCHERS: dict[str, Searcher] = {
    searcher.name: searcher for searcher in (Trained(), Importance(), Evolution(), Random(), Uniform(), MinimaxSearch())
}
