"""What every section of a configuration has in common; engine/config.py says what a configuration is."""

from pydantic import BaseModel, ConfigDict


class Unreadable(Exception):
    """A check asked for a field whose value was refused; what it would say about the field follows from that mistake."""


class Section(BaseModel):
    """Base of every section: immutable, no unknown keys."""

    # coerce: YAML reads the weights of data.train, and folder names such as 2024, as numbers.
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True,
                              coerce_numbers_to_str=True, allow_inf_nan=False)

    def __getattr__(self, name: str):
        if name in type(self).model_fields:      # only `config._readable_part` makes sections that lack a field
            raise Unreadable(name)
        return super().__getattr__(name)
