"""What the tests of all papers' metrics rung need."""

from shared.experiments import benchmarks


def forget_scores():
    """A run measures a set once; a test changes what lies there."""
    benchmarks.scores_of.cache_clear()
    benchmarks.released_of.cache_clear()
