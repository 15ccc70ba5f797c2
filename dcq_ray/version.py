"""The version of dcq-ray: written into every report and compared between a driver and its workers."""

__version__ = "0.2.0"
