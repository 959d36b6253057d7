"""Policies that prune: the scorer, the distribution over keep masks, training, and saved policies
applied at any ratio.
"""

if __name__ == "policies":
    raise ImportError(
        "import prunenet.policies; the top-level folder policies/ is its source, not a package of"
        " its own"
    )
