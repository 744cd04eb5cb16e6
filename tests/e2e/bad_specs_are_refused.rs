//! Every manifest of `bad_specs/` is refused with the sentence that stands in it.
