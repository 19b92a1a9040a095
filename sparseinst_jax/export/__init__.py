"""A trained network as one file that runs without this package, proved before it is handed over."""
