"""How good heads are: metrics, confidence intervals, calibration, ensembles, transferability."""
