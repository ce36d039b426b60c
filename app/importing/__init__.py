"""`mace feedback import`: preference data of any public format and size into a running server.

`sources` finds and opens what the user named, `text_files` and `dataset_rows` read it row by row, `delivery` sends
rows and waits out a server that is away, `progress_file` remembers what was committed, `tally` counts, and `importer`
joins them.
"""
