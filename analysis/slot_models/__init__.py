"""Requests slot by slot or batch by batch: the models that the papers reason about."""
