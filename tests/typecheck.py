"""The run-time type checker of annotations in tests. An int is accepted where a float is declared (PEP 484)."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
