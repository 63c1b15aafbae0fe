"""SiT: Scalable Interpolant Transformers (arXiv 2401.08740) with a pluggable token-mixer slot."""
