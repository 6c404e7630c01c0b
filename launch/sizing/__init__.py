"""Memory and step time of a model on a cluster, before it is rented: `python -m launch plan`."""
