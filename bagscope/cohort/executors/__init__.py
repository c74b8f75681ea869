"""Where the work on a slide happens: local processes, or a Dask cluster."""
