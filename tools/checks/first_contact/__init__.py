"""The first run on a GPU: everything that is to be known of it, in at most nine minutes."""
