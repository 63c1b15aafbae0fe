"""The version of this package; everything else asks here."""

__version__ = "0.2.0"
