"""Models leave the run: predictions in bulk, export in standard forms, model cards."""
