"""Numbers with their uncertainty, quantiles of the usual laws, and how both are written."""
