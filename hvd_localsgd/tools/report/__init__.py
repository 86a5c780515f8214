"""``hvd-localsgd report``: where the time of runs went, from the files that ``timings=`` writes."""
