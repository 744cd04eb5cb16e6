//! Building blocks of the objects that Weft makes. Pure.

pub mod overlay;
pub mod owner;
pub mod pod;
