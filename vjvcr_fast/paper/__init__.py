"""The paper's tables and figures, ours beside theirs, and sweeps of settings.

table1          Table 1 and figure 5
table2          Table 2 and figure 3
actions         figures 2 and 4
latent_probes   the probes of z* for Table 2 and figure 2 (those of Table 1: evaluation/probes.py)
everything      `reproduce all`
sweep           `vjvcr-fast sweep`
side_by_side    trains and evaluates the runs of a table, one after the other or several at once
pages           writes Markdown and JSON
figures         draws the figures
"""


class SweepError(RuntimeError):
    """Some entries of a sweep failed; the message names them."""


class ReproduceError(RuntimeError):
    """Some runs of a table, or some parts of `reproduce all`, failed; the message names them."""
