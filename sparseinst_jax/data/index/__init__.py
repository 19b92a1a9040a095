"""The columns of a whole json: made once, kept in files, seen as records."""
