"""Models of the server and inferences from data. No clock, no randomness of its own, no network.

Rooms, in the order in which data goes through them; none imports from a later one: ``numbers``,
``schedulers``, ``slot_models``, ``theory``, ``calibration``, ``inference``, ``verdicts``, ``operation``,
``reports``.
"""
