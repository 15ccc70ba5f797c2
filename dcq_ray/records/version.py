"""The version of the files that hold records."""

FORMAT_VERSION = 1
