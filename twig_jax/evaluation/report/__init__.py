"""Reports of measurements: tables, plots, and pages that stand alone."""
