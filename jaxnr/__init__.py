"""jaxnr: what a person wants to read about, from everything they do, as news search queries and news recall.

Names carry shapes. The key, used throughout:

    B prompts (users)       G completions a prompt     S prompt tokens         T completion tokens
    D model width           F feed-forward width       N query heads           K key/value heads
    H head size             V vocabulary               L layers                Q queries a list
    E embedding size        I articles                 J facets of a user      C rubric criteria

``hidden_BGTD`` is an array of shape [prompts, completions, completion tokens, width].
"""

__version__ = "0.1.0"
