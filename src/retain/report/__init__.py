"""Run folders in; tables, figures and HTML out."""
