"""`python -m tpcomm.bench`: checks and times every path of a group on this host's GPUs."""
