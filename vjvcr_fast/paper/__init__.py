"""Makes the paper's tables and figures, with our numbers beside the paper's; runs sweeps.

table1          Table 1 and figure 5
table2          Table 2 and figure 3
actions         figures 2 and 4
reproduce_all   `reproduce all`
sweep           `vjvcr-fast sweep`
jobs            trains and evaluates the runs of a table, one after the other or several at once
pages           writes Markdown and JSON
figures         draws the figures

What is measured on one run, the probes above all, is in evaluation/.
"""


class SweepError(RuntimeError):
    """Some entries of a sweep failed; the message names them."""


class ReproduceError(RuntimeError):
    """Some runs of a table, or some parts of `reproduce all`, failed; the message names them."""
