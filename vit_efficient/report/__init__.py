"""Tables, figures and statistics of runs and models."""
